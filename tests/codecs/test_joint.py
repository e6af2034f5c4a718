"""Codecs of all heads and layers together: against the layers' true inputs, their papers' formulas, and what they refuse."""

import pytest
import torch
from brute_inputs import layer_inputs
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.calibrate.layer_inputs import projections
from kvbudget.codecs.base import Codec
from kvbudget.codecs.integer import TokenQuant
from kvbudget.codecs.joint import InputDeltas, LayerInputs, Predicted
from kvbudget.codecs.rotated import GridCodes
from kvbudget.errors import PolicyError, UnsupportedModel
from kvbudget.eval.rate import stored_bytes
from kvbudget.models import Rotation, fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.segments.joint import Group, JointSegment
from tiny import random_text, tiny_model


def maps(method: str, model, tmp_path) -> dict[str, Tensor]:
    path = calibrate(method, model, tmp_path / method)
    return dict(Artifact.load(method, fingerprint(model), path).tensors)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "heads"), [("llama", (4, 2)), ("llama", (4, 4)), ("qwen2", (3, 1))], ids=str)
def test_inputs_are_those_of_the_layers_and_give_keys_and_values_back(name, heads, tmp_path):
    """In 8 bits keys and values come back; with as many KV heads as queries the codes are those of the true inputs."""
    model = tiny_model(name, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    found = maps("xquant", model, tmp_path)
    inputs, keys, values = layer_inputs(model, random_text(64))
    whole = heads[0] == heads[1]
    codec = LayerInputs(bits=8, group=16, unit=1 if whole else 16, residual=16, found=found)
    assert codec.whole == whole
    for layer in range(2):
        columns = codec.encode(layer, keys[layer], values[layer], None)
        key, value, _ = codec.decode(layer, columns, None)
        assert error(key, keys[layer]) < 0.02 and error(value, values[layer]) < 0.02
        if whole:
            own = TokenQuant(bits=8, group=16).encode(inputs[layer])
            assert (columns["input.codes"][:, 0].int() - own["codes"].int()).abs().max() <= 1


def test_deltas_add_up_to_the_inputs_of_the_layers(tmp_path):
    """Against the accumulator made from the true inputs and the projections' own singular vectors."""
    model = tiny_model("llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
    found = maps("xquant_cl", model, tmp_path)
    assert found["basis"].shape == (4, 128, 64)
    inputs, keys, values = layer_inputs(model, random_text(40))
    codec, quant = InputDeltas(bits=8, group=64, first=2, found=found), TokenQuant(bits=8, group=64)
    below, accumulated = None, torch.zeros(40, 128)
    for layer, weights in projections(model).items():
        columns = codec.encode(layer, keys[layer], values[layer], below)
        key, value, below = codec.decode(layer, columns, below)
        joint = weights.gain[:, None] * torch.cat([weights.key, weights.value], 1)
        basis = found["basis"][layer]
        assert error(basis @ basis.T @ joint.float(), joint.float()) < 1e-4
        delta = (inputs[layer] / weights.gain.float() - accumulated) @ basis
        accumulated = accumulated + quant.decode(quant.encode(delta)) @ basis.T
        assert error(below[0], accumulated) < 0.02
        assert error(key, keys[layer]) < 0.02 and error(value, values[layer]) < 0.02


def test_models_that_normalize_keys_are_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="no linear map"):
        calibrate("xquant", tiny_model("qwen3"), tmp_path / "artifact")


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_grids_are_better_than_the_best_scalar_codes(bits, limit):
    x = torch.randn(512, 192, generator=torch.Generator().manual_seed(1))
    codec = GridCodes(bits=bits)
    columns = codec.encode(x)
    assert float((codec.decode(columns) - x).square().mean()) < limit
    assert sum(c.untyped_storage().nbytes() for c in columns.values()) == 512 * codec.bytes_per_entry(192)
    assert bool(codec.decode(codec.encode(torch.zeros(3, 80))).eq(0).all())


def test_predictors_leave_less_to_code_and_without_them_it_is_the_grid():
    generator = torch.Generator().manual_seed(0)
    low, turn = torch.randn(256, 64, generator=generator), torch.randn(64, 64, generator=generator) / 8
    high = low @ turn + 0.3 * torch.randn(256, 64, generator=generator)
    found = {
        "key_map": torch.stack([torch.zeros(64, 64), turn]),
        "value_map": torch.stack([torch.zeros(128, 64), torch.cat([torch.zeros(64, 64), turn])]),
        "key_bias": torch.zeros(2, 64),
        "value_bias": torch.zeros(2, 64),
    }
    plain: Codec = GridCodes(bits=2)
    for table, factor in ((found, 0.4), ({name: 0 * x for name, x in found.items()}, None)):
        codec = Predicted(bits=2, found=table)
        _, _, below = codec.decode(0, codec.encode(0, low, low, None), None)
        key, value, _ = codec.decode(1, codec.encode(1, high, high, below), below)
        own = plain.decode(plain.encode(high))
        for x in (key, value):
            if factor is None:
                assert torch.equal(x, own)
            else:
                assert (x - high).norm() < factor * (own - high).norm()


T, HEADS, D = 4096, 2, 64
WIDTH = HEADS * D
WAYS = ("down", "up")
BOTH = {name: torch.eye(2 * WIDTH)[None] for name in WAYS} | {"bias": torch.zeros(1, 2 * WIDTH)}
APART = {f"{side}_{way}": torch.eye(WIDTH)[None] for side in ("key", "value") for way in WAYS}
APART |= {f"{side}_bias": torch.zeros(1, WIDTH) for side in ("key", "value")}
BITS = {
    "xquant": (LayerInputs(bits=4, unit=128, found=APART), 4 + 32 / 128, 0),
    "xquant_cl": (
        InputDeltas(bits=4, first=0, found=BOTH | {"place": torch.zeros(1).long(), "split": torch.tensor(WIDTH)}),
        4 + 32 / 128,
        0,
    ),
    "aquakv": (Predicted(bits=2, sinks=4, found={}), 4 + 16 / WIDTH, 4 + 124),
}


@pytest.mark.parametrize("width", [64, 80, 96, 128])
def test_codes_are_deterministic_and_finite_at_every_width(width):
    both, eye = 2 * HEADS * width, torch.eye(2 * HEADS * width)[None]
    maps = {
        "down": eye,
        "up": eye,
        "bias": torch.zeros(1, both),
        "place": torch.zeros(1).long(),
        "split": torch.tensor(both // 2),
    }
    predictors = {"key_map": eye[:, : both // 2, : both // 2], "key_bias": torch.zeros(1, both // 2)}
    predictors |= {"value_map": eye[..., : both // 2], "value_bias": torch.zeros(1, both // 2)}
    for codec in (InputDeltas(found=maps, first=0), LayerInputs(found=maps), Predicted(found=predictors)):
        for key in (torch.randn(12, both // 2), torch.zeros(12, both // 2), torch.full((12, both // 2), -3.0)):
            below = None
            for _ in range(2):
                columns = codec.encode(0, key, key, below)
                size = sum(column.untyped_storage().nbytes() for column in columns.values())
                assert size == 12 * codec.bytes_per_entry(below is not None, *2 * [both // 2])
                again = codec.decode(0, codec.encode(0, key, key, below), below)
                *found, below = codec.decode(0, columns, below)
                assert all(torch.equal(x, y) and bool(x.isfinite().all()) for x, y in zip(found, again, strict=False))
                assert all((x - key).norm() <= 0.5 * key.norm() for x in found)


@pytest.mark.parametrize("name", BITS)
def test_stored_bits_are_those_of_the_formula(name):
    codec, bits, plain = BITS[name]
    segment = JointSegment(HEADS, codec, Group((0,), HEADS, (Rotation(torch.empty(0)),)))
    x = torch.randn(2, HEADS * T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    segment.append(x[0], x[1], {"position": torch.arange(T).int().repeat(HEADS)}, [T] * HEADS)
    segment.seal()
    segment.check_integrity()
    found = 8 * stored_bytes(segment) / (2 * HEADS * T * D)
    assert found == pytest.approx((bits * (T - plain) + 16 * plain) / T, rel=0.02)
    assert error(segment.keys().flatten(0, 1).float(), x[0].float()) < 0.2


def test_saved_caches_hold_layers_once_and_go_on_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model, ids = tiny_model("llama", num_hidden_layers=4), random_text(60)
    calibrate("xquant_cl", model)
    cache = KVCache(model, "xquant_cl(group=16)")
    with torch.inference_mode():
        model(ids[:, :50], past_key_values=cache)
        saved = cache.save(tmp_path / "cache.kv")
        assert saved.nbytes < cache.nbytes + 20_000
        logits = [
            model(ids[:, 50:], past_key_values=c).logits for c in (KVCache.load(tmp_path / "cache.kv", model), cache)
        ]
    torch.testing.assert_close(*logits)


CHOOSING = (
    "roco(every=1)",
    "fair(cuts=(30,), window=8)",
    "snapkv(window=8)+scope(recent=8)",
    "laq(first=8)",
    "kvzip(uniform=True)",
    "finch(window=8)",
    "streaming_llm+kcache(top=16)",
    "streaming_llm(positions='cache')",
    "pyramidinfer(window=8)",
    "kvzip(chunk=32, instruction_ids=(1, 2))",
    "snapkv(window=8)+adakv+pyramidkv",
    "mikv",
    "d2o",
    "cam",
    "elastic_cache",
    "lattice(slots=8)",
)


def answered(model, policy: str) -> tuple[KVCache, Tensor]:
    """A cache of 48 entries after a prompt of 110 tokens and ten more, and the logits of these."""
    ids, cache = random_text(120), KVCache(model, policy, 48, max_length=120)
    cache.prefill(model, ids[:, :110])
    with torch.inference_mode():
        logits = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(110, 120)])
    cache.check_integrity()
    return cache, logits


@pytest.mark.parametrize("policy", CHOOSING)
def test_methods_choose_and_merge_as_without_codes_and_the_same_for_all_heads(policy, tmp_path, monkeypatch):
    """One head whose window holds everything is the plain cache; where there are more and codes, all hold the same tokens."""
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    one, more = (tiny_model("llama", num_attention_heads=n, num_key_value_heads=n) for n in (1, 2))
    for model in (one, more):
        calibrate("xquant", model)
    found, expected = answered(one, f"{policy}+xquant"), answered(one, policy)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)
    cache, logits = answered(more, f"{policy}+xquant(group=16)")
    assert bool(logits.isfinite().all())
    for layer in cache.enforcer.layers:
        assert all(torch.equal(*segment.positions()) for segment in layer.main)
    assert cache.enforcer.layers[0].main[-1].cells.total
    assert sum(layer.longest for layer in cache.enforcer.layers) <= 2 * 48


def test_what_they_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama")
    calibrate("xquant", model)
    calibrate("xquant_cl", model)
    for policy, why in (
        ("streaming_llm(positions='cache')+pyramidkv+xquant_cl", "nothing to vote on"),
        ("pyramidinfer+xquant_cl", "shared layers"),
        ("knorm+kivi+xquant", "use one of the codecs"),
    ):
        with pytest.raises(PolicyError, match=why):
            KVCache(model, policy, 200)
    assert KVCache(model, "knorm+pyramidkv+xquant", 200).enforcer.layers
    without = tiny_model("smollm3")
    calibrate("xquant_cl", without)
    with pytest.raises(PolicyError, match="turn their keys differently"):
        KVCache(without, "streaming_llm(positions='cache')+xquant_cl", 200)
