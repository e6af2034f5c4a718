// Counts what one entry costs in the kernels themselves, without Python, for one storage format:
//
//   g++ -std=c++17 -O3 -mavx2 -mfma -mf16c -Wno-psabi -I src/kvbudget/kernels/native benchmarks/instructions.cpp -o count
//   ./count 64 3 4            head_dim, queries, bits (32 and 16: dense): time-stamp cycles per entry, data in the cache
//   valgrind --tool=callgrind --toggle-collect='*attend*' ./count 64 3 4 once     instructions of 2048 entries
#define KV_TABLE avx2_kernels
#define KV_NAME "avx2"
#include <x86intrin.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "table.h"

using namespace kvbudget;

constexpr int kEntries = 2048, kGroup = 32;
static const int64_t start = 0, length = kEntries;

// Random bytes serve: small exponents of bf16 and float32 keep every number finite.
static std::vector<uint8_t> bytes(size_t n, uint8_t most) {
  std::vector<uint8_t> data(n);
  for (uint8_t& b : data) b = static_cast<uint8_t>(std::rand() % (most + 1));
  return data;
}

int main(int, char** arguments) {
  const int width = std::atoi(arguments[1]), queries = std::atoi(arguments[2]), bits = std::atoi(arguments[3]);
  const bool once = arguments[4] != nullptr;
  const bool dense = bits >= 16;
  const std::vector<uint8_t> data = bytes(static_cast<size_t>(kEntries) * width * bits / 8, dense ? 0x3e : 0xff);
  const std::vector<uint8_t> meta = bytes(static_cast<size_t>(kEntries) * width / kGroup * 2, 0x38);
  Operand key{}, value{};
  for (Operand* x : {&key, &value}) {
    x->kind = dense ? Kind::dense : x == &key ? Kind::channel : Kind::token;
    x->type = bits == 32 ? Type::f32 : dense ? Type::bf16 : Type::f16;
    x->data = data.data();
    x->scale = x->zero = meta.data();
    x->stride = width * bits / 8;
    x->width = width;
    x->bits = bits;
    x->group = dense ? 1 : kGroup;
    x->starts = &start;
  }
  const std::vector<float> query(static_cast<size_t>(queries) * width, 0.1f);
  Job job{};
  job.key = key;
  job.value = value;
  job.query = reinterpret_cast<const uint8_t*>(query.data());
  job.rows = job.steps = 1;
  job.queries = queries;
  job.scale = 0.1f;
  job.lengths = &length;
  const Kernels& kernels = avx2_kernels();
  std::vector<uint8_t> scratch(kernels.scratch_bytes(job) + 64);
  uint8_t* aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  std::vector<float> out(static_cast<size_t>(queries) * width), lse(queries);
  unsigned long long least = ~0ull;
  for (int turn = 0; turn < (once ? 1 : 400); ++turn) {
    const unsigned long long begin = __rdtsc();
    kernels.attend(job, 0, 0, kEntries, aligned, out.data(), lse.data(), nullptr);
    least = std::min<unsigned long long>(least, __rdtsc() - begin);
  }
  std::printf("head_dim %d, %d queries, %d bits: %.1f cycles per entry (lse %g)\n", width, queries, bits,
              static_cast<double>(least) / kEntries, lse[0]);
}
