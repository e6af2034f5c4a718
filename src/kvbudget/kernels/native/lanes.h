// Logit micro-kernel for codes whose scales stand in the queries (or apply to whole logits): sixteen entries side by side.
//
// The 32-bit words of sixteen rows are transposed, so that a vector holds the same word of eight entries. What one mask leaves of
// it is one channel of eight entries, which multiplies a broadcast query: no sums across lanes, and few loads per product.
#pragma once

#include <type_traits>

#include "dot.h"

namespace kvbudget {
namespace {

constexpr int kLanes = 16;  // entries per turn

// Words of a row of codes that this kernel can read; 0: it cannot.
KV_INLINE int lane_words(const Operand& x) {
  if (choose(x) == Codec::expand || !(x.kind == Kind::channel || (x.kind == Kind::token && x.group == x.width))) return 0;
  const int bytes = packed_bytes(x.width, kernel_bits(x));
  return bytes % 16 ? 0 : bytes / 4;
}

// What the query of channel d is multiplied by, since its codes stay where they stand inside of their words.
KV_INLINE float unit_of(int d, int words, int bits) {
  const int shift = 8 * (d % 4) + bits * (d / (4 * words));
  return shift == 32 - bits ? 1.0f : 1.0f / static_cast<float>(1u << shift);
}

// to[word][kLanes] of kLanes rows.
KV_INLINE void transpose(const uint8_t* rows, int64_t stride, int words, uint32_t* to) {
  for (int e = 0; e < kLanes; e += W, rows += W * stride)
    for (int c = 0; c < words; c += 4) {
      vf r[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) r[i] = load_halves(rows + i * stride + 4 * c, rows + (i + 4) * stride + 4 * c);
      const vf a = KV_SHUFFLE(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13), b = KV_SHUFFLE(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
      const vf d = KV_SHUFFLE(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15), f = KV_SHUFFLE(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
      float* out = reinterpret_cast<float*>(to + c * kLanes + e);
      store(out, KV_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13));
      store(out + kLanes, KV_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
      store(out + 2 * kLanes, KV_SHUFFLE(d, f, 0, 1, 8, 9, 4, 5, 12, 13));
      store(out + 3 * kLanes, KV_SHUFFLE(d, f, 2, 3, 10, 11, 6, 7, 14, 15));
    }
}

// Adds the products of one code of each of Step words: the query of word j stands at q + 4 * j.
template <int Shift, int Step, int MT, int P>
KV_INLINE void add_codes(const uint32_t* w, vu mask, const float* q, int64_t q_stride, vf (&acc)[P][MT][2]) {
#pragma GCC unroll 8
  for (int j = 0; j < Step; ++j) {
    const vu a = load_words(reinterpret_cast<const uint8_t*>(w + j * kLanes));
    const vu b = load_words(reinterpret_cast<const uint8_t*>(w + j * kLanes + W));
    const vf k[2] = {to_float(Shift ? a >> Shift : a & mask), to_float(Shift ? b >> Shift : b & mask)};
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) {
      const vf x = splat(q[m * q_stride + 4 * j]);
      fma(acc[j % P][m][0], x, k[0]);
      fma(acc[j % P][m][1], x, k[1]);
    }
  }
}

template <int Bits, int Step, int MT>
void dot_lanes(const uint8_t* rows, int64_t stride, int64_t ahead, int n, const float* q, int64_t q_stride, int words,
               const float* start, uint32_t* turned, float* out, int64_t out_stride) {
  // Chains of additions hide each other's latency; more of them than this cost registers.
  constexpr int P = KV_QUERY_TILE < 4 ? 1 : MT == 1 ? 4 : MT == 2 ? 2 : 1;
  for (int t = 0; t < n; t += kLanes, rows += kLanes * stride) {
    if (ahead)
      for (int64_t p = 0; p < kLanes * stride; p += 64) __builtin_prefetch(rows + ahead + p, 0, 2);
    transpose(rows, stride, words, turned);
    vf acc[P][MT][2];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) acc[p][m][0] = acc[p][m][1] = p ? vf{} : splat(start[m]);
    for (int c = 0; c < words; c += Step) {
      const uint32_t* w = turned + c * kLanes;
      const float* x = q + 4 * c;
      vu planes = vu{} + ((1u << Bits) - 1u);
#pragma GCC unroll 1
      for (int h = 0; h < 8 / Bits - 1; ++h, x += 4 * words, planes <<= Bits) {
        vu mask = planes;
#pragma GCC unroll 1
        for (int i = 0; i < 4; ++i, mask <<= 8) add_codes<0, Step, MT, P>(w, mask, x + i, q_stride, acc);
      }
#pragma GCC unroll 1
      for (int i = 0; i < 3; ++i, planes <<= 8) add_codes<0, Step, MT, P>(w, planes, x + i, q_stride, acc);
      add_codes<32 - Bits, Step, MT, P>(w, planes, x + 3, q_stride, acc);  // these would be negative where they stand
    }
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 2
      for (int e = 0; e < 2; ++e) {
        vf sums = acc[0][m][e];
#pragma GCC unroll 4
        for (int p = 1; p < P; ++p) sums += acc[p][m][e];
        store(out + m * out_stride + t + e * W, sums);
      }
  }
}

template <int Bits, int Step>
KV_INLINE void dot_lanes(Rows rows, int64_t stride, int n, const float* q, int64_t q_stride, int queries, int words,
                         const float* start, uint32_t* turned, float* out, int64_t out_stride) {
  for (int m = 0; m < queries;) {
    const int tile = next_tile(queries - m);
    const float* at = q + m * q_stride;
    float* to = out + m * out_stride;
    if (tile == 1) dot_lanes<Bits, Step, 1>(rows.base, stride, rows.ahead, n, at, q_stride, words, start + m, turned, to, out_stride);
    if (tile == 2) dot_lanes<Bits, Step, 2>(rows.base, stride, rows.ahead, n, at, q_stride, words, start + m, turned, to, out_stride);
    if constexpr (KV_QUERY_TILE == 4) {
      if (tile == 3) dot_lanes<Bits, Step, 3>(rows.base, stride, rows.ahead, n, at, q_stride, words, start + m, turned, to, out_stride);
      if (tile == 4) dot_lanes<Bits, Step, 4>(rows.base, stride, rows.ahead, n, at, q_stride, words, start + m, turned, to, out_stride);
    }
    m += tile;
    rows.ahead = 0;
  }
}

// Logits of n rows, of which those up to the next multiple of kLanes must be readable; writes up to kLanes - 1 lanes past n.
// q [queries, D] with the factors of unit_of; start [queries] is added to the sums; turned: [words][kLanes].
KV_INLINE void dot_lanes(int bits, const Rows& rows, int64_t stride, int n, const float* q, int64_t q_stride, int queries,
                         int words, const float* start, uint32_t* turned, float* out, int64_t out_stride) {
  const auto go = [&](auto step) {
    constexpr int Step = decltype(step)::value;
    if (bits == 8) return dot_lanes<8, Step>(rows, stride, n, q, q_stride, queries, words, start, turned, out, out_stride);
    if (bits == 4) return dot_lanes<4, Step>(rows, stride, n, q, q_stride, queries, words, start, turned, out, out_stride);
    if (bits == 2) return dot_lanes<2, Step>(rows, stride, n, q, q_stride, queries, words, start, turned, out, out_stride);
    return dot_lanes<1, Step>(rows, stride, n, q, q_stride, queries, words, start, turned, out, out_stride);
  };
  return words % 8 ? go(std::integral_constant<int, 4>{}) : go(std::integral_constant<int, 8>{});
}

}  // namespace
}  // namespace kvbudget
