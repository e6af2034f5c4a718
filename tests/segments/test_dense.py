"""DenseSegment answers queries as brute-force softmax in float64 does, over ragged rows with counts, windows and caps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvbudget.kernels.reference import Partial, merge
from kvbudget.segments.base import AttendContext
from kvbudget.segments.dense import DenseSegment

WIDTH, VALUE_WIDTH = 16, 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make(
    lengths: list[int],
    *,
    counts: bool = False,
    dtype: torch.dtype = torch.float32,
    value_width: int = VALUE_WIDTH,
    spare: int = 0,
) -> DenseSegment:
    """A segment with gaps between positions, as evictions leave them."""
    total = sum(lengths)
    segment = DenseSegment(len(lengths))
    position = [torch.arange(n).mul(2).add(torch.arange(n) // 3) for n in lengths]
    meta = {"position": torch.cat([*position, torch.empty(0)]).int()}
    if counts:
        meta["count"] = torch.randint(1, 9, (total,)).float()
    key = torch.randn(total, WIDTH).to(dtype)
    value = torch.randn(total, value_width).to(dtype)
    segment.append(key, value, meta, lengths)
    segment.meta.reserve([n + spare for n in lengths])
    return segment


def brute(segment: DenseSegment, query: Tensor, ctx: AttendContext) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per row float64 ``(out [M, Dv], lse [M], logits [M, T_r])``."""
    answers = []
    for r, length in enumerate(segment.lengths):
        key, value = segment.meta.row("key", r).double(), segment.meta.row("value", r).double()
        position = segment.meta.row("position", r)
        logits = query[r].double() @ key.T * ctx.scale
        if ctx.softcap is not None:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        if "count" in segment.meta.columns:
            logits = logits + segment.meta.row("count", r).double().log()
        steps = 1 if ctx.query_positions is None else ctx.query_positions.shape[1]
        for m in range(query.shape[1]):
            step = m % steps
            for t in range(length):
                late = ctx.causal_tail > 0 and t > length - ctx.causal_tail + step
                far = ctx.window is not None and int(position[t]) <= int(ctx.query_positions[r, step]) - ctx.window
                if late or far:
                    logits[m, t] = -math.inf
        lse = logits.logsumexp(-1)
        weights = (logits - lse[:, None]).exp().nan_to_num(nan=0.0)
        answers.append((weights @ value, lse, logits))
    return answers


def agree(segment: DenseSegment, query: Tensor, ctx: AttendContext, tolerance: float) -> None:
    answers = brute(segment, query, ctx)
    part = segment.attend(query, ctx)
    assert part.lse.dtype == torch.float32
    for r, (out, lse, _) in enumerate(answers):
        torch.testing.assert_close(part.lse[r].double(), lse, rtol=0, atol=tolerance)
        torch.testing.assert_close(part.out[r].double(), out, rtol=0, atol=tolerance)
    total = torch.stack([lse for _, lse, _ in answers]) + 0.5
    total[:, 0] = math.inf  # a query that is not to be counted
    masses = segment.mass(query, total.float(), ctx)
    for (_, _, logits), lse, mass in zip(answers, total, masses, strict=True):
        expected = (logits - lse.nan_to_num(neginf=0.0)[:, None]).exp().sum(0)
        torch.testing.assert_close(mass.double(), expected, rtol=0, atol=tolerance * query.shape[1])


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    steps=st.integers(1, 4),
    groups=st.integers(1, 3),
    tail=st.booleans(),
    counts=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    window=st.none() | st.integers(1, 60),
    spare=st.integers(0, 2),
)
def test_attend_and_mass_match_brute_force(
    lengths: list[int],
    steps: int,
    groups: int,
    tail: bool,
    counts: bool,
    softcap: float | None,
    window: int | None,
    spare: int,
) -> None:
    if tail:
        lengths = [n and n + steps for n in lengths]  # a tail of the query steps' own entries, or no entries at all
    segment = make(lengths, counts=counts, spare=spare)
    query = torch.randn(len(lengths), groups * steps, WIDTH)
    newest = torch.tensor(
        [int(p[-1]) if len(p) else 0 for p in (segment.meta.row("position", r) for r in range(len(lengths)))]
    )
    positions = newest[:, None] + 1 + torch.arange(steps)
    ctx = AttendContext(WIDTH**-0.5, softcap, window, positions, steps if tail else 0)
    agree(segment, query, ctx, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("lengths", [[33, 33, 33], [5, 40, 1], [7, 0, 12]])
def test_many_query_rows_take_the_matrix_kernels(dtype: torch.dtype, counts: bool, lengths: list[int]) -> None:
    segment = make(lengths, counts=counts, dtype=dtype, value_width=WIDTH, spare=1)
    query = torch.randn(3, 48, WIDTH).to(dtype)
    agree(segment, query, AttendContext(WIDTH**-0.5), TOLERANCE[dtype])


def test_an_empty_row_has_no_weight() -> None:
    segment = make([0, 3])
    part = segment.attend(torch.randn(2, 2, WIDTH), AttendContext(1.0))
    assert part.lse[0].tolist() == [-math.inf, -math.inf]
    assert part.out[0].abs().sum() == 0
    assert part.lse[1].isfinite().all()


def test_a_count_weighs_as_that_many_copies() -> None:
    torch.manual_seed(1)
    key, value = torch.randn(3, WIDTH), torch.randn(3, VALUE_WIDTH)
    merged, copies = DenseSegment(1), DenseSegment(1)
    merged.append(key, value, {"position": torch.arange(3).int(), "count": torch.tensor([1.0, 4.0, 2.0])}, [3])
    index = torch.tensor([0, 1, 1, 1, 1, 2, 2])
    copies.append(key[index], value[index], {"position": torch.arange(7).int()}, [7])
    query, ctx = torch.randn(1, 2, WIDTH), AttendContext(0.3)
    torch.testing.assert_close(merged.attend(query, ctx), copies.attend(query, ctx))


def test_a_merged_away_entry_keeps_a_finite_bias() -> None:
    """A count of zero would be a logit of minus infinity, and a row of only such entries would be NaN."""
    segment = DenseSegment(1)
    meta = {"position": torch.arange(2).int(), "count": torch.zeros(2)}
    segment.append(torch.randn(2, WIDTH), torch.randn(2, WIDTH), meta, [2])
    for rows in (1, 64):
        part = segment.attend(torch.randn(1, rows, WIDTH), AttendContext(1.0))
        assert part.out.isfinite().all() and not part.lse.isnan().any()


def test_take_and_gather_keep_entries_with_their_columns() -> None:
    segment = make([4, 2], counts=True)
    keep = torch.tensor([[True, False, True, False], [False, True, False, False]])
    key, value, meta, counts = segment.gather(keep)
    expected = segment.keys()[keep]
    segment.take(keep)
    assert counts == segment.lengths == [2, 1]
    assert torch.equal(key, expected) and torch.equal(segment.meta.flat("key"), key)
    assert torch.equal(segment.meta.flat("value"), value)
    assert torch.equal(segment.meta.flat("count"), meta["count"])
    assert segment.positions().tolist() == [[0, 4], [2, -1]]
    assert sum(segment.parts().values()) == 3 * (4 * WIDTH + 4 * VALUE_WIDTH + 4 + 4)
    segment.check_integrity()


def test_forks_share_bytes_until_one_writes() -> None:
    one = make([4, 4], spare=3)
    one.meta.append({"votes": torch.zeros(0)}, [0, 0])
    two = one.share()
    assert {t.data_ptr() for t in one.tensors()} == {t.data_ptr() for t in two.tensors()}
    assert one.meta.capacities == [4, 4], "spare room is of no use to two"
    assert one.shared and two.shared and one.branch(hard=False) is not one
    one.add_to_state("votes", [torch.ones(4), torch.ones(4)], [1.0, 1.0])
    assert two.meta.flat("votes").tolist() == [0.0] * 8
    assert one.meta.columns["key"].data_ptr() == two.meta.columns["key"].data_ptr()
    two.take(torch.tensor([[True, True, False, False]] * 2))
    assert not two.shared and one.lengths == [4, 4] and two.lengths == [2, 2]


@st.composite
def partials(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[slice]]:
    """Logits ``[R, M, T]`` (some minus infinity), values ``[R, T, Dv]`` and a partition of the entries."""
    rows, queries, entries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    scale = draw(st.sampled_from([0.1, 3.0, 60.0]))
    logits = torch.randn(rows, queries, entries, dtype=torch.float64) * scale
    hidden = draw(st.lists(st.booleans(), min_size=entries, max_size=entries))
    logits[..., torch.tensor(hidden)] = -math.inf
    cuts = sorted(draw(st.lists(st.integers(0, entries), max_size=4)))
    return logits, torch.randn(rows, entries, 5, dtype=torch.float64), list(map(slice, [0, *cuts], [*cuts, entries]))


def attention(logits: Tensor, value: Tensor) -> Partial:
    lse = logits.logsumexp(-1)
    return Partial(((logits - lse[..., None]).exp().nan_to_num(nan=0.0)) @ value, lse)


@given(partials())
def test_merge_is_the_softmax_over_the_union(case: tuple[Tensor, Tensor, list[slice]]) -> None:
    logits, value, parts = case
    pieces = [attention(logits[..., part], value[:, part]) for part in parts]
    joined = merge([Partial(out.float(), lse.float()) for out, lse in pieces])
    expected = attention(logits, value)
    torch.testing.assert_close(joined.lse.double(), expected.lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(joined.out.double(), expected.out, rtol=0, atol=1e-4)
