// Scales and zeros of groups in half precision, and the codes that they give: round((x - zero) / scale), half to even.
#pragma once

#include "simd.h"

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

// Scales and zeros of eight groups, and what the codes are computed with.
struct Steps {
  v8i16 scale, zero;
  vf s, z, inverse;
  vi narrow;  // lanes set where no quotient is beyond sixteen bits
};

KV_INLINE Steps steps_of(vf least, vf most, vf levels) {
  Steps to;
  to.zero = to_half(clamp(least, -kHalfMax, kHalfMax));
  to.z = load_half(&to.zero);
  v8i16 scale = to_half(clamp(quotient(vmin(most - to.z, splat(3.4028235e38f)), levels, splat(1.0f) / levels), 0.0f, kHalfMax));
  to.scale = scale | ((scale == 0) & 0x3c00);  // 1.0: a constant group
  to.s = load_half(&to.scale);
  to.inverse = splat(1.0f) / to.s;
  to.narrow = ((least - to.z) * to.inverse > splat(-32000.0f)) & ((most - to.z) * to.inverse < splat(32000.0f));
  return to;
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

}  // namespace
}  // namespace kvbudget
