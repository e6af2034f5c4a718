// Attention of one row's queries over a range of its entries: logits, running softmax and weighted sum, block by block.
#pragma once

#include "codebook.h"
#include "limbs.h"
#include "weigh.h"

namespace kvbudget {
namespace {

constexpr int kTile = 32;  // entries whose rows stay in the first-level cache while all queries use them
constexpr int kBytes = 8192;  // values that stay there while one part of their channels after the other is weighed
constexpr float kInfinity = __builtin_inff();

// Rows of an operand as the micro-kernels read them.
struct Side {
  Order order;
  int chunks;
  int lanes;             // vectors * W
  int groups;            // of channels per entry (per-token codes), else 1
  int* channel;          // [lanes]
  float* unit;           // [lanes] 1 / factor; 0 in padded lanes
  int* group_of;         // [vectors]
  float* scale;          // per-token: [groups][block + W]; per-channel: [lanes] of the current group
  float* zero;           // the same
  float* meta;           // conversion buffer
  float* expanded;       // [kTile][lanes] for operands without a direct form
  uint8_t* copied;       // [kTile + 4 * W] rows that are gathered, widened, or read past the range
  int words;             // keys that lanes.h reads: words per row; else 0
  uint32_t* turned;      // [8][kLanes]
  bool limbs;            // values that limbs.h reads: their sums are in the order of channels
  Table table;           // of codebook operands
};

struct State {
  Side key, value;
  float* query;        // [M, D] float32, scaled
  float* permuted;     // [M, lanes]
  float* scaled;       // [M, lanes] times the group's scales (per-channel keys)
  float* query_sums;   // [M, groups]
  float* bias;         // [M]
  float* key_step;     // [M] of the limbs in `scaled` (per-channel keys) or `permuted`
  float* value_step;   // [groups][M] of the limbs in `weights`
  float* logits;       // [M, block + 16]
  float* weights;      // value weights, see weigh.h
  float* sums;         // [M, lanes of the value]
  float* group_sums;   // the same for the current group of per-channel values
  float* zero_sums;    // [M, groups]
  float* top;          // [M]
  float* total;        // [M]
  int block;
};

struct Arena {
  uint8_t* base;
  size_t used;
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// Of a row as the micro-kernels read it.
KV_INLINE int64_t row_bytes(const Operand& x) {
  if (x.kind == Kind::dense) return static_cast<int64_t>(x.width) * type_bytes(x.type);
  return x.bits == 3 ? packed_bytes(x.width, kernel_bits(x)) : x.stride;
}

KV_INLINE void copy_row(const Operand& x, const uint8_t* row, int64_t bytes, uint8_t* to) {
  if (x.bits == 3)
    widen(row, x.width, to);
  else
    std::memcpy(to, row, bytes);
}

KV_INLINE void lay_out(const Operand& x, int queries, int block, Arena& arena, Side& side) {
  side.order = order_of(x);
  side.lanes = side.order.vectors * W;
  side.chunks = side.order.vectors / side.order.steps;
  const bool direct = side.order.codec != Codec::expand;
  side.groups = direct && x.kind == Kind::token ? x.width / x.group : 1;
  side.channel = arena.take<int>(side.lanes);
  side.unit = arena.take<float>(side.lanes);
  side.group_of = arena.take<int>(side.order.vectors);
  const size_t meta = direct && x.kind == Kind::token ? static_cast<size_t>(side.groups) * (block + W) : x.width;
  const size_t repeat = side.order.entries > 1 ? W : 1;
  side.scale = arena.take<float>(direct && x.kind == Kind::token ? meta * repeat : side.lanes);
  side.zero = arena.take<float>(direct && x.kind == Kind::token ? meta : side.lanes);
  side.meta = arena.take<float>(meta);
  side.expanded = arena.take<float>(direct ? 0 : static_cast<size_t>(kTile) * side.lanes);
  side.copied = arena.take<uint8_t>(direct ? static_cast<size_t>(kTile + 4 * W) * row_bytes(x) : 0);
  side.words = lane_words(x);
  side.turned = arena.take<uint32_t>(side.words && !kLimbs ? 8 * kLanes : 0);
  if (!by_table(x)) return;
  side.table.sums = arena.take<float>(W * lane_groups(queries) * table_size(x.book));
  side.table.lanes = arena.take<float>(W * x.width);
  side.table.means = arena.take<float>(queries);
  side.table.shifted = arena.take<float>(queries * x.width);
  side.table.mean = arena.take<float>(x.width);
}

// How often a weight stands in memory: once per group of channels, repeated for the lanes of its entry.
KV_INLINE int copies_of(const Operand& x) {
  const Order o = order_of(x);
  if (o.codec == Codec::expand || x.kind == Kind::dense) return 1;
  return (x.kind == Kind::token ? x.width / x.group : 1) * (o.entries > 1 ? W / o.entries : 1);
}

// Entries per block: the weights of all queries stay within 16 KiB.
KV_INLINE int block_of(const Job& job) {
  const int copies = job.queries * (job.value.data ? copies_of(job.value) : 1);
  return copies <= 16 ? 256 : copies <= 32 ? 128 : 64;
}

KV_INLINE size_t lay_out(const Job& job, uint8_t* base, State& s) {
  Arena arena{base, 0};
  const size_t M = job.queries;
  s.block = block_of(job);
  lay_out(job.key, job.queries, s.block, arena, s.key);
  s.query = arena.take<float>(M * job.key.width);
  s.permuted = arena.take<float>(M * s.key.lanes);
  s.scaled = arena.take<float>(M * s.key.lanes);
  s.query_sums = arena.take<float>(M * s.key.groups);
  s.bias = arena.take<float>(M);
  s.key_step = arena.take<float>(kLimbs ? M : 0);
  s.logits = arena.take<float>(M * (s.block + 16));
  s.top = arena.take<float>(M);
  s.total = arena.take<float>(M);
  if (job.value.data) {
    lay_out(job.value, job.queries, s.block, arena, s.value);
    s.value.limbs = kLimbs && has_limbs(job.value);
    s.weights = arena.take<float>(M * copies_of(job.value) * (s.block + W));
    s.sums = arena.take<float>(M * s.value.lanes);
    s.group_sums = arena.take<float>(M * s.value.lanes);
    s.zero_sums = arena.take<float>(M * s.value.groups);
    s.value_step = arena.take<float>(kLimbs ? M * s.value.groups : 0);
  }
  return arena.used + 64;
}

size_t scratch_bytes(const Job& job) {
  State s{};
  return lay_out(job, nullptr, s);
}

KV_INLINE void describe(const Operand& x, Side& side) {
  if (side.limbs) {
    for (int d = 0; d < side.lanes; ++d) {
      side.channel[d] = d < x.width ? d : 0;
      side.unit[d] = d < x.width ? 1.0f : 0.0f;
    }
    return;
  }
  const Order& o = side.order;
  const bool direct = o.codec != Codec::expand;
  for (int v = 0; v < o.vectors; ++v) {
    const float unit = 1.0f / o.factor(v);
    for (int i = 0; i < W; ++i) {
      const int c = o.channel(v, i);
      side.channel[v * W + i] = c < x.width ? c : 0;
      side.unit[v * W + i] = c < x.width ? unit : 0.0f;
    }
    side.group_of[v] = direct && x.kind == Kind::token ? o.channel(v, 0) / x.group : 0;
  }
}

KV_INLINE int64_t skipped(const Operand& x, int row) { return x.skip ? x.skip[row] : 0; }

// Asks for memory that the next block will read: its many short streams are more than the hardware follows.
KV_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
  const uint8_t* const end = p + bytes;
  for (; p + 192 < end; p += 256) {
    __builtin_prefetch(p, 0, 2);
    __builtin_prefetch(p + 64, 0, 2);
    __builtin_prefetch(p + 128, 0, 2);
    __builtin_prefetch(p + 192, 0, 2);
  }
  for (; p < end; p += 64) __builtin_prefetch(p, 0, 2);
}

// n rows from entry t on (n <= kTile), and readable ones up to the next multiple of `whole`; expands, gathers or copies where
// it must.
KV_INLINE Rows point(const Operand& x, Side& side, int row, int64_t t, int n, int64_t end, int ahead, int whole) {
  const Order& o = side.order;
  if (o.codec == Codec::expand) {
    expand_entries(x, row, t, n, side.expanded, side.lanes, side.meta);
    for (int i = 0; i < n && x.width < side.lanes; ++i)
      for (int d = x.width; d < side.lanes; ++d) side.expanded[static_cast<size_t>(i) * side.lanes + d] = 0.0f;
    return {reinterpret_cast<const uint8_t*>(side.expanded), static_cast<int64_t>(sizeof(float)) * side.lanes, 0};
  }
  const int64_t start = x.kind == Kind::channel ? x.starts[row] * x.group + skipped(x, row) : x.starts[row];
  const int64_t bytes = row_bytes(x);
  if (x.index) {
    const int64_t* index = x.index + x.index_starts[row] + t;
    for (int i = 0; i < n; ++i) {
      if (t + i + kTile < end) prefetch(x.data + (start + index[i + kTile]) * x.stride, bytes);
      copy_row(x, x.data + (start + index[i]) * x.stride, bytes, side.copied + i * bytes);
    }
    return {side.copied, bytes, 0};
  }
  const uint8_t* base = x.data + (start + t) * x.stride;
  const int64_t left = end - t - ahead;
  if (x.bits != 3 && t + padded(n, whole) <= end) return {base, o.entries * x.stride, left >= n ? ahead * x.stride : 0};
  if (left > 0) prefetch(base + ahead * x.stride, (left < n ? left : n) * x.stride);
  for (int i = 0; i < n; ++i) copy_row(x, base + i * x.stride, bytes, side.copied + i * bytes);
  std::memset(side.copied + n * bytes, 0, (padded(n, whole) - n) * bytes);
  return {side.copied, o.entries * bytes, 0};
}

// in [n, groups] to out [groups, stride]; reads and writes up to W - 1 entries past n.
KV_INLINE void deinterleave(const float* in, int n, int groups, int64_t stride, float* out) {
  if (groups == 2) {
    for (int t = 0; t < n; t += W) {
      const vf a = load(in + 2 * t), b = load(in + 2 * t + W);
      store(out + t, KV_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
      store(out + stride + t, KV_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
    }
  } else if (groups == 4) {
    for (int t = 0; t < n; t += W) {
      const float* from = in + 4 * t;
      const vf a = load(from), b = load(from + 8), c = load(from + 16), d = load(from + 24);
      const vf ab_even = KV_SHUFFLE(a, b, 0, 4, 8, 12, 2, 6, 10, 14), ab_odd = KV_SHUFFLE(a, b, 1, 5, 9, 13, 3, 7, 11, 15);
      const vf cd_even = KV_SHUFFLE(c, d, 0, 4, 8, 12, 2, 6, 10, 14), cd_odd = KV_SHUFFLE(c, d, 1, 5, 9, 13, 3, 7, 11, 15);
      store(out + t, KV_SHUFFLE(ab_even, cd_even, 0, 1, 2, 3, 8, 9, 10, 11));
      store(out + stride + t, KV_SHUFFLE(ab_odd, cd_odd, 0, 1, 2, 3, 8, 9, 10, 11));
      store(out + 2 * stride + t, KV_SHUFFLE(ab_even, cd_even, 4, 5, 6, 7, 12, 13, 14, 15));
      store(out + 3 * stride + t, KV_SHUFFLE(ab_odd, cd_odd, 4, 5, 6, 7, 12, 13, 14, 15));
    }
  } else {
    for (int j = 0; j < groups; ++j)
      for (int t = 0; t < n; ++t) out[j * stride + t] = in[t * groups + j];
  }
}

// Scales or zeros of n entries of per-token codes, as [groups][block + W] float32.
KV_INLINE void token_meta(const Operand& x, Side& side, const uint8_t* meta, int row, int64_t t, int n, int block, float* out) {
  const int groups = side.groups;
  if (x.index) {
    const int64_t* index = x.index + x.index_starts[row] + t;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < groups; ++j) out[j * (block + W) + i] = element(meta, x.type, (x.starts[row] + index[i]) * groups + j);
  } else {
    float* flat = groups == 1 ? out : side.meta;
    to_float(meta, x.type, (x.starts[row] + t) * groups, n * groups, flat);
    prefetch(meta + (x.starts[row] + t + n) * groups * type_bytes(x.type), static_cast<int64_t>(n) * groups * type_bytes(x.type));
    if (groups > 1) deinterleave(flat, n, groups, block + W, out);
  }
  for (int j = 0; j < groups; ++j)
    for (int i = n; i < padded(n, W); ++i) out[j * (block + W) + i] = 0.0f;
}

KV_INLINE void prepare_query(const Job& job, State& s, int row) {
  const int M = job.queries, D = job.key.width, lanes = s.key.lanes;
  describe(job.key, s.key);
  to_float(job.query, job.query_type, static_cast<int64_t>(row) * M * D, M * D, s.query);
  for (int i = 0; i < M * D; ++i) s.query[i] *= job.scale;
  if (s.key.words && !kLimbs) lay_lanes(s.query, M, D, s.key.words, kernel_bits(job.key), s.permuted);
  if (s.key.words && kLimbs) scale_limbs(s.query, nullptr, nullptr, M, D, s.permuted, s.key_step, s.bias);
  for (int m = 0; m < M; ++m) {
    const float* q = s.query + m * D;
    if (!s.key.words)
      for (int i = 0; i < lanes; ++i) s.permuted[m * lanes + i] = q[s.key.channel[i]] * s.key.unit[i];
    if (job.key.kind == Kind::token)
      for (int j = 0; j < s.key.groups; ++j) {
        float total = 0.0f;
        const int span = D / s.key.groups;
        for (int i = 0; i < span; ++i) total += q[j * span + i];
        s.query_sums[m * s.key.groups + j] = total;
      }
  }
  if (by_table(job.key))
    for (int first = 0; first < M; first += W) fill_table(job.key, row, s.query, M, first, s.key.table);
}

// Scales the queries for one group of entries of per-channel keys; its zeros become one bias per query.
KV_INLINE void prepare_group(const Job& job, State& s, int64_t group) {
  const Operand& x = job.key;
  const int M = job.queries, D = x.width, lanes = s.key.lanes;
  const int64_t bytes = static_cast<int64_t>(D) * type_bytes(x.type);
  prefetch(x.zero + (group + 1) * bytes, bytes);
  prefetch(x.scale + (group + 1) * bytes, bytes);
  to_float(x.zero, x.type, group * D, D, s.key.zero);
  to_float(x.scale, x.type, group * D, D, s.key.meta);
  if (s.key.words && kLimbs) return scale_limbs(s.query, s.key.meta, s.key.zero, M, D, s.scaled, s.key_step, s.bias);
  if (s.key.words) return scale_lanes(s.permuted, s.query, s.key.meta, s.key.zero, M, D, s.scaled, s.bias);
  const float share = static_cast<float>(s.key.order.entries) / W;  // the lanes of an entry add it up again
  permute(s.key.order, s.key.meta, s.key.scale);
  for (int m = 0; m < M; ++m) {
    vf bias = {};
    for (int i = 0; i < D; i += W) bias += load(s.query + m * D + i) * load(s.key.zero + i);
    s.bias[m] = sum(bias) * share;
    for (int i = 0; i < lanes; i += W)
      store(s.scaled + m * lanes + i, load(s.permuted + m * lanes + i) * load(s.key.scale + i));
  }
}

// Logits of n entries from t on, scaled, capped, biased and masked: s.logits[m, 0 : n], -inf up to a multiple of W.
KV_INLINE void block_logits(const Job& job, State& s, int row, int64_t t, int n, int64_t end) {
  const Operand& x = job.key;
  Side& side = s.key;
  const int M = job.queries, stride = s.block + 16;
  const bool direct = side.order.codec != Codec::expand;
  const bool token = direct && x.kind == Kind::token, channel = direct && x.kind == Kind::channel;
  if (token) {
    token_meta(x, side, x.scale, row, t, n, s.block, side.scale);
    token_meta(x, side, x.zero, row, t, n, s.block, side.zero);
  }
  LaneScales scales{side.scale, s.block + W, side.group_of};
  const float* repeated = side.scale;
  if (token && side.groups > 1 && side.order.entries > 1) {
    const int repeat = W / side.order.entries;
    float* to = side.scale + static_cast<size_t>(side.groups) * (s.block + W);
    for (int j = 0; j < side.groups; ++j)
      for (int i = 0; i < padded(n, W); ++i)
        for (int l = 0; l < repeat; ++l) to[(j * (s.block + W) + i) * repeat + l] = side.scale[j * (s.block + W) + i];
    repeated = to;
    scales = {repeated, (s.block + W) * repeat, side.group_of};
  }
  if (!channel)
    for (int m = 0; m < M; ++m) s.bias[m] = 0.0f;
  if (by_table(x)) table_logits(x, side.table, s.query, M, row, t, n, s.logits, stride);
  for (int at = by_table(x) ? n : 0; at < n;) {
    int count = n - at < kTile ? n - at : kTile;
    const float* q = s.permuted;
    if (channel) {
      const int64_t u = t + at + skipped(x, row), group = u / x.group, left = (group + 1) * x.group - u;
      if (left < count) count = static_cast<int>(left);
      if (at == 0 || u % x.group == 0) prepare_group(job, s, x.starts[row] + group);
      q = s.scaled;
    }
    const Rows rows = point(x, side, row, t + at, count, end, s.block, side.words ? kLanes : 4 * side.order.entries);
    if (side.words && kLimbs)
      dot_limbs(kernel_bits(x), rows, count, q, x.width, M, side.words, s.key_step, s.bias, s.logits + at, stride);
    else if (side.words)
      dot_lanes(kernel_bits(x), rows, count, q, x.width, M, side.words, s.bias, side.turned, s.logits + at, stride);
    else
      dot(side.order.codec, rows, count, q, side.lanes, M, side.chunks, s.bias,
          token && side.groups > 1 ? &scales : nullptr, at, s.logits + at, stride);
    at += count;
  }
  for (int m = 0; m < M; ++m) {
    float* l = s.logits + m * stride;
    if (token) {
      const float* sums = s.query_sums + m * side.groups;
      for (int i = 0; i < n; i += W) {
        vf y = load(l + i);
        if (side.groups == 1) y *= load(side.scale + i);
        for (int j = 0; j < side.groups; ++j) y += load(side.zero + j * (s.block + W) + i) * splat(sums[j]);
        store(l + i, y);
      }
    }
    if (job.softcap > 0.0f)
      for (int i = 0; i < n; i += W) store(l + i, vtanh(load(l + i) * splat(1.0f / job.softcap)) * splat(job.softcap));
    if (job.log_count) {
      const float* count = job.log_count + job.entry_starts[row] + t;
      for (int i = 0; i < n; ++i) l[i] += count[i];
    }
    const int step = m % job.steps;
    if (job.causal_tail > 1) {
      const int64_t visible = job.lengths[row] - job.causal_tail + step + 1 - t;  // entries of this block that the step sees
      for (int64_t i = visible < 0 ? 0 : visible; i < n; ++i) l[i] = -kInfinity;
    }
    if (job.window > 0) {
      const int64_t above = job.query_positions[static_cast<int64_t>(row) * job.steps + step] - job.window;
      const int64_t first = job.entry_starts[row] + t;
      if (job.wide_positions) {
        const i64_memory* p = reinterpret_cast<const i64_memory*>(job.positions) + first;
        for (int i = 0; i < n; ++i) l[i] = p[i] > above ? l[i] : -kInfinity;
      } else {
        const i32_memory* p = reinterpret_cast<const i32_memory*>(job.positions) + first;
        for (int i = 0; i < n; ++i) l[i] = p[i] > above ? l[i] : -kInfinity;
      }
    }
    for (int i = n; i < padded(n, W); ++i) l[i] = -kInfinity;
  }
}

KV_INLINE void scale_by(float* p, int n, float factor) {
  for (int i = 0; i < n; ++i) p[i] *= factor;
}

// Turns s.logits into unnormalized weights against the running maximum.
KV_INLINE void block_softmax(const Job& job, State& s, int n) {
  const int stride = s.block + 16;
  for (int m = 0; m < job.queries; ++m) {
    float* l = s.logits + m * stride;
    vf most = load(l);
    for (int i = W; i < n; i += W) most = vmax(most, load(l + i));
    float top = most[0];
    for (int i = 1; i < W; ++i) top = most[i] > top ? most[i] : top;
    if (top > s.top[m]) {
      if (s.top[m] > -kInfinity) {
        const float factor = vexp(splat(s.top[m] - top))[0];
        s.total[m] *= factor;
        scale_by(s.sums + m * s.value.lanes, s.value.lanes, factor);
        scale_by(s.zero_sums + m * s.value.groups, s.value.groups, factor);
        if (by_table(job.value)) shrink(job.value, s.value.table, m, factor);
      }
      s.top[m] = top;
    }
    const vf base = splat(s.top[m] > -kInfinity ? s.top[m] : 0.0f);
    vf total = splat(0.0f);
    for (int i = 0; i < n; i += W) {
      vf p = vexp(load(l + i) - base);
      total += p;
      store(l + i, p);
    }
    s.total[m] += sum(total);
  }
}

// Adds the sums of one group of per-channel values, which stand in s.group_sums, to s.sums.
KV_INLINE void flush_group(const Job& job, State& s, int64_t group, const float* weight_sums) {
  const Operand& x = job.value;
  Side& side = s.value;
  to_float(x.scale, x.type, group * x.width, x.width, side.meta);
  permute(side.order, side.meta, side.scale);
  for (int i = 0; i < side.lanes; i += W) store(side.scale + i, load(side.scale + i) * load(side.unit + i));
  to_float(x.zero, x.type, group * x.width, x.width, side.meta);
  permute(side.order, side.meta, side.zero);
  const vf share = splat(1.0f / side.order.entries);  // each of the lanes that are added up in the end brings its share
  for (int i = 0; i < side.lanes; i += W) store(side.zero + i, load(side.zero + i) * share);
  for (int m = 0; m < job.queries; ++m)
    for (int i = 0; i < side.lanes; i += W) {
      float* to = s.sums + m * side.lanes + i;
      store(to, load(to) + load(s.group_sums + m * side.lanes + i) * load(side.scale + i) + load(side.zero + i) * splat(weight_sums[m]));
    }
}

// Repeats each weight for the lanes of its entry.
KV_INLINE void repeat_lanes(vf y, int entries, float* to) {
  if (entries == 1) {
    store(to, y);
  } else if (entries == 2) {
    store(to, KV_SHUFFLE(y, y, 0, 0, 0, 0, 1, 1, 1, 1));
    store(to + 8, KV_SHUFFLE(y, y, 2, 2, 2, 2, 3, 3, 3, 3));
    store(to + 16, KV_SHUFFLE(y, y, 4, 4, 4, 4, 5, 5, 5, 5));
    store(to + 24, KV_SHUFFLE(y, y, 6, 6, 6, 6, 7, 7, 7, 7));
  } else {
    store(to, KV_SHUFFLE(y, y, 0, 0, 1, 1, 2, 2, 3, 3));
    store(to + 8, KV_SHUFFLE(y, y, 4, 4, 5, 5, 6, 6, 7, 7));
  }
}

// Weights of `count` entries, zero from there to the end of the last vector (which may hold entries of the next group).
KV_INLINE void repeat_weights(const float* p, int count, int entries, float* to) {
  for (int i = 0; i < count; i += W) {
    vf y = load(p + i);
    for (int l = count - i; l < W; ++l) y[l] = 0.0f;
    repeat_lanes(y, entries, to + i * (W / entries));
  }
}

// Weights times the scales of channel group j (per-token values), and the sums of weight * zero.
KV_INLINE void scale_weights(State& s, int j, int M, int n, int stride) {
  const Side& side = s.value;
  const int entries = side.order.entries, repeat = entries > 1 ? W / entries : 1, span = s.block + W;
  const float *scale = side.scale + j * span, *zero = side.zero + j * span;
  with_tiles(M, [&](int first, auto tile) {
    constexpr int MT = decltype(tile)::value;
    const float* p = s.logits + first * stride;
    float* to = s.weights + static_cast<size_t>(j * M + first) * span * repeat;
    vf total[MT] = {};
    for (int i = 0; i < n; i += W) {
      const vf x = load(scale + i), z = load(zero + i);
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) {
        const vf y = load(p + m * stride + i);
        total[m] += y * z;
        repeat_lanes(y * x, entries, to + m * span * repeat + i * repeat);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) s.zero_sums[(first + m) * side.groups + j] += sum(total[m]);
  });
}

KV_INLINE void block_values_by_limbs(const Job& job, State& s, int row, int64_t t, int n, int64_t end) {
  const Operand& x = job.value;
  Side& side = s.value;
  weight_limbs(s.logits, s.block + 16, job.queries, n, side.scale, side.zero, side.groups, s.block + W, s.block, s.bias, s.weights,
               s.value_step, s.zero_sums);
  for (int at = 0, count; at < n; at += count) {
    const int most = x.index || x.bits == 3 ? kTile : kBytes / static_cast<int>(x.stride) / 4 * 4;
    count = n - at < most ? n - at : most;
    if (count > kTile) count = count / 4 * 4;  // more rows than `copied` holds are read where they lie
    const Rows rows = point(x, side, row, t + at, count, end, s.block, 4);
    weigh_limbs(x, rows.base, rows.step / side.order.entries, rows.ahead, count, s.weights + at, s.block, s.value_step,
                job.queries, s.sums, side.lanes);
  }
}

KV_INLINE void block_values(const Job& job, State& s, int row, int64_t t, int n, int64_t end) {
  const Operand& x = job.value;
  Side& side = s.value;
  const int M = job.queries, stride = s.block + 16, entries = side.order.entries;
  const bool direct = side.order.codec != Codec::expand;
  if (by_table(x)) return table_weights(x, side.table, M, row, t, n, s.logits, stride);
  const bool token = direct && x.kind == Kind::token, channel = direct && x.kind == Kind::channel;
  const int repeat = entries > 1 ? W / entries : 1;
  if (token) {
    token_meta(x, side, x.scale, row, t, n, s.block, side.scale);
    token_meta(x, side, x.zero, row, t, n, s.block, side.zero);
    if (side.limbs) return block_values_by_limbs(job, s, row, t, n, end);
    for (int j = 0; j < side.groups; ++j) scale_weights(s, j, M, n, stride);
  }
  float* acc = channel ? s.group_sums : s.sums;
  if (channel) std::memset(acc, 0, sizeof(float) * M * side.lanes);
  float* weight_sums = s.bias;  // free between two blocks of keys
  for (int m = 0; m < M; ++m) weight_sums[m] = 0.0f;
  for (int at = 0; at < n;) {
    int count = n - at < kTile ? n - at : kTile;
    const int64_t u = t + at + (channel ? skipped(x, row) : 0);
    if (channel) {
      const int64_t left = (u / x.group + 1) * x.group - u;
      if (left < count) count = static_cast<int>(left);
    }
    const Rows rows = point(x, side, row, t + at, count, end, s.block, 4 * entries);
    Weights w{s.logits + at, stride, 0};
    if (token) {
      w = {s.weights + at * repeat, (s.block + W) * repeat, static_cast<int64_t>(M) * (s.block + W) * repeat};
    } else if (entries > 1) {
      for (int m = 0; m < M; ++m)
        repeat_weights(s.logits + m * stride + at, count, entries, s.weights + m * (s.block + W) * repeat);
      w = {s.weights, (s.block + W) * repeat, 0};
    }
    weigh(side.order.codec, rows, (count + entries - 1) / entries, w, side.groups > 1 ? side.group_of : nullptr, M,
          side.chunks, acc, side.lanes);
    if (channel) {
      for (int m = 0; m < M; ++m) {
        const float* p = s.logits + m * stride + at;
        float total = 0.0f;
        for (int i = 0; i < count; ++i) total += p[i];
        weight_sums[m] += total;
      }
      if ((u + count) % x.group == 0 || at + count == n) {
        flush_group(job, s, x.starts[row] + u / x.group, weight_sums);
        std::memset(acc, 0, sizeof(float) * M * side.lanes);
        for (int m = 0; m < M; ++m) weight_sums[m] = 0.0f;
      }
    }
    at += count;
  }
}

KV_INLINE void finish(const Job& job, State& s, float* out, float* lse) {
  const Operand& x = job.value;
  Side& side = s.value;
  const bool direct = side.order.codec != Codec::expand;
  const bool units = !(direct && x.kind == Kind::channel);  // flush_group has applied them
  for (int m = 0; m < job.queries; ++m) {
    float* o = out + static_cast<size_t>(m) * x.width;
    const float* p = s.sums + static_cast<size_t>(m) * side.lanes;
    for (int d = 0; d < x.width; ++d) o[d] = 0.0f;
    if (!(s.top[m] > -kInfinity)) {
      lse[m] = -kInfinity;
      continue;
    }
    for (int i = 0; i < side.lanes; ++i)
      if (side.unit[i] != 0.0f) o[side.channel[i]] += units ? p[i] * side.unit[i] : p[i];
    if (direct && x.kind == Kind::token)
      for (int d = 0; d < x.width; ++d) o[d] += s.zero_sums[m * side.groups + d / x.group];
    const float inverse = 1.0f / s.total[m];
    for (int d = 0; d < x.width; ++d) o[d] *= inverse;
    lse[m] = s.top[m] + __builtin_logf(s.total[m]);
  }
}

void attend(const Job& job, int row, int64_t begin, int64_t end, uint8_t* scratch, float* out, float* lse, float* logits) {
  State s{};
  lay_out(job, scratch, s);
  prepare_query(job, s, row);
  describe(job.value, s.value);
  const int M = job.queries;
  for (int m = 0; m < M; ++m) {
    s.top[m] = -kInfinity;
    s.total[m] = 0.0f;
  }
  std::memset(s.sums, 0, sizeof(float) * M * s.value.lanes);
  std::memset(s.zero_sums, 0, sizeof(float) * M * s.value.groups);
  if (by_table(job.value)) clear(job.value, M, s.value.table);
  for (int64_t t = begin; t < end; t += s.block) {
    const int n = static_cast<int>(end - t < s.block ? end - t : s.block);
    block_logits(job, s, row, t, n, end);
    if (logits)
      for (int m = 0; m < M; ++m)
        std::memcpy(logits + m * job.lengths[row] + t, s.logits + m * (s.block + 16), sizeof(float) * n);
    block_softmax(job, s, n);
    block_values(job, s, row, t, n, end);
  }
  if (by_table(job.value)) multiply_words(job.value, s.value.table, M, row, s.sums, s.value.lanes);
  finish(job, s, out, lse);
}

// sums[i] = sum over queries of exp(logit - lse), for n entries; whatever n is.
KV_INLINE void sum_weights(const float* logits, int64_t stride, int queries, const float* lse, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; i += W) {
    const int count = static_cast<int>(n - i < W ? n - i : W);
    vf total = splat(0.0f);
    for (int m = 0; m < queries; ++m) {
      // lse is -inf where a query sees no entry at all, +inf where it is not to be counted: neither adds anything.
      if (!(lse[m] > -kInfinity && lse[m] < kInfinity)) continue;
      vf l = splat(-kInfinity);
      if (count == W)
        l = load(logits + m * stride + i);
      else
        for (int j = 0; j < count; ++j) l[j] = logits[m * stride + i + j];
      total += vexp(l - splat(lse[m]));
    }
    if (count == W)
      store(sums + i, total);
    else
      for (int j = 0; j < count; ++j) sums[i + j] = total[j];
  }
}

void mass(const Job& job, int row, int64_t begin, int64_t end, uint8_t* scratch, const float* lse, float* sums) {
  State s{};
  lay_out(job, scratch, s);
  prepare_query(job, s, row);
  for (int64_t t = begin; t < end; t += s.block) {
    const int n = static_cast<int>(end - t < s.block ? end - t : s.block);
    block_logits(job, s, row, t, n, end);
    sum_weights(s.logits, s.block + 16, job.queries, lse, n, sums + (t - begin));
  }
}

void mass_of_logits(int queries, int64_t length, const float* logits, const float* lse, float* sums) {
  sum_weights(logits, length, queries, lse, length, sums);
}

}  // namespace
}  // namespace kvbudget
