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

KV_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// Stores scale and zero of a group and returns what the codes are computed against.
KV_INLINE void settle(float least, float most, float levels, uint8_t* scale, uint8_t* zero, int64_t at, float& s, float& z) {
  const uint16_t zero_half = float_to_half(clamp(least, -kHalfMax, kHalfMax));
  z = half_to_float(zero_half);
  uint16_t scale_half = float_to_half(clamp((most - z) / levels, 0.0f, kHalfMax));
  if (scale_half == 0) scale_half = 0x3c00;  // 1.0: a constant group
  s = half_to_float(scale_half);
  reinterpret_cast<u16_memory*>(scale)[at] = scale_half;
  reinterpret_cast<u16_memory*>(zero)[at] = zero_half;
}

KV_INLINE vf vmin(vf a, vf b) { return -vmax(-a, -b); }

// Rounded codes; x may be far outside of the range of its group where half precision cut the zero off.
KV_INLINE vf codes_of(vf x, vf s, vf z, vf levels) {
  const vf magic = splat(12582912.0f);
  return (vmin(vmax((x - z) / s, splat(0.0f)), levels) + magic) - magic;
}

// Codes [width] as floats into slabs of `bits` bits each.
KV_INLINE void pack_plane(const float* codes, int width, int bits, uint8_t* out) {
  const int slab = packed_bytes(width, bits), slabs = 8 / bits;
  int i = 0;
  for (; i + W <= slab; i += W) {
    vf byte = load(codes + i);
    for (int j = 1; j < slabs; ++j) byte += load(codes + i + j * slab) * splat(static_cast<float>(1 << (j * bits)));
    *reinterpret_cast<v8u8_memory*>(out + i) = __builtin_convertvector(__builtin_convertvector(byte, vi), v8u8);
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
  const float levels = static_cast<float>((1 << bits) - 1);
  alignas(32) float copy[1024], codes[1024];
  for (int64_t t = begin; t < end; ++t) {
    const float* row = float_row(x, t, copy);
    for (int g = 0; g < groups; ++g) {
      const float* in = row + g * group;
      float least = in[0], most = in[0], s, z;
      int i = 0;
      if (group >= W) {
        vf low = load(in), high = low;
        for (i = W; i + W <= group; i += W) {
          const vf v = load(in + i);
          low = vmin(low, v);
          high = vmax(high, v);
        }
        for (int l = 0; l < W; ++l) {
          least = low[l] < least ? low[l] : least;
          most = high[l] > most ? high[l] : most;
        }
      }
      for (; i < group; ++i) {
        least = in[i] < least ? in[i] : least;
        most = in[i] > most ? in[i] : most;
      }
      settle(least, most, levels, to.scale, to.zero, t * groups + g, s, z);
      for (i = 0; i + W <= group; i += W) store(codes + g * group + i, codes_of(load(in + i), splat(s), splat(z), splat(levels)));
      for (; i < group; ++i) codes[g * group + i] = codes_of(splat(in[i]), splat(s), splat(z), splat(levels))[0];
    }
    pack_row(codes, D, bits, to.codes + t * bytes);
  }
}

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
void encode_units(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits);
  const float levels = static_cast<float>((1 << bits) - 1);
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
    for (int d = 0; d < D; ++d) settle(least[d], most[d], levels, to.scale, to.zero, u * D + d, s[d], z[d]);
    for (int t = 0; t < unit; ++t) {
      const float* row = float_row(x, u * unit + t, copy);
      for (int d = 0; d < D; d += W) store(codes + d, codes_of(load(row + d), load(s + d), load(z + d), splat(levels)));
      pack_row(codes, D, bits, to.codes + (u * unit + t) * bytes);
    }
  }
}

}  // namespace
}  // namespace kvbudget
