// How each storage format hands out its channels, eight lanes at a time, and in which order.
//
// A chunk of a row is read as 32-bit words; vector v of a row is what one mask (or shift) of such words leaves. Its lanes are
// channels in a fixed permuted order, which costs nothing: queries are permuted once to match, outputs once at the end.
#pragma once

#include "job.h"
#include "simd.h"

namespace kvbudget {
namespace {

// steps vectors come from each chunk of `chunk` bytes; `entries` rows lie side by side in one vector.
template <int Steps>
struct F32 {
  static constexpr int steps = Steps, chunk = 32 * Steps, entries = 1;
  static constexpr bool codes = false;
  KV_INLINE vf get(const uint8_t* p, int s) { return load_bytes(p + 32 * s); }
};

template <int Steps>
struct BF16 {
  static constexpr int steps = Steps, chunk = 16 * Steps, entries = 1;
  static constexpr bool codes = false;
  KV_INLINE vf get(const uint8_t* p, int s) {
    vu x = load_words(p + 32 * (s / 2));
    return s % 2 ? as_float(x & 0xffff0000u) : as_float(x << 16);
  }
};

// Codes stay at their bit position inside the word (an exact power-of-two factor, undone in the permuted query or output).
template <int Bits, int Entries>
struct Codes {
  static constexpr int steps = 32 / Bits, chunk = 32, entries = Entries;
  static constexpr bool codes = true;
  KV_INLINE vf get(const uint8_t* p, int s) {
    const int shift = 8 * (s % 4) + Bits * (s / 4);
    vu x = load_words(p);
    return to_float(shift == 32 - Bits ? x >> shift : x & (((1u << Bits) - 1u) << shift));
  }
};

enum class Codec : int {
  f32, f32_wide, bf16, bf16_wide,
  c8, c4, c4_2, c2, c2_2, c1_2, c1_4,
  expand,  // no direct form: small tiles are expanded to float32 first
};

// Calls body<C>() for the type that stands behind a codec.
template <class Body>
KV_INLINE void with_codec(Codec codec, Body&& body) {
  switch (codec) {
    case Codec::f32: case Codec::expand: return body(F32<2>{});
    case Codec::f32_wide: return body(F32<4>{});
    case Codec::bf16: return body(BF16<2>{});
    case Codec::bf16_wide: return body(BF16<4>{});
    case Codec::c8: return body(Codes<8, 1>{});
    case Codec::c4: return body(Codes<4, 1>{});
    case Codec::c4_2: return body(Codes<4, 2>{});
    case Codec::c2: return body(Codes<2, 1>{});
    case Codec::c2_2: return body(Codes<2, 2>{});
    case Codec::c1_2: return body(Codes<1, 2>{});
    case Codec::c1_4: return body(Codes<1, 4>{});
  }
}

KV_INLINE int padded(int n, int to) { return (n + to - 1) / to * to; }
KV_INLINE int packed_bytes(int width, int bits) { return width * bits / 8; }

// Whether entries change after they have been written out, so that no code can be met as it is stored.
KV_INLINE bool turned(const Operand& x) { return x.turn.matrix || x.turn.cos; }

// Whether look-up tables stand for products with codewords.
KV_INLINE bool by_table(const Operand& x) { return x.kind == Kind::codebook && !x.book.weights && !turned(x); }

// Three bits lie in two planes; the kernels read them as the four bits that `widen` makes of them.
KV_INLINE int kernel_bits(const Operand& x) { return x.bits == 3 ? 4 : x.bits; }

KV_INLINE Codec choose(const Operand& x) {
  if (x.kind == Kind::codebook || x.kind == Kind::scalar || turned(x)) return Codec::expand;
  if (x.kind == Kind::dense) {
    if (x.width % 16 || x.type == Type::f16) return Codec::expand;
    const bool wide = x.width % 32 == 0;
    if (x.type == Type::f32) return wide ? Codec::f32_wide : Codec::f32;
    return wide ? Codec::bf16_wide : Codec::bf16;
  }
  const int bytes = packed_bytes(x.width, kernel_bits(x));
  const int entries = bytes % 32 == 0 ? 1 : bytes == 16 ? 2 : bytes == 8 ? 4 : 0;
  if (!entries || x.stride != packed_bytes(x.width, x.bits) || (x.index && (entries > 1 || x.kind == Kind::channel))) return Codec::expand;
  // A vector's lanes span 32 / entries consecutive channels, which must share a scale (and not straddle two slabs).
  if (x.kind == Kind::token && x.group % (32 / entries)) return Codec::expand;
  switch (kernel_bits(x)) {
    case 8: return entries == 1 ? Codec::c8 : Codec::expand;
    case 4: return entries == 1 ? Codec::c4 : entries == 2 ? Codec::c4_2 : Codec::expand;
    case 2: return entries == 1 ? Codec::c2 : entries == 2 ? Codec::c2_2 : Codec::expand;
    case 1: return entries == 2 ? Codec::c1_2 : entries == 4 ? Codec::c1_4 : Codec::expand;
    default: return Codec::expand;
  }
}

// The order of a row's channels in its vectors.
struct Order {
  Codec codec;
  int entries;  // per vector
  int vectors;  // per row
  int steps;
  int chunk;
  int slab;     // channels per slab of packed codes
  int bits;

  // The channel in a lane of vector v; may be >= width where a tile was padded.
  int channel(int v, int lane) const {
    if (bits == 0) return 8 * v + lane;
    if (bits == 16) return 16 * (v / 2) + 2 * lane + v % 2;
    const int s = v % steps;
    return 32 * (v / steps) + 4 * (lane % (W / entries)) + s % 4 + s / 4 * slab;
  }
  // The factor by which get() is too large.
  float factor(int v) const {
    if (bits == 0 || bits == 16) return 1.0f;
    const int s = v % steps, shift = 8 * (s % 4) + bits * (s / 4);
    return shift == 32 - bits ? 1.0f : static_cast<float>(1u << shift);
  }
};

KV_INLINE Order order_of(const Operand& x) {
  Order o{};
  o.codec = choose(x);
  with_codec(o.codec, [&](auto c) {
    o.entries = decltype(c)::entries;
    o.steps = decltype(c)::steps;
    o.chunk = decltype(c)::chunk;
  });
  if (o.codec == Codec::expand || x.kind == Kind::dense) {
    o.bits = o.codec == Codec::bf16 || o.codec == Codec::bf16_wide ? 16 : 0;
    o.vectors = (x.width + 15) / 16 * 2;
  } else {
    o.bits = kernel_bits(x);
    o.slab = packed_bytes(x.width, o.bits);
    o.vectors = x.width * o.entries / W;
  }
  return o;
}

KV_INLINE float element(const uint8_t* p, Type type, int64_t i) {
  if (type == Type::f32) return reinterpret_cast<const f32_memory*>(p)[i];
  const uint16_t h = reinterpret_cast<const u16_memory*>(p)[i];
  return type == Type::bf16 ? bf16_to_float(h) : half_to_float(h);
}

KV_INLINE int type_bytes(Type type) { return type == Type::f32 ? 4 : 2; }

// Converts n consecutive elements to float32.
KV_INLINE void to_float(const uint8_t* p, Type type, int64_t first, int n, float* out) {
  int i = 0;
  if (type == Type::f32) {
    std::memcpy(out, p + 4 * first, sizeof(float) * n);
    return;
  }
  p += 2 * first;
  if (type == Type::bf16)
    for (; i + W <= n; i += W) store(out + i, load_bf16(p + 2 * i));
  else
    for (; i + W <= n; i += W) store(out + i, load_half(p + 2 * i));
  for (; i < n; ++i) out[i] = element(p, type, i);
}

// One value per channel into the order of a row's vectors (codes with a direct form).
KV_INLINE void permute(const Order& o, const float* in, float* out) {
  for (int v = 0; v < o.vectors; v += 4, out += 4 * W) {
    const float* from = in + o.channel(v, 0);
    if (o.entries == 1) {
      const vf a = load(from), b = load(from + 8), c = load(from + 16), d = load(from + 24);
      const vf ab_even = KV_SHUFFLE(a, b, 0, 4, 8, 12, 2, 6, 10, 14), ab_odd = KV_SHUFFLE(a, b, 1, 5, 9, 13, 3, 7, 11, 15);
      const vf cd_even = KV_SHUFFLE(c, d, 0, 4, 8, 12, 2, 6, 10, 14), cd_odd = KV_SHUFFLE(c, d, 1, 5, 9, 13, 3, 7, 11, 15);
      store(out, KV_SHUFFLE(ab_even, cd_even, 0, 1, 2, 3, 8, 9, 10, 11));
      store(out + W, KV_SHUFFLE(ab_odd, cd_odd, 0, 1, 2, 3, 8, 9, 10, 11));
      store(out + 2 * W, KV_SHUFFLE(ab_even, cd_even, 4, 5, 6, 7, 12, 13, 14, 15));
      store(out + 3 * W, KV_SHUFFLE(ab_odd, cd_odd, 4, 5, 6, 7, 12, 13, 14, 15));
    } else if (o.entries == 2) {
      const vf a = load(from), b = load(from + 8);
      store(out, KV_SHUFFLE(a, b, 0, 4, 8, 12, 0, 4, 8, 12));
      store(out + W, KV_SHUFFLE(a, b, 1, 5, 9, 13, 1, 5, 9, 13));
      store(out + 2 * W, KV_SHUFFLE(a, b, 2, 6, 10, 14, 2, 6, 10, 14));
      store(out + 3 * W, KV_SHUFFLE(a, b, 3, 7, 11, 15, 3, 7, 11, 15));
    } else {
      const vf a = load(from);
      store(out, KV_SHUFFLE(a, a, 0, 4, 0, 4, 0, 4, 0, 4));
      store(out + W, KV_SHUFFLE(a, a, 1, 5, 1, 5, 1, 5, 1, 5));
      store(out + 2 * W, KV_SHUFFLE(a, a, 2, 6, 2, 6, 2, 6, 2, 6));
      store(out + 3 * W, KV_SHUFFLE(a, a, 3, 7, 3, 7, 3, 7, 3, 7));
    }
  }
}

// Eight bytes as 32-bit words, shifted right; compilers take a conversion of byte vectors apart lane by lane.
KV_INLINE vu load_bytes_as_words(const uint8_t* p, uint32_t shift) {
  uint32_t w[2];
  std::memcpy(w, p, 8);
  return vu{w[0], w[0], w[0], w[0], w[1], w[1], w[1], w[1]} >> (vu{0, 8, 16, 24, 0, 8, 16, 24} + shift);
}

// out = (or +=) factor * codes of a plane whose slabs hold `slab` channels.
template <bool Add>
KV_INLINE void unpack_plane(const uint8_t* row, int slab, int bits, float factor, float* out) {
  const uint32_t mask = (1u << bits) - 1u;
  for (int j = 0; j < 8 / bits; ++j, out += slab) {
    int i = 0;
    for (; i + W <= slab; i += W) {
      const vf codes = to_float(load_bytes_as_words(row + i, bits * j) & mask) * splat(factor);
      store(out + i, Add ? load(out + i) + codes : codes);
    }
    for (; i < slab; ++i) {
      const float code = static_cast<float>(row[i] >> (bits * j) & mask) * factor;
      out[i] = Add ? out[i] + code : code;
    }
  }
}

// A row of three-bit codes as four-bit codes, as many words at a time as both kinds of planes are made of. Eighths of a row
// share a byte of the upper plane, quarters one of the lower plane, halves one of the result.
template <class Word>
KV_INLINE void widen_words(const uint8_t* row, int width, uint8_t* out) {
  const int block = width / 8, size = sizeof(Word);
  const Word low = static_cast<Word>(0x3333333333333333u), high = static_cast<Word>(0x1111111111111111u);
  for (int i = 0; i < block; i += size) {
    Word a, b, c;
    std::memcpy(&a, row + i, size);
    std::memcpy(&b, row + block + i, size);
    std::memcpy(&c, row + 2 * block + i, size);
    const Word words[4] = {static_cast<Word>((a & low) | (c & high) << 2), static_cast<Word>((b & low) | (c >> 1 & high) << 2),
                           static_cast<Word>((a >> 2 & low) | (c & high << 2)), static_cast<Word>((b >> 2 & low) | (c >> 1 & high << 2))};
    for (int q = 0; q < 4; ++q) std::memcpy(out + q * block + i, words + q, size);
  }
}

KV_INLINE void widen(const uint8_t* row, int width, uint8_t* out) {
  if (width % 64 == 0)
    widen_words<uint64_t>(row, width, out);
  else
    widen_words<uint32_t>(row, width, out);
}

// Codes of one packed row as float32.
KV_INLINE void unpack_row(const uint8_t* row, int width, int bits, float* out) {
  if (bits == 3) {
    unpack_plane<false>(row, width / 4, 2, 1.0f, out);
    unpack_plane<true>(row + width / 4, width / 8, 1, 4.0f, out);
  } else {
    unpack_plane<false>(row, packed_bytes(width, bits), bits, 1.0f, out);
  }
}

// Where entry t of a row lies: its index over all rows, counted in entries.
KV_INLINE int64_t flat(const Operand& x, int row, int64_t t) {
  if (x.index) t = x.index[x.index_starts[row] + t];
  if (x.skip) t += x.skip[row];
  return x.starts[row] * (x.kind == Kind::channel || x.kind == Kind::codebook ? x.group : 1) + t;
}

}  // namespace
}  // namespace kvbudget
