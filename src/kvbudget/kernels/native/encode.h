// Integer codes from dense entries: minimum and maximum of each group, rounding and packing, without a division per element.
//
// Bit for bit what kernels/encode.py computes in torch: scale and zero are rounded to half precision first, then
// code = round((x - zero) / scale), half to even.
#pragma once

#include "blocks.h"
#include "codec.h"

namespace kvbudget {
namespace {

KV_INLINE uint8_t cut(int code, int levels) { return static_cast<uint8_t>(code < 0 ? 0 : code < levels ? code : levels); }

// Slabs of codes from byte i on, a word at a time.
template <class Word>
KV_INLINE void pack_words(const uint8_t* codes, int slab, int bits, uint8_t* out, int& i) {
  for (; i + static_cast<int>(sizeof(Word)) <= slab; i += sizeof(Word)) {
    Word word, next;
    std::memcpy(&word, codes + i, sizeof(Word));
    for (int j = 1; j < 8 / bits; ++j) {
      std::memcpy(&next, codes + i + j * slab, sizeof(Word));
      word |= next << (j * bits);
    }
    std::memcpy(out + i, &word, sizeof(Word));
  }
}

// Codes [width], a byte each, into slabs of `bits` bits each.
KV_INLINE void pack_plane(const uint8_t* codes, int width, int bits, uint8_t* out) {
  typedef uint32_t half_vu __attribute__((vector_size(16)));
  const int slab = packed_bytes(width, bits);
  int i = 0;
  pack_words<vu>(codes, slab, bits, out, i);
  pack_words<half_vu>(codes, slab, bits, out, i);
  pack_words<uint64_t>(codes, slab, bits, out, i);
  for (; i < slab; ++i) {
    int byte = 0;
    for (int j = 0; j < 8 / bits; ++j) byte |= codes[i + j * slab] << (j * bits);
    out[i] = static_cast<uint8_t>(byte);
  }
}

constexpr int kWidest = 1024;  // channels of a row, as the binding checks

// Codes [count, width], a byte each.
template <int Bits>
KV_INLINE void pack_planes(const uint8_t* codes, int count, int width, uint8_t* out) {
  for (int t = 0; t < count; ++t) pack_plane(codes + t * width, width, Bits, out + t * packed_bytes(width, Bits));
}

KV_INLINE void pack_row_of_three(const uint8_t* codes, int width, uint8_t* out) {
  uint8_t low[kWidest], high[kWidest];
  for (int d = 0; d < width; ++d) {
    low[d] = codes[d] & 3;
    high[d] = codes[d] >> 2;
  }
  pack_plane(low, width, 2, out);
  pack_plane(high, width, 1, out + width / 4);
}

KV_INLINE void pack_rows(const uint8_t* codes, int count, int width, int bits, uint8_t* out) {
  switch (bits) {
    case 8: std::memcpy(out, codes, count * width); return;
    case 4: return pack_planes<4>(codes, count, width, out);
    case 2: return pack_planes<2>(codes, count, width, out);
    case 1: return pack_planes<1>(codes, count, width, out);
  }
  for (int t = 0; t < count; ++t) pack_row_of_three(codes + t * width, width, out + t * packed_bytes(width, 3));
}

// Codes of eight channels of a row, as bytes.
template <Type T>
KV_INLINE void code_channels(const uint8_t* row, int d, vf s, vf z, vf inverse, int levels, uint8_t* codes) {
  const vi found = codes_of(load_as<T>(row, d), s, z, inverse);
  for (int i = 0; i < W; ++i) codes[d + i] = cut(found[i], levels);
}

// What channels or groups are coded with, as many as `Most`.
template <int Most>
struct Lines {
  alignas(32) float s[Most], z[Most], inverse[Most];
  alignas(32) int32_t narrow[Most];

  KV_MEMBER void put(int i, const Steps& steps) {
    store(s + i, steps.s);
    store(z + i, steps.z);
    store(inverse + i, steps.inverse);
    *reinterpret_cast<vi*>(narrow + i) = steps.narrow;
  }
};

// Entries [begin, end) with one scale and zero per `group` consecutive channels. Eight groups, of one row or several, find their
// steps together.
template <Type T>
void encode_tokens_of(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  Lines<W * kWidest> lines;
  alignas(32) float least[W * W] = {}, most[W * W] = {};  // of eight groups
  alignas(32) uint8_t codes[W * kWidest];
  for (int64_t t = begin; t < end; t += W) {
    const int rows = static_cast<int>(end - t < W ? end - t : W), all = rows * groups;
    const uint8_t* row = x.data + t * x.stride;
    for (int n = 0, g = 0; n < all; n += W) {
      const int found = all - n < W ? all - n : W;
      for (int k = 0; k < found; ++k) {
        vf low, high;
        bounds_of<T>(row, g * group, (g + 1) * group, low, high);
        store(least + k * W, low);
        store(most + k * W, high);
        if (++g == groups) {
          g = 0;
          row += x.stride;
        }
      }
      const Steps steps = steps_of(across(least, least_of), across(most, most_of), splat(static_cast<float>(levels)));
      std::memcpy(to.scale + 2 * (t * groups + n), &steps.scale, 2 * found);
      std::memcpy(to.zero + 2 * (t * groups + n), &steps.zero, 2 * found);
      lines.put(n, steps);
    }
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

// The same for groups of whole blocks, a strip of entries at a time, whose groups are independent of one another at every stage.
template <Type T>
void encode_tokens_in_blocks(const Dense& x, int bits, int group, int64_t begin, int64_t end, const Encoded& to) {
  constexpr int kMost = kStrip * kWidest / kBlock, size = T == Type::f32 ? 4 : 2;
  const int D = x.width, groups = D / group, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  Lines<kMost> lines;
  alignas(32) float least[kMost], most[kMost];
  alignas(32) v8i16 scale[kMost / W], zero[kMost / W];
  alignas(32) uint8_t codes[kStrip * kWidest];
  int64_t at[kMost];  // where each group of a strip begins
  for (int n = 0; n < kStrip * groups; ++n) at[n] = n / groups * x.stride + n % groups * group * size;
  const vf top = splat(static_cast<float>(levels));
  for (int64_t t = begin; t < end; t += kStrip) {
    const int rows = static_cast<int>(end - t < kStrip ? end - t : kStrip), all = rows * groups;
    const uint8_t* from = x.data + t * x.stride;
    for (int n = 0; n < all; n += W) {
      Bounds<T> eight[W];
#pragma GCC unroll 8
      for (int k = 0; k < W; ++k) eight[k] = bounds_of_blocks<T>(from + at[n + k < all ? n + k : all - 1], group);
      vf low, high;
      across<T>(eight, low, high);
      store(least + n, low);
      store(most + n, high);
    }
    for (int n = 0; n < all; n += W) {
      const Steps steps = steps_of(load(least + n), load(most + n), top);
      scale[n / W] = steps.scale;
      zero[n / W] = steps.zero;
      lines.put(n, steps);
    }
    std::memcpy(to.scale + 2 * t * groups, scale, 2 * all);
    std::memcpy(to.zero + 2 * t * groups, zero, 2 * all);
    for (int n = 0; n < all; ++n) {
      const vf s = splat(lines.s[n]), z = splat(lines.z[n]), inverse = splat(lines.inverse[n]);
      const vf scales[] = {s, s, s, s}, zeros[] = {z, z, z, z}, inverses[] = {inverse, inverse, inverse, inverse};
      code_blocks<T>(lines.narrow[n], from + at[n], kBlock * size, kStrip * x.stride, group / kBlock, scales, zeros, inverses, levels,
                     codes + n * group, kBlock);
    }
    pack_rows(codes, rows, D, bits, to.codes + t * bytes);
  }
}

#endif

// Units [begin, end) of `unit` consecutive entries with one scale and zero per channel; the width is a multiple of W.
template <Type T>
void encode_units_of(const Dense& x, int bits, int unit, int64_t begin, int64_t end, const Encoded& to) {
  const int D = x.width, bytes = packed_bytes(D, bits), levels = (1 << bits) - 1;
  const vf top = splat(static_cast<float>(levels));
  Lines<kWidest> lines;
  alignas(32) float least[kWidest], most[kWidest];
  alignas(32) uint8_t codes[kStrip * kWidest];
#if defined(__AVX2__)
  const int blocks = D / kBlock * kBlock;  // channels in whole ones, which lie as pairs in least, most and lines
#endif
  for (int64_t u = begin; u < end; ++u) {
    const uint8_t* rows = x.data + u * unit * x.stride;
    uint8_t *scale = to.scale + 2 * u * D, *zero = to.zero + 2 * u * D;
    int d = 0;
#if defined(__AVX2__)
    for (; d < blocks; d += 2 * W) bounds_of_rows<T>(rows, x.stride, unit, d, least + d, most + d);
#endif
    for (; d < D; d += W) {
      vf low = load_as<T>(rows, d), high = low;
      for (int t = 1; t < unit; ++t) {
        const vf v = load_as<T>(rows + t * x.stride, d);
        low = vmin(low, v);
        high = vmax(high, v);
      }
      store(least + d, low);
      store(most + d, high);
    }
    for (d = 0; d < D; d += W) {
      const Steps steps = steps_of(load(least + d), load(most + d), top);
      *reinterpret_cast<v8i16_memory*>(scale + 2 * d) = steps.scale;
      *reinterpret_cast<v8i16_memory*>(zero + 2 * d) = steps.zero;
      lines.put(d, steps);
    }
#if defined(__AVX2__)
    for (d = 0; d < blocks; d += 2 * W) {
      order_pair<T>(scale + 2 * d);
      order_pair<T>(zero + 2 * d);
    }
#endif
    for (int first = 0; first < unit; first += kStrip, rows += kStrip * x.stride) {
      const int count = unit - first < kStrip ? unit - first : kStrip;
      d = 0;
#if defined(__AVX2__)
      for (; d < blocks; d += kBlock) {
        vf s[4], z[4], inverse[4];
        vi narrow = ~vi{};
        for (int v = 0; v < 4; ++v) {
          s[v] = load(lines.s + d + v * W);
          z[v] = load(lines.z + d + v * W);
          inverse[v] = load(lines.inverse + d + v * W);
          narrow &= *reinterpret_cast<const vi*>(lines.narrow + d + v * W);
        }
        const uint8_t* row = rows + d * (T == Type::f32 ? 4 : 2);
        code_blocks<T>(every(narrow), row, x.stride, unit * x.stride, count, s, z, inverse, levels, codes + d, D);
      }
#endif
      for (; d < D; d += W) {
        const vf s = load(lines.s + d), z = load(lines.z + d), inverse = load(lines.inverse + d);
        for (int t = 0; t < count; ++t) code_channels<T>(rows + t * x.stride, d, s, z, inverse, levels, codes + t * D);
      }
      pack_rows(codes, count, D, bits, to.codes + (u * unit + first) * bytes);
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
