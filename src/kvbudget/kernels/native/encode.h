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
KV_INLINE vf codes_of(vf x, vf s, vf z, vf levels) {
  const vf magic = splat(12582912.0f);
  return (vmin(vmax((x - z) / s, splat(0.0f)), levels) + magic) - magic;
}

// Eight codes below 256 as bytes.
KV_INLINE void store_bytes(uint8_t* p, vf codes) {
  vu x = (vu)__builtin_convertvector(codes, vi) << vu{0, 8, 16, 24, 0, 8, 16, 24};
  x |= KV_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
  x |= KV_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  const uint32_t words[2] = {x[0], x[4]};
  std::memcpy(p, words, 8);
}

// Codes [width] as floats into slabs of `bits` bits each.
KV_INLINE void pack_plane(const float* codes, int width, int bits, uint8_t* out) {
  const int slab = packed_bytes(width, bits), slabs = 8 / bits;
  int i = 0;
  for (; i + W <= slab; i += W) {
    vf byte = load(codes + i);
    for (int j = 1; j < slabs; ++j) byte += load(codes + i + j * slab) * splat(static_cast<float>(1 << (j * bits)));
    store_bytes(out + i, byte);
  }
  for (; i < slab; ++i) {
    float byte = codes[i];
    for (int j = 1; j < slabs; ++j) byte += codes[i + j * slab] * static_cast<float>(1 << (j * bits));
    out[i] = static_cast<uint8_t>(byte);
  }
}

// codes [width] are overwritten where they have three bits.
KV_INLINE void pack_row(float* codes, int width, int bits, uint8_t* out) {
  if (bits != 3) return pack_plane(codes, width, bits, out);
  float high[1024];
  for (int i = 0; i < width; i += W) {
    const vi code = __builtin_convertvector(load(codes + i), vi);
    store(high + i, __builtin_convertvector(code >> 2, vf));
    store(codes + i, __builtin_convertvector(code & 3, vf));
  }
  pack_plane(codes, width, 2, out);
  pack_plane(high, width, 1, out + width / 4);
}

// Row i of x as floats: x itself or a converted copy.
KV_INLINE const float* float_row(const Dense& x, int64_t i, float* copy) {
  const uint8_t* row = x.data + i * x.stride;
  if (x.type == Type::f32) return reinterpret_cast<const float*>(row);
  to_float(row, x.type, 0, x.width, copy);
  return copy;
}

// Entries [begin, end) with one scale and zero per `group` consecutive channels.
void encode_tokens(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits);
  const vf levels = splat(static_cast<float>((1 << bits) - 1));
  alignas(32) float copy[1024], codes[1024];
  for (int64_t t = begin; t < end; ++t) {
    const float* row = float_row(x, t, copy);
    for (int g = 0; g < groups; ++g) {
      const float* in = row + g * group;
      vf low = splat(in[0]), high = low;
      int i = 0;
      for (; i + W <= group; i += W) {
        const vf v = load(in + i);
        low = vmin(low, v);
        high = vmax(high, v);
      }
      for (; i < group; ++i) {
        low = vmin(low, splat(in[i]));
        high = vmax(high, splat(in[i]));
      }
      low = across(low, [](vf a, vf b) { return vmin(a, b); });
      high = across(high, [](vf a, vf b) { return vmax(a, b); });
      const Steps steps = steps_of(low, high, levels);
      reinterpret_cast<u16_memory*>(to.scale)[t * groups + g] = static_cast<uint16_t>(steps.scale[0]);
      reinterpret_cast<u16_memory*>(to.zero)[t * groups + g] = static_cast<uint16_t>(steps.zero[0]);
      for (i = 0; i + W <= group; i += W) store(codes + g * group + i, codes_of(load(in + i), steps.s, steps.z, levels));
      for (; i < group; ++i) codes[g * group + i] = codes_of(splat(in[i]), steps.s, steps.z, levels)[0];
    }
    pack_row(codes, D, bits, to.codes + t * bytes);
  }
}

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
void encode_units(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits);
  const vf levels = splat(static_cast<float>((1 << bits) - 1));
  alignas(32) float copy[1024], codes[1024], least[1024], most[1024], s[1024], z[1024];
  for (int64_t u = begin; u < end; ++u) {
    for (int t = 0; t < unit; ++t) {
      const float* row = float_row(x, u * unit + t, copy);
      for (int d = 0; d < D; d += W) {
        const vf v = load(row + d);
        store(least + d, t ? vmin(load(least + d), v) : v);
        store(most + d, t ? vmax(load(most + d), v) : v);
      }
    }
    for (int d = 0; d < D; d += W) {
      const Steps steps = steps_of(load(least + d), load(most + d), levels);
      *reinterpret_cast<v8i16_memory*>(to.scale + 2 * (u * D + d)) = steps.scale;
      *reinterpret_cast<v8i16_memory*>(to.zero + 2 * (u * D + d)) = steps.zero;
      store(s + d, steps.s);
      store(z + d, steps.z);
    }
    for (int t = 0; t < unit; ++t) {
      const float* row = float_row(x, u * unit + t, copy);
      for (int d = 0; d < D; d += W) store(codes + d, codes_of(load(row + d), load(s + d), load(z + d), levels));
      pack_row(codes, D, bits, to.codes + (u * unit + t) * bytes);
    }
  }
}

}  // namespace
}  // namespace kvbudget
