// Eight-lane vectors in GCC/Clang vector extensions: every instruction set compiles the same source.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define KV_INLINE static inline __attribute__((always_inline))
#define KV_MEMBER inline __attribute__((always_inline))

namespace kvbudget {
namespace {

constexpr int W = 8;

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef float vf_memory __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t vu_memory __attribute__((vector_size(32), aligned(1), may_alias));
typedef float f32_memory __attribute__((aligned(1), may_alias));
typedef uint16_t u16_memory __attribute__((aligned(1), may_alias));
typedef int32_t i32_memory __attribute__((aligned(1), may_alias));
typedef int64_t i64_memory __attribute__((aligned(1), may_alias));

#if defined(__clang__)
#define KV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

KV_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_memory*>(p); }
KV_INLINE vf load_bytes(const uint8_t* p) { return *reinterpret_cast<const vf_memory*>(p); }
KV_INLINE vu load_words(const uint8_t* p) { return *reinterpret_cast<const vu_memory*>(p); }
KV_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_memory*>(p) = x; }
KV_INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x}; }
KV_INLINE vf as_float(vu x) { return (vf)x; }
KV_INLINE vf to_float(vu x) { return __builtin_convertvector((vi)x, vf); }

// Keeps a loaded vector in a register where the compiler would rather load it again for each use.
KV_INLINE void pin(vf& x) {
#if defined(__AVX__)
  __asm__("" : "+x"(x));
#else
  (void)x;
#endif
}

// acc += x * k where acc stands: compilers move accumulators about when a tile fills the registers.
KV_INLINE void fma(vf& acc, vf x, vf k) {
#if defined(__FMA__) && defined(__AVX512VL__)
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(k));
#elif defined(__FMA__)
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(x), "x"(k));
#else
  acc += x * k;
#endif
}

// Sixteen bytes from either pointer.
KV_INLINE vf load_halves(const uint8_t* low, const uint8_t* high) {
#if defined(__AVX__)
  const float *a = reinterpret_cast<const float*>(low), *b = reinterpret_cast<const float*>(high);
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
#else
  vf x;
  std::memcpy(&x, low, 16);
  std::memcpy(reinterpret_cast<uint8_t*>(&x) + 16, high, 16);
  return x;
#endif
}

// Hides where a pointer comes from, so that what is loaded through it is loaded again rather than kept in a register.
KV_INLINE void hide(const uint8_t*& p) { __asm__ volatile("" : "+r"(p)); }

KV_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX__) && !defined(__clang__)
  return __builtin_ia32_maxps256(a, b);
#else
  return a > b ? a : b;
#endif
}

KV_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX__) && !defined(__clang__)
  return __builtin_ia32_minps256(a, b);
#else
  return a < b ? a : b;
#endif
}

KV_INLINE float sum(vf x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// Sums inside each half: lane 4h + i of the result is the sum of half h of the i-th argument.
KV_INLINE vf quad_sums(vf a, vf b, vf c, vf d) {
  vf ab = KV_SHUFFLE(a, b, 0, 1, 10, 11, 4, 5, 14, 15) + KV_SHUFFLE(a, b, 2, 3, 8, 9, 6, 7, 12, 13);
  vf cd = KV_SHUFFLE(c, d, 0, 1, 10, 11, 4, 5, 14, 15) + KV_SHUFFLE(c, d, 2, 3, 8, 9, 6, 7, 12, 13);
  return KV_SHUFFLE(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) + KV_SHUFFLE(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
}

// exp(x) for x <= 88, exactly 0 below the smallest normal result (so that -inf gives 0).
KV_INLINE vf vexp(vf x) {
  const vf low = splat(-87.33654f);
  vf clamped = vmax(x, low);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = clamped * splat(1.44269504f) + magic;
  vf n = shifted - magic;
  vf r = clamped - n * splat(0.693145752f);
  r = r - n * splat(1.42860677e-6f);
  vf p = splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  return (vf)((vi)(p * (vf)exponent) & (x > low));
}

KV_INLINE vf vtanh(vf x) {
  vf magnitude = (vf)((vi)x & 0x7fffffff);
  vf far = splat(1.0f) - splat(2.0f) / (vexp(vmax(splat(-40.0f), -(vmax(-(magnitude + magnitude), splat(-40.0f))))) + splat(1.0f));
  vf y = x * x;
  vf near = splat(62.0f / 2835);
  near = near * y - splat(17.0f / 315);
  near = near * y + splat(2.0f / 15);
  near = near * y - splat(1.0f / 3);
  near = near * y + splat(1.0f);
  near = near * magnitude;
  vi small = magnitude < splat(0.25f);
  vi bits = (small & (vi)near) | (~small & (vi)far);
  return (vf)(bits | ((vi)x & (int32_t)0x80000000));
}

// Sine and cosine of |x| < 2^31; the angle is brought near zero in double precision.
KV_INLINE void vsincos(vf x, vf& sin, vf& cos) {
  typedef double vd __attribute__((vector_size(64)));
  const vd wide = __builtin_convertvector(x, vd);
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const vd turns = (wide * 0.63661977236758134308 + magic) - magic;
  const vf r = __builtin_convertvector(wide - turns * 1.57079632679489661923, vf);
  const vi quarter = __builtin_convertvector(turns, vi);
  const vf z = r * r;
  const vf s = r + r * z * (splat(-1.6666654611e-1f) + z * (splat(8.3321608736e-3f) + z * splat(-1.9515295891e-4f)));
  const vf c = splat(1.0f) - splat(0.5f) * z +
               z * z * (splat(4.166664568298827e-2f) + z * (splat(-1.388731625493765e-3f) + z * splat(2.443315711809948e-5f)));
  const vi odd = (quarter & 1) != 0, low = (vi)s, high = (vi)c;
  sin = (vf)(((odd & high) | (~odd & low)) ^ ((quarter & 2) << 30));
  cos = (vf)(((odd & low) | (~odd & high)) ^ (((quarter + 1) & 2) << 30));
}

KV_INLINE float half_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  std::memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

KV_INLINE float bf16_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

typedef uint16_t v8u16 __attribute__((vector_size(16)));
typedef int16_t v8i16 __attribute__((vector_size(16)));
typedef int16_t v8i16_memory __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t v8u16_memory __attribute__((vector_size(16), aligned(1), may_alias));

KV_INLINE vf load_bf16(const void* p) {
#if defined(__AVX2__)  // GCC widens halves of the vector apart
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16);
#else
  return (vf)(__builtin_convertvector((v8u16) * static_cast<const v8u16_memory*>(p), vu) << 16);
#endif
}

KV_INLINE vf load_half(const void* p) {
#if defined(__F16C__) && !defined(__clang__)
  typedef short v8short __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps256((v8short) * static_cast<const v8u16_memory*>(p));
#else
  vu h = __builtin_convertvector((v8u16) * static_cast<const v8u16_memory*>(p), vu);
  vf magnitude = (vf)((h & 0x7fffu) << 13) * splat(5.192296858534828e33f);
  vu special = (vu)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (vf)((vu)magnitude | special | ((h & 0x8000u) << 16));
#endif
}

}  // namespace
}  // namespace kvbudget
