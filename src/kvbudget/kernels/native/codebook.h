// Codebook operands by look-up tables: a code is a place in a table, never a vector.
//
// Keys: the table holds the product of every codeword with every query, so an entry's logits are one addition per code.
// Values: the table gathers the weights of every codeword; one small matrix product with the words ends the range.
// The lanes of a table's vectors are up to eight queries.
#pragma once

#include "expand.h"

namespace kvbudget {
namespace {

struct Table {
  float* sums;     // [lane groups][stages * subspaces * size][W]
  float* lanes;    // [D][W] or, for values, [block][W]
  float* means;    // [M] query times the mean of the current unit (keys), or sums of weights (values)
  float* shifted;  // [M, D] what means add to the output (values)
  float* mean;     // [D]
};

KV_INLINE int64_t table_size(const Book& book) { return static_cast<int64_t>(book.stages) * book.subspaces * book.size; }

KV_INLINE int lane_groups(int queries) { return (queries + W - 1) / W; }

// lut[code] = words * queries, for queries first ... first + W; query [M, D] is scaled.
KV_INLINE void fill_table(const Operand& x, int row, const float* query, int queries, int first, Table& table) {
  const Book& book = x.book;
  const int D = x.width;
  for (int d = 0; d < D; ++d)
    for (int l = 0; l < W; ++l) table.lanes[d * W + l] = first + l < queries ? query[(first + l) * D + d] : 0.0f;
  float* to = table.sums + first * table_size(book);
  for (int k = 0; k < book.stages; ++k)
    for (int p = 0; p < book.subspaces; ++p) {
      const float* word = words_of(book, row, k, p);
      const float* lanes = table.lanes + p * book.coupled * W;
      for (int e = 0; e < book.size; ++e, word += book.coupled, to += W) {
        vf total = splat(0.0f);
        for (int i = 0; i < book.coupled; ++i) total += splat(word[i]) * load(lanes + i * W);
        store(to, total);
      }
    }
}

// Rows to columns.
KV_INLINE void transpose(vf (&x)[W]) {
  vf y[W];
  for (int i = 0; i < W; i += 2) {
    y[i] = KV_SHUFFLE(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = KV_SHUFFLE(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < W; i += 4)
    for (int j = i; j < i + 2; ++j) {
      x[j] = KV_SHUFFLE(y[j], y[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      x[j + 2] = KV_SHUFFLE(y[j], y[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    const vf a = x[i], b = x[i + 4];
    x[i] = KV_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = KV_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Sum of one vector per code of an entry.
KV_INLINE vf sum_words(const Book& book, const float* table, const uint8_t* codes) {
  const int slots = book.stages * book.subspaces;
  const int64_t step = static_cast<int64_t>(book.size) * W;
  vf a = splat(0.0f), b = splat(0.0f);
  int slot = 0;
  if (book.code_bytes == 1 && book.size == 256)
    for (; slot + 2 <= slots; slot += 2, table += 2 * step) {
      a += load(table + codes[slot] * W);
      b += load(table + step + codes[slot + 1] * W);
    }
  for (; slot < slots; ++slot, table += step) a += load(table + code_of(book, codes, slot) * W);
  return a + b;
}

// Raw logits of n entries from t on: logits [M, stride]. May write up to W - 1 lanes past n.
KV_INLINE void table_logits(const Operand& x, Table& table, const float* query, int queries, int row, int64_t t, int n,
                            float* logits, int64_t stride) {
  const Book& book = x.book;
  const int D = x.width;
  for (int first = 0; first < queries; first += W) {
    const float* lut = table.sums + first * table_size(book);
    const int count = queries - first < W ? queries - first : W;
    for (int i = 0; i < n; i += W) {
      vf sums[W];
      for (int j = 0; j < W; ++j) {
        const int64_t at = flat(x, row, t + (i + j < n ? i + j : n - 1));
        sums[j] = sum_words(book, lut, x.data + at * x.stride);
        if (x.scale) sums[j] *= splat(element(x.scale, x.type, at));
      }
      transpose(sums);
      for (int m = 0; m < count; ++m) store(logits + (first + m) * stride + i, sums[m]);
    }
  }
  if (!book.mean) return;
  int64_t unit = -1;
  for (int i = 0; i < n; ++i) {
    const int64_t at = flat(x, row, t + i);
    if (at / x.group != unit) {
      unit = at / x.group;
      to_float(book.mean, x.type, unit * D, D, table.mean);
      for (int m = 0; m < queries; ++m) {
        vf product = splat(0.0f);
        for (int d = 0; d < D; d += W) product += load(query + m * D + d) * load(table.mean + d);
        table.means[m] = sum(product);
      }
    }
    const float shift = element(book.shift, x.type, at);
    for (int m = 0; m < queries; ++m) logits[m * stride + i] += shift * table.means[m];
  }
}

KV_INLINE void clear(const Operand& x, int queries, Table& table) {
  std::memset(table.sums, 0, sizeof(float) * W * lane_groups(queries) * table_size(x.book));
  std::memset(table.shifted, 0, sizeof(float) * queries * x.width);
}

// The running maximum of query m has risen: its sums shrink.
KV_INLINE void shrink(const Operand& x, Table& table, int m, float factor) {
  const int64_t size = table_size(x.book);
  float* lane = table.sums + (m / W * size * W + m % W);
  for (int64_t i = 0; i < size; ++i) lane[i * W] *= factor;
  for (int d = 0; d < x.width; ++d) table.shifted[m * x.width + d] *= factor;
}

// Adds the weights [M, stride] of n entries from t on to their codewords. Reads up to W - 1 weights past n.
KV_INLINE void table_weights(const Operand& x, Table& table, int queries, int row, int64_t t, int n, const float* weights,
                             int64_t stride) {
  const Book& book = x.book;
  const int D = x.width, slots = book.stages * book.subspaces;
  for (int first = 0; first < queries; first += W) {
    float* hist = table.sums + first * table_size(book);
    const int count = queries - first < W ? queries - first : W;
    for (int i = 0; i < n; i += W) {
      vf w[W];
      for (int m = 0; m < W; ++m) w[m] = m < count ? load(weights + (first + m) * stride + i) : splat(0.0f);
      transpose(w);
      for (int j = 0; j < W && i + j < n; ++j) {
        const int64_t at = flat(x, row, t + i + j);
        if (x.scale) w[j] *= splat(element(x.scale, x.type, at));
        const uint8_t* codes = x.data + at * x.stride;
        float* to = hist;
        for (int slot = 0; slot < slots; ++slot, to += static_cast<int64_t>(book.size) * W) {
          float* cell = to + code_of(book, codes, slot) * W;
          store(cell, load(cell) + w[j]);
        }
      }
    }
  }
  if (!book.mean) return;
  for (int i = 0; i < n;) {
    const int64_t unit = flat(x, row, t + i) / x.group;
    for (int m = 0; m < queries; ++m) table.means[m] = 0.0f;
    for (; i < n; ++i) {
      const int64_t at = flat(x, row, t + i);
      if (at / x.group != unit) break;
      const float shift = element(book.shift, x.type, at);
      for (int m = 0; m < queries; ++m) table.means[m] += shift * weights[m * stride + i];
    }
    to_float(book.mean, x.type, unit * D, D, table.mean);
    for (int m = 0; m < queries; ++m)
      for (int d = 0; d < D; d += W) {
        float* to = table.shifted + m * D + d;
        store(to, load(to) + splat(table.means[m]) * load(table.mean + d));
      }
  }
}

// sums [M, stride] = gathered weights times words, and what the means add.
KV_INLINE void multiply_words(const Operand& x, Table& table, int queries, int row, float* sums, int64_t stride) {
  const Book& book = x.book;
  const int D = x.width;
  for (int first = 0; first < queries; first += W) {
    const float* hist = table.sums + first * table_size(book);
    std::memset(table.lanes, 0, sizeof(float) * D * W);
    for (int k = 0; k < book.stages; ++k)
      for (int p = 0; p < book.subspaces; ++p) {
        const float* word = words_of(book, row, k, p);
        float* lanes = table.lanes + p * book.coupled * W;
        for (int e = 0; e < book.size; ++e, word += book.coupled, hist += W) {
          const vf w = load(hist);
          for (int i = 0; i < book.coupled; ++i) store(lanes + i * W, load(lanes + i * W) + splat(word[i]) * w);
        }
      }
    for (int l = 0; l < W && first + l < queries; ++l)
      for (int d = 0; d < D; ++d) sums[(first + l) * stride + d] = table.lanes[d * W + l] + table.shifted[(first + l) * D + d];
  }
}

}  // namespace
}  // namespace kvbudget
