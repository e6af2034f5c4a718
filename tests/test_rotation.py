"""Rotations against the keys that models really cache."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvbudget.errors import UnsupportedModel
from kvbudget.models.rotation import LAYOUTS, Layout, Rotation, rotation_of, rotations_of, verify
from tiny import random_text, tiny_model

# Model, layout and rotated elements of each layer (head_dim is 16; 0: the layer knows no positions; None: no attention).
EXPECTED: dict[str, tuple[Layout, tuple[int | None, ...]]] = {
    "llama": ("half", (16, 16)),
    "qwen3": ("half", (16, 16)),
    "qwen3_moe": ("half", (16, 16)),
    "phi": ("half", (8, 8)),
    "glm": ("interleaved", (8, 8)),
    "glm4": ("interleaved", (8, 8)),
    "stablelm": ("half", (4, 4)),
    "gpt_neox": ("half", (4, 4)),
    "cohere": ("interleaved", (16, 16)),
    "cohere2": ("interleaved", (16, 0)),
    "gemma3": ("half", (16, 16)),
    "gpt_oss": ("half", (16, 16)),
    "smollm3": ("half", (16, 0)),
    "lfm2": ("half", (None, 16, None, 16)),
    "qwen3_next": ("half", (None, 8, None, 8)),
}


def cached_keys(model: PreTrainedModel, ids: Tensor, start: int) -> list[Tensor | None]:
    """The keys `[1, Hkv, T, D]` that each layer caches for a text that begins at position `start`."""
    cache = DynamicCache(config=model.config)
    positions = torch.arange(start, start + ids.shape[1])[None]
    with torch.no_grad():
        model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [getattr(layer, "keys", None) for layer in cache.layers]


@pytest.mark.parametrize("name", EXPECTED)
def test_moves_every_key_to_where_the_model_would_have_put_it(name: str) -> None:
    model = tiny_model(name)
    layout, rotary_dims = EXPECTED[name]
    rotations = rotations_of(model)
    assert tuple(rotation and rotation.rotary_dim for rotation in rotations) == rotary_dims
    ids = random_text(9, seed=3)
    here, there = cached_keys(model, ids, start=17), cached_keys(model, ids, start=230)
    for rotation, before, after in zip(rotations, here, there, strict=True):
        if rotation is None:
            continue
        assert before is not None and after is not None
        if rotation.rotary_dim:
            assert rotation.layout == layout
            assert (before - after).abs().max() > 0.1
        torch.testing.assert_close(rotation.rotate(before, 213), after, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(rotation.rotate(after, -213), before, atol=2e-4, rtol=1e-4)


def test_gemma3_rotates_local_and_global_layers_by_their_own_theta() -> None:
    model = tiny_model("gemma3", rope_parameters=None)
    local, global_ = (rotation_of(model, layer_idx) for layer_idx in (0, 1))
    assert not torch.equal(local.inv_freq, global_.inv_freq)
    slowest = [1 / theta ** (14 / 16) for theta in (10_000, 1_000_000)]
    assert [rotation.inv_freq[-1].item() for rotation in (local, global_)] == pytest.approx(slowest)


def test_another_position_for_every_entry() -> None:
    model = tiny_model("llama")
    ids = random_text(12)
    keys = cached_keys(model, ids, start=0)[0]
    assert keys is not None
    kept = torch.tensor([0, 3, 4, 9, 11])
    packed = rotation_of(model, 0).rotate(keys[:, :, kept], torch.arange(5) - kept)  # positions inside the cache
    # Layer 0 sees only the embeddings, so the same tokens alone, at positions 0..4, have the same keys there.
    alone = cached_keys(model, ids[:, kept], start=0)[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


STATIC_SCALING = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
}


@pytest.mark.parametrize("rope_type", STATIC_SCALING)
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_static_scaling_and_keys_before_rope(name: str, rope_type: str) -> None:
    model = tiny_model(name, rope_parameters={"rope_theta": 10_000.0, **STATIC_SCALING[rope_type]}, use_qk_norm=False)
    rotation = rotation_of(model, 1)
    assert rotation.attention_scaling == pytest.approx(1 + 0.1 * math.log(4) if rope_type == "yarn" else 1.0)
    projected: list[Tensor] = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: projected.append(call[2]))
    cached = cached_keys(model, random_text(10), start=600)[1]
    hook.remove()
    assert cached is not None
    before_rope = projected[0].unflatten(-1, (-1, 16)).transpose(1, 2)
    positions = torch.arange(600, 610)
    torch.testing.assert_close(rotation.strip(cached, positions), before_rope, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(rotation.embed(before_rope, positions), cached, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "rope_parameters", "reason"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}, "'dynamic' changes frequencies"),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 512,
            },
            "'longrope' changes frequencies",
        ),
    ],
)
def test_length_dependent_scaling_is_refused(name: str, rope_parameters: dict, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        rotations_of(tiny_model(name, rope_parameters=rope_parameters))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="no rotary position embedding"):
        rotations_of(tiny_model(name))


def test_unserved_models_are_refused_as_such() -> None:
    with pytest.raises(UnsupportedModel, match="FalconForCausalLM cannot be served"):
        rotations_of(tiny_model("falcon"))


def test_layers_without_attention_have_no_rotation() -> None:
    with pytest.raises(UnsupportedModel, match="layer 0 of Lfm2ForCausalLM has no attention"):
        rotation_of(tiny_model("lfm2"), 0)


def test_training_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"call model.eval\(\)"):
        rotations_of(tiny_model("llama").train())


def test_a_model_whose_keys_do_not_rotate_as_its_buffers_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    plain = type(rotary).forward

    def squared(self: torch.nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return plain(self, x, position_ids**2 % 1009)

    monkeypatch.setattr(type(rotary), "forward", squared)
    with pytest.raises(UnsupportedModel, match=r"layer 0 of LlamaForCausalLM follow no rotation.*relative error"):
        rotations_of(model)


def test_a_model_that_ignores_position_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    plain = type(rotary).forward
    monkeypatch.setattr(
        type(rotary), "forward", lambda self, x, position_ids: plain(self, x, torch.zeros_like(position_ids))
    )
    with pytest.raises(UnsupportedModel, match="do not follow the position ids"):
        rotations_of(model)


def test_verify_tells_a_wrong_rotation() -> None:
    model = tiny_model("llama")
    right = rotation_of(model, 0)
    other_layout = Rotation(right.inv_freq, "interleaved")
    other_theta = Rotation(right.inv_freq**1.1, "half")
    assert max(verify(model, (right, right))) < 1e-5
    for wrong in (other_layout, other_theta, Rotation(-right.inv_freq), Rotation(torch.empty(0))):
        assert min(verify(model, (wrong, wrong))) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "glm4", "qwen3_moe"])
def test_low_precision_models_verify(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    rotation = rotation_of(model, 1)
    assert rotation.layout == EXPECTED[name][0]
    keys = cached_keys(model, random_text(4), start=0)[1]
    assert keys is not None
    assert rotation.rotate(keys, 5).dtype == dtype


def test_verification_runs_once_per_model_and_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    before = set(vars(model))
    assert rotations_of(model) is rotations_of(model)
    assert set(vars(model)) == before


@given(
    layout=st.sampled_from(LAYOUTS),
    rotary_dim=st.sampled_from([0, 2, 8, 16]),
    first=st.integers(-5000, 5000),
    second=st.integers(-5000, 5000),
)
def test_rotations_add_and_keep_norms(layout: Layout, rotary_dim: int, first: int, second: int) -> None:
    rotation = Rotation(1 / 100 ** torch.arange(0, 1, 2 / rotary_dim) if rotary_dim else torch.empty(0), layout)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(first))
    twice = rotation.rotate(rotation.rotate(x, first), second)
    torch.testing.assert_close(twice, rotation.rotate(x, first + second), atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(twice.norm(dim=-1), x.norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(twice[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_rotation(dtype: str) -> None:
    from kvbudget.models import load

    model, _ = load("smollm2-135m", dtype=dtype)
    rotations = rotations_of(model)
    assert len(rotations) == 30
    frequencies = 1 / 100_000 ** (torch.arange(0, 64, 2) / 64)
    for rotation in rotations:
        assert rotation is not None and rotation.layout == "half"
        torch.testing.assert_close(rotation.inv_freq, frequencies)
