#include "lane.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace kvbudget {
namespace {

// A stretch of a portion's entries, in every row, whose keys and whose values are stored in one way each.
struct Stretch {
  size_t portion;
  Integers begins, lengths;
  size_t logits = 0;  // where its kept logits begin
};

// What the last step of this thread has kept for `accumulate`.
struct Kept {
  const Lane* lane = nullptr;
  std::vector<Stretch> stretches;
  std::vector<float> logits, lse;
};
thread_local Kept kept;

// The entries of a row from begins[r] on, which are all sealed or all in the tail.
Operand from(const Side& side, bool sealed, const Integers& cells, const Integers& begins, Integers& starts, Integers& skip) {
  Operand x = sealed ? side.sealed : side.tail;
  starts = sealed ? side.sealed_lists.starts : side.tail_lists.starts;
  const bool skips = sealed && (x.kind == Kind::channel || x.kind == Kind::codebook);
  if (skips) skip = begins;
  for (size_t r = 0; r < begins.size(); ++r)
    if (!skips) starts[r] += begins[r] - (sealed ? 0 : cells[r] * side.unit);
  x.starts = starts.data();
  x.skip = skips ? skip.data() : nullptr;
  return x;
}

void write(const float* from, Type type, size_t count, uint8_t* to) {
  if (type == Type::f32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  for (size_t i = 0; i < count; ++i) {  // bf16, to nearest even; attention outputs are finite unless their values are not
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

}  // namespace

Lane::Lane(int rows, int queries, std::vector<Portion> given, Room room, size_t first, std::vector<Sum> sums)
    : portions(std::move(given)), rows_(rows), queries_(queries), room_(std::move(room)), first_(first), sums_(std::move(sums)) {
  Integers one_each(rows);
  for (int r = 0; r < rows; ++r) one_each[r] = r;
  for (Side Portion::*side : {&Portion::key, &Portion::value}) {
    (apart_.*side).tail = (portions.back().*side).tail;
    (apart_.*side).tail_lists.starts = one_each;
  }
  apart_.starts = std::move(one_each);
  apart_.key_cells = apart_.value_cells = Integers(rows);
}

void Lane::set_apart(const Step& step) {
  apart_.lengths.assign(rows_, step.apart ? 1 : 0);
  apart_.key.tail.data = step.key;
  apart_.value.tail.data = step.value;
  apart_.positions = step.apart;
}

bool Lane::append(const Step& step) {
  Portion& last = portions.back();
  for (int r = 0; r < rows_; ++r) {
    const int64_t n = last.lengths[r];
    if (n >= room_.entries[r] || n - last.key_cells[r] * last.key.unit >= room_.keys[r] ||
        n - last.value_cells[r] * last.value.unit >= room_.values[r])
      return false;
  }
  const auto store = [](const Side& side, const Integers& cells, int64_t n, int r, const uint8_t* from) {
    const int64_t at = side.tail_lists.starts[r] + n - cells[r] * side.unit;
    const size_t bytes = static_cast<size_t>(side.tail.stride);
    std::memcpy(const_cast<uint8_t*>(side.tail.data) + static_cast<size_t>(at) * bytes, from + r * bytes, bytes);
  };
  for (int r = 0; r < rows_; ++r) {
    const int64_t n = last.lengths[r]++, at = last.starts[r] + n;
    store(last.key, last.key_cells, n, r, step.key);
    store(last.value, last.value_cells, n, r, step.value);
    const int32_t position = static_cast<int32_t>(step.positions[r]);
    std::memcpy(const_cast<uint8_t*>(last.positions) + at * sizeof position, &position, sizeof position);
    for (uint8_t* column : room_.zeroed) std::memset(column + at * 4, 0, 4);
  }
  return true;
}

bool Lane::step(const Kernels& kernels, const Step& step, int threads) {
  if (!step.apart && !append(step)) return false;
  set_apart(step);
  kept.lane = nullptr;
  kept.stretches.clear();
  const int width = portions.back().value.tail.width, M = queries_;
  Job job{};
  job.query = step.query;
  job.query_type = step.type;
  job.rows = rows_, job.queries = M, job.steps = 1;
  job.scale = step.scale, job.softcap = step.softcap;
  // A window that covers everything held need not be looked at.
  for (int r = 0; r < rows_; ++r) {
    int64_t held = 0;
    for (size_t i = 0; i <= portions.size(); ++i) held += portion(i).lengths[r];
    if (held > step.window) job.window = step.window;
  }
  job.query_positions = step.positions.data();

  const auto cells = static_cast<size_t>(rows_) * M;
  std::vector<std::vector<float>> outs, lses;
  Integers key_starts, key_skip, value_starts, value_skip, entry_starts;
  size_t logits = 0;
  for (size_t i = 0; i < portions.size() + (step.apart ? 1 : 0); ++i) {
    const Portion& p = portion(i);
    // Cut where the storage of keys or of values changes.
    const auto cut = [&p](int c, int r) {
      const int64_t k = p.key_cells[r] * p.key.unit, v = p.value_cells[r] * p.value.unit;
      const int64_t cuts[] = {0, std::min(k, v), k, std::max(k, v), p.lengths[r]};
      return cuts[c];
    };
    for (int c = 0; c < 4; ++c) {
      size_t total = 0;
      for (int r = 0; r < rows_; ++r) total += static_cast<size_t>(cut(c + 1, r) - cut(c, r));
      if (!total) continue;
      Stretch stretch{i, Integers(rows_), Integers(rows_), logits};
      for (int r = 0; r < rows_; ++r) stretch.begins[r] = cut(c, r), stretch.lengths[r] = cut(c + 1, r) - cut(c, r);
      job.key = from(p.key, c < 2, p.key_cells, stretch.begins, key_starts, key_skip);
      job.value = from(p.value, c == 0 || c == 2, p.value_cells, stretch.begins, value_starts, value_skip);
      entry_starts = p.starts;
      for (int r = 0; r < rows_; ++r) entry_starts[r] += stretch.begins[r];
      job.entry_starts = entry_starts.data();
      job.positions = p.positions;
      job.lengths = stretch.lengths.data();
      outs.emplace_back(cells * width);
      lses.emplace_back(cells);
      if (step.keep_logits && kept.logits.size() < logits + total * M) kept.logits.resize(logits + total * M);
      attend(kernels, job, threads, outs.back().data(), lses.back().data(), step.keep_logits ? kept.logits.data() + logits : nullptr);
      logits += total * M;
      kept.stretches.push_back(std::move(stretch));
    }
  }
  std::vector<float>&out = outs[0], &lse = lses[0];
  if (outs.size() > 1) {
    std::vector<const float*> some, their;
    for (size_t i = 0; i < outs.size(); ++i) some.push_back(outs[i].data()), their.push_back(lses[i].data());
    std::vector<float> joined(cells * width), together(cells);
    merge(some, their, static_cast<int64_t>(cells), width, joined.data(), together.data());
    out.swap(joined), lse.swap(together);
  }
  write(out.data(), step.type, cells * width, step.out);
  if (step.lse) std::copy_n(lse.data(), cells, step.lse);
  if (step.keep_logits) kept.lane = this, kept.lse.swap(lse);
  if (step.add)
    for (const Sum& sum : sums_) accumulate(kernels, sum, threads);
  return true;
}

bool Lane::accumulate(const Kernels& kernels, const Sum& to, int threads) const {
  if (kept.lane != this) return false;
  std::vector<float> sums;
  for (const Stretch& stretch : kept.stretches) {
    if (stretch.portion < first_) continue;
    size_t total = 0;
    for (const int64_t n : stretch.lengths) total += static_cast<size_t>(n);
    if (sums.size() < total) sums.resize(total);
    mass_of_logits(kernels, rows_, queries_, stretch.lengths.data(), threads, kept.logits.data() + stretch.logits, kept.lse.data(),
                   sums.data());
    const float* sum = sums.data();
    for (int r = 0; r < rows_; ++r) {
      float* state = to.states[stretch.portion - first_] + portion(stretch.portion).starts[r] + stretch.begins[r];
      const float decay = to.decay[r], factor = to.factor;
      for (int64_t t = 0; t < stretch.lengths[r]; ++t) state[t] = decay * state[t] + factor * *sum++;
    }
  }
  return true;
}

}  // namespace kvbudget
