// Codes of 32 channels at a time, where AVX2 is there.
#pragma once

#include "bounds.h"
#include "steps.h"

namespace kvbudget {
namespace {

constexpr int kBlock = 32;  // channels

#if defined(__AVX2__)

// The lower halves of the 32-bit lanes of a pair side by side.
KV_INLINE __m256i alternate(vf a, vf b) { return _mm256_blend_epi16((__m256i)a, _mm256_slli_epi32((__m256i)b, 16), 0xaa); }

KV_INLINE bool every(vi lanes) { return _mm256_movemask_epi8((__m256i)lanes) == -1; }

// Codes of 32 channels of a row, a byte each, for scales, zeros and inverses as pairs. They are rounded by adding 1.5 * 2^23,
// which leaves them in the last bits, sixteen of which are kept: `Clip` where quotients could be beyond those.
template <Type T, bool Clip>
KV_INLINE void code_block(const uint8_t* row, const vf* s, const vf* z, const vf* inverse, int levels, uint8_t* codes) {
  const vf magic = splat(12582912.0f);
  __m256i sixteen[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    vf x[2];
    load_pair<T>(row, 16 * h, x);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int i = 2 * h + v;
      vf y = x[v] - z[i];
      if constexpr (Clip) y = vmin(vmax(y, -s[i]), s[i] * splat(levels + 1.0f));
      x[v] = quotient(y, s[i], inverse[i]) + magic;
    }
    sixteen[h] = alternate(x[0], x[1]);
  }
  __m256i bytes = _mm256_packus_epi16(sixteen[0], sixteen[1]);
  bytes = _mm256_min_epu8(bytes, _mm256_set1_epi8(static_cast<char>(levels)));
  if constexpr (T == Type::bf16) {
    bytes = _mm256_permute4x64_epi64(bytes, 0xd8);
  } else {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
}

// Codes of `count` blocks; what lies `ahead` bytes behind them is asked for.
template <Type T>
KV_INLINE void code_blocks(bool narrow, const uint8_t* row, int64_t stride, int64_t ahead, int count, const vf* s, const vf* z,
                           const vf* inverse, int levels, uint8_t* codes, int pitch) {
  for (int t = 0; t < count; ++t, row += stride, codes += pitch) {
    for (int line = 0; line < (T == Type::f32 ? 128 : 64); line += 64) __builtin_prefetch(row + ahead + line);
    if (__builtin_expect(narrow, 1)) {
      code_block<T, false>(row, s, z, inverse, levels, codes);
    } else {
      code_block<T, true>(row, s, z, inverse, levels, codes);
    }
  }
}

#endif

}  // namespace
}  // namespace kvbudget
