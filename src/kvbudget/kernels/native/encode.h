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

// Consecutive entries as floats: where they are, or a converted copy.
struct Floats {
  const float* data;
  int64_t step;
  const float* row(int64_t i) const { return data + i * step; }
};

constexpr int kCopied = 4096;  // floats of converted entries that are worked on at a time

KV_INLINE Floats float_rows(const Dense& x, int64_t first, int64_t n, float* copy) {
  if (x.type == Type::f32)
    return {reinterpret_cast<const float*>(x.data + first * x.stride), x.stride / static_cast<int64_t>(sizeof(float))};
  for (int64_t i = 0; i < n; ++i) to_float(x.data + (first + i) * x.stride, x.type, 0, x.width, copy + i * x.width);
  return {copy, x.width};
}

// The smallest and the largest of n numbers.
KV_INLINE void extremes(const float* in, int n, float& least, float& most) {
  vf low = splat(in[0]), high = low;
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf v = load(in + i);
    low = vmin(low, v);
    high = vmax(high, v);
  }
  for (; i < n; ++i) {
    low = vmin(low, splat(in[i]));
    high = vmax(high, splat(in[i]));
  }
  least = across(low, [](vf a, vf b) { return vmin(a, b); })[0];
  most = across(high, [](vf a, vf b) { return vmax(a, b); })[0];
}

// Entries [begin, end) with one scale and zero per `group` consecutive channels. Scales of eight groups are found together,
// for a tile of entries before the first of its codes: each step of the way there waits for the one before.
void encode_tokens(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits), tile = kCopied / D;
  const vf levels = splat(static_cast<float>((1 << bits) - 1));
  alignas(32) float copy[kCopied], codes[1024], least[kCopied + W], most[kCopied + W], s[kCopied + W], z[kCopied + W];
  for (int64_t first = begin; first < end; first += tile) {
    const int n = static_cast<int>(end - first < tile ? end - first : tile), all = n * groups;
    const Floats rows = float_rows(x, first, n, copy);
    for (int t = 0; t < n; ++t)
      for (int g = 0; g < groups; ++g) extremes(rows.row(t) + g * group, group, least[t * groups + g], most[t * groups + g]);
    for (int i = all; i < padded(all, W); ++i) least[i] = most[i] = 0.0f;
    u16_memory* scales = reinterpret_cast<u16_memory*>(to.scale) + first * groups;
    u16_memory* zeros = reinterpret_cast<u16_memory*>(to.zero) + first * groups;
    for (int i = 0; i < all; i += W) {
      const Steps steps = steps_of(load(least + i), load(most + i), levels);
      store(s + i, steps.s);
      store(z + i, steps.z);
      const size_t size = sizeof(uint16_t) * (all - i < W ? all - i : W);
      std::memcpy(scales + i, &steps.scale, size);
      std::memcpy(zeros + i, &steps.zero, size);
    }
    for (int t = 0; t < n; ++t) {
      for (int g = 0; g < groups; ++g) {
        const float* in = rows.row(t) + g * group;
        const vf scale = splat(s[t * groups + g]), zero = splat(z[t * groups + g]);
        int i = 0;
        for (; i + W <= group; i += W) store(codes + g * group + i, codes_of(load(in + i), scale, zero, levels));
        for (; i < group; ++i) codes[g * group + i] = codes_of(splat(in[i]), scale, zero, levels)[0];
      }
      pack_row(codes, D, bits, to.codes + (first + t) * bytes);
    }
  }
}

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
void encode_units(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits), tile = kCopied / D;
  const vf levels = splat(static_cast<float>((1 << bits) - 1));
  alignas(32) float copy[kCopied], codes[1024], least[1024], most[1024], s[1024], z[1024];
  for (int64_t u = begin; u < end; ++u) {
    Floats rows{};
    for (int first = 0; first < unit; first += tile) {
      const int n = unit - first < tile ? unit - first : tile;
      rows = float_rows(x, u * unit + first, n, copy);
      for (int d = 0; d < D; d += W) {
        vf low = first ? load(least + d) : load(rows.data + d), high = first ? load(most + d) : low;
        for (int t = 0; t < n; ++t) {
          const vf v = load(rows.row(t) + d);
          low = vmin(low, v);
          high = vmax(high, v);
        }
        store(least + d, low);
        store(most + d, high);
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
      if (unit > tile && t % tile == 0) rows = float_rows(x, u * unit + t, unit - t < tile ? unit - t : tile, copy);
      const float* row = rows.row(unit > tile ? t % tile : t);
      for (int d = 0; d < D; d += W) store(codes + d, codes_of(load(row + d), load(s + d), load(z + d), levels));
      pack_row(codes, D, bits, to.codes + (u * unit + t) * bytes);
    }
  }
}

}  // namespace
}  // namespace kvbudget
