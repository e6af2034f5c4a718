// A decode step of one layer, prepared: a new entry for every row, and one query step over all that the layer holds.
#pragma once

#include <cstdint>
#include <vector>

#include "driver.h"
#include "ragged.h"

namespace kvbudget {

// The integers of an operand, which point into here.
struct Lists {
  Integers starts, skip, index_starts, unit_starts, unit_skip, turn_starts;
};

// Keys or values of a segment: sealed cells of `unit` entries each behind a codec, then full-precision entries. Without
// data an operand is missing.
struct Side {
  Operand sealed{}, tail{};
  Lists sealed_lists, tail_lists;
  int64_t unit = 1;
};

// A segment: where its entries lie, and what `step` is told each time: sealed cells per row, and entries per row.
struct Portion {
  Side key, value;
  Integers starts;  // of positions (and of all else that is kept per entry)
  const uint8_t* positions = nullptr;
  Integers key_cells, value_cells, lengths;
};

// Where new entries go: the last portion's tables, each with its cells' room per row, and its per-entry columns of 4 bytes.
struct Room {
  Integers entries, keys, values;
  std::vector<uint8_t*> zeroed;
};

// What a step adds to states: state <- decay[r] * state + factor * (attention weight, summed over the row's queries), one address
// per portion that takes part.
struct Sum {
  std::vector<float*> states;
  std::vector<float> decay;
  float factor;
};

struct Step {
  const uint8_t *query, *key, *value;  // [rows, M, D], [rows, D], [rows, Dv]
  Type type;                           // of the three and of out
  float scale, softcap;
  int64_t window;
  Integers positions;  // of the new entries, per row
  const uint8_t* apart;  // the same as int32, where the new entries are not to be stored; else null
  uint8_t* out;        // [rows, M, Dv]
  float* lse;          // [rows, M] or null
  bool keep_logits, add;
};

class Lane {
 public:
  // Sums are those of the portions from `first` on, whose states begin like their positions.
  Lane(int rows, int queries, std::vector<Portion> portions, Room room, size_t first, std::vector<Sum> sums);

  // Stores the new entries (or reads them where they are), attends, and adds the sums where the step says so; false, with nothing
  // done, where a row has no room left.
  bool step(const Kernels&, const Step&, int threads);

  // Adds the last step's sum, also to one more state, of new entries that were not stored; false where another step has come
  // between.
  bool accumulate(const Kernels&, const Sum& sum, int threads) const;

  std::vector<Portion> portions;

 private:
  bool append(const Step&);
  void set_apart(const Step&);
  const Portion& portion(size_t i) const { return i < portions.size() ? portions[i] : apart_; }

  int rows_, queries_;
  Room room_;
  size_t first_;
  std::vector<Sum> sums_;
  Portion apart_;  // one entry per row, or none
};

}  // namespace kvbudget
