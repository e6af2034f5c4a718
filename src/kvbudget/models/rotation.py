"""How a model's keys rotate with position: RoPE parameters taken from the model and verified against its own keys."""

import inspect
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvbudget.errors import UnsupportedModel
from kvbudget.models.geometry import CacheGeometry
from kvbudget.models.support import check_supported

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")

_PROBE_TOKENS = 8
_PROBE_SHIFTS = (3, 101)
# Largest accepted relative difference between a rotated key and the model's own, by the model's number format:
# rounding, and how far it spreads through the layers.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# The frequencies of these RoPE types change with the length of the text, so no later rotation can be known.
_LENGTH_DEPENDENT = ("dynamic", "longrope")

_verified: "WeakKeyDictionary[PreTrainedModel, tuple[Rotation | None, ...]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding (RoPE) that one layer applies to its keys.

    `inv_freq` holds the angle per position of each rotated pair, float32 `[R / 2]`; empty for a layer whose keys know
    no position. `layout` says which elements form a pair: "half" pairs i with i + R / 2 (Llama, GPT-NeoX),
    "interleaved" pairs 2i with 2i + 1 (Cohere, GLM). Only the first R elements of a head rotate. `attention_scaling`
    is the factor by which the model multiplies the rotated elements (YaRN); it cancels in `rotate`.

    Source: Su et al., RoFormer, arXiv 2104.09864.

    >>> rotation = Rotation(torch.tensor([0.5]), "half")
    >>> key = torch.tensor([1.0, 0.0, 7.0])
    >>> there = rotation.rotate(key, torch.tensor(2))
    >>> [round(x, 4) for x in there.tolist()]  # cos 1, sin 1; the last element does not rotate
    [0.5403, 0.8415, 7.0]
    >>> torch.allclose(rotation.rotate(there, torch.tensor(-2)), key)
    True
    """

    inv_freq: Tensor
    layout: Layout = "half"
    attention_scaling: float = 1.0
    _tables: list[Tensor] = field(default_factory=list, init=False, repr=False)

    @property
    def rotary_dim(self) -> int:
        """The number R of elements of a head that rotate; 0 for a layer without RoPE."""
        return 2 * self.inv_freq.numel()

    def rotate(self, x: Tensor, delta: Tensor | int) -> Tensor:
        """Move cached keys by `delta` positions: a key of position p becomes that of position p + delta.

        `x` is `[..., D]`, `delta` integers that broadcast to `[...]`, negative to move back. Computes in float32 (the
        angles as the model itself computes them, so moving back by p undoes the model's own rounding) and returns
        x's dtype.
        """
        return self._turn(x, delta, 1.0)

    def embed(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """Turn keys before RoPE, `[..., D]`, into what the model caches at `positions` (broadcast to `[...]`)."""
        return self._turn(x, positions, self.attention_scaling)

    def strip(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """Turn cached keys, `[..., D]`, into the keys before RoPE: the inverse of `embed`."""
        return self._turn(x, -positions, 1.0 / self.attention_scaling)

    def tables(self, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[P, R / 2]`` by which `embed` turns at the positions below P >= ``length``; kept, and grown."""
        if not self._tables or len(self._tables[0]) < length or self._tables[0].device != torch.device(device):
            most = 1 << (max(length, 1024) - 1).bit_length()
            angle = torch.arange(most, device=device)[:, None].float() * self.inv_freq.to(device)
            self._tables[:] = [angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling]
        return self._tables[0], self._tables[1]

    def embed_mean(self, x: Tensor, begin: Tensor | int, count: int) -> Tensor:
        """The mean of `embed(x, p)` over the ``count`` positions p from ``begin`` on (broadcast to `[...]`)."""
        if not self.rotary_dim:
            return x
        positions = torch.as_tensor(begin, device=x.device)[..., None] + torch.arange(count, device=x.device)
        angle = positions[..., None].float() * self.inv_freq.to(x.device)
        scale = self.attention_scaling
        return self._apply(x, angle.cos().mean(-2) * scale, angle.sin().mean(-2) * scale)

    def _turn(self, x: Tensor, delta: Tensor | int, scale: float) -> Tensor:
        if not self.rotary_dim:
            return x
        delta = torch.as_tensor(delta, device=x.device)
        angle = delta[..., None].float() * self.inv_freq.to(x.device)
        return self._apply(x, angle.cos() * scale, angle.sin() * scale)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.layout == "half":
            first, second = rotary.float().chunk(2, dim=-1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        else:
            first, second = rotary.float().unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)


def rotation_of(model: PreTrainedModel, layer_idx: int) -> Rotation:
    """The verified rotation of one attention layer; see `rotations_of`. Raises UnsupportedModel."""
    rotation = rotations_of(model)[layer_idx]
    if rotation is None:
        raise UnsupportedModel(f"layer {layer_idx} of {type(model).__name__} has no attention, so no keys that rotate")
    return rotation


def rotations_of(model: PreTrainedModel) -> "tuple[Rotation | None, ...]":
    """The rotation of the keys of every layer, verified; None for layers without attention.

    The frequencies are those in the model's rotary modules. Which of them a layer uses, in which layout, or whether it
    uses any, is not guessed but measured: a few tokens pass through the model at shifted positions, and the keys that
    reach the cache must be the unshifted keys, rotated. That costs three forward passes of 8 tokens, once per model.

    Raises UnsupportedModel if a layer's keys follow no such rotation (learned positions), if the frequencies depend on
    the length of the text (dynamic NTK, LongRoPE), or if the model is in training mode, where dropout disturbs keys.
    """
    if model not in _verified:
        _verified[model] = _verify_all(model)
    return _verified[model]


def verify(model: PreTrainedModel, rotations: "tuple[Rotation | None, ...]") -> list[float]:
    """The relative error of each layer's rotation against the model's own keys (0.0 for layers without attention)."""
    probe = _probe(model)
    return [
        0.0 if rotation is None or keys is None else probe.error(rotation, keys)
        for rotation, keys in zip(rotations, probe.keys, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Candidate:
    rotation: Rotation
    rope_type: str


@dataclass(frozen=True, eq=False)
class _Probe:
    """The keys of the same tokens at several positions.

    `keys` has one entry per layer, None without attention, else the keys `[1, Hkv, T, D]` at positions from 0 on and
    at positions from each of `shifts` on.
    """

    shifts: tuple[int, ...]
    keys: list[list[Tensor] | None]

    def error(self, rotation: Rotation, keys: list[Tensor]) -> float:
        """The largest relative error of `rotation` over the shifts, for the keys of one layer.

        Per token the worst head counts. A quarter of the tokens may differ, because rounding can send a token to
        another expert of a mixture, whose keys then truly differ; a wrong rotation is wrong for nearly all tokens.
        """
        start, *shifted = (each.float() for each in keys)
        errors = []
        for moved, shift in zip(shifted, self.shifts, strict=True):
            relative = (rotation.rotate(start, shift) - moved).norm(dim=-1) / moved.norm(dim=-1).clamp_min(1e-30)
            errors.append(relative.amax(dim=1).flatten().quantile(0.75).item())
        return max(errors)


def _verify_all(model: PreTrainedModel) -> "tuple[Rotation | None, ...]":
    check_supported(model)
    name = type(model).__name__
    candidates = _candidates(model)
    if not candidates:
        raise UnsupportedModel(
            f"the keys of {name} cannot be moved to other positions: it has no rotary position embedding (RoPE)"
        )
    no_rope = _Candidate(Rotation(torch.empty(0)), "none")
    tolerance = _TOLERANCE.get(model.dtype, 8e-2)
    chosen: list[_Candidate | None] = []
    probe = _probe(model)
    for layer_idx, keys in enumerate(probe.keys):
        if keys is None:
            chosen.append(None)
            continue
        fitting = [c for c in (no_rope, *candidates) if c.rotation.rotary_dim <= keys[0].shape[-1]]
        errors = [probe.error(candidate.rotation, keys) for candidate in fitting]
        error = min(errors)
        best = fitting[errors.index(error)]
        if not error <= tolerance:
            raise UnsupportedModel(
                f"the keys of layer {layer_idx} of {name} follow no rotation that kvbudget knows: relative error "
                f"{error:.2g}, limit {tolerance:.2g} in {model.dtype}; choose a method that needs no position changes"
            )
        if best.rope_type.startswith(_LENGTH_DEPENDENT):
            raise UnsupportedModel(
                f"the keys of {name} cannot be moved to other positions: its RoPE type {best.rope_type!r} changes "
                "frequencies with the length of the text"
            )
        chosen.append(best)
    if all(candidate is None or candidate is no_rope for candidate in chosen):
        raise UnsupportedModel(
            f"the keys of {name} cannot be moved to other positions: they do not follow the position ids given to it"
        )
    return tuple(None if candidate is None else candidate.rotation for candidate in chosen)


def _candidates(model: PreTrainedModel) -> list[_Candidate]:
    """Every rotation that the rotary modules of the model's decoder allow."""
    found = []
    for module in _decoder(model).modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if not buffer_name.endswith("inv_freq") or buffer_name.endswith("original_inv_freq"):
                continue
            prefix = buffer_name.removesuffix("inv_freq")  # "" or the type of layer, as "sliding_attention_"
            rope_type = getattr(module, "rope_type", "default")
            if isinstance(rope_type, dict):
                rope_type = rope_type[prefix.removesuffix("_")]
            scaling = getattr(module, f"{prefix}attention_scaling", getattr(module, "attention_scaling", 1.0))
            forward = buffer.detach().float().clone()
            found += [
                _Candidate(Rotation(frequencies, layout, float(scaling)), rope_type)
                for frequencies in (forward, -forward)  # NanoChat turns the other way
                for layout in LAYOUTS
            ]
    return found


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The text decoder, without the output head where it can be had."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


@torch.no_grad()
def _probe(model: PreTrainedModel) -> _Probe:
    """Pass the same few tokens through the model at shifted positions, and take the keys from the cache."""
    if model.training:
        raise UnsupportedModel(f"{type(model).__name__} is in training mode, where keys are random; call model.eval()")
    decoder = _decoder(model)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise UnsupportedModel(f"{type(decoder).__name__} takes no position_ids, so its rotation cannot be verified")
    geometry = CacheGeometry.from_config(model.config)
    room = _PROBE_SHIFTS[-1] if geometry.max_positions is None else geometry.max_positions - _PROBE_TOKENS
    shifts = tuple(min(shift, room) for shift in _PROBE_SHIFTS)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, _PROBE_TOKENS), generator=generator).to(model.device)
    runs = []
    for shift in (0, *shifts):
        cache = DynamicCache(config=model.config)
        positions = torch.arange(shift, shift + _PROBE_TOKENS, device=model.device)[None]
        decoder(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        runs.append(cache)
    keys = [
        [run.layers[i].keys for run in runs] if layer.num_kv_heads else None for i, layer in enumerate(geometry.layers)
    ]
    return _Probe(shifts, keys)
