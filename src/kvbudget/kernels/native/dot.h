// Logit micro-kernels: dot products of a few queries with rows of keys, codes entering as they are stored.
#pragma once

#include <type_traits>

#include "codec.h"

namespace kvbudget {
namespace {

// Per-entry factors of the groups of channels (per-token keys with several groups): row t's lanes at data + t * stride,
// vector v belongs to group `group_of[v]`.
struct LaneScales {
  const float* data;  // [groups][rows], or [groups][rows * W / C::entries]: repeated for the lanes of its row
  int64_t stride;     // between groups
  const int* group_of;
};

// Rows that follow each other at equal distances, as vectors of rows.
struct Rows {
  const uint8_t* base;
  int64_t step;
  int64_t ahead;  // bytes from here to what is to be fetched from memory meanwhile; 0: nothing
  const uint8_t* at(int64_t t) const { return base + t * step; }
};

// Accumulators of R vectors-of-rows (R * C::entries rows) and MT queries, which begin at `start`.
template <class C, int MT, int R, bool Scaled>
KV_INLINE void dot_tile(const Rows& rows, const float* q, int64_t q_stride, int chunks, const float* start,
                        const LaneScales& scales, int64_t first, vf (&acc)[MT][R]) {
  for (int m = 0; m < MT; ++m)
    for (int e = 0; e < R; ++e) acc[m][e] = splat(start[m]);
  for (int c = 0; c < chunks; ++c) {
#pragma GCC unroll 32
    for (int s = 0; s < C::steps; ++s) {
      vf x[MT];
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) {
        x[m] = load(q + m * q_stride + (c * C::steps + s) * W);
        if constexpr (MT == 4 && !C::codes) pin(x[m]);
      }
#pragma GCC unroll 4
      for (int e = 0; e < R; ++e) {
        vf k = C::get(rows.at(e) + c * C::chunk, s);
        if constexpr (Scaled) {
          const float* group = scales.data + scales.group_of[c * C::steps + s] * scales.stride;
          if constexpr (C::entries == 1)
            k *= splat(group[first + e]);
          else
            k *= load(group + (first + e * C::entries) * (W / C::entries));
        }
#pragma GCC unroll 4
        for (int m = 0; m < MT; ++m) acc[m][e] += x[m] * k;
      }
    }
  }
}

KV_INLINE void store4(float* p, vf halves) {
  typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
  vf s = halves + KV_SHUFFLE(halves, halves, 4, 5, 6, 7, 0, 1, 2, 3);
  *reinterpret_cast<v4*>(p) = v4{s[0], s[1], s[2], s[3]};
}

// Writes the sums of four accumulators, which stand for 4 * entries consecutive rows. May write lanes past the last row.
template <int Entries>
KV_INLINE void store_sums(float* p, vf a, vf b, vf c, vf d) {
  if constexpr (Entries == 4) {  // pairs of lanes per row
    const vf x[4] = {a, b, c, d};
    for (int e = 0; e < 4; ++e)
      for (int i = 0; i < 4; ++i) p[4 * e + i] = x[e][2 * i] + x[e][2 * i + 1];
  } else {
    vf halves = quad_sums(a, b, c, d);
    if constexpr (Entries == 1)
      store4(p, halves);
    else
      store(p, KV_SHUFFLE(halves, halves, 0, 4, 1, 5, 2, 6, 3, 7));
  }
}

template <class C, int MT, bool Scaled>
void dot_rows(Rows rows, int n, const float* q, int64_t q_stride, int chunks, const float* start, const LaneScales& scales,
              int64_t first, float* out, int64_t out_stride) {
  // MT * R accumulators, MT queries and one key fit in sixteen registers, and a word of codes per row where it serves many steps.
  constexpr int R = MT == 4 || (MT == 3 && C::codes) ? 2 : 4;
  for (int t = 0; t < n; t += 4 * C::entries, rows.base += 4 * rows.step) {
    if (rows.ahead)
      for (int64_t p = 0; p < 4 * rows.step; p += 64) __builtin_prefetch(rows.base + rows.ahead + p, 0, 2);
    vf acc[4 / R][MT][R];
    for (int half = 0; half < 4 / R; ++half)
      dot_tile<C, MT, R, Scaled>({rows.at(half * R), rows.step, 0}, q, q_stride, chunks, start, scales,
                                 first + t + half * R * C::entries, acc[half]);
    for (int m = 0; m < MT; ++m)
      store_sums<C::entries>(out + m * out_stride + t, acc[0][m][0], acc[0][m][1], acc[4 / R - 1][m][R - 2],
                             acc[4 / R - 1][m][R - 1]);
  }
}

// The largest register tile: sixteen vector registers of eight lanes hold four queries, of four lanes only two.
#if !defined(KV_QUERY_TILE)
#define KV_QUERY_TILE 4
#endif

// How many of the remaining queries the next register tile takes.
KV_INLINE int next_tile(int remaining) {
  if (KV_QUERY_TILE < 4) return remaining < KV_QUERY_TILE ? remaining : KV_QUERY_TILE;
  return remaining % 4 == 0 ? 4 : remaining < 3 ? remaining : 3;
}

// Calls body(m, MT) for every register tile of MT queries from m on.
template <class Body>
KV_INLINE void with_tiles(int queries, Body&& body) {
  for (int m = 0; m < queries;) {
    const int tile = next_tile(queries - m);
    if (tile == 1) body(m, std::integral_constant<int, 1>{});
    if (tile == 2) body(m, std::integral_constant<int, 2>{});
    if constexpr (KV_QUERY_TILE == 4) {
      if (tile == 3) body(m, std::integral_constant<int, 3>{});
      if (tile == 4) body(m, std::integral_constant<int, 4>{});
    }
    m += tile;
  }
}

template <class C, bool Scaled>
void dot_queries(Rows rows, int n, const float* q, int64_t q_stride, int queries, int chunks, const float* start,
                 const LaneScales& scales, int64_t first, float* out, int64_t out_stride) {
  for (int m = 0; m < queries;) {
    int tile = next_tile(queries - m);
    if (Scaled && tile == 3) tile = 2;
    const float* at = q + m * q_stride;
    float* to = out + m * out_stride;
    if (tile == 1) dot_rows<C, 1, Scaled>(rows, n, at, q_stride, chunks, start + m, scales, first, to, out_stride);
    if (tile == 2) dot_rows<C, 2, Scaled>(rows, n, at, q_stride, chunks, start + m, scales, first, to, out_stride);
    if constexpr (KV_QUERY_TILE == 4 && !Scaled)
      if (tile == 3) dot_rows<C, 3, Scaled>(rows, n, at, q_stride, chunks, start + m, scales, first, to, out_stride);
    if constexpr (KV_QUERY_TILE == 4)
      if (tile == 4) dot_rows<C, 4, Scaled>(rows, n, at, q_stride, chunks, start + m, scales, first, to, out_stride);
    m += tile;
    rows.ahead = 0;
  }
}

// Logits of n rows, of which those up to the next multiple of 4 * entries must be readable; writes up to 4 * entries - 1 lanes
// past n. start [queries]: what every lane of an accumulator begins with.
KV_INLINE void dot(Codec codec, const Rows& rows, int n, const float* q, int64_t q_stride, int queries, int chunks,
                   const float* start, const LaneScales* scales, int64_t first, float* out, int64_t out_stride) {
  with_codec(codec, [&](auto c) {
    using C = decltype(c);
    if constexpr (C::codes) {
      if (scales)
        return dot_queries<C, true>(rows, n, q, q_stride, queries, chunks, start, *scales, first, out, out_stride);
    }
    // Other codes without factors per group of channels are read by lanes.h.
    if constexpr (!C::codes || C::entries == 4)
      dot_queries<C, false>(rows, n, q, q_stride, queries, chunks, start, LaneScales{}, first, out, out_stride);
  });
}

}  // namespace
}  // namespace kvbudget
