// Products of integer codes with queries and weights in fixed point, where the machine multiplies bytes (AVX-512 VNNI).
//
// A float32 factor becomes three signed bytes (its limbs) against a step that the largest factor sets: 22 bits and the sign. One
// instruction multiplies 64 codes by a limb and adds fours of products, without a rounding; the three sums meet again in float32.
#pragma once

#include "lanes.h"

namespace kvbudget {
namespace {

// Values that weigh_limbs can read: their scales stand in the weights, and sixteen channels share one.
KV_INLINE bool has_limbs(const Operand& x) {
  return choose(x) != Codec::expand && x.kind == Kind::token && packed_bytes(x.width, kernel_bits(x)) % 16 == 0 &&
         x.group % 16 == 0;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

constexpr bool kLimbs = true;
constexpr float kLargest = 4190000.0f;  // of the fixed-point numbers; adding 1.5 * 2^23 rounds up to 2^22 to an integer

KV_INLINE __m512 wide(const float* p) { return _mm512_loadu_ps(p); }

// The first n of sixteen floats, else zeros.
KV_INLINE __m512 wide(const float* p, int n) {
  return n >= 16 ? wide(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}

// The larger magnitudes, as the bits of floats: integer units are free where products fill the others.
KV_INLINE __m512i larger(__m512i top, __m512 x) {
  return _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}

KV_INLINE float largest(__m512i top) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(top)))); }

// Four rows of four 32-bit words (or bytes of each such word) as columns, in each quarter of a register.
KV_INLINE __m512i turn_bytes(__m512i x) {
  return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// Sixteen bytes from each of four places.
KV_INLINE __m512i gather(const uint8_t* p, int64_t stride) {
  const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride)); };
  return _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1), at(2), 2), at(3), 3);
}

// sums += four products of bytes in each lane: codes with one limb of four factors. It stands where the sums are, since compilers move
// them about when a tile fills the registers.
KV_INLINE void add_products(__m512i& sums, __m512i codes, const uint8_t* limb) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*reinterpret_cast<const i32_memory*>(limb)));
}

// The limbs of sixteen factors: of each four the lowest, then the middle ones, the highest, and four bytes without meaning.
KV_INLINE __m512i limbs_of(__m512 factors, __m512 inverse) {
  const __m512i whole = _mm512_castps_si512(_mm512_fmadd_ps(factors, inverse, _mm512_set1_ps(12582912.0f)));
  const __m512i raised = _mm512_add_epi32(whole, _mm512_set1_epi32(0x808080 - 0x4b400000));  // bytes count from 128 now
  return turn_bytes(_mm512_xor_si512(raised, _mm512_set1_epi32(0x808080)));
}

KV_INLINE float inverse_of(float step) { return step > 1e-37f ? 1.0f / step : 0.0f; }

// Queries [M, D] times scales per channel (or null: one) as limbs [M][D / 4][16 bytes]; step [M] undoes what they were multiplied
// by; bias [M]: the products of the queries with the zeros.
KV_INLINE void scale_limbs(const float* query, const float* scale, const float* zero, int queries, int D, float* to, float* step,
                           float* bias) {
  for (int m = 0; m < queries; ++m, query += D) {
    __m512i top = _mm512_setzero_si512();
    __m512 total = _mm512_setzero_ps();
    for (int d = 0; d < D; d += 16) {
      const __m512 q = wide(query + d), x = scale ? _mm512_mul_ps(q, wide(scale + d)) : q;
      top = larger(top, x);
      if (scale) total = _mm512_fmadd_ps(q, wide(zero + d), total);
    }
    step[m] = largest(top) * (1.0f / kLargest);
    if (scale) bias[m] = _mm512_reduce_add_ps(total);
    const __m512 inverse = _mm512_set1_ps(inverse_of(step[m]));
    for (int d = 0; d < D; d += 16, to += 16) {
      const __m512 q = wide(query + d);
      _mm512_storeu_si512(to, limbs_of(scale ? _mm512_mul_ps(q, wide(scale + d)) : q, inverse));
    }
  }
}

// Four words of sixteen rows, so that a vector holds one word of each.
KV_INLINE void turn_words(const uint8_t* rows, int64_t stride, __m512i (&to)[4]) {
  __m512i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = gather(rows + i * stride, 4 * stride);
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
  const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  to[0] = _mm512_unpacklo_epi64(a, b);
  to[1] = _mm512_unpackhi_epi64(a, b);
  to[2] = _mm512_unpacklo_epi64(c, d);
  to[3] = _mm512_unpackhi_epi64(c, d);
}

// Plane k of sixteen words of codes.
template <int Bits>
KV_INLINE __m512i plane(__m512i words, int k) {
  if constexpr (Bits == 8) return words;
  return _mm512_and_si512(_mm512_srli_epi32(words, k * Bits), _mm512_set1_epi8((1 << Bits) - 1));
}

// What three sums stand for, in units of the step.
KV_INLINE __m512 join_limbs(__m512i low, __m512i middle, __m512i high) {
  const __m512 below = _mm512_fmadd_ps(_mm512_cvtepi32_ps(middle), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), below);
}

// Logits of sixteen rows.
template <int Bits, int MT>
void dot_tile_limbs(const uint8_t* rows, int64_t ahead, const uint8_t* q, int D, int words, const float* step, const float* start,
                    float* out, int64_t out_stride) {
  const int64_t stride = 4 * words;
  __m512i sums[MT][3];
#pragma GCC unroll 4
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 3
    for (int l = 0; l < 3; ++l) sums[m][l] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int c = 0; c < words; c += 4, q += 64) {
    __m512i turned[4];
    turn_words(rows + 4 * c, stride, turned);
    if (ahead)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) __builtin_prefetch(rows + ahead + 64 * (c + i), 0, 2);
#pragma GCC unroll 8
    for (int k = 0; k < 8 / Bits; ++k) {
      const uint8_t* limbs[MT];  // hidden, or the compiler keeps an address for every one of its uses
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) hide(limbs[m] = q + 4 * (static_cast<int64_t>(m) * D + 4 * k * words));
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        const __m512i codes = plane<Bits>(turned[w], k);
#pragma GCC unroll 4
        for (int m = 0; m < MT; ++m)
#pragma GCC unroll 3
          for (int l = 0; l < 3; ++l) add_products(sums[m][l], codes, limbs[m] + 16 * w + 4 * l);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MT; ++m)
    _mm512_storeu_ps(out + m * out_stride,
                     _mm512_fmadd_ps(join_limbs(sums[m][0], sums[m][1], sums[m][2]), _mm512_set1_ps(step[m]), _mm512_set1_ps(start[m])));
}

// Calls body(bits) with one of the widths that codes are read in.
template <class Body>
KV_INLINE void with_bits(int bits, Body&& body) {
  if (bits == 8) body(std::integral_constant<int, 8>{});
  if (bits == 4) body(std::integral_constant<int, 4>{});
  if (bits == 2) body(std::integral_constant<int, 2>{});
  if (bits == 1) body(std::integral_constant<int, 1>{});
}

// Logits of n rows as dot_lanes gives them; q and step: as scale_limbs makes them.
KV_INLINE void dot_limbs(int bits, const Rows& rows, int n, const float* q, int D, int queries, int words, const float* step,
                         const float* start, float* out, int64_t out_stride) {
  with_bits(bits, [&](auto bits) {
    with_tiles(queries, [&](int m, auto tile) {
      const uint8_t* limbs = reinterpret_cast<const uint8_t*>(q + m * D);
      for (int t = 0; t < n; t += kLanes)
        dot_tile_limbs<decltype(bits)::value, decltype(tile)::value>(rows.base + 4 * t * words, m ? 0 : rows.ahead, limbs, D, words,
                                                                     step + m, start + m, out + m * out_stride + t, out_stride);
    });
  });
}

KV_INLINE float largest(const float* p, int n) {
  __m512i top = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16) top = larger(top, wide(p + i, n - i));
  return largest(top);
}

// Weights of n entries times the scales of each group of channels as limbs [groups][M][block / 4][16 bytes], with a step for each
// [groups][M]; zero_sums [M, groups] grows by the products with the zeros. Scales and zeros: [groups][span]; top: [M].
KV_INLINE void weight_limbs(const float* weights, int64_t stride, int queries, int n, const float* scale, const float* zero, int groups,
                            int64_t span, int block, float* top, float* to, float* step, float* zero_sums) {
  for (int m = 0; m < queries; ++m) top[m] = largest(weights + m * stride, n);
  for (int j = 0; j < groups; ++j, scale += span, zero += span) {
    const float most = largest(scale, n);
    for (int m = 0; m < queries; ++m, ++step, to += block) {
      *step = top[m] * most * (1.0f / kLargest);
      const __m512 inverse = _mm512_set1_ps(inverse_of(*step));
      __m512 total = _mm512_setzero_ps();
      for (int i = 0; i < n; i += 16) {
        const __m512 p = wide(weights + m * stride + i, n - i);
        total = _mm512_fmadd_ps(p, wide(zero + i, n - i), total);
        _mm512_storeu_si512(to + i, limbs_of(_mm512_mul_ps(p, wide(scale + i, n - i)), inverse));
      }
      zero_sums[m * groups + j] += _mm512_reduce_add_ps(total);
    }
  }
}

// Sixteen bytes of each of four rows, so that a lane holds one byte of each.
KV_INLINE __m512i turn_rows(const uint8_t* rows, int64_t stride) {
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return turn_bytes(_mm512_permutexvar_epi32(quarters, gather(rows, stride)));
}

// 32 bytes of each of four rows: bytes 0 to 7 and 16 to 23 in the first vector, the others in the second.
KV_INLINE void turn_wide_rows(const uint8_t* rows, int64_t stride, __m512i (&to)[2]) {
  const auto two = [&](int i) {
    const __m256i *a = reinterpret_cast<const __m256i*>(rows + i * stride), *b = reinterpret_cast<const __m256i*>(rows + (i + 2) * stride);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(a)), _mm256_loadu_si256(b), 1);
  };
  const __m512i a = two(0), b = two(1);
  const __m512i words = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  to[0] = _mm512_permutexvar_epi16(words, _mm512_unpacklo_epi8(a, b));
  to[1] = _mm512_permutexvar_epi16(words, _mm512_unpackhi_epi8(a, b));
}

// Adds sixteen bytes' worth of `rows`, P planes from k on, to acc [M, acc_stride] at the channels where each plane begins; of codes
// of eight bits, two halves of 32 bytes as turn_wide_rows parts them.
template <int Bits, int MT, int P>
void weigh_tile_limbs(const uint8_t* row, int64_t stride, const uint8_t* ahead, int quads, int k, const uint8_t* const (&limbs)[P],
                      int64_t limb_stride, const float* const (&step)[P], float* const (&acc)[P], int64_t acc_stride) {
  constexpr bool kWide = Bits == 8 && P == 2;
  __m512i sums[P][MT][3];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 3
      for (int l = 0; l < 3; ++l) sums[p][m][l] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int i = 0; i < quads; ++i, row += 4 * stride) {
    if (ahead)
#pragma GCC unroll 2
      for (int p = 0; p < (kWide ? 2 : 1); ++p) __builtin_prefetch(ahead + 64 * ((kWide ? 2 : 1) * i + p), 0, 2);
    __m512i turned[2];
    if constexpr (kWide) {
      turn_wide_rows(row, stride, turned);
    } else {
      turned[0] = turned[1] = turn_rows(row, stride);
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const __m512i codes = plane<Bits>(turned[p], k + p);
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m)
#pragma GCC unroll 3
        for (int l = 0; l < 3; ++l) add_products(sums[p][m][l], codes, limbs[p] + m * limb_stride + 16 * i + 4 * l);
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) {
      float* to = acc[p] + m * acc_stride;
      const __m512 found = join_limbs(sums[p][m][0], sums[p][m][1], sums[p][m][2]);
      const __m512 before = kWide ? _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(to)), _mm256_loadu_ps(to + 16), 1) : wide(to);
      const __m512 after = _mm512_fmadd_ps(found, _mm512_set1_ps(step[p][m]), before);
      if constexpr (kWide) {
        _mm256_storeu_ps(to, _mm512_castps512_ps256(after));
        _mm256_storeu_ps(to + 16, _mm512_extractf32x8_ps(after, 1));
      } else {
        _mm512_storeu_ps(to, after);
      }
    }
}

// acc [M, acc_stride] += weights times n rows `stride` bytes apart, of which those up to the next multiple of four must be readable;
// limbs and step: as weight_limbs makes them, from a multiple of four entries on.
KV_INLINE void weigh_limbs(const Operand& x, const uint8_t* rows, int64_t stride, int64_t ahead, int n, const float* limbs, int block,
                           const float* step, int queries, float* acc, int64_t acc_stride) {
  const int slab = packed_bytes(x.width, kernel_bits(x));
  const auto weigh = [&](auto bits, auto tile, auto pieces, int m) {
    constexpr int Bits = decltype(bits)::value, P = decltype(pieces)::value;
    constexpr int bytes = Bits == 8 ? 16 * P : 16, planes = Bits == 8 ? 1 : P;  // that a tile takes at a time
    const int quads = (n + 3) / 4;
    for (int c = 0; c < slab; c += bytes)
      for (int k = 0; k < 8 / Bits; k += planes) {
        const uint8_t* of[P];
        const float* steps[P];
        float* to[P];
        for (int p = 0; p < P; ++p) {
          const int channel = Bits == 8 ? c + 8 * p : (k + p) * slab + c, at = channel / x.group * queries + m;
          of[p] = reinterpret_cast<const uint8_t*>(limbs + static_cast<int64_t>(at) * block);
          steps[p] = step + at;
          to[p] = acc + m * acc_stride + channel;
        }
        const uint8_t* next = ahead && !k && !m ? rows + ahead + 4 * c * quads : nullptr;  // a share of it
        weigh_tile_limbs<Bits, decltype(tile)::value, P>(rows + c, stride, next, quads, k, of, 4 * block, steps, to, acc_stride);
      }
  };
  with_bits(kernel_bits(x), [&](auto bits) {
    with_tiles(queries, [&](int m, auto tile) {
      if (decltype(bits)::value == 8 && (slab % 32 || x.group % 32)) {
        weigh(bits, tile, std::integral_constant<int, 1>{}, m);
      } else {
        weigh(bits, tile, std::integral_constant<int, 2>{}, m);
      }
    });
  });
}

#else

constexpr bool kLimbs = false;
template <class... T>
void scale_limbs(T&&...) {}
template <class... T>
void dot_limbs(T&&...) {}
template <class... T>
void weight_limbs(T&&...) {}
template <class... T>
void weigh_limbs(T&&...) {}

#endif

}  // namespace
}  // namespace kvbudget
