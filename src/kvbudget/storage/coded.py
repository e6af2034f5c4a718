"""Transform coding of a saved cache: which keys and values are coded, and how they come back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.codecs import transform
from kvbudget.codecs.transform import Transform
from kvbudget.errors import CacheError, nearest
from kvbudget.layer import LayerCache
from kvbudget.models import fingerprint, rotations_of
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.policy import MOST
from kvbudget.segments.dense import DenseSegment
from kvbudget.storage.state import positions_of

SIDES = ("key", "value")
METHOD = "kvtc"


@dataclass(frozen=True)
class Options:
    """How kvtc saves: see `kvbudget.storage.save`."""

    ratio: float = 20.0
    sinks: int = 4
    recent: int = 128
    calibration: str | Path | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options by name; refuses unknown ones with the nearest match."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise CacheError(f"kvtc has no option {name!r}{nearest(name, known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not (number and 1 <= self.ratio <= MOST):
            raise CacheError(
                f"ratio={self.ratio!r} is not how many times smaller to make it; give a number from 1 to {MOST}"
            )
        for name, count in (("sinks", self.sinks), ("recent", self.recent)):
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
                raise CacheError(f"{name}={count!r} is no number of tokens; give a whole number from 0 to {MOST}")
        if not isinstance(self.calibration, (str, Path, type(None))):
            raise CacheError(
                f"calibration={self.calibration!r} is no path; give the file that kvbudget calibrate wrote"
            )


def encode(
    cache: KVCache, state: Mapping[str, Any], tensors: dict[str, Tensor], options: Options
) -> tuple[dict[str, Any], int, int]:
    """Replaces keys and values in ``tensors`` by streams; returns what `decode` needs, bytes before and bytes after.

    Coded are the tokens that every head of every budgeted layer holds in full precision, but for the first and the newest.

    Raises:
        CacheError: when there are none.
        PolicyError: when the model has no calibration.
    """
    for layer in cache.enforcer.layers:
        if layer.moving or not all(type(segment) is DenseSegment for segment in layer.main):
            raise CacheError(
                f"{cache.policy} leaves no keys in full precision at their own positions; save it with codec='raw'"
            )
    fitted, mark = transforms(cache.model, options.calibration)
    tokens = Tokens(cache, state, tensors, options.sinks, options.recent)
    if not tokens.count:
        raise CacheError(
            f"no token between the first {options.sinks} and the newest {options.recent} is held by all layers and heads, so "
            "kvtc has nothing to code; save it with codec='raw'"
        )
    numbers: dict[str, Any] = {"sinks": options.sinks, "recent": options.recent, "calibration": mark}
    before = after = 0
    for side in SIDES:
        rows = tokens.cut(side)
        plan = fitted[side].plan(rows.shape[1] * cache.dtype.itemsize * 8 / options.ratio)
        packed = transform.pack(fitted[side].quantize(rows, plan))
        tensors.update({f"coded.{side}.{name}": x for name, x in packed.items()})
        numbers[side] = plan
        before += rows.numel() * cache.dtype.itemsize
        after += sum(x.numel() * x.itemsize for x in packed.values())
    return numbers, before, after


def decode(
    cache: KVCache,
    state: Mapping[str, Any],
    numbers: Mapping[str, Any],
    tensors: dict[str, Tensor],
    calibration: str | Path | None,
) -> None:
    """Puts keys and values that `encode` coded back into ``tensors``, for an empty cache of the same model.

    Raises:
        CacheError: when the model has been calibrated anew since.
    """
    fitted, mark = transforms(cache.model, calibration)
    if mark != numbers["calibration"]:
        raise CacheError(
            f"the cache was coded with another calibration ({numbers['calibration']}, this one is {mark}); load it with "
            "calibration= and the file that it was saved with"
        )
    tokens = Tokens(cache, state, tensors, numbers["sinks"], numbers["recent"])
    for side in SIDES:
        plan, whole = numbers[side], fitted[side]
        packed = {name: tensors.pop(f"coded.{side}.{name}").cpu() for name in ("stream", "symbols", "normal", "counts")}
        sizes = [size for size, step in zip(whole.sizes, plan, strict=True) if step]
        tokens.paste(side, whole.restore(transform.unpack(packed, sizes, tokens.count), plan, tokens.count))


def transforms(model: PreTrainedModel, path: str | Path | None = None) -> tuple[dict[str, Transform], str]:
    """What ``kvbudget calibrate kvtc`` found for keys and values of this model, and a digest that tells it apart."""
    tensors = Artifact.load(METHOD, fingerprint(model), path).tensors
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    names = ("mean", "basis", "scale", "rate", "loss")
    fitted = {side: Transform(*(tensors[f"{side}.{name}"] for name in names)) for side in SIDES}
    return fitted, digest.hexdigest()[:16]


class Tokens:
    """The tokens of a packed cache that are coded, and the cells of its tensors where their keys and values lie."""

    def __init__(
        self, cache: KVCache, state: Mapping[str, Any], tensors: dict[str, Tensor], sinks: int, recent: int
    ) -> None:
        self.tensors, self.dtype = tensors, cache.dtype
        self.layers: list[LayerCache] = cache.enforcer.layers
        self.rotations = rotations_of(cache.model)
        self.numbers = [state["layers"][layer.layer_idx] for layer in self.layers]
        self.heads = [layer.num_kv_heads for layer in self.layers]
        seen = self.numbers[0]["seen"]
        held = [self._positions(i) for i in range(len(self.layers))]
        self.chosen = []
        for b, length in enumerate(seen):
            common = torch.arange(sinks, max(length - recent, sinks), dtype=torch.int32)
            for heads, rows in zip(self.heads, held, strict=True):
                for row in rows[b * heads : (b + 1) * heads]:
                    common = common[torch.isin(common, row)]
            self.chosen.append(common)
        self.count = sum(map(len, self.chosen))

    def cut(self, side: str) -> Tensor:
        """Takes the chosen cells out of the tensors: rows ``[count, p]`` float32, keys before RoPE."""
        columns = []
        for i, layer in enumerate(self.layers):
            pieces: list[list[Tensor]] = [[] for _ in range(len(self.chosen) * self.heads[i])]
            for name, lengths, mask in self._cells(i, side):
                column = self.tensors[name]
                taken = mask.split(lengths)
                for r, (cells, chosen) in enumerate(zip(column.split(lengths), taken, strict=True)):
                    pieces[r].append(cells[chosen].cpu())
                self.tensors[name] = column[~mask].clone()
            grid = [torch.cat(row).float() for row in pieces]
            for h in range(self.heads[i]):
                x = torch.cat(grid[h :: self.heads[i]])
                if side == "key" and (rotation := self.rotations[layer.layer_idx]) is not None:
                    x = rotation.strip(x, torch.cat(self.chosen))
                columns.append(x)
        return torch.cat(columns, 1)

    def paste(self, side: str, rows: Tensor) -> None:
        """Puts rows ``[count, p]`` back into the tensors; the inverse of `cut`."""
        begin = 0
        for i, layer in enumerate(self.layers):
            shape = next(self.tensors[name] for name, _, _ in self._cells(i, side))
            width, heads = shape.shape[-1], self.heads[i]
            grid: list[Tensor] = []
            for h in range(heads):
                x = rows[:, begin + h * width : begin + (h + 1) * width]
                if side == "key" and (rotation := self.rotations[layer.layer_idx]) is not None:
                    x = rotation.embed(x, torch.cat(self.chosen))
                grid.append(x)
            begin += heads * width
            parts = [x.split([len(c) for c in self.chosen]) for x in grid]
            left = [parts[h][b] for b in range(len(self.chosen)) for h in range(heads)]
            for name, lengths, mask in self._cells(i, side):
                column = shape.new_zeros((sum(lengths), width))
                column[~mask] = self.tensors[name]
                fresh = []
                for r, chosen in enumerate(mask.split(lengths)):
                    fresh.append(left[r][: int(chosen.sum())])
                    left[r] = left[r][len(fresh[-1]) :]
                column[mask] = torch.cat(fresh).to(column)
                self.tensors[name] = column

    def _cells(self, i: int, side: str) -> Iterator[tuple[str, Sequence[int], Tensor]]:
        """Name, row lengths and chosen cells of the tensor of each of a layer's segments."""
        heads = self.heads[i]
        for at, lengths, positions in self._tables(i):
            chosen = [torch.isin(p, self.chosen[r // heads]) for r, p in enumerate(positions.split(lengths))]
            yield f"{at}.{side}", lengths, torch.cat(chosen)

    def _tables(self, i: int) -> Iterator[tuple[str, Sequence[int], Tensor]]:
        for number, segment in enumerate(self.numbers[i]["main"]):
            at = f"{self.layers[i].layer_idx}.main.{number}.0"
            yield at, segment["tables"][0]["lengths"], positions_of(self.tensors, at).cpu()

    def _positions(self, i: int) -> list[Tensor]:
        """Positions of every row of a layer, its segments joined."""
        rows = [positions.split(lengths) for _, lengths, positions in self._tables(i)]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]
