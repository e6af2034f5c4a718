"""A layer answers as brute force over the tokens that it should hold, however the text was cut, evicted, forked or cropped."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.models.rotation import Rotation
from kvbudget.segments.quantized import QuantizedSegment
from residency import resident_bytes, storages

DIM, VALUE_DIM = 16, 8
SCALE = DIM**-0.5


@dataclass
class Oracle:
    """The same layer by brute force in float64: all tokens ever seen, and which of them each KV head still holds."""

    heads: int
    groups: int
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)  # per sequence [Hkv, T, D]
    values: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)  # per sequence [Hkv, T]

    def forward(self, call: AttentionCall, *, keep: bool = True) -> tuple[Tensor, Tensor]:
        batch, _, n, _ = call.query.shape
        if not self.keys:
            self.keys = [torch.zeros(self.heads, 0, DIM, dtype=torch.float64)] * batch
            self.values = [torch.zeros(self.heads, 0, VALUE_DIM, dtype=torch.float64)] * batch
            self.alive = [torch.zeros(self.heads, 0, dtype=torch.bool)] * batch
        before = list(self.keys), list(self.values), list(self.alive)
        out = torch.zeros(*call.query.shape[:3], VALUE_DIM, dtype=torch.float64)
        lse = torch.full(call.query.shape[:3], -math.inf, dtype=torch.float64)
        for b in range(batch):
            for i in range(n):
                if call.valid is not None and not call.valid[b, i]:
                    continue
                self.keys[b] = torch.cat([self.keys[b], call.key[b, :, i : i + 1].double()], 1)
                self.values[b] = torch.cat([self.values[b], call.value[b, :, i : i + 1].double()], 1)
                self.alive[b] = torch.cat([self.alive[b], torch.ones(self.heads, 1, dtype=torch.bool)], 1)
                out[b, :, i], lse[b, :, i] = self._answer(b, call.query[b, :, i].double())
        if not keep:
            self.keys, self.values, self.alive = before
        return out, lse

    def _answer(self, b: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Query ``[Hq, D]`` at the newest position."""
        query = query.unflatten(0, (self.heads, self.groups))
        logits = torch.einsum("hgd,htd->hgt", query, self.keys[b]) * SCALE
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        seen = self.keys[b].shape[1]
        visible = self.alive[b]
        if self.window is not None:
            visible = visible & (torch.arange(seen) > seen - 1 - self.window)
        logits = logits.masked_fill(~visible[:, None], -math.inf)
        if self.sink is not None:
            logits = torch.cat([logits, self.sink.double().view(self.heads, self.groups, 1)], -1)
        lse = logits.logsumexp(-1)
        weights = (logits - lse[..., None]).exp()[..., :seen]
        return torch.einsum("hgt,htv->hgv", weights, self.values[b]).flatten(0, 1), lse.flatten()


def make_call(oracle: Oracle, batch: int, n: int, valid: Tensor | None = None) -> AttentionCall:
    key, value = torch.randn(batch, oracle.heads, n, DIM), torch.randn(batch, oracle.heads, n, VALUE_DIM)
    query = 2 * torch.randn(batch, oracle.heads * oracle.groups, n, DIM)
    return AttentionCall(query, key, value, SCALE, oracle.softcap, oracle.window, oracle.sink, valid)


def agree(layer: LayerCache, oracle: Oracle, call: AttentionCall) -> None:
    """One forward on both sides."""
    out, lse = layer.forward(call)
    expected_out, expected_lse = oracle.forward(call)
    real = slice(None) if call.valid is None else call.valid[:, None].expand(lse.shape)
    torch.testing.assert_close(lse[real].double(), expected_lse[real], rtol=0, atol=3e-5)
    torch.testing.assert_close(out[real].double(), expected_out[real], rtol=0, atol=3e-5)
    layer.finish_forward()
    layer.check_integrity()
    assert layer.seen == [keys.shape[1] for keys in oracle.keys]


def evict(layer: LayerCache, oracle: Oracle, share: float, *, ragged: bool, spare: int = 0) -> None:
    """Drops random entries on both sides, different ones in every head."""
    positions = torch.cat([segment.positions() for segment in layer.main], 1)
    valid = positions >= 0
    chance = share * torch.rand(len(positions), 1) * 2 if ragged else torch.tensor(share)
    keep = (torch.rand(positions.shape) >= chance) & valid
    layer.evict(keep, spare)
    for b, alive in enumerate(oracle.alive):
        for h in range(oracle.heads):
            row = b * oracle.heads + h
            kept = torch.zeros_like(alive[h])
            kept[positions[row][keep[row]].long()] = True
            alive[h] = kept
    assert layer.evictable() == [alive.sum(1).tolist() for alive in oracle.alive]


@st.composite
def texts(draw: st.DrawFn) -> tuple[Oracle, int, list[tuple[int, Tensor | None]]]:
    """A layer's shape, a batch size and forwards ``(tokens, valid)`` with padding on either side or in between."""
    groups, heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    oracle = Oracle(
        heads,
        groups,
        softcap=draw(st.none() | st.floats(1, 10)),
        window=draw(st.none() | st.integers(1, 30)),
        sink=draw(st.none() | st.just(torch.linspace(-1, 2, heads * groups))),
    )
    forwards: list[tuple[int, Tensor | None]] = []
    for n in draw(st.lists(st.sampled_from([1, 2, 8, 9, 20]), min_size=1, max_size=4)):
        valid = None
        if draw(st.booleans()):
            rows = st.lists(st.booleans(), min_size=n, max_size=n)
            valid = torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))
        forwards.append((n, valid))
    return oracle, batch, forwards


@given(texts())
def test_any_chunking_and_padding_equals_brute_force(case: tuple[Oracle, int, list[tuple[int, Tensor | None]]]) -> None:
    oracle, batch, forwards = case
    layer = LayerCache(0, oracle.heads, window=oracle.window)
    for n, valid in forwards:
        agree(layer, oracle, make_call(oracle, batch, n, valid))


@given(texts(), st.floats(0.1, 0.9), st.booleans(), st.integers(0, 3))
def test_attention_over_what_evictions_left_equals_brute_force(
    case: tuple[Oracle, int, list[tuple[int, Tensor | None]]], share: float, ragged: bool, spare: int
) -> None:
    oracle, batch, forwards = case
    oracle.window = None
    layer = LayerCache(0, oracle.heads)
    for n, valid in forwards:
        agree(layer, oracle, make_call(oracle, batch, n, valid))
        evict(layer, oracle, share, ragged=ragged, spare=spare)
        held = sum(sum(row) for row in layer.evictable())
        cells = held + spare * layer.num_rows
        assert layer.nbytes() == cells * 4 * (DIM + VALUE_DIM + 1), "what was evicted has not been freed"


@given(texts())
def test_a_probe_leaves_nothing_behind(case: tuple[Oracle, int, list[tuple[int, Tensor | None]]]) -> None:
    oracle, batch, forwards = case
    layer = LayerCache(0, oracle.heads, window=oracle.window)
    for n, valid in forwards:
        agree(layer, oracle, make_call(oracle, batch, n, valid))
    addresses, seen, kept = storages(layer.tensors()), list(layer.seen), layer.kept()
    content = [tensor.clone() for tensor in layer.tensors()]
    call = make_call(oracle, batch, 12)
    out, lse, own = layer.probe(call)
    expected_out, expected_lse = oracle.forward(call, keep=False)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=3e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=3e-5)
    assert (own <= lse + 1e-6).all()
    assert (storages(layer.tensors()), layer.seen, layer.kept()) == (addresses, seen, kept)
    assert all(torch.equal(a, b) for a, b in zip(layer.tensors(), content, strict=True))
    agree(layer, oracle, make_call(oracle, batch, 3))


def test_a_sliding_window_keeps_what_it_covers_and_little_more() -> None:
    oracle = Oracle(heads=2, groups=1, window=24)
    layer = LayerCache(0, 2, window=24)
    for n in [100, *[1] * 200, 30, 7, 300, 1]:
        agree(layer, oracle, make_call(oracle, 1, n))
        held = layer.kept()[0][0]
        assert min(layer.seen[0], 23) <= held <= 23 + 64
        assert layer.nbytes() <= 2 * (23 + 2 * 64) * 4 * (DIM + VALUE_DIM + 1)


def grown(batch: int = 2, n: int = 40, **options: object) -> tuple[LayerCache, Oracle]:
    oracle = Oracle(heads=2, groups=2)
    layer = LayerCache(0, 2, **options)  # type: ignore[arg-type]
    agree(layer, oracle, make_call(oracle, batch, n))
    return layer, oracle


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["few", "many", "evict", "fork", "crop"]), min_size=1, max_size=7), st.data())
def test_forks_go_separate_ways(actions: list[str], data: st.DataObject) -> None:
    lineages = [grown()]
    for action in actions:
        at = data.draw(st.integers(0, len(lineages) - 1), label="lineage")
        layer, oracle = lineages[at]
        if action == "fork":
            lineages.append((layer.fork(), copy.deepcopy(oracle)))
        elif action == "evict":
            evict(layer, oracle, 0.4, ragged=data.draw(st.booleans()))
        elif action == "crop":
            tokens = data.draw(st.integers(1, 3))
            if layer.can_truncate(tokens):
                layer.truncate(tokens)
                oracle.keys, oracle.values, oracle.alive = (
                    [column[:, :-tokens] for column in part] for part in (oracle.keys, oracle.values, oracle.alive)
                )
        else:
            agree(layer, oracle, make_call(oracle, 2, 2 if action == "few" else 11))
    for layer, oracle in lineages:
        layer.check_integrity()
        agree(layer, oracle, make_call(oracle, 2, 1))


def test_a_fork_costs_only_what_it_adds() -> None:
    layer, oracle = grown(n=100)
    before = layer.nbytes()
    fork = layer.fork()
    assert resident_bytes([layer, fork]) == layer.nbytes() == fork.nbytes() <= before
    twin = copy.deepcopy(oracle)
    fork.set_capacity([2 * 101] * 2)
    agree(fork, twin, make_call(twin, 2, 1))
    assert resident_bytes([layer, fork]) == layer.nbytes() + 4 * 4 * (DIM + VALUE_DIM + 1)
    evict(fork, twin, 0.9, ragged=True)
    assert len(fork.main) == 1, "segments that no fork shares any more are joined"
    agree(layer, oracle, make_call(oracle, 2, 1))


def test_truncate_takes_the_newest_tokens_back() -> None:
    layer, oracle = grown()
    call = make_call(oracle, 2, 5)
    twin = copy.deepcopy(oracle)
    agree(layer, oracle, call)
    assert layer.can_truncate(5) and not layer.can_truncate(46)
    layer.truncate(5)
    agree(layer, twin, make_call(twin, 2, 9))


def test_what_was_evicted_cannot_be_taken_back() -> None:
    layer, _ = grown(n=10)
    keep = torch.ones(4, 10, dtype=torch.bool)
    keep[1, 8] = False
    layer.evict(keep)
    assert layer.can_truncate(0) and layer.can_truncate(1)
    assert not layer.can_truncate(2) and not layer.can_truncate(3)


def test_sequences_are_chosen_and_repeated() -> None:
    layer, oracle = grown(batch=3)
    evict(layer, oracle, 0.3, ragged=True)
    index = [2, 2, 0, 1]
    layer.select_sequences(index)
    oracle.keys, oracle.values = [oracle.keys[b] for b in index], [oracle.values[b] for b in index]
    oracle.alive = [oracle.alive[b].clone() for b in index]
    agree(layer, oracle, make_call(oracle, 4, 1))
    agree(layer, oracle, make_call(oracle, 4, 12))


ROTATION = Rotation(10.0 ** -torch.arange(DIM // 2).float())


def set_apart(layer: LayerCache, sinks: int, recent: int) -> None:
    """What streaming_llm does: sinks and the newest entries stay."""
    positions = torch.cat([segment.positions() for segment in layer.main], 1)
    seen = torch.tensor(layer.seen).repeat_interleave(layer.num_kv_heads)[:, None]
    layer.evict((positions >= 0) & ((positions < sinks) | (positions >= seen - recent)))


@pytest.mark.parametrize("forked", [False, True])
def test_sinks_set_apart_are_seen_at_positions_inside_the_cache(forked: bool) -> None:
    """RoPE is applied here: the true cache position of a kept entry is its rank, so brute force renumbers the keys."""
    sinks, recent, heads = 3, 12, 2
    layer = LayerCache(0, heads, rotation=ROTATION)
    layer.apart = sinks
    text_keys, text_values = torch.randn(1, heads, 90, DIM), torch.randn(1, heads, 90, VALUE_DIM)
    text_queries = torch.randn(1, 2 * heads, 90, DIM)
    kept: list[int] = []
    position = 0
    for step, n in enumerate([7, 5, 9, 1, 1, 15, 1, 1, 2, 1, 1, 30]):
        if forked and step in (1, 4, 7):
            layer = layer.fork()
        at = torch.arange(position, position + n)
        call = AttentionCall(
            ROTATION.rotate(text_queries[:, :, at], at),
            ROTATION.rotate(text_keys[:, :, at], at),
            text_values[:, :, at],
            SCALE,
        )
        out, _ = layer.forward(call)
        held = [*kept, *at.tolist()]
        keys = ROTATION.rotate(text_keys[:, :, held], torch.arange(len(held)))
        for i in range(n):
            upto = len(kept) + i + 1
            query = ROTATION.rotate(text_queries[0, :, position + i], upto - 1).unflatten(0, (heads, 2))
            logits = torch.einsum("hgd,htd->hgt", query, keys[0, :, :upto]) * SCALE
            expected = torch.einsum("hgt,htv->hgv", logits.softmax(-1), text_values[0][:, held[:upto]])
            torch.testing.assert_close(out[0, :, i], expected.flatten(0, 1), rtol=0, atol=1e-4)
        position += n
        layer.finish_forward()
        if len(held) > sinks + recent:
            set_apart(layer, sinks, recent)
            held = [p for p in held if p < sinks or p >= position - recent]
        kept = held
        layer.check_integrity()
        assert layer.evictable() == [[len(kept)] * heads]
        assert len(layer.main) <= 3, "forks leave a trail of segments"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_ahead_of_need_stays_inside_the_capacity(dtype: torch.dtype) -> None:
    oracle = Oracle(heads=2, groups=1)
    layer = LayerCache(0, 2)
    layer.forward(make_call(oracle, 2, 30))
    layer.finish_forward()
    layer.evict(torch.rand(4, 30) < torch.tensor([[0.9], [0.2], [0.5], [0.6]]))
    held = [sum(row) for row in layer.evictable()]
    capacity = [held[0] + 2 * 5, held[1] + 2 * 3]
    layer.set_capacity(capacity)
    for step in range(8):
        layer.forward(make_call(oracle, 2, 1))
        layer.finish_forward()
        (table,) = layer.main[0].tables()
        reserved = [sum(table.capacities[2 * b : 2 * b + 2]) for b in range(2)]
        for b in range(2):
            assert reserved[b] <= max(capacity[b], held[b] + 2 * (step + 1))
        layer.check_integrity()


def test_a_quantized_layer_under_a_byte_budget_keeps_one_pair_of_tails_over_forks() -> None:
    key, value = ChannelQuant(bits=8, unit=8, residual=16), TokenQuant(bits=8, group=8, residual=16)
    layer = LayerCache(0, 2, make_segment=lambda rows: QuantizedSegment(rows, key, value))
    layer.hard = True
    oracle = Oracle(heads=2, groups=1)
    layer.forward(make_call(oracle, 1, 50))
    layer.finish_forward()
    single = layer.nbytes()
    for _ in range(4):
        layer, parent = layer.fork(), layer
        layer.forward(make_call(oracle, 1, 1))
        layer.finish_forward()
        layer.check_integrity()
        assert len(layer.main) == 1
        assert parent.kept()[0][0] == layer.kept()[0][0] - 1
    layer.set_capacity([2 * 54])
    assert layer.nbytes() < 2 * single
