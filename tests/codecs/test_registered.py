"""Every codec of the registry: deterministic, finite on constant data, of the size it says, and right through the cache."""

import sys
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvbudget.cache import KVCache
from kvbudget.codecs.base import Codec, alone
from kvbudget.codecs.commuting import laid_out, stages_of
from kvbudget.codecs.span import SpanQuant
from kvbudget.errors import PolicyError
from kvbudget.eval.rate import declared
from kvbudget.methods import parse, registry
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.segments.base import AttendContext
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.store import SEALED
from tiny import left_padded, random_text, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
from test_registry import feed

# Codecs as they fit texts of some hundred tokens; the others are taken with their defaults.
SMALL = {
    "kivi": "kivi(group=16, residual=16)",
    "gear": "gear(group=16)",
    "zipcache": "zipcache(gap=20)",
    "zipvl": "zipvl(gap=20)",
    "nsnquant": "nsnquant(chunk=16)",
    "commvq": "commvq(residual=16)",
    "quantspec": "quantspec(group=16)",
    "hcattention": "hcattention(residual=16)",
    "qaq": "qaq(residual=16)",
    "squat": "squat(group=16, residual=16)",
    "vidkv": "vidkv(group=16, residual=16)",
    "quantized_pruning": "quantized_pruning(residual=8)",
    "xquant": "xquant(group=16)",
    "xquant_cl": "xquant_cl(group=16, first=1)",
    "aquakv": "aquakv(residual=16)",
}
# Sides of two methods: units on one, states on both, calibrations, windows of different lengths.
PAIRS = [
    "kv_codecs(keys='kivi(group=16, residual=16)', values='turboquant(bits=2)')",
    "kv_codecs(keys='commvq(residual=16)', values='nsnquant(chunk=16)')",
    "kv_codecs(keys='squat(group=16, residual=16)', values='gear(group=16)')",
    "kv_codecs(keys='hcattention(residual=16)', values='qaq(residual=16)')",
    "kv_codecs(keys='visual_1bit(residual=8)', values='cq')",
]
SIDES = ("key", "value")
# Artifacts by method, for the tiny Llama: 2 layers, 4 query heads over 2 KV heads, 16 elements.
ARTIFACTS: dict[str, dict[str, Tensor]] = {
    "kvquant": {
        "offset": torch.zeros(2, 2, 16),
        "spread": torch.full((2, 2, 16), 3.0),
        "keys_3": torch.linspace(-1, 1, 8).expand(2, 2, 8),
        "values_3": torch.linspace(-1, 1, 8).expand(2, 2, 8),
    },
    "commvq": {
        "tables": torch.randn(2, 2, 3, 64, 16, generator=torch.Generator().manual_seed(0)) / 8,
        "order": torch.arange(16),
    },
    "csr": {
        side: normalize(torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)), dim=-1) for side in SIDES
    },
    "cq": {side: torch.randn(2, 2, 2, 256, 8, generator=torch.Generator().manual_seed(0)) for side in SIDES},
    "xquant": {f"{side}_{way}": torch.eye(32).expand(2, 32, 32) for side in SIDES for way in ("down", "up")}
    | {f"{side}_bias": torch.zeros(2, 32) for side in SIDES},
    "xquant_cl": {name: torch.eye(64).expand(2, 64, 64) for name in ("down", "up", "basis")}
    | {"bias": torch.zeros(2, 64), "place": torch.arange(2), "split": torch.tensor(32)},
    "aquakv": {f"{side}_map": torch.full((2, rows, 32), 0.02) for side, rows in zip(SIDES, (32, 64), strict=True)}
    | {f"{side}_bias": torch.zeros(2, 32) for side in SIDES},
}
CODECS = [name for name, kind in registry().items() if kind.role == "codec"]
FREE = [name for name in CODECS if "calibration" not in registry()[name].needs]
CALIBRATED = ["kvquant", "commvq", "csr", "cq"]
# By turns, since any codec goes with any of them.
EVICTIONS = ["snapkv(window=8)", "h2o", "snapkv(window=8)+adakv", "tova", "streaming_llm(positions='cache')"]


@pytest.fixture(autouse=True)
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    for method, tensors in ARTIFACTS.items():
        Artifact(method, mark(), tensors, {}).save()


@cache
def mark() -> str:
    return fingerprint(tiny_model("llama"))


def sides(name: str) -> list[Codec]:
    codec = parse(SMALL.get(name, name)).parts().codec
    assert codec is not None
    return list(codec)


def stored_bytes(columns: dict[str, Tensor]) -> int:
    return sum(column.untyped_storage().nbytes() for column in columns.values())


def test_the_guide_says_what_codecs_declare():
    guide = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text(encoding="utf-8")
    assert "\n".join(declared()) in guide


@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("name", FREE)
def test_deterministic_finite_and_of_its_size(name, width):
    generator = torch.Generator().manual_seed(width)
    for codec in sides(name):
        count = 3 * codec.unit * codec.lump // codec.unit
        x = torch.randn(count, width, generator=generator) * torch.rand(width, generator=generator) * 3
        place = alone(codec, x)
        columns, again = codec.encode(x, place), codec.encode(x.clone(), alone(codec, x))
        decoded = codec.decode(columns, place)
        assert torch.equal(decoded, codec.decode(again, alone(codec, x)))
        assert decoded.shape == x.shape and decoded.dtype is torch.float32
        assert (decoded - x).square().mean() < 0.6 * x.square().mean()
        most = count * codec.bytes_per_entry(width)
        assert stored_bytes(columns) == pytest.approx(most) or (codec.variable and stored_bytes(columns) < most)
        assert sum(t.untyped_storage().nbytes() for t in place.state.values()) == codec.state_bytes(width)
        for constant in (torch.zeros_like(x), torch.full_like(x, -3.0), x * 0 + 1e-8, x[:1].expand_as(x).contiguous()):
            place = alone(codec, constant)
            found = codec.decode(codec.encode(constant, place), place)
            assert bool(found.isfinite().all())
            # What lies below half precision may become zero.
            assert (found - constant).square().mean() <= max(0.6 * constant.square().mean(), 1e-14)


@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_codes_are_deterministic_finite_and_of_their_size(name, width):
    """As above, with what one KV head would get of a calibration drawn at random."""
    generator, order = torch.Generator().manual_seed(width), torch.arange(width)
    drawn = {
        "book": torch.linspace(-1, 1, 8).expand(2, 8),
        "offset": torch.zeros(1, width),
        "spread": torch.full((1, width), 3.0),
        "words": torch.randn(1, width // 8, 256, 8, generator=generator),
        "atoms": normalize(torch.randn(256, width, generator=generator), dim=-1),
        "vectors": laid_out(torch.randn(1, stages_of(2, width), 64, width, generator=generator) / width**0.5, order),
        "order": order,
    }
    for codec in sides(name):
        known = {field.name for field in fields(codec)} & set(drawn)
        codec = replace(codec, **{name: drawn[name] for name in known})
        if name == "commvq" and known:
            codec = replace(codec, stages=stages_of(2, width))
        x = torch.randn(40, width, generator=generator)
        place = alone(codec, x)
        columns = codec.encode(x, place)
        assert torch.equal(codec.decode(columns, place), codec.decode(codec.encode(x.clone(), place), place))
        assert stored_bytes(columns) == pytest.approx(len(x) * codec.bytes_per_entry(width))
        for constant in (torch.zeros_like(x), torch.full_like(x, -3.0), x * 0 + 1e-8):
            found = codec.decode(codec.encode(constant, place), place)
            assert found.shape == x.shape and bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("name", "eviction"), [(n, EVICTIONS[i % 5]) for i, n in enumerate(CODECS)] + [("xquant", EVICTIONS[2])]
)
def test_padded_rows_equal_their_single_runs_inside_the_bytes(name, eviction):
    """Some units are sealed before anything has been evicted."""
    model, policy = tiny_model("llama"), f"{eviction}+{SMALL.get(name, name)}"
    texts = [random_text(n, seed=n) for n in (31, 150, 97)]
    ids, mask = left_padded(texts)
    ids, mask = torch.cat([ids, random_text(9, rows=3)], dim=1), torch.cat([mask, torch.ones(3, 9).long()], dim=1)
    single = KVCache(model, policy, "1GiB").enforcer
    # Bytes for 40 entries beside what the codec needs anyway.
    need = int(4 * (single.cost.fixed + max(40, single.floor) * single.cost.per_entry)) + 1
    batch = KVCache(model, policy, f"{3 * need}B")
    logits = feed(model, batch, ids, [40, 60, 50, *[1] * 9], mask)
    assert bool(logits.isfinite().all())
    for b, text in enumerate(texts):
        ends = [max(0, end - 150 + text.shape[1]) for end in (0, 40, 100, 150)]
        sizes = [end - begin for begin, end in pairwise(ends) if end > begin] + [1] * 9
        one = KVCache(model, policy, f"{need}B")
        expected = feed(model, one, torch.cat([text, ids[b : b + 1, -9:]], dim=1), sizes)
        torch.testing.assert_close(logits[b : b + 1, mask[b].bool()], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in (*CODECS, *PAIRS) if parse(name).parts().scorer is None])
def test_attention_over_codes_is_that_over_decoded_entries(name):
    """Chunks, small blocks and single steps, forks included, against the segment's own decoded keys and values."""
    model, ids = tiny_model("llama"), random_text(170)
    cache = KVCache(model, SMALL.get(name, name))
    feed(model, cache, ids[:, :150], [90, 60])
    feed(model, cache, ids[:, 150:160], [1] * 4 + [6])
    fork = cache.fork()
    for layer in cache.enforcer.layers:
        (segment,) = layer.main
        assert segment.tensors()
        keys, values = segment.keys(), segment.values()
        query = torch.randn(2, 2, 16)
        part = layer.main[0].attend(query, _context())
        logits = query @ keys.mT * 0.25
        if getattr(segment, "key", None) is not None and segment.key.codec.lowered:
            ((begin, end),) = set(segment.key.bounds(SEALED))
            logits[..., begin:end] = lowered(logits[..., begin:end], segment.key.codec.lowered)
        weights = logits.softmax(-1)
        torch.testing.assert_close(part.out, weights @ values, atol=1e-4, rtol=1e-4)
    one, other = (feed(model, c, ids[:, 160:], [1] * 10) for c in (cache, fork))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "eviction"), zip(PAIRS, EVICTIONS, strict=True))
def test_padded_rows_of_two_codecs_equal_their_single_runs(name, eviction):
    test_padded_rows_equal_their_single_runs_inside_the_bytes(name, eviction)


def test_each_side_is_that_of_its_own_method():
    """In the first layer, whose keys and values no codec has touched."""
    model, ids = tiny_model("llama"), random_text(100)
    stored = {}
    for policy in ("kivi(group=16, residual=16)", "commvq(residual=16)", "csr(residual=8)"):
        for name in (
            policy,
            f"kv_codecs(keys={policy!r}, values='bf16')",
            f"kv_codecs(keys='bf16', values={policy!r})",
        ):
            cache = KVCache(model, name)
            feed(model, cache, ids, [60, 40])
            stored[name] = cache.enforcer.layers[0].main[0]
        own, keys, values = stored.values()
        assert torch.equal(keys.keys(), own.keys()) and torch.equal(values.values(), own.values())
        stored.clear()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("kv_codecs(keys=xquant)", "xquant does not code keys and values of a KV head by themselves"),
        ("kv_codecs(values=snapkv)", "snapkv does not code"),
        (
            "kv_codecs(keys='nsnquant(chunk=48)', values=vidkv)",
            "48 at a time and vidkv values 32 at a time; give both the same",
        ),
        ("kv_codecs(keys=zipcache)", "keep different windows, where one of them codes by attention; give"),
        ("kv_codecs(keys='kivi(bits=5)')", "bits=5 cannot be packed"),
        ("gear(base='kv_codecs(keys=commvq)')", "no codec that can be corrected"),
    ],
)
def test_sides_that_do_not_go_together_are_refused(policy, message):
    with pytest.raises(PolicyError, match=message):
        parse(policy)


def lowered(logits: Tensor, by: float) -> Tensor:
    """Logits ``[..., T]`` mapped from [min, max] to [min, max - by], all to the minimum where they span less (CalibQuant)."""
    low, high = logits.aminmax(dim=-1, keepdim=True)
    return low + (logits - low) * ((high - low - by).clamp_min(0) / (high - low))


@pytest.mark.parametrize("queries", [2, 40])
def test_lowered_logits_are_what_attention_and_scorers_see(queries):
    """CalibQuant's calibration over codes alone, for few and many queries, whose spreads lie on both sides of it."""
    codec = SpanQuant(sinks=2, residual=4, lowered=3.0)
    segment = QuantizedSegment(2, codec, codec)
    key, value = torch.randn(2, 2 * 50, 16, generator=torch.Generator().manual_seed(0))
    segment.append(key, value, {"position": torch.arange(50).int().repeat(2)}, [50, 50])
    segment.seal()
    query = torch.randn(2, queries, 16) * torch.linspace(0.3, 6, queries)[:, None]
    logits = query @ segment.keys().mT * 0.25
    spread = logits[..., 2:46].amax(-1) - logits[..., 2:46].amin(-1)
    assert bool((spread < 3).any()) and bool((spread > 3).any())
    logits[..., 2:46] = lowered(logits[..., 2:46], 3.0)
    expected, lse = logits.softmax(-1), logits.logsumexp(-1)
    part = segment.attend(query, _context())
    torch.testing.assert_close(part.out, expected @ segment.values(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.lse, lse, atol=1e-4, rtol=1e-4)
    weights, mass = segment.weights(query, lse, _context()), segment.mass(query, lse, _context())
    torch.testing.assert_close(torch.stack(weights), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.stack(mass), expected.sum(1), atol=1e-4, rtol=1e-3)


def _context():
    return AttendContext(scale=0.25)
