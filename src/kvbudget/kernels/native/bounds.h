// Least and most of groups of channels or of entries.
#pragma once

#include "codec.h"

namespace kvbudget {
namespace {

// W elements of a row from channel d on.
template <Type T>
KV_INLINE vf load_as(const uint8_t* row, int d) {
  if constexpr (T == Type::f32) return load_bytes(row + 4 * d);
  return T == Type::bf16 ? load_bf16(row + 2 * d) : load_half(row + 2 * d);
}

KV_INLINE vf least_of(vf a, vf b) { return vmin(a, b); }
KV_INLINE vf most_of(vf a, vf b) { return vmax(a, b); }

// Lane k of the result is the smallest (largest) lane of the k-th vector in x.
template <class Pick>
KV_INLINE vf across(const float* x, Pick pick) {
  const auto halves = [&](int i) {
    const vf a = load(x + i * W), b = load(x + (i + 4) * W);
    return pick(KV_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), KV_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
  };
  const auto quarters = [&](vf a, vf b) {
    return pick(KV_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13), KV_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
  };
  const vf a = quarters(halves(0), halves(1)), b = quarters(halves(2), halves(3));
  return pick(KV_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14), KV_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15));
}

// Least and most of the channels [first, last) of a row; what one lane has seen is in that lane.
template <Type T>
KV_INLINE void bounds_of(const uint8_t* row, int first, int last, vf& least, vf& most) {
  int d = first;
  if (last - first < W) {
    least = most = splat(element(row, T, d++));
  } else {
    least = most = load_as<T>(row, d);
    d += W;
  }
  for (; d + W <= last; d += W) {
    const vf v = load_as<T>(row, d);
    least = vmin(least, v);
    most = vmax(most, v);
  }
  for (; d < last; ++d) {
    least = vmin(least, splat(element(row, T, d)));
    most = vmax(most, splat(element(row, T, d)));
  }
}

#if defined(__AVX2__)

// Sixteen channels as two vectors: bf16 comes apart in even and odd ones, what else in the first eight and the last.
template <Type T>
KV_INLINE void load_pair(const uint8_t* row, int d, vf* x) {
  if constexpr (T == Type::bf16) {
    const vu words = load_words(row + 2 * d);
    x[0] = (vf)(words << 16);
    x[1] = (vf)(words & 0xffff0000u);
  } else {
    x[0] = load_as<T>(row, d);
    x[1] = load_as<T>(row, d + W);
  }
}

// Numbers in the upper halves of lanes.
template <Type T>
KV_INLINE vf from_upper(vi x) {
  if constexpr (T == Type::bf16) return (vf)x;
  const __m256i lower = _mm256_srli_epi32((__m256i)x, 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
  return (vf)_mm256_cvtph_ps(halves);
}

// Brings halves that were stored as a pair into the order of their channels.
template <Type T>
KV_INLINE void order_pair(uint8_t* p) {
  if constexpr (T == Type::bf16) {
    __m128i* halves = reinterpret_cast<__m128i*>(p);
    const __m128i a = _mm_loadu_si128(halves), b = _mm_loadu_si128(halves + 1);
    _mm_storeu_si128(halves, _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128(halves + 1, _mm_unpackhi_epi16(a, b));
  }
}

// The most of signed, the most of unsigned and the least of signed integers.
template <int Part>
KV_INLINE __m256i extreme(__m256i a, __m256i b) {
  if constexpr (Part == 0) return _mm256_max_epi16(a, b);
  return Part == 1 ? _mm256_max_epu16(a, b) : _mm256_min_epi16(a, b);
}

// Least and most of sixteen channels over many rows. Two bytes are compared as integers, whose order is that of numbers of one sign,
// turned where it is negative: the most of unsigned integers is the least number if any is negative.
template <Type T>
struct Bounds {
  __m256i part[3];

  static KV_MEMBER __m256i at(const uint8_t* row, int d) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * d));
  }
  static KV_MEMBER Bounds of(const uint8_t* row, int d) {
    const __m256i x = at(row, d);
    return {{x, x, x}};
  }
  KV_MEMBER void take(const uint8_t* row, int d) {
    const __m256i x = at(row, d);
    part[0] = extreme<0>(part[0], x);
    part[1] = extreme<1>(part[1], x);
    part[2] = extreme<2>(part[2], x);
  }
  KV_MEMBER void pair(vf* least, vf* most) const {
    uint8_t x[32], y[32];
    const __m256i low = _mm256_blendv_epi8(part[2], part[1], _mm256_srai_epi16(part[1], 15));
    const __m256i high = _mm256_blendv_epi8(part[0], part[2], _mm256_srai_epi16(part[0], 15));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), high);
    load_pair<T>(x, 0, least);
    load_pair<T>(y, 0, most);
  }
};

template <>
struct Bounds<Type::f32> {
  vf low[2], high[2];

  static KV_MEMBER Bounds of(const uint8_t* row, int d) {
    const vf x = load_as<Type::f32>(row, d), y = load_as<Type::f32>(row, d + W);
    return {{x, y}, {x, y}};
  }
  KV_MEMBER void take(const uint8_t* row, int d) {
    for (int h = 0; h < 2; ++h) {
      const vf x = load_as<Type::f32>(row, d + h * W);
      low[h] = vmin(low[h], x);
      high[h] = vmax(high[h], x);
    }
  }
  KV_MEMBER void pair(vf* least, vf* most) const {
    for (int h = 0; h < 2; ++h) {
      least[h] = low[h];
      most[h] = high[h];
    }
  }
};

// Of a group of whole blocks.
template <Type T>
KV_INLINE Bounds<T> bounds_of_blocks(const uint8_t* first, int channels) {
  Bounds<T> bounds = Bounds<T>::of(first, 0);
  bounds.take(first, 2 * W);
  for (int d = 4 * W; d < channels; d += 2 * W) bounds.take(first, d);
  return bounds;
}

// Of a block of many rows, as pairs.
template <Type T>
KV_INLINE void bounds_of_rows(const uint8_t* rows, int64_t stride, int count, int d, float* least, float* most) {
  Bounds<T> bounds[] = {Bounds<T>::of(rows, d), Bounds<T>::of(rows, d + 2 * W)};
#pragma GCC unroll 4
  for (int t = 1; t < count; ++t)
    for (int h = 0; h < 2; ++h) bounds[h].take(rows + t * stride, d + 2 * h * W);
  for (int h = 0; h < 2; ++h) {
    vf low[2], high[2];
    bounds[h].pair(low, high);
    for (int v = 0; v < 2; ++v) {
      store(least + (2 * h + v) * W, low[v]);
      store(most + (2 * h + v) * W, high[v]);
    }
  }
}

// Lane k of the result has the extreme of the k-th group in its lower half.
template <int Part, class B>
KV_INLINE __m256i extremes(const B* groups) {
  __m256i x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i a = groups[i].part[Part], b = groups[i + 4].part[Part];
    x[i] = extreme<Part>(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  }
  __m256 y[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i a = x[2 * i], b = x[2 * i + 1];
    y[i] = (__m256)extreme<Part>(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  }
  const __m256i z = extreme<Part>((__m256i)_mm256_shuffle_ps(y[0], y[1], 0x88), (__m256i)_mm256_shuffle_ps(y[0], y[1], 0xdd));
  return extreme<Part>(z, _mm256_srli_epi32(z, 16));
}

// Least and most of each of eight groups.
template <Type T>
KV_INLINE void across(const Bounds<T>* groups, vf& least, vf& most) {
  if constexpr (T == Type::f32) {
    alignas(32) float low[W * W], high[W * W];
    for (int k = 0; k < W; ++k) {
      store(low + k * W, vmin(groups[k].low[0], groups[k].low[1]));
      store(high + k * W, vmax(groups[k].high[0], groups[k].high[1]));
    }
    least = across(low, least_of);
    most = across(high, most_of);
  } else {
    const vi p = (vi)extremes<0>(groups) << 16, n = (vi)extremes<1>(groups) << 16, r = (vi)extremes<2>(groups) << 16;
    const vi low = n < 0 ? n : r, high = p < 0 ? r : p;
    least = from_upper<T>(low);
    most = from_upper<T>(high);
  }
}

#endif

}  // namespace
}  // namespace kvbudget
