// Scales and zeros of groups in half precision, and the codes that they give: round((x - zero) / scale), half to even.
#pragma once

#include "simd.h"

namespace kvbudget {
namespace {

constexpr float kHalfMax = 65504.0f;

// As many of eight as there are.
KV_INLINE void store_halves(uint8_t* p, v8i16 halves, int count) {
  if (count >= W) {
    *reinterpret_cast<v8i16_memory*>(p) = halves;
  } else {
    std::memcpy(p, &halves, 2 * count);
  }
}

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

KV_INLINE bool every(vi lanes) {
#if defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)lanes) == -1;
#else
  for (int i = 0; i < W; ++i)
    if (!lanes[i]) return false;
  return true;
#endif
}

KV_INLINE vf clamp(vf x, float low, float high) { return vmin(vmax(x, splat(low)), splat(high)); }

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

// y / s rounded as a division rounds it, for an s of eleven bits. A product with the rounded inverse is off by 2^-23 at most, and
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

// A grid of 2^-fraction that holds quotients of `levels` and less as floats of one exponent: the bits before the point are then the
// quotient, those behind it are its fraction.
struct Grid {
  int levels, fraction;
  float base;   // what puts a quotient on the grid: the power of two of that exponent, 1/2 to round, and two steps
  // zero / scale may be as large as this, so that two steps are more than all that is rounded on the way. In steps, with 16 (13) bits of
  // fraction: 0.12 (0.25) by x - zero and the quotient that it stands for, 0.06 (0.12) by the inverse, 0.25 by zero * inverse, and 0.5
  // each by the bias and by x * inverse + bias, together 1.43 (1.62).
  float reach;
};

KV_INLINE Grid grid_of(int bits) {
  const int fraction = bits < 8 ? 16 : 13;
  const float power = static_cast<float>(1 << (23 - fraction));
  return {(1 << bits) - 1, fraction, power + 0.5f + 2.0f / static_cast<float>(1 << fraction), 0.75f * power};
}

// Scales and zeros of eight groups.
struct Steps {
  v8i16 scale, zero;
  vf s, z;
};

KV_INLINE Steps steps_of(vf least, vf most, vf levels) {
  Steps to;
  to.zero = to_half(clamp(least, -kHalfMax, kHalfMax));
  to.z = load_half(&to.zero);
  v8i16 scale = to_half(clamp(quotient(vmin(most - to.z, splat(3.4028235e38f)), levels, splat(1.0f) / levels), 0.0f, kHalfMax));
  to.scale = scale | ((scale == 0) & 0x3c00);  // 1.0: a constant group
  to.s = load_half(&to.scale);
  return to;
}

constexpr int kWidest = 1024;  // channels of a row, as native.py checks, and lines that are found together

// What channels or groups are coded with.
struct Lines {
  alignas(64) float s[kWidest], z[kWidest], inverse[kWidest];
  alignas(64) float bias[kWidest];     // x * inverse + bias is on the grid
  alignas(64) int32_t plain[kWidest];  // set where every quotient rounds to a level,
  alignas(64) int32_t near[kWidest];   // and where the zero is inside the grid's reach
  bool all_near;                       // set where all lines are

  // Scales and zeros of `count` lines, whose halves go out as well. Two passes, since what waits for a division holds up the rest.
  KV_MEMBER void find(const float* least, const float* most, int count, const Grid& grid, uint8_t* scale, uint8_t* zero) {
    const vf levels = splat(static_cast<float>(grid.levels));
    for (int i = 0; i < count; i += W) {
      const Steps steps = steps_of(load(least + i), load(most + i), levels);
      store(s + i, steps.s);
      store(z + i, steps.z);
      store_halves(scale + 2 * i, steps.scale, count - i);
      store_halves(zero + 2 * i, steps.zero, count - i);
    }
    vi all = ~vi{};
    for (int i = 0; i < count; i += W) {
      const vf origin = load(z + i), over = splat(1.0f) / load(s + i), shift = origin * over;
      store(inverse + i, over);
      store(bias + i, splat(grid.base) - shift);
      const vi inside = ((load(least + i) - origin) * over > splat(-0.49f)) & ((load(most + i) - origin) * over < levels + splat(0.49f));
      *reinterpret_cast<vi*>(plain + i) = inside;
      const vi close = inside & (shift > splat(-grid.reach)) & (shift < splat(grid.reach));
      *reinterpret_cast<vi*>(near + i) = close;
      all &= close;
    }
    all_near = every(all);
  }
};

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

}  // namespace
}  // namespace kvbudget
