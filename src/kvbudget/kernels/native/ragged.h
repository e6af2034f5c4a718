// Moves and picks entries of ragged rows: plain memory traffic, the same for every instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace kvbudget {

using Integers = std::vector<int64_t>;

// Which cells of ragged rows stay: cell t of row r does where cells[r * stride + begins[r] + t * unit] is set, and the other
// `unit - 1` flags of the cell agree. Without `begins` the rows of the mask begin with the rows' first cells and end with
// their last ones, but for padding that nothing selects.
struct Mask {
  const uint8_t* cells;  // 0 or 1; null: all cells stay
  int64_t stride, width;
  Integers begins;
  int64_t unit;
};

// A column whose cells move from one storage to another, or inside of one.
struct Moved {
  uint8_t* to;
  const uint8_t* from;
  int64_t bytes;  // per cell
};

// Where rows lie: row r has room for capacities[r] cells from cell starts[r] on.
struct Layout {
  Integers starts, lengths, capacities;
};

// Cells that stay per row of `lengths`; false where the mask breaks its rules.
bool count_kept(const Mask&, const Integers& lengths, Integers& counts);

// Brings the cells that stay, in order, to their places in the new layout, whose lengths they are. A column that goes to
// another storage gets zeros in its spare room; one that stays needs as many cells as before.
void compact(const std::vector<Moved>& columns, const Mask&, const Layout& from, const Layout& to, int threads);

// Writes new cells row after row: counts[r] of them from cell begins[r] on; without `from`, zeros.
void scatter(const std::vector<Moved>& columns, const Integers& begins, const Integers& counts);

// Scores of the cells of rows of one width: invalid cells never stay, protected ones always do. Cells of one unit (numbers
// from 0 on; null: each cell alone) are judged by their mean and stay or go together.
struct Scored {
  int64_t rows, width;
  const float* scores;
  const uint8_t *protect, *valid;
  const int64_t* units;
  bool fill;  // units after the first one that does not fit may take the room that is left
};

// keep [rows, width]: the counts[r] best cells of each row, older ones first among equals. False, with nothing done, where the
// numbers of units have gaps larger than is worth a table.
bool select(const Scored&, const Integers& counts, uint8_t* keep);

}  // namespace kvbudget
