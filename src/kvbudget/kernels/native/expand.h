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

struct Trits {
  float of[256][5];
};

// The five levels -1, 0 and 1 in each byte.
constexpr Trits trits() {
  Trits found{};
  for (int code = 0; code < 256; ++code)
    for (int k = 0, left = code; k < 5; ++k, left /= 3) found.of[code][k] = static_cast<float>(left % 3 - 1);
  return found;
}
constexpr Trits kTrits = trits();

// Those of all entries of a unit follow each other, so an entry may begin inside of a byte.
KV_INLINE void unpack_trits(const Operand& x, int64_t at, float* out) {
  const int64_t first = at % x.group * x.width;
  const uint8_t* data = x.data + at / x.group * x.stride + first / 5;
  for (int i = 0, k = static_cast<int>(first % 5); i < x.width; k = 0, ++data) {
    const float* five = kTrits.of[*data];
    while (k < 5 && i < x.width) out[i++] = five[k++];
  }
}

KV_INLINE void expand_channel(const Operand& x, int64_t at, float* out, float* other) {
  if (x.bits)
    unpack_row(x.data + at * x.stride, x.width, x.bits, out);
  else
    unpack_trits(x, at, out);
  const int64_t meta = at / x.group * x.width;
  to_float(x.scale, x.type, meta, x.width, other);
  for (int i = 0; i < x.width; ++i) out[i] *= other[i];
  if (!x.zero) return;
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

// Adds to entries t to t + n of a row, which stand `stride` floats apart, what their codes miss.
KV_INLINE void correct(const Operand& x, int row, int64_t t, int n, float* out, int64_t stride) {
  const Correction& c = x.correction;
  const int64_t first = t + c.skip[row], D = x.width;  // counted from the row's first unit
  for (int64_t e = first; e < first + n; ++e) {
    float* const to = out + (e - first) * stride;
    const int64_t cell = c.starts[row] * c.unit + e;
    for (int r = 0; r < c.rank; ++r) {
      const vf y = splat(element(c.projected, Type::f16, cell * c.rank + r));
      const float* direction = c.directions + (static_cast<int64_t>(row) * c.rank + r) * D;
      for (int d = 0; d < D; d += W) store(to + d, load(to + d) + y * load(direction + d));
    }
  }
  const auto number = [&](int64_t k) -> int { return c.index_bytes == 1 ? c.index[k] : reinterpret_cast<const u16_memory*>(c.index)[k]; };
  for (int64_t u = first / c.unit; c.count && u <= (first + n - 1) / c.unit; ++u) {
    int64_t k = (c.starts[row] + u) * c.count * (c.by_entry ? 1 : D);
    if (c.by_entry) {
      for (int v = 0; v < c.count; ++v, ++k)
        if (number(k) < D) out[(u - first) * stride + number(k)] += element(c.delta, Type::f16, k);
      continue;
    }
    for (int v = 0; v < c.count; ++v)
      for (int64_t d = 0; d < D; ++d, ++k) {
        const int64_t e = u * c.unit + number(k) - first;
        if (e >= 0 && e < n) out[e * stride + d] += element(c.delta, Type::f16, k);
      }
  }
}

KV_INLINE void turn(const Operand& x, int row, int64_t t, float* out, float* other) {
  const Turn& turn = x.turn;
  if (turn.matrix) {
    std::memcpy(other, out, sizeof(float) * x.width);
    multiply(turn.matrix, other, x.width, out);
  }
  if (!turn.frequency) return;
  const int half = turn.half;
  const int64_t position = turn.position[turn.starts[row] + (x.index ? x.index[x.index_starts[row] + t] : t)];
  for (int i = 0; i < half; i += W) {
    const int n = half - i < W ? half - i : W;
    vf angle = {};
    if (n == W)
      angle = load(turn.frequency + i);
    else
      std::memcpy(&angle, turn.frequency + i, sizeof(float) * n);
    vf sin, cos;
    vsincos(angle * splat(static_cast<float>(position)), sin, cos);
    sin *= splat(turn.factor);
    cos *= splat(turn.factor);
    if (n == W && !turn.interleaved) {
      const vf a = load(out + i), b = load(out + half + i);
      store(out + i, a * cos - b * sin);
      store(out + half + i, b * cos + a * sin);
      continue;
    }
    for (int j = 0; j < n; ++j) {
      const int at = turn.interleaved ? 2 * (i + j) : i + j, other = turn.interleaved ? at + 1 : at + half;
      const float a = out[at], b = out[other];
      out[at] = a * cos[j] - b * sin[j];
      out[other] = b * cos[j] + a * sin[j];
    }
  }
}

// Entries t to t + n of a row as float32, `stride` floats apart; `other` holds [width] floats in between.
KV_INLINE void expand_entries(const Operand& x, int row, int64_t t, int n, float* out, int64_t stride, float* other) {
  for (int i = 0; i < n; ++i) {
    const int64_t at = flat(x, row, t + i);
    float* to = out + i * stride;
    switch (x.kind) {
      case Kind::dense: to_float(x.data + at * x.stride, x.type, 0, x.width, to); break;
      case Kind::token: expand_token(x, at, to); break;
      case Kind::channel: expand_channel(x, at, to, other); break;
      case Kind::codebook: expand_words(x, row, at, to, other); break;
      case Kind::scalar: expand_scalar(x, row, at, to); break;
    }
  }
  if (x.correction.unit) correct(x, row, t, n, out, stride);
  if (x.turn.matrix || x.turn.frequency)
    for (int i = 0; i < n; ++i) turn(x, row, t + i, out + i * stride, other);
}

}  // namespace
}  // namespace kvbudget
