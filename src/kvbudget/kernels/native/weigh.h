// Weighted-sum micro-kernels: attention weights times rows of values, codes entering as they are stored.
#pragma once

#include "dot.h"

namespace kvbudget {
namespace {

// Weights of all queries. entries == 1: the weight of row t stands at m * stride + t and is broadcast to all lanes.
// Otherwise the weights are repeated for the lanes of their entry, a vector of them per vector of rows.
struct Weights {
  const float* data;
  int64_t stride;        // between queries
  int64_t group_stride;  // between groups of channels
};

// acc[m * acc_stride + v * W ...] += sum over n rows of weight * vector v.
template <class C, int MT>
void weigh_rows(const Rows& rows, int n, const Weights& w, const int* group_of, int chunks, float* acc, int64_t acc_stride) {
  constexpr int V = MT == 4 || C::steps < 4 ? 2 : 4;  // vectors per register tile
  for (int c = 0; c < chunks; ++c) {
#pragma GCC unroll 16
    for (int s = 0; s < C::steps; s += V) {
      float* to = acc + (c * C::steps + s) * W;
      const float* weights = w.data + (group_of ? group_of[c * C::steps + s] * w.group_stride : 0);
      vf x[MT][V];
      for (int m = 0; m < MT; ++m)
        for (int i = 0; i < V; ++i) x[m][i] = load(to + m * acc_stride + i * W);
      const uint8_t* row = rows.base + c * C::chunk;
#pragma GCC unroll 2
      for (int t = 0; t < n; ++t, row += rows.step) {
        if (s == 0)
          for (int i = 0; i < C::chunk; i += 64) __builtin_prefetch(row + rows.ahead + i, 0, 2);
        vf p[MT];
#pragma GCC unroll 4
        for (int m = 0; m < MT; ++m) {
          if constexpr (C::entries == 1)
            p[m] = splat(weights[m * w.stride + t]);
          else
            p[m] = load(weights + m * w.stride + t * W);
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
          // Twelve accumulators leave no register for a word of codes: one that waits for its next mask would push an
          // accumulator out to memory, and the chain of additions through it.
          if constexpr (MT * V > 8) hide(row);
          const vf v = C::get(row, s + i);
#pragma GCC unroll 4
          for (int m = 0; m < MT; ++m) x[m][i] += p[m] * v;
        }
      }
      for (int m = 0; m < MT; ++m)
        for (int i = 0; i < V; ++i) store(to + m * acc_stride + i * W, x[m][i]);
    }
  }
}

// rows: n vectors of rows.
KV_INLINE void weigh(Codec codec, const Rows& rows, int n, const Weights& w, const int* group_of, int queries, int chunks,
                     float* acc, int64_t acc_stride) {
  with_codec(codec, [&](auto c) {
    with_tiles(queries, [&](int m, auto tile) {
      const Weights part{w.data + m * w.stride, w.stride, w.group_stride};
      weigh_rows<decltype(c), decltype(tile)::value>(rows, n, part, group_of, chunks, acc + m * acc_stride, acc_stride);
    });
  });
}

}  // namespace
}  // namespace kvbudget
