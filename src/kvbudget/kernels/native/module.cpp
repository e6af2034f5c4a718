// The Python face of the kernels: raw addresses and sizes, which native.py has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "lane.h"

namespace nb = nanobind;
using kvbudget::Integers;
using kvbudget::Job;
using kvbudget::Lists;
using kvbudget::Operand;

namespace {

const kvbudget::Kernels* kernels = kvbudget::best_kernels();

const uint8_t* address(const nb::handle& h) { return reinterpret_cast<const uint8_t*>(nb::cast<uintptr_t>(h)); }

// (words, heads, stages, subspaces, size, coupled, head step, stage step, subspace step, code bytes, mean, shift,
//  weights)
kvbudget::Book book_of(const nb::tuple& t) {
  kvbudget::Book x{};
  if (t.size() == 0) return x;
  x.words = reinterpret_cast<const float*>(address(t[0]));
  x.heads = nb::cast<int>(t[1]);
  x.stages = nb::cast<int>(t[2]);
  x.subspaces = nb::cast<int>(t[3]);
  x.size = nb::cast<int>(t[4]);
  x.coupled = nb::cast<int>(t[5]);
  x.head_step = nb::cast<int64_t>(t[6]);
  x.stage_step = nb::cast<int64_t>(t[7]);
  x.subspace_step = nb::cast<int64_t>(t[8]);
  x.code_bytes = nb::cast<int>(t[9]);
  x.mean = address(t[10]);
  x.shift = address(t[11]);
  x.weights = reinterpret_cast<const int8_t*>(address(t[12]));
  return x;
}

// (table, centered, levels, at, spread, offset, heads, classes, outliers, places, count, place bytes)
kvbudget::Scalar scalar_of(const nb::tuple& t) {
  kvbudget::Scalar x{};
  if (t.size() == 0) return x;
  x.table = reinterpret_cast<const float*>(address(t[0]));
  x.centered = nb::cast<bool>(t[1]);
  x.levels = address(t[2]);
  x.at = reinterpret_cast<const int64_t*>(address(t[3]));
  x.spread = reinterpret_cast<const float*>(address(t[4]));
  x.offset = reinterpret_cast<const float*>(address(t[5]));
  x.heads = nb::cast<int>(t[6]);
  x.classes = nb::cast<int>(t[7]);
  x.outliers = address(t[8]);
  x.places = address(t[9]);
  x.count = nb::cast<int>(t[10]);
  x.place_bytes = nb::cast<int>(t[11]);
  return x;
}

// (matrix, frequency, half, factor, interleaved, positions, starts)
kvbudget::Turn turn_of(const nb::tuple& t, Lists& lists) {
  kvbudget::Turn x{};
  if (t.size() == 0) return x;
  x.matrix = reinterpret_cast<const float*>(address(t[0]));
  x.frequency = reinterpret_cast<const float*>(address(t[1]));
  x.half = nb::cast<int>(t[2]);
  x.factor = nb::cast<float>(t[3]);
  x.interleaved = nb::cast<bool>(t[4]);
  x.position = reinterpret_cast<const int32_t*>(address(t[5]));
  lists.turn_starts = nb::cast<Integers>(t[6]);
  x.starts = lists.turn_starts.data();
  return x;
}

// (unit, starts, skip, rank, projected, directions, count, by entry, index, index bytes, delta)
kvbudget::Correction correction_of(const nb::tuple& t, Lists& lists) {
  kvbudget::Correction x{};
  if (t.size() == 0) return x;
  x.unit = nb::cast<int>(t[0]);
  lists.unit_starts = nb::cast<Integers>(t[1]);
  lists.unit_skip = nb::cast<Integers>(t[2]);
  x.starts = lists.unit_starts.data();
  x.skip = lists.unit_skip.data();
  x.rank = nb::cast<int>(t[3]);
  x.projected = address(t[4]);
  x.directions = reinterpret_cast<const float*>(address(t[5]));
  x.count = nb::cast<int>(t[6]);
  x.by_entry = nb::cast<bool>(t[7]);
  x.index = address(t[8]);
  x.index_bytes = nb::cast<int>(t[9]);
  x.delta = address(t[10]);
  return x;
}

// (kind, type, data, stride, scale, zero, width, bits, group, starts, skip, index, index_starts, book, scalar, correction, turn),
// of which the last four are () where there is nothing of the kind.
Operand operand(const nb::tuple& t, Lists& lists) {
  Operand x{};
  x.kind = static_cast<kvbudget::Kind>(nb::cast<int>(t[0]));
  x.type = static_cast<kvbudget::Type>(nb::cast<int>(t[1]));
  x.data = address(t[2]);
  x.stride = nb::cast<int64_t>(t[3]);
  x.scale = address(t[4]);
  x.zero = address(t[5]);
  x.width = nb::cast<int>(t[6]);
  x.bits = nb::cast<int>(t[7]);
  x.group = nb::cast<int>(t[8]);
  lists.starts = nb::cast<Integers>(t[9]);
  lists.skip = nb::cast<Integers>(t[10]);
  x.index = reinterpret_cast<const int64_t*>(address(t[11]));
  lists.index_starts = nb::cast<Integers>(t[12]);
  x.starts = lists.starts.data();
  x.skip = lists.skip.empty() ? nullptr : lists.skip.data();
  x.index_starts = lists.index_starts.data();
  x.book = book_of(nb::cast<nb::tuple>(t[13]));
  x.scalar = scalar_of(nb::cast<nb::tuple>(t[14]));
  x.correction = correction_of(nb::cast<nb::tuple>(t[15]), lists);
  x.turn = turn_of(nb::cast<nb::tuple>(t[16]), lists);
  return x;
}

// (query, type, rows, queries, steps, scale, softcap, lengths, entry_starts, log_count, positions, wide, query_positions,
//  causal_tail, window)
struct Call {
  Job job{};
  Integers lengths, entry_starts;
  Lists key_lists, value_lists;

  Call(const nb::tuple& key, const nb::tuple* value, const nb::tuple& t) {
    job.key = operand(key, key_lists);
    if (value) job.value = operand(*value, value_lists);
    job.query = address(t[0]);
    job.query_type = static_cast<kvbudget::Type>(nb::cast<int>(t[1]));
    job.rows = nb::cast<int>(t[2]);
    job.queries = nb::cast<int>(t[3]);
    job.steps = nb::cast<int>(t[4]);
    job.scale = nb::cast<float>(t[5]);
    job.softcap = nb::cast<float>(t[6]);
    lengths = nb::cast<Integers>(t[7]);
    entry_starts = nb::cast<Integers>(t[8]);
    job.lengths = lengths.data();
    job.entry_starts = entry_starts.data();
    job.log_count = reinterpret_cast<const float*>(address(t[9]));
    job.positions = address(t[10]);
    job.wide_positions = nb::cast<bool>(t[11]);
    job.query_positions = reinterpret_cast<const int64_t*>(address(t[12]));
    job.causal_tail = nb::cast<int64_t>(t[13]);
    job.window = nb::cast<int64_t>(t[14]);
    const size_t rows = static_cast<size_t>(job.rows);
    const bool needs_entries = job.log_count || job.window > 0;
    const auto complete = [rows](const Operand& x, const Lists& l) {
      return l.starts.size() >= rows && (l.skip.empty() || l.skip.size() >= rows) && (!x.index || l.index_starts.size() >= rows) &&
             (!x.turn.frequency || l.turn_starts.size() >= rows) &&
             (!x.correction.unit || (l.unit_starts.size() >= rows && l.unit_skip.size() >= rows));
    };
    if (lengths.size() != rows || !complete(job.key, key_lists) || (value && !complete(job.value, value_lists)) ||
        (needs_entries && entry_starts.size() < rows))
      throw std::invalid_argument("one length and one start per row of queries are needed");
  }
};

void attend(const nb::tuple& key, const nb::tuple& value, const nb::tuple& call, int threads, uintptr_t out, uintptr_t lse,
            uintptr_t logits) {
  Call c(key, &value, call);
  nb::gil_scoped_release release;
  kvbudget::attend(*kernels, c.job, threads, reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse),
                   reinterpret_cast<float*>(logits));
}

void mass(const nb::tuple& key, const nb::tuple& call, int threads, uintptr_t lse, uintptr_t sums, uintptr_t weights) {
  Call c(key, nullptr, call);
  nb::gil_scoped_release release;
  kvbudget::mass(*kernels, c.job, threads, reinterpret_cast<const float*>(lse), reinterpret_cast<float*>(sums),
                 reinterpret_cast<float*>(weights));
}

void encode(uintptr_t data, int type, int64_t stride, int width, bool by_units, int bits, int group, int64_t count, int threads,
            uintptr_t codes, uintptr_t scale, uintptr_t zero) {
  nb::gil_scoped_release release;
  const kvbudget::Dense x{reinterpret_cast<const uint8_t*>(data), static_cast<kvbudget::Type>(type), stride, width};
  kvbudget::encode(*kernels, x, by_units, bits, group, count, threads,
                   {reinterpret_cast<uint8_t*>(codes), reinterpret_cast<uint8_t*>(scale), reinterpret_cast<uint8_t*>(zero)});
}

void mass_of_logits(const Integers& lengths, int queries, int threads, uintptr_t logits, uintptr_t lse, uintptr_t sums) {
  nb::gil_scoped_release release;
  kvbudget::mass_of_logits(*kernels, static_cast<int>(lengths.size()), queries, lengths.data(), threads,
                           reinterpret_cast<const float*>(logits), reinterpret_cast<const float*>(lse),
                           reinterpret_cast<float*>(sums));
}

// (to, from or 0 for none, bytes per cell) each.
std::vector<kvbudget::Moved> moved(const nb::list& columns) {
  std::vector<kvbudget::Moved> made;
  for (const nb::handle item : columns) {
    const nb::tuple t = nb::cast<nb::tuple>(item);
    made.push_back({reinterpret_cast<uint8_t*>(nb::cast<uintptr_t>(t[0])), address(t[1]), nb::cast<int64_t>(t[2])});
  }
  return made;
}

// (flags, stride, width, begins, unit)
kvbudget::Mask mask(const nb::tuple& t) {
  return {address(t[0]), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<Integers>(t[3]), nb::cast<int64_t>(t[4])};
}

void scatter(const nb::list& columns, const Integers& begins, const Integers& counts) {
  kvbudget::scatter(moved(columns), begins, counts);
}

// None where the mask breaks its rules.
std::optional<Integers> count_kept(const nb::tuple& flags, const Integers& lengths) {
  Integers counts;
  return kvbudget::count_kept(mask(flags), lengths, counts) ? std::optional<Integers>(counts) : std::nullopt;
}

// from: (starts, lengths), to: (starts, lengths, capacities) per row.
void compact(const nb::list& columns, const nb::tuple& flags, const nb::tuple& from, const nb::tuple& to, int threads) {
  const kvbudget::Layout before{nb::cast<Integers>(from[0]), nb::cast<Integers>(from[1]), {}};
  const kvbudget::Layout after{nb::cast<Integers>(to[0]), nb::cast<Integers>(to[1]), nb::cast<Integers>(to[2])};
  kvbudget::compact(moved(columns), mask(flags), before, after, threads);
}

// cells: (rows, width, scores, protect, valid, units or 0, fill).
bool select_best(const nb::tuple& cells, const Integers& counts, uintptr_t keep) {
  const kvbudget::Scored x{nb::cast<int64_t>(cells[0]),
                           nb::cast<int64_t>(cells[1]),
                           reinterpret_cast<const float*>(address(cells[2])),
                           address(cells[3]),
                           address(cells[4]),
                           reinterpret_cast<const int64_t*>(address(cells[5])),
                           nb::cast<bool>(cells[6])};
  if (counts.size() != static_cast<size_t>(x.rows)) throw std::invalid_argument("one count per row is needed");
  return kvbudget::select(x, counts, reinterpret_cast<uint8_t*>(keep));
}

void merge(const std::vector<uintptr_t>& outs, const std::vector<uintptr_t>& lses, int64_t queries, int width, uintptr_t out,
           uintptr_t lse) {
  const auto floats = [](const std::vector<uintptr_t>& addresses) {
    std::vector<const float*> p;
    for (const uintptr_t address : addresses) p.push_back(reinterpret_cast<const float*>(address));
    return p;
  };
  kvbudget::merge(floats(outs), floats(lses), queries, width, reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse));
}

// (sealed operand, entries per sealed cell, tail operand); an operand that is missing is ().
void side(const nb::tuple& t, kvbudget::Side& x) {
  const nb::tuple sealed = nb::cast<nb::tuple>(t[0]), tail = nb::cast<nb::tuple>(t[2]);
  if (sealed.size()) x.sealed = operand(sealed, x.sealed_lists);
  x.unit = nb::cast<int64_t>(t[1]);
  if (tail.size()) x.tail = operand(tail, x.tail_lists);
}

PyObject* named(const char* name) { return PyUnicode_InternFromString(name); }

nb::object call(const nb::handle& x, PyObject* method) {
  PyObject* found = PyObject_CallMethodNoArgs(x.ptr(), method);
  if (!found) throw nb::python_error();
  return nb::steal(found);
}

nb::object member(const nb::handle& x, PyObject* name) {
  PyObject* found = PyObject_GetAttr(x.ptr(), name);
  if (!found) throw nb::python_error();
  return nb::steal(found);
}

const uint8_t* data_of(const nb::handle& tensor) {
  static PyObject* const name = named("data_ptr");
  return address(call(tensor, name));
}

// Whether a tensor has so many elements of this dtype, which lie one behind the other.
bool fits(const nb::handle& tensor, const nb::handle& dtype, int64_t elements) {
  static PyObject *const type = named("dtype"), *const contiguous = named("is_contiguous"), *const count = named("numel");
  return member(tensor, type).is(dtype) && call(tensor, contiguous).is(nb::handle(Py_True)) &&
         nb::cast<int64_t>(call(tensor, count)) == elements;
}

// The `lengths` of a table (RaggedTable); none of None.
Integers lengths_of(const nb::handle& table) {
  static PyObject* const name = named("lengths");
  return table.is_none() ? Integers() : nb::cast<Integers>(member(table, name));
}

struct BoundLane {
  kvbudget::Lane lane;
  int rows, queries;
  kvbudget::Type type;
};

// decay: one number per sequence, or per row.
kvbudget::Sum sum(const std::vector<uintptr_t>& states, const std::vector<float>& decay, float factor, int rows) {
  const size_t count = static_cast<size_t>(rows);
  if (decay.empty() || count % decay.size()) throw std::invalid_argument("one decay per sequence or per row is needed");
  kvbudget::Sum made{{}, std::vector<float>(count), factor};
  for (const uintptr_t state : states) made.states.push_back(reinterpret_cast<float*>(state));
  for (size_t r = 0; r < count; ++r) made.decay[r] = decay[r * decay.size() / count];
  return made;
}

// portions: (key side, value side, starts, positions) per segment; room: capacities per row of the last segment's entries, key tail
// and value tail; zeroed: addresses of its columns that begin with zero; first, sums: what steps may add to columns of the segments
// from the first on, (addresses, decay, factor) each.
BoundLane* lane(int rows, int queries, const nb::list& portions, const nb::tuple& room, const std::vector<uintptr_t>& zeroed,
                int type, int first, const nb::list& sums) {
  std::vector<kvbudget::Portion> made;
  for (const nb::handle item : portions) {
    const nb::tuple t = nb::cast<nb::tuple>(item);
    kvbudget::Portion& p = made.emplace_back();
    side(nb::cast<nb::tuple>(t[0]), p.key);
    side(nb::cast<nb::tuple>(t[1]), p.value);
    p.starts = nb::cast<Integers>(t[2]);
    p.positions = address(t[3]);
  }
  kvbudget::Room space{nb::cast<Integers>(room[0]), nb::cast<Integers>(room[1]), nb::cast<Integers>(room[2]), {}};
  for (const uintptr_t column : zeroed) space.zeroed.push_back(reinterpret_cast<uint8_t*>(column));
  std::vector<kvbudget::Sum> added;
  for (const nb::handle item : sums) {
    const nb::tuple t = nb::cast<nb::tuple>(item);
    added.push_back(sum(nb::cast<std::vector<uintptr_t>>(t[0]), {nb::cast<float>(t[1])}, nb::cast<float>(t[2]), rows));
  }
  return new BoundLane{{rows, queries, std::move(made), std::move(space), static_cast<size_t>(first), std::move(added)},
                       rows, queries, static_cast<kvbudget::Type>(type)};
}

// query, key, value and out are tensors of this dtype, lse is the address of float32 numbers or 0; seen: positions of the new entries, per sequence; held: of each
// segment the tables of sealed key cells and sealed value cells, or None, and of entries; grown: the tables that are one entry
// longer in each row afterwards; apart: the address of the positions as int32 per row where the new entries are not to be stored,
// else 0. False, with nothing done, where the tensors are others than the lane was made for, or a row has no room.
bool lane_step(BoundLane& bound, const nb::handle& query, const nb::handle& key, const nb::handle& value, const nb::handle& dtype,
               const Integers& seen, const nb::list& held, const nb::list& grown, float scale, std::optional<float> softcap,
               std::optional<int64_t> window, const nb::handle& out, uintptr_t lse, bool keep_logits, bool add, uintptr_t apart,
               int threads) {
  const int64_t rows = bound.rows, asked = rows * bound.queries;
  const kvbudget::Portion& last = bound.lane.portions.back();
  const int64_t width = last.key.tail.width, value_width = last.value.tail.width;
  if (!fits(query, dtype, asked * width) || !fits(key, dtype, rows * width) || !fits(value, dtype, rows * value_width) ||
      !fits(out, dtype, asked * value_width))
    return false;
  if (held.size() != bound.lane.portions.size()) throw std::invalid_argument("the tables of each segment are needed");
  for (size_t i = 0; i < held.size(); ++i) {
    const nb::tuple tables = nb::cast<nb::tuple>(held[i]);
    kvbudget::Portion& p = bound.lane.portions[i];
    p.lengths = lengths_of(tables[2]);
    p.key_cells = lengths_of(tables[0]);
    p.value_cells = lengths_of(tables[1]);
    p.key_cells.resize(p.lengths.size());
    p.value_cells.resize(p.lengths.size());
  }
  const int64_t batch = static_cast<int64_t>(seen.size());
  if (!batch || rows % batch) return false;
  Integers positions(rows);
  for (int64_t r = 0; r < rows; ++r) positions[r] = seen[r * batch / rows];
  const kvbudget::Step step{data_of(query),
                            data_of(key),
                            data_of(value),
                            bound.type,
                            scale,
                            softcap.value_or(0.0f),
                            window.value_or(0),
                            std::move(positions),
                            reinterpret_cast<const uint8_t*>(apart),
                            const_cast<uint8_t*>(data_of(out)),
                            reinterpret_cast<float*>(lse),
                            keep_logits,
                            add};
  {
    nb::gil_scoped_release release;
    if (!bound.lane.step(*kernels, step, threads)) return false;
  }
  if (apart) return true;
  for (const nb::handle table : grown) {
    Integers longer = lengths_of(table);
    for (int64_t& n : longer) ++n;
    table.attr("lengths") = longer;
  }
  return true;
}

bool lane_accumulate(const BoundLane& bound, const std::vector<uintptr_t>& states, const std::vector<float>& decay, float factor,
                     int threads) {
  const kvbudget::Sum made = sum(states, decay, factor, bound.rows);
  nb::gil_scoped_release release;
  return bound.lane.accumulate(*kernels, made, threads);
}

bool use(const std::string& name) {
  const kvbudget::Kernels* found = kvbudget::named_kernels(name.c_str());
  if (found) kernels = found;
  return found != nullptr;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native attention kernels; use them through kvbudget.kernels.";
  m.def("attend", &attend);
  m.def("mass", &mass);
  m.def("mass_of_logits", &mass_of_logits);
  m.def("encode", &encode);
  m.def("merge", &merge);
  m.def("scatter", &scatter);
  m.def("count_kept", &count_kept);
  m.def("compact", &compact);
  m.def("select", &select_best);
  nb::class_<BoundLane>(m, "Lane")
      .def(nb::new_(&lane))
      .def("step", &lane_step)
      .def("accumulate", &lane_accumulate);
  m.def("shares", &kvbudget::shares, "Entries of each row that each thread attends to, by the rows' lengths.");
  m.def("instruction_set", [] { return std::string(kernels->name); });
  m.def("use", &use, "Switches to the kernels of an instruction set; False where the machine cannot run them.");
}
