// Splits attention over ragged rows among threads and joins what the threads bring back.
#include "driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace kvbudget {
namespace {

// A range of one row's entries; where it is not the whole row, its result waits in a slot to be merged.
struct Range {
  int row;
  int64_t begin, end;
  int slot;
};

struct Split {
  std::vector<Range> ranges;
  std::vector<size_t> first;  // of each thread's ranges, one more at the end
  int slots = 0;
};

// Attention of one query over a part of the entries.
struct Part {
  const float* out;
  float lse;
};

// Exact softmax over the union of the parts.
void join(const std::vector<Part>& parts, int width, float* out, float& lse) {
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (const Part& part : parts) top = std::max(top, part.lse);
  std::fill_n(out, width, 0.0f);
  lse = top;
  if (!std::isfinite(top)) return;
  for (const Part& part : parts) total += std::exp(part.lse - top);
  lse = top + std::log(total);
  for (const Part& part : parts) {
    const float weight = std::exp(part.lse - lse);
    for (int d = 0; d < width; ++d) out[d] += weight * part.out[d];
  }
}

// From this many query rows on, entries are expanded once for all of them.
constexpr int kManyQueries = 16;
constexpr int64_t kColumns = 256;

// Threads pay off from about ten microseconds of work on.
constexpr double kSerialWork = 1.5e5;

int useful_threads(const Job& job, int threads) {
  int64_t entries = 0;
  for (int r = 0; r < job.rows; ++r) entries += job.lengths[r];
  const double work = static_cast<double>(entries) * job.queries * (job.key.width + job.value.width);
  return work < kSerialWork ? 1 : std::max(threads, 1);
}

// Equal shares of the entries of all rows, which are cut at multiples of `grain` alone.
Split split(const int64_t* lengths, int rows, int64_t grain, int threads) {
  Split s;
  int64_t total = 0, left = 0;
  for (int r = 0; r < rows; ++r) total += lengths[r];
  int row = 0;
  int64_t at = 0;
  for (int t = 0; t < threads; ++t) {
    s.first.push_back(s.ranges.size());
    const int64_t until = total * (t + 1) / threads;
    while (row < rows && (left < until || t + 1 == threads)) {
      const int64_t length = lengths[row];
      int64_t end = length;
      if (t + 1 < threads && left + (length - at) > until) {
        end = std::min(length, (at + (until - left) + grain / 2) / grain * grain);
        if (end <= at) break;
      }
      if (end > at) s.ranges.push_back({row, at, end, at == 0 && end == length ? -1 : s.slots++});
      left += end - at;
      at = end;
      if (at == length) ++row, at = 0;
    }
  }
  s.first.push_back(s.ranges.size());
  return s;
}

constexpr int64_t kGrain = 32;

// Cut where no group of per-channel codes is torn.
Split split(const Job& job, int threads) {
  int64_t grain = kGrain;
  for (const Operand* x : {&job.key, &job.value})
    if (x->kind == Kind::channel) grain = std::max<int64_t>(grain, x->group);
  return split(job.lengths, job.rows, grain, threads);
}

uint8_t* scratch(size_t bytes) {
  thread_local std::vector<uint8_t> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~static_cast<uintptr_t>(63));
}

template <class Body>
void in_parallel(int threads, const Body& body) {
  if (threads == 1) return body(0);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) body(t);
}

// Where each row's results begin, `per_entry` numbers for every entry.
std::vector<int64_t> offsets_of(const Job& job, int64_t per_entry) {
  std::vector<int64_t> offsets(job.rows);
  for (int r = 1; r < job.rows; ++r) offsets[r] = offsets[r - 1] + job.lengths[r - 1] * per_entry;
  return offsets;
}

void by_columns(const Kernels& kernels, const Job& job, int threads, const float* lse, float* sums, float* weights) {
  const std::vector<int64_t> offsets = offsets_of(job, 1);
  std::vector<Range> blocks;
  for (int r = 0; r < job.rows; ++r)
    for (int64_t t = 0; t < job.lengths[r]; t += kColumns) blocks.push_back({r, t, std::min(t + kColumns, job.lengths[r]), -1});
  threads = useful_threads(job, threads);
  const size_t bytes = kernels.column_bytes(job);
  const auto block = [&](const Range& x) {
    const int64_t at = offsets[x.row];
    kernels.columns(job, x.row, x.begin, x.end, scratch(bytes), lse + static_cast<size_t>(x.row) * job.queries,
                    sums ? sums + at + x.begin : nullptr, weights ? weights + at * job.queries + x.begin : nullptr);
  };
  // Causal blocks differ in work, so each thread takes the next one that is left.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (size_t i = 0; i < blocks.size(); ++i) block(blocks[i]);
}

bool machine_has(const char* name) {
  if (!std::strcmp(name, "generic")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

}  // namespace

const Kernels* named_kernels(const char* name) {
  if (!machine_has(name)) return nullptr;
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512")) return &avx512_kernels();
  if (!std::strcmp(name, "avx2")) return &avx2_kernels();
#endif
  return &generic_kernels();
}

const Kernels* best_kernels() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* kernels = named_kernels(name)) return kernels;
  return &generic_kernels();
}

std::vector<std::vector<int64_t>> shares(const std::vector<int64_t>& lengths, int threads) {
  const int rows = static_cast<int>(lengths.size());
  const Split s = split(lengths.data(), rows, kGrain, threads);
  std::vector<std::vector<int64_t>> entries(threads, std::vector<int64_t>(rows));
  for (int t = 0; t < threads; ++t)
    for (size_t i = s.first[t]; i < s.first[t + 1]; ++i) entries[t][s.ranges[i].row] += s.ranges[i].end - s.ranges[i].begin;
  return entries;
}

void attend(const Kernels& kernels, const Job& job, int threads, float* out, float* lse, float* logits) {
  const float infinity = std::numeric_limits<float>::infinity();
  const int M = job.queries, width = job.value.width;
  threads = useful_threads(job, threads);
  const Split s = split(job, threads);
  std::vector<float> parts(static_cast<size_t>(s.slots) * M * (width + 1));
  const std::vector<int64_t> offsets = offsets_of(job, M);
  const size_t bytes = kernels.scratch_bytes(job);
  in_parallel(threads, [&](int t) {
    uint8_t* memory = scratch(bytes);
    for (size_t i = s.first[t]; i < s.first[t + 1]; ++i) {
      const Range& range = s.ranges[i];
      float* to = out + static_cast<size_t>(range.row) * M * width;
      float* to_lse = lse + static_cast<size_t>(range.row) * M;
      if (range.slot >= 0) {
        to = parts.data() + static_cast<size_t>(range.slot) * M * (width + 1);
        to_lse = to + static_cast<size_t>(M) * width;
      }
      kernels.attend(job, range.row, range.begin, range.end, memory, to, to_lse, logits ? logits + offsets[range.row] : nullptr);
    }
  });
  for (int r = 0; r < job.rows; ++r)
    if (job.lengths[r] == 0) {
      std::fill_n(out + static_cast<size_t>(r) * M * width, static_cast<size_t>(M) * width, 0.0f);
      std::fill_n(lse + static_cast<size_t>(r) * M, M, -infinity);
    }
  std::vector<Part> some;
  for (size_t i = 0; i < s.ranges.size();) {
    size_t last = i;
    while (last < s.ranges.size() && s.ranges[last].row == s.ranges[i].row) ++last;
    if (s.ranges[i].slot >= 0)
      for (int m = 0; m < M; ++m) {
        some.clear();
        for (size_t k = i; k < last; ++k) {
          const float* part = parts.data() + static_cast<size_t>(s.ranges[k].slot) * M * (width + 1);
          some.push_back({part + static_cast<size_t>(m) * width, part[static_cast<size_t>(M) * width + m]});
        }
        const size_t at = static_cast<size_t>(s.ranges[i].row) * M + m;
        join(some, width, out + at * width, lse[at]);
      }
    i = last;
  }
}

void mass(const Kernels& kernels, const Job& job, int threads, const float* lse, float* sums, float* weights) {
  if (weights || job.queries >= kManyQueries) return by_columns(kernels, job, threads, lse, sums, weights);
  threads = useful_threads(job, threads);
  const Split s = split(job, threads);
  const std::vector<int64_t> offsets = offsets_of(job, 1);
  const size_t bytes = kernels.scratch_bytes(job);
  in_parallel(threads, [&](int t) {
    uint8_t* memory = scratch(bytes);
    for (size_t i = s.first[t]; i < s.first[t + 1]; ++i) {
      const Range& range = s.ranges[i];
      kernels.mass(job, range.row, range.begin, range.end, memory, lse + static_cast<size_t>(range.row) * job.queries,
                   sums + offsets[range.row] + range.begin);
    }
  });
}

void encode(const Kernels& kernels, const Dense& x, bool by_units, int bits, int group, int64_t count, int threads,
            const Encoded& to) {
  const int64_t elements = count * x.width * (by_units ? group : 1);
  threads = elements < (1 << 16) ? 1 : std::max(threads, 1);
  in_parallel(threads, [&](int t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    (by_units ? kernels.encode_units : kernels.encode_tokens)(x, bits, group, begin, end, to);
  });
}

void merge(const std::vector<const float*>& outs, const std::vector<const float*>& lses, int64_t queries, int width, float* out,
           float* lse) {
  std::vector<Part> parts(outs.size());
  for (int64_t m = 0; m < queries; ++m) {
    for (size_t i = 0; i < outs.size(); ++i) parts[i] = {outs[i] + m * width, lses[i][m]};
    join(parts, width, out + m * width, lse[m]);
  }
}

void mass_of_logits(const Kernels& kernels, int rows, int queries, const int64_t* lengths, int threads, const float* logits,
                    const float* lse, float* sums) {
  std::vector<int64_t> offsets(rows + 1);
  for (int r = 0; r < rows; ++r) offsets[r + 1] = offsets[r] + lengths[r];
  threads = offsets[rows] * queries < 16384 ? 1 : std::max(1, std::min(threads, rows));
  in_parallel(threads, [&](int t) {
    for (int r = rows * t / threads; r < rows * (t + 1) / threads; ++r)
      kernels.mass_of_logits(queries, lengths[r], logits + offsets[r] * queries, lse + static_cast<size_t>(r) * queries,
                             sums + offsets[r]);
  });
}

}  // namespace kvbudget
