// Codes of 32 channels at a time, where AVX2 is there: by division, or with AVX-512 on a grid of fixed point.
#pragma once

#include "bounds.h"
#include "steps.h"

namespace kvbudget {
namespace {

constexpr int kBlock = 32;  // channels

#if defined(__AVX2__)

// What a block is coded with: the lines from i on, one per channel as pairs, or line i, `Shared` by all.
template <bool Shared>
struct Block {
  const Lines& lines;
  int i;

  KV_MEMBER vf at(const float* numbers, int v) const { return Shared ? splat(numbers[i]) : load(numbers + i + v * W); }
  KV_MEMBER bool all(const int32_t* flags) const {
    if constexpr (Shared) return flags[i] != 0;
    vi set = ~vi{};
    for (int v = 0; v < kBlock / W; ++v) set &= *reinterpret_cast<const vi*>(flags + i + v * W);
    return every(set);
  }
};

// The lower halves of the 32-bit lanes of a pair side by side.
KV_INLINE __m256i alternate(vf a, vf b) { return _mm256_blend_epi16((__m256i)a, _mm256_slli_epi32((__m256i)b, 16), 0xaa); }

// Codes of a block of a row, a byte each. They are rounded by adding 1.5 * 2^23, which leaves them in the last bits, sixteen of which
// are kept: `Clip` where quotients could be beyond those.
template <Type T, bool Clip>
KV_INLINE __m256i divide_block(const uint8_t* row, const vf* s, const vf* z, const vf* inverse, int levels) {
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
  if constexpr (T == Type::bf16) return _mm256_permute4x64_epi64(bytes, 0xd8);
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Codes by division.
template <Type T, bool Shared>
struct Divider {
  const Lines& lines;
  const int levels;
  bool plain;
  vf s[4], z[4], inverse[4];

  KV_MEMBER Divider(const Lines& from, const Grid& grid) : lines(from), levels(grid.levels) {}

  KV_MEMBER void aim(int line) {
    const Block<Shared> block{lines, line};
    plain = block.all(lines.plain);
    for (int v = 0; v < 4; ++v) {
      s[v] = block.at(lines.s, v);
      z[v] = block.at(lines.z, v);
      inverse[v] = block.at(lines.inverse, v);
    }
  }

  KV_MEMBER __m256i operator()(const uint8_t* row) const {
    return __builtin_expect(plain, 1) ? divide_block<T, false>(row, s, z, inverse, levels) : divide_block<T, true>(row, s, z, inverse, levels);
  }
};

#if defined(__AVX512BW__)

// Outside the loops over rows, whose registers it must not take.
template <Type T, bool Shared>
__attribute__((noinline, cold)) __m256i divide_apart(const uint8_t* row, const Lines& lines, const Grid& grid, int line) {
  Divider<T, Shared> divider(lines, grid);
  divider.aim(line);
  return divider(row);
}

KV_INLINE __m512 join(vf a, vf b) { return _mm512_insertf32x8(_mm512_castps256_ps512((__m256)a), (__m256)b, 1); }

// The codes of a block on a grid, with one fused multiply-add each. All that is rounded on the way stays below two steps of the grid:
// a code is right unless the bits behind the point are below four steps, which is where quotients lie in the middle of two levels.
template <Type T, bool Shared>
struct Coder {
  const Lines& lines;
  const Grid& grid;
  int line;
  __m512 inverse[2], bias[2];
  __m512i middle, whole, shifted;

  KV_MEMBER Coder(const Lines& from, const Grid& on) : lines(from), grid(on) {
    middle = _mm512_set1_epi32((1 << grid.fraction) - 4);
    whole = _mm512_set1_epi32(grid.fraction);
    shifted = _mm512_set1_epi32(grid.fraction - 8);
  }

  KV_MEMBER __m512 at(const float* numbers, int v) const {
    if constexpr (Shared) return _mm512_set1_ps(numbers[line]);
    const float* from = numbers + line;
    return T == Type::bf16 ? join(load(from + v * W), load(from + (v + 2) * W)) : _mm512_loadu_ps(from + 2 * v * W);
  }

  KV_MEMBER void aim(int at_line) {
    line = at_line;
    for (int v = 0; v < 2; ++v) {
      inverse[v] = at(lines.inverse, v);
      bias[v] = at(lines.bias, v);
    }
  }

  KV_MEMBER __m256i operator()(const uint8_t* row) const {
    __m512i x[2];
    if constexpr (T == Type::bf16) {
      const __m512i words = _mm512_loadu_si512(row);
      x[0] = _mm512_slli_epi32(words, 16);
      x[1] = _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    } else {
      for (int v = 0; v < 2; ++v)
        x[v] = T == Type::f32 ? _mm512_loadu_si512(row + 64 * v)
                              : (__m512i)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * v)));
    }
    for (int v = 0; v < 2; ++v) x[v] = (__m512i)_mm512_fmadd_ps((__m512)x[v], inverse[v], bias[v]);
    if (__builtin_expect(!_kortestz_mask16_u8(_mm512_testn_epi32_mask(x[0], middle), _mm512_testn_epi32_mask(x[1], middle)), 0))
      return divide_apart<T, Shared>(row, lines, grid, line);
    if constexpr (T == Type::bf16) {
      const __m512i both = _mm512_mask_blend_epi8(0x2222222222222222u, _mm512_srlv_epi32(x[0], whole), _mm512_srlv_epi32(x[1], shifted));
      return _mm512_cvtepi32_epi16(both);
    }
    for (int v = 0; v < 2; ++v) x[v] = _mm512_srlv_epi32(x[v], whole);
    return _mm256_setr_m128i(_mm512_cvtepi32_epi8(x[0]), _mm512_cvtepi32_epi8(x[1]));
  }
};

#endif

KV_INLINE void store_bytes(uint8_t* p, __m256i bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes); }

// Entries, `stride` bytes apart, whose codes go `pitch` bytes apart. Each entry's lines are `step` behind those of the one before.
struct Strip {
  const uint8_t* from;
  int64_t stride;
  int count, step;
  uint8_t* to;
  int pitch;
  int64_t ahead;       // entries
  const uint8_t* out;  // where packed codes go at last, so many bytes of each entry
  int bytes;

  // What a block of an entry `ahead` will read, and where its packed codes will go, is asked for, into the second level of caches.
  template <Type T>
  KV_MEMBER void prefetch(int t, int64_t at) const {
    const uint8_t* row = from + (t + ahead) * stride + at;
    for (int line = 0; line < (T == Type::f32 ? 128 : 64); line += 64) __builtin_prefetch(row + line, 0, 2);
  }
  KV_MEMBER void prefetch_out(int t, int at) const { __builtin_prefetch(out + (t + ahead) * bytes + at, 1, 2); }
};

// A byte per code of a block; `line` and `from` are where it begins in the first entry.
template <Type T, bool Shared, template <Type, bool> class Way>
KV_INLINE void code_blocks(const Lines& lines, const Grid& grid, const Strip& strip, int line, int64_t from, int to) {
  const int written = to * strip.bytes / strip.pitch;
  Way<T, Shared> coder(lines, grid);
  coder.aim(line);
  for (int t = 0; t < strip.count; ++t) {
    if constexpr (Shared) coder.aim(line + t * strip.step);
    strip.prefetch<T>(t, from);
    strip.prefetch_out(t, written);
    store_bytes(strip.to + t * strip.pitch + to, coder(strip.from + t * strip.stride + from));
  }
}

// A byte per two codes of four bits, of blocks in the first and in the second half of an entry.
template <Type T, bool Shared, template <Type, bool> class Way>
KV_INLINE void code_pairs(const Lines& lines, const Grid& grid, const Strip& strip, const int* line, const int64_t* from, int to) {
  Way<T, Shared> low(lines, grid), high(lines, grid);
  low.aim(line[0]);
  high.aim(line[1]);
  for (int t = 0; t < strip.count; ++t) {
    if constexpr (Shared) {
      low.aim(line[0] + t * strip.step);
      high.aim(line[1] + t * strip.step);
    }
    const uint8_t* row = strip.from + t * strip.stride;
    strip.prefetch<T>(t, from[0]);
    strip.prefetch<T>(t, from[1]);
    strip.prefetch_out(t, to);
    store_bytes(strip.to + t * strip.pitch + to, _mm256_or_si256(low(row + from[0]), _mm256_slli_epi16(high(row + from[1]), 4)));
  }
}

// Whether a block whose first line is this is on the grid in all entries.
template <bool Shared>
KV_INLINE bool on_grid(const Lines& lines, int line) {
  return Shared ? lines.all_near : Block<Shared>{lines, line}.all(lines.near);
}

// Codes of the whole blocks of rows of `width` channels, whose lines stand for `share` channels each: a byte for
// each, or for two where they come in `pairs`.
template <Type T, bool Shared>
KV_INLINE void code_rows(const Lines& lines, const Grid& grid, const Strip& strip, int width, int share, bool pairs) {
  constexpr int size = T == Type::f32 ? 4 : 2;
  if (pairs) {
    for (int d = 0; d < width / 2; d += kBlock) {
      const int channels[] = {d, d + width / 2}, line[] = {channels[0] / share, channels[1] / share};
      const int64_t from[] = {channels[0] * size, channels[1] * size};
#if defined(__AVX512BW__)
      if (on_grid<Shared>(lines, line[0]) && on_grid<Shared>(lines, line[1])) {
        code_pairs<T, Shared, Coder>(lines, grid, strip, line, from, d);
        continue;
      }
#endif
      code_pairs<T, Shared, Divider>(lines, grid, strip, line, from, d);
    }
    return;
  }
  for (int d = 0; d < width; d += kBlock) {
#if defined(__AVX512BW__)
    if (on_grid<Shared>(lines, d / share)) {
      code_blocks<T, Shared, Coder>(lines, grid, strip, d / share, d * size, d);
      continue;
    }
#endif
    code_blocks<T, Shared, Divider>(lines, grid, strip, d / share, d * size, d);
  }
}

#endif

}  // namespace
}  // namespace kvbudget
