// Logit micro-kernel for codes whose scales stand in the queries (or apply to whole logits): sixteen entries side by side.
//
// The 32-bit words of sixteen rows are transposed, so that a vector holds the same word of eight entries. What one mask leaves of
// it is one channel of eight entries, which multiplies a broadcast query: no sums across lanes, and few loads per product.
#pragma once

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

// to[word][kLanes] of four words of kLanes rows.
KV_INLINE void transpose(const uint8_t* rows, int64_t stride, uint32_t* to) {
#pragma GCC unroll 2
  for (int e = 0; e < kLanes; e += W, rows += W * stride) {
    vf r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = load_halves(rows + i * stride, rows + (i + 4) * stride);
    const vf a = KV_SHUFFLE(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13), b = KV_SHUFFLE(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const vf d = KV_SHUFFLE(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15), f = KV_SHUFFLE(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
    float* out = reinterpret_cast<float*>(to + e);
    store(out, KV_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13));
    store(out + kLanes, KV_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
    store(out + 2 * kLanes, KV_SHUFFLE(d, f, 0, 1, 8, 9, 4, 5, 12, 13));
    store(out + 3 * kLanes, KV_SHUFFLE(d, f, 2, 3, 10, 11, 6, 7, 14, 15));
  }
}

// Adds the products of one code of each of Step words: the queries of word j stand at q + 4 * j * MT.
template <int Shift, int Step, int MT, int P>
KV_INLINE void add_codes(const uint32_t* words, vu mask, const float* q, vf (&acc)[P][MT][2]) {
  const uint8_t* w = reinterpret_cast<const uint8_t*>(words);
  hide(w);  // words that wait for their next mask in registers would be pushed out to memory first
#pragma GCC unroll 8
  for (int j = 0; j < Step; ++j) {
    const vu a = load_words(w + 4 * j * kLanes), b = load_words(w + 4 * (j * kLanes + W));
    const vf k[2] = {to_float(Shift ? a >> Shift : a & mask), to_float(Shift ? b >> Shift : b & mask)};
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) {
      const vf x = splat(q[4 * j * MT + m]);
      fma(acc[j % P][m][0], x, k[0]);
      fma(acc[j % P][m][1], x, k[1]);
    }
  }
}

template <int Bits, int Step, int MT>
void dot_lanes(const uint8_t* rows, int64_t ahead, int n, const float* q, int words, const float* start, uint32_t* turned,
               float* out, int64_t out_stride) {
  // Chains of additions hide each other's latency; more of them than this cost registers.
  constexpr int P = KV_QUERY_TILE < 4 ? 1 : MT == 1 ? 4 : MT == 2 ? 2 : 1;
  const int64_t stride = 4 * words;  // a cache line for each word of kLanes rows
  for (int t = 0; t < n; t += kLanes, rows += kLanes * stride) {
    vf acc[P][MT][2];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) acc[p][m][0] = acc[p][m][1] = p ? vf{} : splat(start[m]);
    for (int c = 0; c < words; c += Step) {
#pragma GCC unroll 2
      for (int i = 0; i < Step; i += 4) transpose(rows + 4 * (c + i), stride, turned + i * kLanes);
      if (ahead)
#pragma GCC unroll 8
        for (int i = 0; i < Step; ++i) __builtin_prefetch(rows + ahead + 64 * (c + i), 0, 2);
      const float* x = q + 4 * c * MT;
      vu planes = vu{} + ((1u << Bits) - 1u);
#pragma GCC unroll 1
      for (int h = 0; h < 8 / Bits - 1; ++h, x += 4 * words * MT, planes <<= Bits) {
        vu mask = planes;
#pragma GCC unroll 1
        for (int i = 0; i < 4; ++i, mask <<= 8) add_codes<0, Step, MT, P>(turned, mask, x + i * MT, acc);
      }
#pragma GCC unroll 1
      for (int i = 0; i < 3; ++i, planes <<= 8) add_codes<0, Step, MT, P>(turned, planes, x + i * MT, acc);
      add_codes<32 - Bits, Step, MT, P>(turned, planes, x + 3 * MT, acc);  // these would be negative where they stand
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

// Queries [M, D] side by side as add_codes reads them: of each tile [D, MT], times the factors of unit_of.
KV_INLINE void lay_lanes(const float* query, int queries, int D, int words, int bits, float* to) {
  with_tiles(queries, [&](int first, auto tile) {
    constexpr int MT = decltype(tile)::value;
    for (int d = 0; d < D; ++d)
      for (int m = 0; m < MT; ++m) to[first * D + d * MT + m] = query[(first + m) * D + d] * unit_of(d, words, bits);
  });
}

// Lane i of the result: lane (part * W + i) / MT of x.
template <int MT>
KV_INLINE vf spread(vf x, int part) {
  if constexpr (MT == 1) return x;
  if constexpr (MT == 2) return part ? KV_SHUFFLE(x, x, 4, 4, 5, 5, 6, 6, 7, 7) : KV_SHUFFLE(x, x, 0, 0, 1, 1, 2, 2, 3, 3);
  if constexpr (MT == 3)
    return part == 0   ? KV_SHUFFLE(x, x, 0, 0, 0, 1, 1, 1, 2, 2)
           : part == 1 ? KV_SHUFFLE(x, x, 2, 3, 3, 3, 4, 4, 4, 5)
                       : KV_SHUFFLE(x, x, 5, 5, 6, 6, 6, 7, 7, 7);
  if constexpr (MT == 4)
    return part == 0   ? KV_SHUFFLE(x, x, 0, 0, 0, 0, 1, 1, 1, 1)
           : part == 1 ? KV_SHUFFLE(x, x, 2, 2, 2, 2, 3, 3, 3, 3)
           : part == 2 ? KV_SHUFFLE(x, x, 4, 4, 4, 4, 5, 5, 5, 5)
                       : KV_SHUFFLE(x, x, 6, 6, 6, 6, 7, 7, 7, 7);
}

// What lay_lanes has laid out times a scale per channel; bias [queries]: the products of the queries [M, D] with the zeros.
KV_INLINE void scale_lanes(const float* laid, const float* query, const float* scale, const float* zero, int queries, int D,
                           float* to, float* bias) {
  with_tiles(queries, [&](int first, auto tile) {
    constexpr int MT = decltype(tile)::value;
    vf total[MT] = {};
    for (int d = 0; d < D; d += W) {  // codes with a direct form have a multiple of 32 channels
      const vf x = load(scale + d), z = load(zero + d);
#pragma GCC unroll 4
      for (int m = 0; m < MT; ++m) {
        total[m] += load(query + (first + m) * D + d) * z;
        const int at = first * D + d * MT + m * W;
        store(to + at, load(laid + at) * spread<MT>(x, m));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) bias[first + m] = sum(total[m]);
  });
}

// Logits of n rows, of which those up to the next multiple of kLanes must be readable; writes up to kLanes - 1 lanes past n.
// q: as lay_lanes makes it; start [queries] is added to the sums; turned: [8][kLanes].
KV_INLINE void dot_lanes(int bits, const Rows& rows, int n, const float* q, int D, int queries, int words, const float* start,
                         uint32_t* turned, float* out, int64_t out_stride) {
  const auto go = [&](auto bits, auto step) {
    with_tiles(queries, [&](int m, auto tile) {
      dot_lanes<decltype(bits)::value, decltype(step)::value, decltype(tile)::value>(
          rows.base, m ? 0 : rows.ahead, n, q + m * D, words, start + m, turned, out + m * out_stride, out_stride);
    });
  };
  const auto steps = [&](auto bits) {
    words % 8 ? go(bits, std::integral_constant<int, 4>{}) : go(bits, std::integral_constant<int, 8>{});
  };
  if (bits == 8) steps(std::integral_constant<int, 8>{});
  if (bits == 4) steps(std::integral_constant<int, 4>{});
  if (bits == 2) steps(std::integral_constant<int, 2>{});
  if (bits == 1) steps(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace kvbudget
