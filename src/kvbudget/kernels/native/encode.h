// Integer codes from dense entries: minimum and maximum of each group, rounding and packing, at the speed of memory.
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

// The smallest (largest) lane, in all lanes.
template <class Pick>
KV_INLINE vf across(vf x, Pick pick) {
  x = pick(x, KV_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = pick(x, KV_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return pick(x, KV_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
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

// Scales and zeros of eight groups, and what the codes are computed against.
struct Steps {
  v8i16 scale, zero;
  vf s, z;
};

KV_INLINE Steps steps_of(vf least, vf most, vf levels) {
  Steps to;
  to.zero = to_half(clamp(least, -kHalfMax, kHalfMax));
  to.z = load_half(&to.zero);
  v8i16 scale = to_half(clamp((most - to.z) / levels, 0.0f, kHalfMax));
  to.scale = scale | ((scale == 0) & 0x3c00);  // 1.0: a constant group
  to.s = load_half(&to.scale);
  return to;
}

// Rounded codes; x may be far outside of the range of its group where half precision cut the zero off.
KV_INLINE vi codes_of(vf x, vf s, vf z, vf levels) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the last bits
  return (vi)(vmin(vmax((x - z) / s, splat(0.0f)), levels) + magic) & 0xff;
}

KV_INLINE vi load_codes(const int32_t* p) { return (vi)load(reinterpret_cast<const float*>(p)); }
KV_INLINE void store_codes(int32_t* p, vi x) { store(reinterpret_cast<float*>(p), (vf)x); }

// Codes of the slabs side by side in W bytes' worth of lanes.
KV_INLINE vi join_slabs(const int32_t* codes, int slab, int bits) {
  vi byte = load_codes(codes);
  for (int j = 1; j < 8 / bits; ++j) byte |= load_codes(codes + j * slab) << (j * bits);
  return byte;
}

// Eight lanes below 256 as bytes.
KV_INLINE void store_bytes(uint8_t* p, vi byte) {
  vu x = (vu)byte << vu{0, 8, 16, 24, 0, 8, 16, 24};
  x |= KV_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
  x |= KV_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  const uint32_t words[2] = {x[0], x[4]};
  std::memcpy(p, words, 8);
}

// Codes [width] into slabs of `bits` bits each.
KV_INLINE void pack_plane(const int32_t* codes, int width, int bits, uint8_t* out) {
  const int slab = packed_bytes(width, bits);
  int i = 0;
#if defined(__AVX2__)
  for (; i + 4 * W <= slab; i += 4 * W) {
    const auto bytes = [&](int k) { return (__m256i)join_slabs(codes + i + k * W, slab, bits); };
    const __m256i quarters = _mm256_packus_epi16(_mm256_packus_epi32(bytes(0), bytes(1)), _mm256_packus_epi32(bytes(2), bytes(3)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_permutevar8x32_epi32(quarters, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
#endif
  for (; i + W <= slab; i += W) store_bytes(out + i, join_slabs(codes + i, slab, bits));
  for (; i < slab; ++i) {
    int32_t byte = 0;
    for (int j = 0; j < 8 / bits; ++j) byte |= codes[i + j * slab] << (j * bits);
    out[i] = static_cast<uint8_t>(byte);
  }
}

// codes [width] are overwritten where they have three bits.
KV_INLINE void pack_row(int32_t* codes, int width, int bits, uint8_t* out) {
  if (bits != 3) return pack_plane(codes, width, bits, out);
  int32_t high[1024];
  for (int i = 0; i < width; i += W) {
    const vi code = load_codes(codes + i);
    store_codes(high + i, code >> 2);
    store_codes(codes + i, code & 3);
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

// Entries [begin, end) with one scale and zero per `group` consecutive channels.
template <Type T>
void encode_tokens_of(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits);
  const vf levels = splat(static_cast<float>((1 << bits) - 1));
  alignas(32) int32_t codes[1024 + W];
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* row = x.data + t * x.stride;
    for (int g = 0; g < groups; ++g) {
      const int first = g * group, rest = first + group / W * W, last = first + group;
      vf low = splat(element(row, T, first)), high = low;
      for (int d = first; d < rest; d += W) {
        const vf v = load_as<T>(row, d);
        low = vmin(low, v);
        high = vmax(high, v);
      }
      for (int d = rest; d < last; ++d) {
        low = vmin(low, splat(element(row, T, d)));
        high = vmax(high, splat(element(row, T, d)));
      }
      low = across(low, [](vf a, vf b) { return vmin(a, b); });
      high = across(high, [](vf a, vf b) { return vmax(a, b); });
      const Steps steps = steps_of(low, high, levels);
      reinterpret_cast<u16_memory*>(to.scale)[t * groups + g] = static_cast<uint16_t>(steps.scale[0]);
      reinterpret_cast<u16_memory*>(to.zero)[t * groups + g] = static_cast<uint16_t>(steps.zero[0]);
      for (int d = first; d < rest; d += W) store_codes(codes + d, codes_of(load_as<T>(row, d), steps.s, steps.z, levels));
      for (int d = rest; d < last; ++d) codes[d] = codes_of(splat(element(row, T, d)), steps.s, steps.z, levels)[0];
    }
    pack_row(codes, D, bits, to.codes + t * bytes);
  }
}

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
template <Type T>
void encode_units_of(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits);
  const vf levels = splat(static_cast<float>((1 << bits) - 1));
  alignas(32) float s[1024], z[1024];
  alignas(32) int32_t codes[1024];
  for (int64_t u = begin; u < end; ++u) {
    const uint8_t* rows = x.data + u * unit * x.stride;
    for (int d = 0; d < D; d += W) {
      vf least = load_as<T>(rows, d), most = least;
      for (int t = 1; t < unit; ++t) {
        const vf v = load_as<T>(rows + t * x.stride, d);
        least = vmin(least, v);
        most = vmax(most, v);
      }
      const Steps steps = steps_of(least, most, levels);
      *reinterpret_cast<v8i16_memory*>(to.scale + 2 * (u * D + d)) = steps.scale;
      *reinterpret_cast<v8i16_memory*>(to.zero + 2 * (u * D + d)) = steps.zero;
      store(s + d, steps.s);
      store(z + d, steps.z);
    }
    for (int t = 0; t < unit; ++t, rows += x.stride) {
      for (int d = 0; d < D; d += W) store_codes(codes + d, codes_of(load_as<T>(rows, d), load(s + d), load(z + d), levels));
      pack_row(codes, D, bits, to.codes + (u * unit + t) * bytes);
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
