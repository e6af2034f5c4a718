// Integer codes from dense entries: minimum and maximum of each group, rounding and packing, without a division per element.
//
// Bit for bit what kernels/encode.py computes in torch: scale and zero are rounded to half precision first, then
// code = round((x - zero) / scale), half to even.
#pragma once

#include "codec.h"

namespace kvbudget {
namespace {

constexpr float kHalfMax = 65504.0f;

// Rounds to half precision, nearest even; |f| <= kHalfMax.
KV_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits < 0x38800000u) {  // below the smallest normal half: adding 0.5 leaves its 2^-24ths in the last bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | (bits - 0x38000000u) >> 13);
}

KV_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX__) && !defined(__clang__)
  return __builtin_ia32_minps256(a, b);
#else
  return a < b ? a : b;
#endif
}

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

KV_INLINE vf clamp(vf x, float low, float high) { return vmin(vmax(x, splat(low)), splat(high)); }

typedef int16_t v8i16 __attribute__((vector_size(16)));
typedef int16_t v8i16_memory __attribute__((vector_size(16), aligned(1), may_alias));

KV_INLINE v8i16 to_half(vf x) {
#if defined(__F16C__) && !defined(__clang__)
  typedef short v8short __attribute__((vector_size(16)));
  return (v8i16)(v8short)__builtin_ia32_vcvtps2ph256(x, 0);
#else
  v8i16 halves;
  for (int i = 0; i < W; ++i) halves[i] = static_cast<int16_t>(float_to_half(x[i]));
  return halves;
#endif
}

// Scales and zeros of eight groups, and what the codes are computed with.
struct Steps {
  v8i16 scale, zero;
  vf s, z, inverse;
};

KV_INLINE Steps steps_of(vf least, vf most, vf levels) {
  Steps to;
  to.zero = to_half(clamp(least, -kHalfMax, kHalfMax));
  to.z = load_half(&to.zero);
  v8i16 scale = to_half(clamp((most - to.z) / levels, 0.0f, kHalfMax));
  to.scale = scale | ((scale == 0) & 0x3c00);  // 1.0: a constant group
  to.s = load_half(&to.scale);
  to.inverse = splat(1.0f) / to.s;
  return to;
}

// y / s rounded as a division rounds it, for the s of a half. A product with the rounded inverse is off by 2^-23 at most, and
// what it leaves of y is exact, so that one correction comes within 2^-46 of the quotient. A quotient of 24 by 11 bits keeps
// 2^-36 away from where rounding turns.
KV_INLINE vf quotient(vf y, vf s, vf inverse) {
#if defined(__FMA__)
  const vf near = y * inverse;
  return (vf)_mm256_fmadd_ps((__m256)_mm256_fnmadd_ps((__m256)near, (__m256)s, (__m256)y), (__m256)inverse, (__m256)near);
#else
  (void)inverse;
  return y / s;
#endif
}

// Rounded codes, half to even; as bytes they are cut to their levels. Only where half precision cut the scale off is a
// quotient too large for an integer, which the bound of x - z prevents; one that is too small becomes the least integer.
KV_INLINE vi codes_of(vf x, vf s, vf z, vf inverse) {
  const vf q = quotient(vmin(x - z, splat(33554432.0f)), s, inverse);
#if defined(__AVX__)
  return (vi)_mm256_cvtps_epi32((__m256)q);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the last bits
  return (vi)(vmax(q, splat(0.0f)) + magic) - (vi)magic;
#endif
}

KV_INLINE void store_words(uint8_t* p, vu x) { *reinterpret_cast<vu_memory*>(p) = x; }

KV_INLINE uint8_t cut(int code, int levels) { return static_cast<uint8_t>(code < 0 ? 0 : code < levels ? code : levels); }

// `Vectors` times eight codes as bytes, cut to their levels.
template <int Vectors>
KV_INLINE void store_codes(uint8_t* p, const vi* codes, int levels) {
#if defined(__AVX2__)
  if constexpr (Vectors == 4) {
    const __m256i* x = reinterpret_cast<const __m256i*>(codes);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(x[0], x[1]), _mm256_packus_epi32(x[2], x[3]));
    const __m256i cut = _mm256_min_epu8(bytes, _mm256_set1_epi8(static_cast<char>(levels)));
    const __m256i ordered = _mm256_permutevar8x32_epi32(cut, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ordered);
  }
#endif
  for (int v = 0; v < Vectors; ++v)
    for (int i = 0; i < W; ++i) p[v * W + i] = cut(codes[v][i], levels);
}

// Codes [width], a byte each, into slabs of `bits` bits each.
KV_INLINE void pack_plane(const uint8_t* codes, int width, int bits, uint8_t* out) {
  const int slab = packed_bytes(width, bits);
  int i = 0;
  for (; i + 32 <= slab; i += 32) {
    vu word = load_words(codes + i);
    for (int j = 1; j < 8 / bits; ++j) word |= load_words(codes + i + j * slab) << (j * bits);
    store_words(out + i, word);
  }
  for (; i + 8 <= slab; i += 8) {
    uint64_t word, next;
    std::memcpy(&word, codes + i, 8);
    for (int j = 1; j < 8 / bits; ++j) {
      std::memcpy(&next, codes + i + j * slab, 8);
      word |= next << (j * bits);
    }
    std::memcpy(out + i, &word, 8);
  }
  for (; i < slab; ++i) {
    int byte = 0;
    for (int j = 0; j < 8 / bits; ++j) byte |= codes[i + j * slab] << (j * bits);
    out[i] = static_cast<uint8_t>(byte);
  }
}

constexpr int kWidest = 1024;  // channels of a row, as the binding checks

// codes [width], padded to whole vectors, are overwritten where they have three bits.
KV_INLINE void pack_row(uint8_t* codes, int width, int bits, uint8_t* out) {
  switch (bits) {
    case 8: std::memcpy(out, codes, width); return;
    case 4: return pack_plane(codes, width, 4, out);
    case 2: return pack_plane(codes, width, 2, out);
    case 1: return pack_plane(codes, width, 1, out);
  }
  uint8_t high[kWidest + 32];
  for (int i = 0; i < width; i += 32) {
    const vu word = load_words(codes + i);
    store_words(high + i, word >> 2 & 0x01010101u);
    store_words(codes + i, word & 0x03030303u);
  }
  pack_plane(codes, width, 2, out);
  pack_plane(high, width, 1, out + width / 4);
}

// W elements of a row from channel d on.
template <Type T>
KV_INLINE vf load_as(const uint8_t* row, int d) {
  if constexpr (T == Type::f32) return load_bytes(row + 4 * d);
  return T == Type::bf16 ? load_bf16(row + 2 * d) : load_half(row + 2 * d);
}

KV_INLINE vf least_of(vf a, vf b) { return vmin(a, b); }
KV_INLINE vf most_of(vf a, vf b) { return vmax(a, b); }

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

// Codes of `Vectors` times eight channels of a row, as bytes.
template <Type T, int Vectors>
KV_INLINE void code_channels(const uint8_t* row, int d, const vf* s, const vf* z, const vf* inverse, int levels, uint8_t* codes) {
  vi found[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) found[v] = codes_of(load_as<T>(row, d + v * W), s[v], z[v], inverse[v]);
  store_codes<Vectors>(codes + d, found, levels);
}

// Entries [begin, end) with one scale and zero per `group` consecutive channels. Eight groups, of one row or several, find
// their steps together.
template <Type T>
void encode_tokens_of(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  alignas(32) float s[W * kWidest], z[W * kWidest], inverse[W * kWidest];
  alignas(32) float least[W * W] = {}, most[W * W] = {};  // of eight groups
  alignas(32) uint8_t codes[W][kWidest + 32];
  for (int64_t t = begin; t < end; t += W) {
    const int rows = static_cast<int>(end - t < W ? end - t : W), all = rows * groups;
    const uint8_t* row = x.data + t * x.stride;
    for (int n = 0, g = 0; n < all; n += W) {
      const int found = all - n < W ? all - n : W;
      for (int k = 0; k < found; ++k) {
        vf low, high;
        bounds_of<T>(row, g * group, (g + 1) * group, low, high);
        store(least + k * W, low);
        store(most + k * W, high);
        if (++g == groups) {
          g = 0;
          row += x.stride;
        }
      }
      const Steps steps = steps_of(across(least, least_of), across(most, most_of), splat(static_cast<float>(levels)));
      std::memcpy(to.scale + 2 * (t * groups + n), &steps.scale, 2 * found);
      std::memcpy(to.zero + 2 * (t * groups + n), &steps.zero, 2 * found);
      store(s + n, steps.s);
      store(z + n, steps.z);
      store(inverse + n, steps.inverse);
    }
    row = x.data + t * x.stride;
    for (int r = 0, n = 0; r < rows; ++r, row += x.stride) {
      for (int first = 0; first < D; first += group, ++n) {
        const vf scale[] = {splat(s[n]), splat(s[n]), splat(s[n]), splat(s[n])};
        const vf zero[] = {splat(z[n]), splat(z[n]), splat(z[n]), splat(z[n])};
        const vf over[] = {splat(inverse[n]), splat(inverse[n]), splat(inverse[n]), splat(inverse[n])};
        const int last = first + group;
        int d = first;
        for (; d + 4 * W <= last; d += 4 * W) code_channels<T, 4>(row, d, scale, zero, over, levels, codes[r]);
        for (; d + W <= last; d += W) code_channels<T, 1>(row, d, scale, zero, over, levels, codes[r]);
        for (; d < last; ++d) codes[r][d] = cut(codes_of(splat(element(row, T, d)), scale[0], zero[0], over[0])[0], levels);
      }
    }
    for (int r = 0; r < rows; ++r) pack_row(codes[r], D, bits, to.codes + (t + r) * bytes);
  }
}

constexpr int kStrip = 32;  // entries of a unit whose codes wait as bytes

// `Vectors` times eight channels of a strip of entries.
template <Type T, int Vectors>
KV_INLINE void code_strip(const uint8_t* rows, int64_t stride, int count, int d, const float* s, const float* z, const float* inverse,
                          int levels, uint8_t (*codes)[kWidest + 32]) {
  vf scale[Vectors], zero[Vectors], over[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    scale[v] = load(s + d + v * W);
    zero[v] = load(z + d + v * W);
    over[v] = load(inverse + d + v * W);
  }
  for (int t = 0; t < count; ++t) code_channels<T, Vectors>(rows + t * stride, d, scale, zero, over, levels, codes[t]);
}

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
template <Type T>
void encode_units_of(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  alignas(32) float s[kWidest], z[kWidest], inverse[kWidest];
  alignas(32) uint8_t codes[kStrip][kWidest + 32];
  for (int64_t u = begin; u < end; ++u) {
    const uint8_t* rows = x.data + u * unit * x.stride;
    for (int d = 0; d < D; d += W) {
      vf least = load_as<T>(rows, d), most = least;
      for (int t = 1; t < unit; ++t) {
        const vf v = load_as<T>(rows + t * x.stride, d);
        least = vmin(least, v);
        most = vmax(most, v);
      }
      const Steps steps = steps_of(least, most, splat(static_cast<float>(levels)));
      *reinterpret_cast<v8i16_memory*>(to.scale + 2 * (u * D + d)) = steps.scale;
      *reinterpret_cast<v8i16_memory*>(to.zero + 2 * (u * D + d)) = steps.zero;
      store(s + d, steps.s);
      store(z + d, steps.z);
      store(inverse + d, steps.inverse);
    }
    for (int first = 0; first < unit; first += kStrip, rows += kStrip * x.stride) {
      const int count = unit - first < kStrip ? unit - first : kStrip;
      int d = 0;
      for (; d + 4 * W <= D; d += 4 * W) code_strip<T, 4>(rows, x.stride, count, d, s, z, inverse, levels, codes);
      for (; d < D; d += W) code_strip<T, 1>(rows, x.stride, count, d, s, z, inverse, levels, codes);
      for (int t = 0; t < count; ++t) pack_row(codes[t], D, bits, to.codes + (u * unit + first + t) * bytes);
    }
  }
}

void encode_tokens(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  if (x.type == Type::f32) return encode_tokens_of<Type::f32>(x, bits, group, begin, end, to);
  if (x.type == Type::bf16) return encode_tokens_of<Type::bf16>(x, bits, group, begin, end, to);
  encode_tokens_of<Type::f16>(x, bits, group, begin, end, to);
}

void encode_units(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  if (x.type == Type::f32) return encode_units_of<Type::f32>(x, bits, unit, begin, end, to);
  if (x.type == Type::bf16) return encode_units_of<Type::bf16>(x, bits, unit, begin, end, to);
  encode_units_of<Type::f16>(x, bits, unit, begin, end, to);
}

}  // namespace
}  // namespace kvbudget
