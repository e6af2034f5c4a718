// Splits attention over ragged rows among threads and joins what the threads bring back.
#pragma once

#include <vector>

#include "job.h"

namespace kvbudget {

// The best kernels that this machine can run, or those called `name` (null if it cannot run them).
const Kernels* best_kernels();
const Kernels* named_kernels(const char* name);

// Entries of each row that each of the threads attends to: [threads][rows].
std::vector<std::vector<int64_t>> shares(const std::vector<int64_t>& lengths, int threads);

// out [rows, M, Dv], lse [rows, M]; logits (may be null) row after row [M, length].
void attend(const Kernels&, const Job&, int threads, float* out, float* lse, float* logits);
// sums: row after row [length], against lse [rows, M]; or the weights themselves, row after row [M, length]. Either may be null.
void mass(const Kernels&, const Job&, int threads, const float* lse, float* sums, float* weights);
// The same from the logits that attend has kept.
void mass_of_logits(const Kernels&, int rows, int queries, const int64_t* lengths, int threads, const float* logits,
                    const float* lse, float* sums);

// Joins partial attentions of `queries` rows: outs [queries, width], lses [queries].
void merge(const std::vector<const float*>& outs, const std::vector<const float*>& lses, int64_t queries, int width, float* out,
           float* lse);
// Codes, scales and zeros of `count` entries, or of `count` units of `group` entries.
void encode(const Kernels&, const Dense&, bool by_units, int bits, int group, int64_t count, int threads, const Encoded&);

}  // namespace kvbudget
