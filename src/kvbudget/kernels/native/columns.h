// Attention weights of many queries on a block of entries: their sums over the queries, or the weights themselves.
//
// Entries are the lanes: a block of keys is expanded and transposed once into panels of two vectors, then every tile of
// queries passes over the panels that some of its queries can see (the causal half and what a window hides are skipped).
#pragma once

#include "expand.h"

namespace kvbudget {
namespace {

constexpr int kColumns = 256;  // entries per block
constexpr int kPanel = 2 * W;  // entries per panel
constexpr int kSettled = 64;   // query tiles after which sums move to a second level, so that rounding errors stay small
#if defined(KV_QUERY_TILE)
constexpr int kQueryTile = KV_QUERY_TILE;
#else
constexpr int kQueryTile = 6;
#endif

struct Columns {
  float* panels;    // [kColumns / kPanel][D][kPanel]
  float* queries;   // [kQueryTile][D]
  float* bias;      // [kColumns] log counts
  float* partial;   // [kColumns] sums of the latest tiles
  float* settled;   // [kColumns]
  int32_t* position;  // [kColumns]
  float* entry;     // [2][D]
};

KV_INLINE size_t lay_out(const Job& job, uint8_t* base, Columns& c) {
  size_t used = 0;
  const auto take = [&](size_t n) {
    uint8_t* p = base + used;
    used += (n * 4 + 63) / 64 * 64;
    return p;
  };
  const size_t D = job.key.width;
  c.panels = reinterpret_cast<float*>(take(D * kColumns));
  c.queries = reinterpret_cast<float*>(take(D * kQueryTile));
  c.bias = reinterpret_cast<float*>(take(kColumns));
  c.partial = reinterpret_cast<float*>(take(kColumns));
  c.settled = reinterpret_cast<float*>(take(kColumns));
  c.position = reinterpret_cast<int32_t*>(take(kColumns));
  c.entry = reinterpret_cast<float*>(take(2 * D));
  return used + 64;
}

size_t column_bytes(const Job& job) {
  Columns c{};
  return lay_out(job, nullptr, c);
}

// What the queries of a tile may see: in-row entries up to `last`, positions above `above`.
struct Sight {
  int64_t last[kQueryTile];
  int64_t above[kQueryTile];
  float lse[kQueryTile];  // +inf: not counted
  int64_t furthest, nearest;   // extremes of last
  int64_t lowest, highest;     // extremes of above
  bool counted;
};

KV_INLINE Sight sight(const Job& job, int row, int first, int count, const float* lse) {
  Sight s{};
  s.furthest = s.highest = INT64_MIN;
  s.nearest = s.lowest = INT64_MAX;
  for (int i = 0; i < kQueryTile; ++i) {
    const int m = first + (i < count ? i : count - 1), step = m % job.steps;
    s.last[i] = job.lengths[row] - 1 - (job.causal_tail > 1 ? job.causal_tail - 1 - step : 0);
    s.above[i] = job.window > 0 ? job.query_positions[static_cast<int64_t>(row) * job.steps + step] - job.window : INT32_MIN;
    const bool counts = i < count && lse[m] > -__builtin_inff() && lse[m] < __builtin_inff();
    s.lse[i] = counts ? lse[m] : __builtin_inff();
    s.counted |= counts;
    s.furthest = s.last[i] > s.furthest ? s.last[i] : s.furthest;
    s.nearest = s.last[i] < s.nearest ? s.last[i] : s.nearest;
    s.lowest = s.above[i] < s.lowest ? s.above[i] : s.lowest;
    s.highest = s.above[i] > s.highest ? s.above[i] : s.highest;
  }
  return s;
}

KV_INLINE void load_block(const Job& job, const Columns& c, int row, int64_t begin, int n) {
  const int D = job.key.width;
  for (int t = 0; t < padded(n, kPanel); ++t) {
    float* to = c.panels + static_cast<size_t>(t / kPanel) * D * kPanel + t % kPanel;
    if (t < n) expand_entry(job.key, row, begin + t, c.entry, c.entry + D);
    for (int d = 0; d < D; ++d) to[d * kPanel] = t < n ? c.entry[d] : 0.0f;
    const int64_t at = job.entry_starts ? job.entry_starts[row] + begin + t : 0;
    c.bias[t] = job.log_count && t < n ? job.log_count[at] : 0.0f;
    c.position[t] = 0;
    if (job.window > 0 && t < n)
      c.position[t] = job.wide_positions ? static_cast<int32_t>(reinterpret_cast<const i64_memory*>(job.positions)[at])
                                         : reinterpret_cast<const i32_memory*>(job.positions)[at];
  }
}

// Logits of a tile of queries on one panel: out [kQueryTile][kPanel].
KV_INLINE void panel_logits(const float* panel, const float* queries, int D, float* out) {
  vf acc[kQueryTile][2];
#pragma GCC unroll 6
  for (int m = 0; m < kQueryTile; ++m) acc[m][0] = acc[m][1] = splat(0.0f);
  for (int d = 0; d < D; ++d) {
    const vf a = load(panel + d * kPanel), b = load(panel + d * kPanel + W);
#pragma GCC unroll 6
    for (int m = 0; m < kQueryTile; ++m) {
      const vf q = splat(queries[m * D + d]);
      acc[m][0] += q * a;
      acc[m][1] += q * b;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kQueryTile; ++m) {
    store(out + m * kPanel, acc[m][0]);
    store(out + m * kPanel + W, acc[m][1]);
  }
}

// One block of at most kColumns entries of a row. sums [end - begin] or weights (of entry `begin`, row after row of queries
// `length` apart); either may be null.
void columns(const Job& job, int row, int64_t begin, int64_t end, uint8_t* scratch, const float* lse, float* sums, float* weights) {
  Columns c{};
  lay_out(job, scratch, c);
  const int D = job.key.width, n = static_cast<int>(end - begin), span = padded(n, kPanel);
  const int64_t length = job.lengths[row];
  load_block(job, c, row, begin, n);
  for (int t = 0; t < span; ++t) c.partial[t] = c.settled[t] = 0.0f;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
  int tiles = 0;
  for (int first = 0; first < job.queries; first += kQueryTile) {
    const int count = job.queries - first < kQueryTile ? job.queries - first : kQueryTile;
    const Sight s = sight(job, row, first, count, lse);
    if (weights)
      for (int m = 0; m < count; ++m) std::memset(weights + (first + m) * length, 0, sizeof(float) * n);
    if (!s.counted || s.furthest < begin) continue;
    to_float(job.query, job.query_type, (static_cast<int64_t>(row) * job.queries + first) * D, count * D, c.queries);
    for (int i = 0; i < count * D; ++i) c.queries[i] *= job.scale;
    for (int i = count * D; i < kQueryTile * D; ++i) c.queries[i] = 0.0f;
    for (int p = 0; p < span && begin + p <= s.furthest; p += kPanel) {
      vi position[2];
      bool hidden = begin + p + kPanel - 1 > s.nearest || p + kPanel > n;
      if (job.window > 0) {
        int32_t least = INT32_MAX, most = INT32_MIN;
        for (int i = p; i < p + kPanel && i < n; ++i) {
          least = c.position[i] < least ? c.position[i] : least;
          most = c.position[i] > most ? c.position[i] : most;
        }
        if (most <= s.lowest) continue;
        hidden |= least <= s.highest;
        std::memcpy(position, c.position + p, sizeof(position));
      }
      alignas(32) float logits[kQueryTile * kPanel];
      panel_logits(c.panels + static_cast<size_t>(p) * D, c.queries, D, logits);
      vf total[2] = {load(c.partial + p), load(c.partial + p + W)};
      for (int m = 0; m < kQueryTile; ++m)
        for (int v = 0; v < 2; ++v) {
          vf x = load(logits + m * kPanel + v * W);
          if (job.softcap > 0.0f) x = vtanh(x * splat(1.0f / job.softcap)) * splat(job.softcap);
          x += load(c.bias + p + v * W);
          x = vexp(x - splat(s.lse[m]));
          if (hidden) {
            const int64_t visible = s.last[m] - begin - p - v * W;
            const int bound = static_cast<int>(visible < n - p - v * W - 1 ? visible : n - p - v * W - 1);
            vi seen = lane <= bound;
            if (job.window > 0) seen &= position[v] > static_cast<int32_t>(s.above[m]);
            x = (vf)((vi)x & seen);
          }
          total[v] += x;
          if (weights && m < count)
            for (int i = 0; i < W && p + v * W + i < n; ++i) weights[(first + m) * length + p + v * W + i] = x[i];
        }
      store(c.partial + p, total[0]);
      store(c.partial + p + W, total[1]);
    }
    if (++tiles % kSettled == 0)
      for (int t = 0; t < span; t += W) {
        store(c.settled + t, load(c.settled + t) + load(c.partial + t));
        store(c.partial + t, splat(0.0f));
      }
  }
  if (sums)
    for (int t = 0; t < n; ++t) sums[t] = c.settled[t] + c.partial[t];
}

}  // namespace
}  // namespace kvbudget
