#include "ragged.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

namespace kvbudget {
namespace {

// Neighbors that stay: `count` cells of a row from cell `begin` on, which will be its cells from `at` on.
struct Run {
  int64_t begin, at, count;
};

const uint8_t* row_of(const Mask& mask, size_t r) {
  return mask.cells + static_cast<int64_t>(r) * mask.stride + (mask.begins.empty() ? 0 : mask.begins[r]);
}

// The first of the cells t to n - 1 that is set (or not set); n where there is none.
int64_t next(const uint8_t* cells, int64_t t, int64_t n, int64_t unit, bool set) {
  if (unit == 1) {
    const void* found = n > t ? std::memchr(cells + t, set, static_cast<size_t>(n - t)) : nullptr;
    return found ? static_cast<const uint8_t*>(found) - cells : n;
  }
  while (t < n && (cells[t * unit] != 0) != set) ++t;
  return t;
}

std::vector<std::vector<Run>> runs_of(const Mask& mask, const Integers& lengths) {
  std::vector<std::vector<Run>> rows(lengths.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!mask.cells) {
      if (lengths[r]) rows[r].push_back({0, 0, lengths[r]});
      continue;
    }
    const uint8_t* cells = row_of(mask, r);
    int64_t at = 0;
    for (int64_t t = next(cells, 0, lengths[r], mask.unit, true); t < lengths[r];) {
      const int64_t end = next(cells, t, lengths[r], mask.unit, false);
      rows[r].push_back({t, at, end - t});
      at += end - t;
      t = next(cells, end, lengths[r], mask.unit, true);
    }
  }
  return rows;
}

// The runs of a row, from cell `from` to cell `to` of a column, which is no later one where both are the same storage.
void close_up(const Moved& x, const std::vector<Run>& runs, int64_t from, int64_t to) {
  for (const Run& run : runs)
    if (x.to != x.from || to + run.at != from + run.begin)
      std::memmove(x.to + (to + run.at) * x.bytes, x.from + (from + run.begin) * x.bytes, static_cast<size_t>(run.count * x.bytes));
}

void move_column(const Moved& x, const std::vector<std::vector<Run>>& runs, const Layout& from, const Layout& to) {
  const size_t rows = runs.size();
  if (x.to != x.from) {
    for (size_t r = 0; r < rows; ++r) {
      close_up(x, runs[r], from.starts[r], to.starts[r]);
      const int64_t spare = to.capacities[r] - to.lengths[r];
      if (spare) std::memset(x.to + (to.starts[r] + to.lengths[r]) * x.bytes, 0, static_cast<size_t>(spare * x.bytes));
    }
    return;
  }
  // Rows that will begin later wait, closed up, until all others have made way; then the last of them goes first.
  for (size_t r = 0; r < rows; ++r)
    if (to.starts[r] > from.starts[r]) close_up(x, runs[r], from.starts[r], from.starts[r]);
  for (size_t r = 0; r < rows; ++r)
    if (to.starts[r] <= from.starts[r]) close_up(x, runs[r], from.starts[r], to.starts[r]);
  for (size_t r = rows; r-- > 0;)
    if (to.starts[r] > from.starts[r] && to.lengths[r])
      std::memmove(x.to + to.starts[r] * x.bytes, x.from + from.starts[r] * x.bytes, static_cast<size_t>(to.lengths[r] * x.bytes));
}

// Whole numbers in the order of the floats that they come from, not-a-number above all.
uint32_t ordered(float score) {
  if (score != score) return std::numeric_limits<uint32_t>::max();
  score += 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Marks the `count` best cells, older ones first among equals.
void mark_best(const std::vector<uint32_t>& scores, int64_t count, std::vector<uint32_t>& sorted, uint8_t* keep) {
  const int64_t n = static_cast<int64_t>(scores.size());
  count = std::min(count, n);
  std::fill_n(keep, n, uint8_t{0});
  if (count <= 0) return;
  sorted = scores;
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<uint32_t>());
  const uint32_t least = sorted[static_cast<size_t>(count - 1)];
  for (int64_t t = 0; t < n; ++t) count -= keep[t] = scores[t] > least;
  for (int64_t t = 0; t < n && count; ++t)
    if (scores[t] == least) keep[t] = 1, --count;
}

// A unit of one row.
struct Unit {
  float sum = 0.0f;
  int64_t size = 0, first = -1, kept = 0;
  bool fixed = false;
  uint32_t order = 0;
};

void select_units(const Scored& x, int64_t r, int64_t count, std::vector<Unit>& units, std::vector<uint32_t>& scores,
                  std::vector<uint32_t>& sorted, uint8_t* keep) {
  const int64_t* unit = x.units + r * x.width;
  const float* score = x.scores + r * x.width;
  const uint8_t *protect = x.protect + r * x.width, *valid = x.valid + r * x.width;
  std::fill(units.begin(), units.end(), Unit{});
  for (int64_t t = 0; t < x.width; ++t) {
    if (!valid[t]) continue;
    Unit& u = units[static_cast<size_t>(unit[t])];
    if (!u.size++) u.first = t;
    u.sum += score[t];
    u.fixed |= protect[t] != 0;
  }
  int64_t fixed = 0;
  for (Unit& u : units) {
    u.order = ordered(u.fixed ? kInfinity : u.sum / static_cast<float>(std::max<int64_t>(u.size, 1)));
    fixed += u.fixed ? u.size : 0;
  }
  for (int64_t t = 0; t < x.width; ++t) scores[t] = valid[t] ? units[static_cast<size_t>(unit[t])].order : ordered(-kInfinity);
  count = std::max(count, fixed);
  mark_best(scores, count, sorted, keep);
  for (int64_t t = 0; t < x.width; ++t) units[static_cast<size_t>(unit[t])].kept += keep[t] &= valid[t];
  for (Unit& u : units) {
    if (u.kept < u.size) u.kept = 0;
    count -= u.kept;
  }
  if (x.fill && count > 0) {
    std::vector<Unit*> left;
    for (Unit& u : units)
      if (!u.kept && u.size && u.size <= count) left.push_back(&u);
    std::sort(left.begin(), left.end(),
              [](const Unit* a, const Unit* b) { return a->order != b->order ? a->order > b->order : a->first < b->first; });
    for (Unit* u : left)
      if (u->size <= count) count -= u->kept = u->size;
  }
  for (int64_t t = 0; t < x.width; ++t) keep[t] = valid[t] && units[static_cast<size_t>(unit[t])].kept;
}

}  // namespace

bool count_kept(const Mask& mask, const Integers& lengths, Integers& counts) {
  counts.assign(lengths.size(), 0);
  for (size_t r = 0; r < lengths.size(); ++r) {
    const uint8_t* cells = row_of(mask, r);
    const int64_t flags = lengths[r] * mask.unit;
    if (flags + (mask.begins.empty() ? 0 : mask.begins[r]) > mask.width) return false;
    int64_t set = 0;
    for (int64_t t = 0; t < flags; ++t) set += cells[t];
    counts[r] = set / mask.unit;
    for (int64_t t = 0; mask.unit > 1 && t < flags; ++t)
      if (cells[t] != cells[t / mask.unit * mask.unit]) return false;
    if (mask.begins.empty() && next(cells, flags, mask.width, 1, true) < mask.width) return false;
  }
  return true;
}

void compact(const std::vector<Moved>& columns, const Mask& mask, const Layout& from, const Layout& to, int threads) {
  const std::vector<std::vector<Run>> runs = runs_of(mask, from.lengths);
  int64_t bytes = 0, cells = 0;
  for (const int64_t n : to.lengths) cells += n;
  for (const Moved& x : columns) bytes += x.bytes * cells;
  threads = bytes < (1 << 18) ? 1 : std::max(threads, 1);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (size_t i = 0; i < columns.size(); ++i) move_column(columns[i], runs, from, to);
}

void scatter(const std::vector<Moved>& columns, const Integers& begins, const Integers& counts) {
  for (const Moved& x : columns) {
    const uint8_t* from = x.from;
    for (size_t r = 0; r < begins.size(); ++r) {
      uint8_t* to = x.to + begins[r] * x.bytes;
      const size_t some = static_cast<size_t>(counts[r] * x.bytes);
      if (!some) continue;
      if (from)
        std::memcpy(to, from, some), from += some;
      else
        std::memset(to, 0, some);
    }
  }
}

bool select(const Scored& x, const Integers& counts, uint8_t* keep) {
  std::vector<uint32_t> scores(static_cast<size_t>(x.width)), sorted;
  std::vector<Unit> units;
  if (x.units && x.rows > 0 && x.width > 0) {
    const auto [least, most] = std::minmax_element(x.units, x.units + x.rows * x.width);
    if (*least < 0 || *most > 64 * x.width) return false;
    units.resize(static_cast<size_t>(*most) + 1);
  }
  for (int64_t r = 0; r < x.rows; ++r, keep += x.width) {
    if (x.units) {
      select_units(x, r, counts[static_cast<size_t>(r)], units, scores, sorted, keep);
      continue;
    }
    int64_t fixed = 0;
    for (int64_t t = 0; t < x.width; ++t) {
      const int64_t at = r * x.width + t;
      const bool always = x.valid[at] && x.protect[at];
      fixed += always;
      scores[t] = ordered(always ? kInfinity : x.valid[at] ? x.scores[at] : -kInfinity);
    }
    mark_best(scores, std::max(counts[static_cast<size_t>(r)], fixed), sorted, keep);
    for (int64_t t = 0; t < x.width; ++t) keep[t] &= x.valid[r * x.width + t];
  }
  return true;
}

}  // namespace kvbudget
