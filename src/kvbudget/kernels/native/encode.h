// Integer codes from dense entries: minimum and maximum of each group, rounding and packing, without a division per element.
//
// Bit for bit what kernels/encode.py computes in torch: scale and zero are rounded to half precision first, then
// code = round((x - zero) / scale), half to even.
#pragma once

#include "blocks.h"
#include "codec.h"

namespace kvbudget {
namespace {

KV_INLINE int lesser(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

KV_INLINE uint8_t cut(int code, int levels) { return static_cast<uint8_t>(code < 0 ? 0 : code < levels ? code : levels); }

// `Bits` bits from bit `From` on of codes of `Of` bits, a byte each, into slabs, a word at a time.
template <int Bits, int From, int Of, class Word>
KV_INLINE void pack_words(const uint8_t* codes, int count, int width, uint8_t* out, int pitch) {
  const int slab = packed_bytes(width, Bits);
  Word mask;
  std::memset(&mask, (1 << Bits) - 1, sizeof(Word));
  const auto part = [&](const uint8_t* p) {
    Word word;
    std::memcpy(&word, p, sizeof(Word));
    return Bits == Of ? word : static_cast<Word>(word >> From & mask);
  };
  for (int t = 0; t < count; ++t, codes += width, out += pitch) {
    for (int i = 0; i < slab; i += sizeof(Word)) {
      Word word = part(codes + i);
      for (int j = 1; j < 8 / Bits; ++j) word |= part(codes + i + j * slab) << (j * Bits);
      std::memcpy(out + i, &word, sizeof(Word));
    }
  }
}

// A plane of codes [count, width].
template <int Bits, int From, int Of>
void pack_plane(const uint8_t* codes, int count, int width, uint8_t* out) {
  typedef uint32_t half_vu __attribute__((vector_size(16)));
  const int slab = packed_bytes(width, Bits), pitch = packed_bytes(width, Of);
  if (slab % sizeof(vu) == 0) return pack_words<Bits, From, Of, vu>(codes, count, width, out, pitch);
  if (slab % sizeof(half_vu) == 0) return pack_words<Bits, From, Of, half_vu>(codes, count, width, out, pitch);
  if (slab % sizeof(uint64_t) == 0) return pack_words<Bits, From, Of, uint64_t>(codes, count, width, out, pitch);
  pack_words<Bits, From, Of, uint8_t>(codes, count, width, out, pitch);
}

KV_INLINE void pack_rows(const uint8_t* codes, int count, int width, int bits, uint8_t* out) {
  switch (bits) {
    case 8: std::memcpy(out, codes, count * width); return;
    case 4: return pack_plane<4, 0, 4>(codes, count, width, out);
    case 3: pack_plane<2, 0, 3>(codes, count, width, out); return pack_plane<1, 2, 3>(codes, count, width, out + width / 4);
    case 2: return pack_plane<2, 0, 2>(codes, count, width, out);
    case 1: return pack_plane<1, 0, 1>(codes, count, width, out);
  }
}

// Codes of eight channels of a row, as bytes.
template <Type T>
KV_INLINE void code_channels(const uint8_t* row, int d, vf s, vf z, vf inverse, int levels, uint8_t* codes) {
  const vi found = codes_of(load_as<T>(row, d), s, z, inverse);
  for (int i = 0; i < W; ++i) codes[d + i] = cut(found[i], levels);
}

// Entries [begin, end) with one scale and zero per `group` consecutive channels. Eight groups, of one row or several, find their
// steps together.
template <Type T>
void encode_tokens_of(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  const Grid grid = grid_of(bits);
  const int together = lesser(W, kWidest / groups);  // rows
  Lines lines;
  alignas(32) float least[kWidest], most[kWidest], low[W * W] = {}, high[W * W] = {};
  alignas(32) uint8_t codes[W * kWidest];
  for (int64_t t = begin; t < end; t += together) {
    const int rows = lesser(end - t, together), all = rows * groups;
    const uint8_t* row = x.data + t * x.stride;
    for (int n = 0, g = 0; n < all; n += W) {
      const int found = lesser(all - n, W);
      for (int k = 0; k < found; ++k) {
        vf a, b;
        bounds_of<T>(row, g * group, (g + 1) * group, a, b);
        store(low + k * W, a);
        store(high + k * W, b);
        if (++g == groups) {
          g = 0;
          row += x.stride;
        }
      }
      store(least + n, across(low, least_of));
      store(most + n, across(high, most_of));
    }
    lines.find(least, most, all, grid, to.scale + 2 * t * groups, to.zero + 2 * t * groups);
    row = x.data + t * x.stride;
    for (int r = 0, n = 0; r < rows; ++r, row += x.stride) {
      for (int first = 0; first < D; first += group, ++n) {
        const vf s = splat(lines.s[n]), z = splat(lines.z[n]), inverse = splat(lines.inverse[n]);
        uint8_t* found = codes + n * group - first;
        const int last = first + group;
        int d = first;
        for (; d + W <= last; d += W) code_channels<T>(row, d, s, z, inverse, levels, found);
        for (; d < last; ++d) found[d] = cut(codes_of(splat(element(row, T, d)), s, z, inverse)[0], levels);
      }
    }
    pack_rows(codes, rows, D, bits, to.codes + t * bytes);
  }
}

constexpr int kStrip = 32;  // entries whose codes wait as bytes

#if defined(__AVX2__)

// Entries from one to the one to ask for meanwhile: 32 KB and more, behind those that are coded together.
template <Type T>
KV_INLINE int64_t ahead_of(int width, int together) {
  const int64_t bytes = int64_t{together} * width * (T == Type::f32 ? 4 : 2);
  return (32768 / bytes + 1) * together;
}

// Whether two codes of four bits, from the halves of a row, fill each byte of the blocks that are coded together.
KV_INLINE bool in_pairs(int bits, int width) { return bits == 4 && width % (2 * kBlock) == 0; }

// The same for groups of whole blocks, whose bounds are independent of one another.
template <Type T>
void encode_tokens_in_blocks(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  constexpr int size = T == Type::f32 ? 4 : 2;
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits);
  const bool pairs = in_pairs(bits, D), direct = pairs || bits == 8;
  const int64_t ahead = ahead_of<T>(D, kStrip);
  const Grid grid = grid_of(bits);
  Lines lines;
  alignas(32) float least[kWidest], most[kWidest];
  alignas(32) uint8_t codes[kStrip * kWidest];
  int64_t at[kWidest];  // where each group begins, the last one repeated to whole vectors
  for (int n = 0; n < kStrip * groups; ++n) at[n] = n / groups * x.stride + n % groups * group * size;
  for (int64_t t = begin; t < end; t += kStrip) {
    const int rows = lesser(end - t, kStrip), all = rows * groups;
    const uint8_t* from = x.data + t * x.stride;
    for (int n = all; n % W; ++n) at[n] = at[all - 1];
    for (int n = 0; n < all; n += W) {
      Bounds<T> eight[W];
#pragma GCC unroll 8
      for (int k = 0; k < W; ++k) eight[k] = bounds_of_blocks<T>(from + at[n + k], group);
      vf low, high;
      across<T>(eight, low, high);
      store(least + n, low);
      store(most + n, high);
    }
    lines.find(least, most, all, grid, to.scale + 2 * t * groups, to.zero + 2 * t * groups);
    uint8_t* out = to.codes + t * bytes;
    const Strip strip{from, x.stride, rows, groups, direct ? out : codes, direct ? bytes : D, ahead, out, bytes};
    code_rows<T, true>(lines, grid, strip, D, group, pairs);
    if (!direct) pack_rows(codes, rows, D, bits, out);
  }
}

#endif

// Least and most of each channel of a unit; those in whole blocks lie as pairs.
template <Type T>
KV_INLINE void bounds_of_unit(const uint8_t* rows, int64_t stride, int unit, int width, float* least, float* most) {
  int d = 0;
#if defined(__AVX2__)
  for (; d + kBlock <= width; d += kBlock) bounds_of_rows<T>(rows, stride, unit, d, least + d, most + d);
#endif
  for (; d < width; d += W) {
    vf low = load_as<T>(rows, d), high = low;
    for (int t = 1; t < unit; ++t) {
      const vf v = load_as<T>(rows + t * stride, d);
      low = vmin(low, v);
      high = vmax(high, v);
    }
    store(least + d, low);
    store(most + d, high);
  }
}

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
template <Type T>
void encode_units_of(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  const Grid grid = grid_of(bits);
  Lines lines;
  alignas(32) float least[kWidest], most[kWidest];
  alignas(32) uint8_t codes[kStrip * kWidest];
#if defined(__AVX2__)
  const int blocks = D / kBlock * kBlock;  // channels in whole ones
  const bool pairs = in_pairs(bits, D), direct = pairs || (bits == 8 && blocks == D);
  const int64_t ahead = ahead_of<T>(D, unit);
#endif
  for (int64_t u = begin; u < end; ++u) {
    const uint8_t* rows = x.data + u * unit * x.stride;
    uint8_t *scale = to.scale + 2 * u * D, *zero = to.zero + 2 * u * D;
    bounds_of_unit<T>(rows, x.stride, unit, D, least, most);
    lines.find(least, most, D, grid, scale, zero);
#if defined(__AVX2__)
    for (int d = 0; d < blocks; d += 2 * W) {
      order_pair<T>(scale + 2 * d);
      order_pair<T>(zero + 2 * d);
    }
#endif
    for (int first = 0; first < unit; first += kStrip, rows += kStrip * x.stride) {
      const int count = lesser(unit - first, kStrip);
      uint8_t* out = to.codes + (u * unit + first) * bytes;
      int d = 0;
#if defined(__AVX2__)
      const Strip strip{rows, x.stride, count, 0, direct ? out : codes, direct ? bytes : D, ahead, out, bytes};
      code_rows<T, false>(lines, grid, strip, blocks, 1, pairs);
      if (direct) continue;
      d = blocks;
#endif
      for (; d < D; d += W) {
        const vf s = load(lines.s + d), z = load(lines.z + d), inverse = load(lines.inverse + d);
        for (int t = 0; t < count; ++t) code_channels<T>(rows + t * x.stride, d, s, z, inverse, levels, codes + t * D);
      }
      pack_rows(codes, count, D, bits, out);
    }
  }
}

template <Type T>
void encode_tokens_as(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
#if defined(__AVX2__)
  if (group % kBlock == 0) return encode_tokens_in_blocks<T>(x, bits, group, begin, end, to);
#endif
  encode_tokens_of<T>(x, bits, group, begin, end, to);
}

void encode_tokens(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  if (x.type == Type::f32) return encode_tokens_as<Type::f32>(x, bits, group, begin, end, to);
  if (x.type == Type::bf16) return encode_tokens_as<Type::bf16>(x, bits, group, begin, end, to);
  encode_tokens_as<Type::f16>(x, bits, group, begin, end, to);
}

void encode_units(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  if (x.type == Type::f32) return encode_units_of<Type::f32>(x, bits, unit, begin, end, to);
  if (x.type == Type::bf16) return encode_units_of<Type::bf16>(x, bits, unit, begin, end, to);
  encode_units_of<Type::f16>(x, bits, unit, begin, end, to);
}

}  // namespace
}  // namespace kvbudget
