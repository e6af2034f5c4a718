"""The native kernels against the torch reference, over formats, shapes and masks."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbudget import kernels
from kvbudget.errors import KVBudgetError
from kvbudget.kernels import (
    AtomOperand,
    ChannelQuantOperand,
    CodebookOperand,
    CorrectedOperand,
    DenseOperand,
    GatheredOperand,
    Operand,
    ScalarOperand,
    TokenQuantOperand,
    TurnedOperand,
    packed_width,
    reference,
)
from kvbudget.kernels.codebook import paired
from kvbudget.kernels.trits import TritOperand

native = pytest.importorskip("kvbudget.kernels.native", reason="the native extension was not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [1, 2, 3, 4, 8]
WIDTHS = [8, 16, 24, 32, 64, 80, 96, 128, 256]
fast = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense(generator: torch.Generator, lengths: list[int], width: int, dtype: torch.dtype) -> DenseOperand:
    """Rows in shuffled order with gaps between them, as eviction leaves them, in a column wider than a row."""
    starts, total = scattered(lengths, 1)
    data = torch.randn(total, width + 8, generator=generator).to(dtype)[:, :width]
    return DenseOperand(data, starts)


def scattered(lengths: list[int], group: int) -> tuple[list[int], int]:
    starts, at = [0] * len(lengths), 0
    for row in reversed(range(len(lengths))):
        starts[row] = at
        at += -(-lengths[row] // group) + row % 2
    return starts, at


def meta(generator: torch.Generator, shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = torch.rand(shape, generator=generator) * 2 / 2**bits
    scale[torch.rand(shape, generator=generator) < 0.1] = 0.0  # constant groups
    return scale.to(dtype), (torch.randn(shape, generator=generator) - 1).to(dtype)


def token_codes(
    generator: torch.Generator, lengths: list[int], width: int, bits: int, group: int, dtype: torch.dtype
) -> TokenQuantOperand:
    starts, total = scattered(lengths, 1)
    codes = torch.randint(0, 256, (total, packed_width(width, bits)), generator=generator).to(torch.uint8)
    scale, zero = meta(generator, (total, width // group), bits, dtype)
    return TokenQuantOperand(codes, scale, zero, bits, group, starts)


def channel_codes(
    generator: torch.Generator, lengths: list[int], width: int, bits: int, group: int, dtype: torch.dtype
) -> ChannelQuantOperand:
    skip = torch.randint(0, 2 * group, (len(lengths),), generator=generator).tolist()
    starts, total = scattered([length + s for length, s in zip(lengths, skip, strict=True)], group)
    codes = torch.randint(0, 256, (total, group, packed_width(width, bits)), generator=generator).to(torch.uint8)
    scale, zero = meta(generator, (total, width), bits, dtype)
    return ChannelQuantOperand(codes, scale, zero, bits, group, starts, skip)


def trits(generator: torch.Generator, lengths: list[int], width: int, unit: int, dtype: torch.dtype) -> TritOperand:
    skip = torch.randint(0, 2 * unit, (len(lengths),), generator=generator).tolist()
    starts, total = scattered([length + s for length, s in zip(lengths, skip, strict=True)], unit)
    codes = torch.randint(0, 243, (total, -(-unit * width // 5)), generator=generator).to(torch.uint8)
    return TritOperand(codes, torch.rand(total, width, generator=generator).to(dtype), unit, starts, skip)


def codebook_codes(
    draw: st.DrawFn, generator: torch.Generator, lengths: list[int], width: int, dtype: torch.dtype
) -> CodebookOperand:
    """Coupled channels, a shared book with scales and means, or additive codes over whole vectors."""
    unit = draw(st.sampled_from([1, 1, 24, 64]))
    skip = torch.randint(0, 2 * unit, (len(lengths),), generator=generator).tolist()
    starts, total = scattered([length + s for length, s in zip(lengths, skip, strict=True)], unit)
    coupled = draw(st.sampled_from([1, 2, 4, 8, width]))
    sizes = [(1, 256), (1, 16), (2, 256), (5, 64), (1, 1024)] + [(6, 64), (10, 64)] * (coupled == width)
    stages, size = draw(st.sampled_from(sizes))
    heads = draw(st.sampled_from([h for h in (1, 2, len(lengths)) if len(lengths) % h == 0]))
    groups = width // coupled
    words = torch.randn(heads, stages, draw(st.sampled_from([1, groups])), size, coupled, generator=generator) / stages
    codes = torch.randint(0, size, (total, unit, stages * groups), generator=generator)
    pairs = stages % 2 == 0 and size == 64
    codes = paired(codes.flatten(0, 1)).unflatten(0, (total, unit)) if pairs else codes
    operand = CodebookOperand(
        codes.to(torch.uint8 if size <= 256 else torch.int16),
        words.expand(-1, -1, groups, -1, -1),
        starts,
        skip if draw(st.booleans()) else None,
        paired=pairs,
    )
    if draw(st.booleans()):
        operand.scale = torch.rand(total, unit, generator=generator).to(dtype)
    if draw(st.booleans()):
        operand.shift = torch.rand(total, unit, generator=generator).to(dtype)
        operand.mean = torch.randn(total, width, generator=generator).to(dtype)
    return operand


def scalar_codes(
    draw: st.DrawFn, generator: torch.Generator, lengths: list[int], width: int, dtype: torch.dtype
) -> ScalarOperand:
    """Codes with any part of what may follow them; of cells that differ in bits the bytes lie in any order."""
    starts, total = scattered(lengths, 1)
    bits = draw(st.sampled_from(BITS))
    codes = torch.randint(0, 256, (total, packed_width(width, bits)), generator=generator).to(torch.uint8)
    found = ScalarOperand(codes, bits, width, starts)
    if draw(st.booleans()):
        found.table = torch.randn(2**bits, generator=generator)
    elif draw(st.booleans()):
        possible = torch.tensor([0, *(b for b in BITS if b <= bits)], dtype=torch.uint8)
        found.levels = possible[torch.randint(len(possible), (total,), generator=generator)]
        sizes = packed_width(width, 1) * found.levels.long()
        order = torch.randperm(total, generator=generator)
        found.at = torch.empty(total, dtype=torch.long)
        found.at[order] = sizes[order].cumsum(0) - sizes[order]
        found.codes = torch.randint(0, 256, (int(sizes.sum()) + 1,), generator=generator).to(torch.uint8)
    found.centered = found.table is None and draw(st.booleans())
    if draw(st.booleans()):
        found.scale = (torch.rand(total, 1, generator=generator) / 2**bits).to(dtype)
    if draw(st.booleans()):
        found.zero = torch.randn(total, 1, generator=generator).to(dtype)
    heads = draw(st.sampled_from([h for h in (1, len(lengths)) if len(lengths) % h == 0]))
    shape = (heads, 2 if found.levels is not None else 1, width)
    if draw(st.booleans()):
        found.spread = torch.rand(shape, generator=generator) / 2**bits
    if draw(st.booleans()):
        found.offset = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        places = torch.rand(total, width, generator=generator).argsort(1)[:, :2]
        found.places = places.to(draw(st.sampled_from([torch.uint8, torch.int16])))
        found.outliers = torch.randn(total, 2, generator=generator).half()
    return found


def corrected(
    draw: st.DrawFn, generator: torch.Generator, lengths: list[int], base: Operand, width: int
) -> CorrectedOperand:
    """Low-rank terms, elements apart by entry or by channel of a unit, or both."""
    by_entry = draw(st.booleans())
    unit = 1 if by_entry else draw(st.sampled_from([1, 16, 300]))
    skip = torch.randint(0, 2 * unit, (len(lengths),), generator=generator).tolist()
    starts, total = scattered([length + s for length, s in zip(lengths, skip, strict=True)], unit)
    found = CorrectedOperand(base, unit, starts, skip)
    if draw(st.booleans()):
        found.projected = torch.randn(total, unit, 3, generator=generator).half()
        found.directions = torch.randn(len(lengths), 3, width, generator=generator)
    if draw(st.booleans()):
        vectors = (
            torch.rand(total, width, generator=generator)
            if by_entry
            else torch.rand(total, unit, width, generator=generator)
        )
        count = min(2, vectors.shape[1])
        places = vectors.argsort(1)[:, :count]
        found.index = places.to(torch.uint8 if max(unit, width) <= 256 else torch.int16).contiguous()
        found.delta = torch.randn(places.shape, generator=generator).half()
        found.by_entry = by_entry
    return found


def turned(draw: st.DrawFn, generator: torch.Generator, lengths: list[int], base: Operand, width: int) -> TurnedOperand:
    """RoPE over some or all channels, at positions in any order, after another basis or not."""
    pairs, most = draw(st.sampled_from([0, 4, width // 4, width // 2])), draw(st.sampled_from([900, 200_000]))
    frequency = torch.rand(pairs, generator=generator) * 2 - 0.5
    entries, total = scattered(lengths, 1)
    position = torch.randint(most, (total,), generator=generator, dtype=torch.int32)
    matrix = None
    if draw(st.booleans()):
        matrix = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.contiguous()
    return TurnedOperand(
        base, frequency, draw(st.booleans()), position, entries, matrix, draw(st.sampled_from([1.0, 0.8]))
    )


def operand(draw: st.DrawFn, generator: torch.Generator, lengths: list[int], width: int) -> Operand:
    """Any format; sometimes a selection out of longer rows."""
    if draw(st.integers(0, 3)) == 0:
        longer = [2 * length + 3 for length in lengths]
        base = plain_operand(draw, generator, longer, width)
        chosen = [torch.randperm(n, generator=generator)[:k] for n, k in zip(longer, lengths, strict=True)]
        starts = [sum(lengths[:row]) for row in range(len(lengths))]
        return GatheredOperand(base, torch.cat(chosen), starts)
    kind = draw(st.sampled_from(["plain", "plain", "scalar", "atoms", "trits"]))
    if kind == "scalar":
        base: Operand = scalar_codes(draw, generator, lengths, width, draw(st.sampled_from(DTYPES)))
    elif kind == "atoms":
        starts, total = scattered(lengths, 1)
        index, codes = (torch.randint(n, (total, 3), generator=generator) for n in (40, 256))
        scale = torch.rand(total, 1, generator=generator).to(draw(st.sampled_from(DTYPES)))
        atoms = torch.randn(40, width, generator=generator) / 128
        base = AtomOperand((codes - 128).to(torch.int8), index.to(torch.int16), scale, atoms, starts)
    elif kind == "trits":
        base = trits(generator, lengths, width, draw(st.sampled_from([5, 32])), draw(st.sampled_from(DTYPES)))
    else:
        base = plain_operand(draw, generator, lengths, width)
    if draw(st.integers(0, 3)) == 0:
        base = corrected(draw, generator, lengths, base, width)
    return turned(draw, generator, lengths, base, width) if draw(st.integers(0, 3)) == 0 else base


def plain_operand(draw: st.DrawFn, generator: torch.Generator, lengths: list[int], width: int) -> Operand:
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["dense", "token", "channel", "codebook"]))
    if kind == "codebook":
        return codebook_codes(draw, generator, lengths, width, dtype)
    if kind == "dense":
        return dense(generator, lengths, width, dtype)
    bits = draw(st.sampled_from(BITS))
    if kind == "token":
        group = draw(st.sampled_from([g for g in (8, 16, 32, 64, 128, width) if width % g == 0]))
        return token_codes(generator, lengths, width, bits, group, dtype)
    return channel_codes(generator, lengths, width, bits, draw(st.sampled_from([8, 20, 32, 128])), dtype)


def close(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    """Relative to the largest expected magnitude: 1e-5, and infinities in the same places."""
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got))
    assert torch.equal(got[~finite], want[~finite])
    largest = max(want[finite].abs().max().item() if finite.any() else 0.0, scale)
    assert (got[finite] - want[finite]).abs().max().item() <= 1e-5 * largest if finite.any() else True


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    """One random call: ragged rows, any pair of formats, any options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 15, 31, 32, 33, 64, 100, 255, 256, 257, 300, 700])
    lengths = draw(st.lists(sizes, min_size=1, max_size=4))
    groups, steps = draw(
        st.sampled_from(
            [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1), (8, 1), (3, 2), (4, 4), (3, 8), (1, 25), (2, 64)]
        )
    )
    width, value_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    query = torch.randn(len(lengths), groups * steps, width, generator=generator).to(draw(st.sampled_from(DTYPES)))
    options: dict[str, object] = {"scale": draw(st.sampled_from([1.0, 0.5])) / math.sqrt(width)}
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    entry_starts, total = scattered(lengths, 1)
    options["entry_starts"] = entry_starts
    if draw(st.booleans()):
        options["log_count"] = torch.rand(total, generator=generator) * 3
    options["positions"] = torch.zeros(total, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    last = max(lengths) + 50
    for row, length in enumerate(lengths):
        kept = torch.randperm(last, generator=generator)[:length].sort().values
        options["positions"][entry_starts[row] : entry_starts[row] + length] = kept  # type: ignore[index]
    options["query_positions"] = (torch.arange(steps) + last).repeat(len(lengths), 1)
    if draw(st.booleans()):
        options["window"] = draw(st.sampled_from([1, 40, 200]))
    if draw(st.booleans()) and min(lengths) >= steps:
        options["causal_tail"] = steps
    key = operand(draw, generator, lengths, width)
    value = operand(draw, generator, lengths, value_width)
    return {"query": query, "key": key, "value": value, "lengths": lengths, "options": options}


@given(call=calls())
@fast
def test_attend_and_mass_match_the_reference(instruction_set: str, call: dict) -> None:
    query, key, value, lengths, options = (call[k] for k in ("query", "key", "value", "lengths", "options"))
    want = reference.attend(query, key, value, lengths, **options)
    got = native.attend(query, key, value, lengths, **options)
    assert got is not None
    close(got.out, want.out)
    close(got.lse, want.lse)
    again, logits = kernels.attend_keeping_logits(query, key, value, lengths, **options)
    close(again.out, want.out)
    lse = want.lse.clone()
    lse[:, :1] = float("inf")
    want_mass = reference.mass(query, key, lengths, lse.nan_to_num(neginf=0.0), **options)
    got_mass = native.mass(query, key, lengths, lse, **options)
    assert got_mass is not None
    from_logits = native.mass_of_logits(logits, lengths, lse)
    got_weights, want_weights = (k.weights(query, key, lengths, lse, **options) for k in (native, reference))
    for row, want_row in enumerate(want_mass):
        assert got_mass[row].shape == want_row.shape
        close(got_mass[row], want_row)
        close(from_logits[row], want_row)
        close(want_weights[row].sum(0), want_row)
        close(got_weights[row], want_weights[row])


@pytest.mark.parametrize("window", [None, 100])
def test_column_sums_of_a_prompt(instruction_set: str, window: int | None) -> None:
    """Many query steps against their own keys and older ones: the sums of the causal weights, computed all at once."""
    generator = torch.Generator().manual_seed(2)
    lengths, steps, width = [900, 700], 600, 24
    key = dense(generator, lengths, width, torch.float32)
    query = torch.randn(2, 3 * steps, width, generator=generator)
    lse = torch.full((2, 3 * steps), math.inf)
    want, whole = [], []
    for row, length in enumerate(lengths):
        keys = key.data[key.starts[row] : key.starts[row] + length].double()
        logits = (query[row].double() @ keys.T).unflatten(0, (3, steps)) * 0.3
        last = length - steps + torch.arange(steps)[:, None]
        hidden = torch.arange(length) > last
        if window is not None:
            hidden |= torch.arange(length) <= last - window
        logits = logits.masked_fill(hidden, -math.inf)
        lse[row] = logits.logsumexp(-1).flatten()
        whole.append(logits.softmax(-1).flatten(0, 1).float())
        want.append(whole[-1].sum(0))
    options = {
        "scale": 0.3, "causal_tail": steps, "window": window, "entry_starts": key.starts,
        "positions": torch.cat([torch.arange(700), torch.zeros(1), torch.arange(900)]).int(),
        "query_positions": torch.stack([length - steps + torch.arange(steps) for length in lengths]),
    }  # fmt: skip
    assert key.starts == [701, 0]
    for found in (native, reference):
        for got_row, want_row in zip(found.mass(query, key, lengths, lse, **options), want, strict=True):
            close(got_row, want_row)
        for got_row, want_row in zip(found.weights(query, key, lengths, lse, **options), whole, strict=True):
            close(got_row, want_row)


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("kind", ["dense", "token", "channel"])
def test_two_threads_split_rows_exactly(kind: str, width: int) -> None:
    """Long unequal rows, cut among threads inside a row, give what one thread gives."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3000, 1, 0, 5021]

    def make() -> Operand:
        if kind == "dense":
            return dense(generator, lengths, width, torch.bfloat16)
        make_codes = token_codes if kind == "token" else channel_codes
        return make_codes(generator, lengths, width, 4, 16, torch.float16)

    key, value = make(), make()
    query = torch.randn(4, 3, width, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.attend(query, key, value, lengths, scale=width**-0.5))
    finally:
        torch.set_num_threads(before)
    want = reference.attend(query, key, value, lengths, scale=width**-0.5)
    for got in results:
        assert got is not None
        close(got.out, want.out)
        close(got.lse, want.lse)


def test_kept_logits_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and mass without the extension are those with it."""
    generator = torch.Generator().manual_seed(1)
    lengths = [40, 0, 7]
    key = dense(generator, lengths, 32, torch.float32)
    query = torch.randn(3, 6, 32, generator=generator)
    options = {
        "scale": 0.2, "window": 30, "causal_tail": 0, "entry_starts": [0, 40, 40], "positions": torch.arange(47) % 40,
        "query_positions": torch.tensor([[41, 42]] * 3), "log_count": torch.rand(47, generator=generator),
    }  # fmt: skip
    partial, logits = kernels.attend_keeping_logits(query, key, key, lengths, **options)
    sums = kernels.mass_of_logits(logits, lengths, partial.lse)
    monkeypatch.setattr(kernels, "backend", lambda: kernels.Backend("reference", "test"))
    want, want_logits = kernels.attend_keeping_logits(query, key, key, lengths, **options)
    close(partial.out, want.out)
    close(logits, want_logits)
    for got_row, want_row in zip(sums[::2], kernels.mass_of_logits(want_logits, lengths, want.lse)[::2], strict=True):
        close(got_row, want_row)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_outlier_scales_cost_no_precision(instruction_set: str, bits: int) -> None:
    """Channels and entries a hundred times larger than others (as keys' outliers are), and scales of either sign."""
    g = torch.Generator().manual_seed(bits)
    keys, values = (
        channel_codes(g, [300], 128, bits, 32, torch.float32),
        token_codes(g, [300], 128, bits, 32, torch.float32),
    )
    for operand in (keys, values):
        signs = torch.where(torch.rand(operand.scale.shape, generator=g) < 0.5, -1.0, 1.0)
        operand.scale *= signs * 100.0 ** torch.rand(operand.scale.shape, generator=g)
    query = torch.randn(1, 4, 128, generator=g)
    got = native.attend(query, keys, values, [300], scale=0.001)
    want = reference.attend(query.double(), keys, values, [300], scale=0.001)
    close(got.out.double(), want.out.double())
    close(got.lse.double(), want.lse.double())


def test_constant_groups_stay_finite() -> None:
    """A zero scale means a constant group: its entries are the zero point, never NaN."""
    codes = torch.zeros(4, packed_width(64, 2), dtype=torch.uint8)
    operand = TokenQuantOperand(codes, torch.zeros(4, 2), torch.full((4, 2), 3.0), 2, 32, [0])
    partial = native.attend(torch.randn(1, 2, 64), operand, operand, [4], scale=0.125)
    assert partial is not None
    torch.testing.assert_close(partial.out, torch.full((1, 2, 64), 3.0))


def test_what_the_extension_cannot_read_is_left_to_the_reference() -> None:
    """An operand of another class or dtype answers None, so that the dispatch falls back."""
    query = torch.randn(1, 1, 16)
    doubles = DenseOperand(torch.randn(3, 16, dtype=torch.float64), [0])

    class Other(Operand):
        starts = (0,)

    assert native.attend(query, doubles, doubles, [3], scale=1.0) is None
    assert native.attend(query, Other(), doubles, [3], scale=1.0) is None


def test_mismatched_head_dim_is_refused() -> None:
    keys = DenseOperand(torch.randn(3, 32), [0])
    with pytest.raises(KVBudgetError, match="head_dim 16"):
        native.attend(torch.randn(1, 1, 16), keys, keys, [3], scale=1.0)


def test_merge_and_scatter_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partials without entries, a query that no part answers, rows without new cells and columns without any."""
    generator = torch.Generator().manual_seed(3)
    parts = [
        reference.Partial(torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, generator=generator) * 30)
        for _ in range(3)
    ]
    for part, row in zip(parts, (slice(0, 1), slice(0, 2), slice(0, 1)), strict=True):
        part.out[row, :2] = 0.0
        part.lse[row, :2] = -math.inf
    want = reference.merge(parts)
    got = kernels.merge(parts)
    close(got.out, want.out)
    close(got.lse, want.lse)
    columns = [torch.zeros(9, 3), torch.zeros(9, dtype=torch.bfloat16), torch.ones(9, 2, dtype=torch.int32)]
    copies = [column.clone() for column in columns]
    cells = [torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator).bfloat16(), None]
    kernels.scatter(list(zip(columns, cells, strict=True)), [1, 4, 6], [2, 0, 2])
    monkeypatch.setattr(kernels, "backend", lambda: kernels.Backend("reference", "test"))
    kernels.scatter(list(zip(copies, cells, strict=True)), [1, 4, 6], [2, 0, 2])
    for column, copy in zip(columns, copies, strict=True):
        assert torch.equal(column, copy)
    assert columns[0][[1, 2, 6, 7]].equal(cells[0])
    assert columns[2].sum() == 10
