// Entries of any storage format written out in float32: what attention reads where codes cannot be met as they are stored.
#pragma once

#include "codec.h"

namespace kvbudget {
namespace {

// Codes come from outside and must not lead out of the table.
KV_INLINE int code_of(const Book& book, const uint8_t* codes, int slot) {
  int code;
  if (book.code_bytes == 0) {
    const int pair = slot / 2, high = codes[book.stages / 2 + pair / 2] >> 4 * (pair % 2) & 15;
    const int both = codes[pair] | high << 8;
    code = slot % 2 ? both & 63 : both >> 6;
  } else {
    code = book.code_bytes == 1 ? codes[slot] : reinterpret_cast<const u16_memory*>(codes)[slot];
  }
  return code < book.size ? code : book.size - 1;
}

KV_INLINE const float* words_of(const Book& book, int row, int stage, int subspace) {
  return book.words + row % book.heads * book.head_step + stage * book.stage_step + subspace * book.subspace_step;
}

KV_INLINE void expand_token(const Operand& x, int64_t at, float* out) {
  unpack_row(x.data + at * x.stride, x.width, x.bits, out);
  const int groups = x.width / x.group;
  for (int j = 0; j < groups; ++j) {
    const float s = element(x.scale, x.type, at * groups + j), z = element(x.zero, x.type, at * groups + j);
    for (int i = 0; i < x.group; ++i) out[j * x.group + i] = out[j * x.group + i] * s + z;
  }
}

KV_INLINE void expand_channel(const Operand& x, int64_t at, float* out, float* other) {
  unpack_row(x.data + at * x.stride, x.width, x.bits, out);
  const int64_t meta = at / x.group * x.width;
  to_float(x.scale, x.type, meta, x.width, other);
  for (int i = 0; i < x.width; ++i) out[i] *= other[i];
  to_float(x.zero, x.type, meta, x.width, other);
  for (int i = 0; i < x.width; ++i) out[i] += other[i];
}

KV_INLINE void expand_words(const Operand& x, int row, int64_t at, float* out, float* other) {
  const Book& book = x.book;
  const uint8_t* data = x.data + at * x.stride;
  const float scale = x.scale ? element(x.scale, x.type, at) : 1.0f;
  const float shift = book.mean ? element(book.shift, x.type, at) : 0.0f;
  if (book.mean) to_float(book.mean, x.type, at / x.group * x.width, x.width, other);
  for (int i = 0; i < x.width; ++i) out[i] = book.mean ? shift * other[i] : 0.0f;
  const int8_t* weights = book.weights ? book.weights + at * book.stages * book.subspaces : nullptr;
  for (int k = 0, slot = 0; k < book.stages; ++k)
    for (int p = 0; p < book.subspaces; ++p, ++slot) {
      const float factor = weights ? scale * weights[slot] : scale;
      const float* word = words_of(book, row, k, p) + static_cast<int64_t>(code_of(book, data, slot)) * book.coupled;
      float* to = out + p * book.coupled;
      int i = 0;
      for (; i + W <= book.coupled; i += W) store(to + i, load(to + i) + splat(factor) * load(word + i));
      for (; i < book.coupled; ++i) to[i] += factor * word[i];
    }
}

// The values that eight codes stand for, in a table of 2^bits.
KV_INLINE vf look_up(const float* table, int bits, vf codes) {
  const vi index = __builtin_convertvector(codes, vi);
#if defined(__AVX2__)
  if (bits <= 4) {
    alignas(32) float few[2 * W] = {};
    const float* low = table;
    if (bits < 3) {  // shorter than a vector
      std::memcpy(few, table, sizeof(float) << bits);
      low = few;
    }
    const vf first = (vf)_mm256_permutevar8x32_ps((__m256)load(low), (__m256i)index);
    if (bits < 4) return first;
    const vf second = (vf)_mm256_permutevar8x32_ps((__m256)load(table + W), (__m256i)index);
    return (vf)_mm256_blendv_ps((__m256)first, (__m256)second, (__m256)(index << 28));
  }
#endif
  vf found;
  for (int i = 0; i < W; ++i) found[i] = table[index[i]];
  return found;
}

KV_INLINE void expand_scalar(const Operand& x, int row, int64_t at, float* out) {
  const Scalar& s = x.scalar;
  const int bits = s.levels ? s.levels[at] : x.bits, D = x.width;
  const uint8_t* data = x.data + (s.levels ? s.at[at] : at * x.stride);
  if (s.table && bits == 8) {
    for (int i = 0; i < D; ++i) out[i] = s.table[data[i]];
  } else if (bits) {
    unpack_row(data, D, bits, out);
    if (s.table)
      for (int i = 0; i < D; i += W) store(out + i, look_up(s.table, bits, load(out + i)));
  } else {
    std::memset(out, 0, sizeof(float) * D);
  }
  if (x.scale || x.zero || s.centered) {
    const float scale = x.scale ? element(x.scale, x.type, at) : 1.0f;
    const float zero = (x.zero ? element(x.zero, x.type, at) : 0.0f) - (s.centered ? scale * static_cast<float>(1 << bits >> 1) : 0.0f);
    for (int i = 0; i < D; i += W) store(out + i, load(out + i) * splat(scale) + splat(zero));
  }
  const int64_t channels = (static_cast<int64_t>(row % s.heads) * s.classes + (s.classes > 1 && bits == x.bits)) * D;
  if (s.spread)
    for (int i = 0; i < D; i += W) store(out + i, load(out + i) * load(s.spread + channels + i));
  if (s.offset)
    for (int i = 0; i < D; i += W) store(out + i, load(out + i) + load(s.offset + channels + i));
  for (int64_t k = at * s.count; k < (at + 1) * s.count; ++k) {
    const int place = s.place_bytes == 1 ? s.places[k] : reinterpret_cast<const u16_memory*>(s.places)[k];
    if (place < D) out[place] = element(s.outliers, Type::f16, k);
  }
}

// out [n] = in [n] times a matrix [n][n]; n is a multiple of W.
KV_INLINE void multiply(const float* matrix, const float* in, int n, float* out) {
  int c = 0;
  for (; c + 8 * W <= n; c += 8 * W) {
    vf acc[8] = {};
    for (int j = 0; j < n; ++j) {
      const vf y = splat(in[j]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc[i] += y * load(matrix + static_cast<int64_t>(j) * n + c + i * W);
    }
    for (int i = 0; i < 8; ++i) store(out + c + i * W, acc[i]);
  }
  for (; c < n; c += W) {
    vf acc[2] = {};
    for (int j = 0; j < n; ++j) acc[j % 2] += splat(in[j]) * load(matrix + static_cast<int64_t>(j) * n + c);
    store(out + c, acc[0] + acc[1]);
  }
}

KV_INLINE void turn(const Operand& x, int row, int64_t t, float* out, float* other) {
  const Turn& turn = x.turn;
  if (turn.matrix) {
    std::memcpy(other, out, sizeof(float) * x.width);
    multiply(turn.matrix, other, x.width, out);
  }
  if (!turn.cos) return;
  const int half = turn.half;
  const int64_t position = turn.position[turn.starts[row] + (x.index ? x.index[x.index_starts[row] + t] : t)];
  const float *cos = turn.cos + position * half, *sin = turn.sin + position * half;
  int i = 0;
  if (!turn.interleaved)
    for (; i + W <= half; i += W) {
      const vf a = load(out + i), b = load(out + half + i), c = load(cos + i), s = load(sin + i);
      store(out + i, a * c - b * s);
      store(out + half + i, b * c + a * s);
    }
  for (; i < half; ++i) {
    float &first = turn.interleaved ? out[2 * i] : out[i], &second = turn.interleaved ? out[2 * i + 1] : out[half + i];
    const float a = first, b = second;
    first = a * cos[i] - b * sin[i];
    second = b * cos[i] + a * sin[i];
  }
}

// Entry t of a row as float32 [width]; `other` holds [width] floats in between.
KV_INLINE void expand_entry(const Operand& x, int row, int64_t t, float* out, float* other) {
  const int64_t at = flat(x, row, t);
  switch (x.kind) {
    case Kind::dense: to_float(x.data + at * x.stride, x.type, 0, x.width, out); break;
    case Kind::token: expand_token(x, at, out); break;
    case Kind::channel: expand_channel(x, at, out, other); break;
    case Kind::codebook: expand_words(x, row, at, out, other); break;
    case Kind::scalar: expand_scalar(x, row, at, out); break;
  }
  turn(x, row, t, out, other);
}

}  // namespace
}  // namespace kvbudget
