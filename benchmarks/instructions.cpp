// Counts what one entry costs in the kernels themselves, without Python, for one storage format:
//
//   g++ -std=c++17 -O3 -mavx2 -mfma -mf16c -Wno-psabi -I src/kvbudget/kernels/native benchmarks/instructions.cpp -o count
//   ./count 64 3 4            head_dim, queries, bits (32 and 16: dense): time-stamp cycles per entry, data in the cache
//   ./count 64 3 4 stream     the same with data from memory, beside what reading these bytes alone takes
//   ./count 64 3 4 encode     of encoding bf16 entries instead, the least of many turns, data in the cache
//   -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=256 added: the AVX-512 kernels, cycles only
//   valgrind --tool=callgrind --toggle-collect='*attend*' ./count 64 3 4 once     instructions of 2048 entries
#define KV_TABLE avx2_kernels
#define KV_NAME "avx2"
#include <x86intrin.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "table.h"

using namespace kvbudget;

constexpr int kEntries = 2048, kGroup = 32;
static const int64_t start = 0, length = kEntries;

using Bytes = std::unique_ptr<uint8_t, decltype(&std::free)>;  // aligned to cache lines, as tensors are

// Random bytes serve: small exponents of bf16 and float32 keep every number finite.
static Bytes bytes(size_t n, uint8_t most) {
  Bytes data(static_cast<uint8_t*>(std::aligned_alloc(64, (n + 63) / 64 * 64)), std::free);
  for (size_t i = 0; i < n; ++i) data.get()[i] = static_cast<uint8_t>(std::rand() % (most + 1));
  return data;
}

// Cycles of reading bytes and doing nothing else.
static unsigned long long read(const uint8_t* p, size_t n) {
  const unsigned long long begin = __rdtsc();
  vu sum[4] = {};
  for (size_t i = 0; i + 128 <= n; i += 128)
    for (int j = 0; j < 4; ++j) sum[j] += load_words(p + i + 32 * j);
  vu total = sum[0] + sum[1] + sum[2] + sum[3];
  __asm__ volatile("" : "+x"(total));
  return __rdtsc() - begin;
}

// Least cycles per entry of encoding in groups of 32, per channel and per token.
static void encoding(int width, int bits) {
  constexpr int kRows = 8 * kEntries, kTurns = 400;
  const size_t bytes_of_codes = static_cast<size_t>(kRows) * width;
  const Bytes entries(static_cast<uint8_t*>(std::aligned_alloc(64, 2 * bytes_of_codes)), std::free);
  for (size_t i = 0; i < bytes_of_codes; ++i) {
    const float x = static_cast<float>(std::rand() % 20001 - 10000) / 3000.0f;
    std::memcpy(entries.get() + 2 * i, reinterpret_cast<const uint8_t*>(&x) + 2, 2);
  }
  const Bytes codes = bytes(bytes_of_codes, 0), scale = bytes(bytes_of_codes, 0), zero = bytes(bytes_of_codes, 0);
  const Dense x{entries.get(), Type::bf16, 2 * width, width};
  const Encoded to{codes.get(), scale.get(), zero.get()};
  const Kernels& kernels = avx2_kernels();
  for (const bool units : {true, false}) {
    unsigned long long least = ~0ull;
    for (int turn = 0; turn < kTurns; ++turn) {
      const unsigned long long begin = __rdtsc();
      (units ? kernels.encode_units : kernels.encode_tokens)(x, bits, kGroup, 0, units ? kRows / kGroup : kRows, to);
      least = std::min<unsigned long long>(least, __rdtsc() - begin);
    }
    std::printf("encoding per %s: %.1f cycles per entry\n", units ? "channel" : "token", static_cast<double>(least) / kRows);
  }
}

static double median(std::vector<unsigned long long> turns) {
  std::nth_element(turns.begin(), turns.begin() + turns.size() / 2, turns.end());
  return static_cast<double>(turns[turns.size() / 2]) / kEntries;
}

int main(int, char** arguments) {
  const int width = std::atoi(arguments[1]), queries = std::atoi(arguments[2]), bits = std::atoi(arguments[3]);
  const char* mode = arguments[4] ? arguments[4] : "";
  if (!std::strcmp(mode, "encode")) return encoding(width, bits), 0;
  const bool once = !std::strcmp(mode, "once"), stream = !std::strcmp(mode, "stream");
  const bool dense = bits >= 16;
  const size_t side = static_cast<size_t>(kEntries) * width * bits / 8;  // bytes of keys, and of values
  const size_t copies = stream ? (size_t{128} << 20) / side / 2 : 1;
  const Bytes data = bytes(copies * (stream ? 2 : 1) * side, dense ? 0x3e : 0xff);
  const Bytes meta = bytes(static_cast<size_t>(kEntries) * width / kGroup * 2, 0x38);
  Operand key{}, value{};
  for (Operand* x : {&key, &value}) {
    x->kind = dense ? Kind::dense : x == &key ? Kind::channel : Kind::token;
    x->type = bits == 32 ? Type::f32 : dense ? Type::bf16 : Type::f16;
    x->data = data.get();
    x->scale = x->zero = meta.get();
    x->stride = width * bits / 8;
    x->width = width;
    x->bits = bits;
    x->group = dense ? 1 : kGroup;
    x->starts = &start;
  }
  const std::vector<float> query(static_cast<size_t>(queries) * width, 0.1f);
  Job job{};
  job.query = reinterpret_cast<const uint8_t*>(query.data());
  job.rows = job.steps = 1;
  job.queries = queries;
  job.scale = 0.1f;
  job.lengths = &length;
  job.key = key;
  job.value = value;
  const Kernels& kernels = avx2_kernels();
  std::vector<uint8_t> scratch(kernels.scratch_bytes(job) + 64);
  uint8_t* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  std::vector<float> out(static_cast<size_t>(queries) * width), lse(queries);
  std::vector<unsigned long long> turns, reads;
  for (size_t turn = 0; turn < (once ? 1 : stream ? 3 * copies : 400); ++turn) {
    if (stream) {
      job.key.data = data.get() + turn % copies * 2 * side;
      job.value.data = job.key.data + side;
    }
    const unsigned long long begin = __rdtsc();
    kernels.attend(job, 0, 0, kEntries, aligned, out.data(), lse.data(), nullptr);
    turns.push_back(__rdtsc() - begin);
    if (stream) reads.push_back(read(data.get() + (turn + copies / 2) % copies * 2 * side, 2 * side));
  }
  const double cycles = stream ? median(turns) : static_cast<double>(*std::min_element(turns.begin(), turns.end())) / kEntries;
  std::printf("head_dim %d, %d queries, %d bits: %.1f cycles per entry (lse %g)\n", width, queries, bits, cycles, lse[0]);
  if (stream) std::printf("reading its bytes: %.1f cycles, so %.2f times that\n", median(reads), cycles / median(reads));
}
