// The plain structs that the driver hands to the kernels of one instruction set.
//
// Kernel translation units are compiled with different machine flags, so nothing here (or in any header that they share)
// may define a function with external linkage: the linker could keep the copy that needs the newer machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvbudget {

enum class Kind : int { dense = 0, token = 1, channel = 2, codebook = 3, scalar = 4 };
enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

// Codewords of a codebook operand: an entry is scale * (one word per stage and group of coupled channels) + shift * mean.
struct Book {
  const float* words;         // [heads][stages][subspaces][size][coupled]
  int heads;                  // row r uses words of head r % heads
  int stages, subspaces;      // codes per entry: stages * subspaces
  int size, coupled;
  int64_t head_step, stage_step, subspace_step;  // in floats; 0 where words are shared
  int code_bytes;             // 1 or 2; 0: two words per 12 bits, low bytes of an entry first, then high halves
  const uint8_t* mean;        // [units, D]; null: none
  const uint8_t* shift;       // per entry, with the mean
  const int8_t* weights;      // [entries][stages * subspaces] what each word counts, before the scale; null: one
};

// How the codes of a scalar operand become elements, in this order; the fields are those of scalar.py.
struct Scalar {
  const float* table;       // [2^bits] what a code stands for; null: itself
  bool centered;            // codes count from minus half of their range
  const uint8_t* levels;    // bits of each entry; null: all have those of the operand
  const int64_t* at;        // with levels: where the codes of an entry begin
  const float* spread;      // [heads][classes][D], after the entry's own scale and zero; null: none
  const float* offset;      // the same, added
  int heads, classes;       // row r uses head r % heads; of two classes entries with the most bits are the second
  const uint8_t* outliers;  // [entries][count] half precision, in place of what the codes say
  const uint8_t* places;    // [entries][count] their channels
  int count, place_bytes;
};

// What is added to an entry that has been written out; the fields are those of corrected.py.
struct Correction {
  int unit;                   // entries per unit; 0: nothing is added
  const int64_t* starts;      // of rows, in units
  const int64_t* skip;        // entries of a row's first units that are passed over
  int rank;                   // 0: no low-rank term
  const uint8_t* projected;   // [units][unit][rank] half precision
  const float* directions;    // [rows][rank][D]
  int count;                  // single elements per vector; 0: none
  bool by_entry;              // vectors are entries, else the channels of a unit
  const uint8_t* index;       // [units][count] channels, or [units][count][D] entries of the unit
  int index_bytes;
  const uint8_t* delta;       // half precision, as the index
};

// What is done to an entry that has been written out and corrected: the product with a matrix, then RoPE at its position.
struct Turn {
  const float* matrix;      // [D][D], row j is what channel j of the codes adds; null: none
  const float* frequency;   // [half] angle per position; null: none
  int half;                 // pairs of channels that are turned
  float factor;             // of cosines and sines
  bool interleaved;
  const int32_t* position;  // of entry t of a row at starts[row] + t
  const int64_t* starts;
};

// Keys or values of all rows; the fields are those of operands.py.
struct Operand {
  Kind kind;
  Type type;           // of the data (dense) or of scale and zero (token, channel)
  const uint8_t* data;
  int64_t stride;      // bytes from one entry to the next, or from one unit where there are no whole bits
  const uint8_t* scale;
  const uint8_t* zero;
  int width;           // D
  int bits;            // 0: five codes of three levels to a byte, those of a unit without a gap (channel)
  int group;           // channels per group (token) or entries per group (channel, codebook)
  const int64_t* starts;
  const int64_t* skip;   // per-channel codes: entries of a row's first group that are passed over; null: none
  const int64_t* index;  // gathered subsets: entry t of a row is index[index_starts[row] + t]; null otherwise
  const int64_t* index_starts;
  Book book;
  Scalar scalar;
  Correction correction;
  Turn turn;
};

// Dense entries to be encoded, and where their codes, scales and zeros go.
struct Dense {
  const uint8_t* data;
  Type type;
  int64_t stride;  // bytes from one entry to the next
  int width;
};
struct Encoded {
  uint8_t* codes;
  uint8_t* scale;  // half precision
  uint8_t* zero;
};

struct Job {
  Operand key;
  Operand value;
  const uint8_t* query;  // [rows, queries, D]
  Type query_type;
  int rows;
  int queries;  // M = G * steps
  int steps;    // n
  float scale;
  float softcap;  // 0: none
  const int64_t* lengths;
  const int64_t* entry_starts;  // of log_count and positions
  const float* log_count;       // may be null
  const uint8_t* positions;     // may be null
  bool wide_positions;          // int64 rather than int32
  const int64_t* query_positions;  // [rows, n], may be null
  int64_t causal_tail;
  int64_t window;  // 0: none
};

// The kernels of one instruction set. Ranges are in-row entries; logits (or null) [M, length] are
// kept for mass_of_logits; scratch holds scratch_bytes(job) bytes, 64-byte aligned.
struct Kernels {
  const char* name;
  size_t (*scratch_bytes)(const Job&);
  // out [M, Dv] normalized over the range, lse [M].
  void (*attend)(const Job&, int row, int64_t begin, int64_t end, uint8_t* scratch, float* out, float* lse, float* logits);
  // sums[t - begin] = sum over m of exp(logit[m, t] - lse[m]).
  void (*mass)(const Job&, int row, int64_t begin, int64_t end, uint8_t* scratch, const float* lse, float* sums);
  // The same from logits [M, length] that attend has kept.
  void (*mass_of_logits)(int queries, int64_t length, const float* logits, const float* lse, float* sums);
  // For many queries: sums [end - begin] (or null) and the weights themselves, [M] rows `length` apart (or null), of at most
  // 256 entries; scratch holds column_bytes(job) bytes.
  size_t (*column_bytes)(const Job&);
  void (*columns)(const Job&, int row, int64_t begin, int64_t end, uint8_t* scratch, const float* lse, float* sums, float* weights);
  // Integer codes of entries (per-token groups) or units (per-channel groups) begin to end.
  void (*encode_tokens)(const Dense&, int bits, int group, int64_t begin, int64_t end, const Encoded&);
  void (*encode_units)(const Dense&, int bits, int unit, int64_t begin, int64_t end, const Encoded&);
};

const Kernels& generic_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace kvbudget
