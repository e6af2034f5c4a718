"""Codes of different width from entry to entry: packed into bytes one after the other, and bits chosen by salience."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.codecs.integer import check_bits
from kvbudget.kernels.encode import HALF_MAX, quantize
from kvbudget.kernels.operands import pack, packed_width, unpack
from kvbudget.kernels.scalar import ScalarOperand


def pack_levels(codes: Tensor, bits: Tensor) -> Tensor:
    """Packs codes ``[N, D]`` of ``bits [N]`` each (0: nothing) into flat bytes, entry after entry."""
    sizes = bits.long() * codes.shape[-1] // 8
    begins = sizes.cumsum(0) - sizes
    payload = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=codes.device)
    for width in bits.unique().tolist():
        if width:
            chosen = bits == width
            packed = pack(codes[chosen], width)
            payload[begins[chosen][:, None] + torch.arange(packed.shape[-1], device=codes.device)] = packed
    return payload


def unpack_levels(payload: Tensor, bits: Tensor, width: int) -> Tensor:
    """Inverse of `pack_levels`: uint8 codes ``[N, width]``, zeros where an entry has no bits."""
    sizes = bits.long() * width // 8
    begins = sizes.cumsum(0) - sizes
    codes = torch.zeros(len(bits), width, dtype=torch.uint8, device=payload.device)
    for level in bits.unique().tolist():
        if level:
            chosen = bits == level
            at = begins[chosen][:, None] + torch.arange(packed_width(width, level), device=payload.device)
            codes[chosen] = unpack(payload[at], level, width)
    return codes


@dataclass(frozen=True)
class Levels(Codec):
    """Codes whose width is a column of their entry, ``bits`` uint8 ``[N]``; ``high`` is the widest."""

    variable: ClassVar[bool] = True

    high: int = 4

    def sizes(self, columns: Mapping[str, Tensor], width: int) -> Tensor:
        return columns["bits"].long() * width // 8

    def payload_bytes(self, width: int) -> int:
        return packed_width(width, self.high)

    def scalar(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        """The codes alone; ``columns`` has ``at``, where each entry begins in the payload, and its ``width`` too."""
        first = [start + s for start, s in zip(starts, skip, strict=True)]
        found = ScalarOperand(columns["payload"], self.high, int(columns["width"]), first)
        found.levels, found.at = columns["bits"], columns["at"]
        return found


@dataclass(frozen=True)
class SalientQuant(Levels):
    """More bits for salient entries than for others (ZipCache, arXiv 2405.14256, section 4).

    Of the entries of a row that are encoded together, the ``low_share`` with the least salience get ``low`` bits and the rest
    ``high``. ``keys`` are coded per channel with the range that the channel has in the row's first entries; ``values`` are
    divided by ``c = sqrt(max |x|)`` of their channel in the first entries, then coded min-max per entry.

    Salience is the attention of probe queries, normalized by how many of them see the entry: the newest ``probes`` of the
    queries of the forward, and as many spread evenly over the earlier ones (the paper draws them at random). Without
    queries (the end of a plan) the newest entries count as salient.
    """

    judges: ClassVar[bool] = True

    low: int = 2
    low_share: float = 0.4
    probes: float = 0.05
    side: Literal["keys", "values"] = "keys"

    def __post_init__(self) -> None:
        check_bits(self.high)
        check_bits(self.low)

    def judge(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> Tensor:
        received, seeing = self._probed(asked, row, keys, positions)
        return received / seeing.clamp_min(1)

    def _probed(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Attention ``[T]`` that the entries receive from the probes, and how many of these see them."""
        steps = (asked.steps[row] >= 0).nonzero()[:, 0]
        count = max(1, round(self.probes * len(steps)))
        earlier = len(steps) - count
        spread = torch.arange(min(count, earlier), device=steps.device) * earlier // max(1, min(count, earlier))
        chosen = torch.cat([steps[spread], steps[earlier:]])
        received = asked.weights(row, chosen, keys, positions).sum((0, 1))
        return received, (asked.steps[row][chosen][:, None] >= positions[None]).sum(0)

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        x = x.float()
        if self.side == "values":
            channel = x.abs().amax(0).sqrt().clamp_max(HALF_MAX)
            return {"channel": torch.where(channel > 1e-3, channel, torch.ones_like(channel)).half()}
        low, high = (edge.clamp(-HALF_MAX, HALF_MAX).half() for edge in x.aminmax(dim=0))
        return {"lowest": low, "highest": high}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        x, bits = x.float(), self._bits(place)
        if self.side == "keys":
            low, scale = self._grid(place, bits)
            codes = ((x - low) / scale).round().clamp_min(0).minimum((2.0 ** bits.float() - 1)[:, None])
            return {"bits": bits, "payload": pack_levels(codes.to(torch.uint8), bits)}
        x = x / place.of("channel").float()
        codes = torch.zeros_like(x, dtype=torch.uint8)
        scale, zero = (x.new_zeros(len(x), 1, dtype=torch.float16) for _ in range(2))
        for width in {self.low, self.high}:
            chosen = bits == width
            codes[chosen], scale[chosen], zero[chosen] = quantize(x[chosen], width, -1)
        return {"bits": bits, "scale": scale, "zero": zero, "payload": pack_levels(codes, bits)}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        bits = columns["bits"]
        codes = unpack_levels(columns["payload"], bits, place.width).float()
        if self.side == "keys":
            low, scale = self._grid(place, bits)
            return codes * scale + low
        return (codes * columns["scale"].float() + columns["zero"].float()) * place.of("channel").float()

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> ScalarOperand:
        found = self.scalar(columns, starts, skip)
        if self.side == "keys":
            low, high = columns["lowest"].float(), columns["highest"].float()
            levels = (self.low, self.high) if self.low < self.high else (self.high,)
            found.spread = torch.stack([_step(low, high, 2.0**bits - 1) for bits in levels], 1)
            found.offset = low[:, None].expand(-1, len(levels), -1).contiguous()
        else:
            found.scale, found.zero = columns["scale"], columns["zero"]
            found.spread = columns["channel"][:, None].float()
        return found

    def state_bytes(self, width: int) -> float:
        return 4 * width if self.side == "keys" else 2 * width

    def bytes_per_entry(self, width: int) -> float:
        return packed_width(width, self.high) + 1 + (4 if self.side == "values" else 0)

    def _bits(self, place: Place) -> Tensor:
        salience = place.salience if place.salience is not None else place.positions
        assert salience is not None
        bits = torch.full((len(place.rows),), self.high, dtype=torch.uint8, device=place.rows.device)
        for row in place.rows.unique():
            mine = (place.rows == row).nonzero()[:, 0]
            order = torch.argsort(salience[mine], stable=True)
            bits[mine[order[: int(self.low_share * len(mine))]]] = self.low
        return bits

    def _grid(self, place: Place, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest value and step of each entry's channels."""
        low, high = place.of("lowest").float(), place.of("highest").float()
        return low, _step(low, high, (2.0 ** bits.float() - 1)[:, None])


def _step(low: Tensor, high: Tensor, steps: Tensor | float) -> Tensor:
    """The distance of neighboring codes of each channel; one where a channel does not change."""
    scale = (high - low) / steps
    return torch.where(scale > 0, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class AdaptiveQuant(SalientQuant):
    """As many salient entries as the attention needs (ZipVL, arXiv 2410.08584, section 3), instead of a fixed share.

    Of the entries of a row that are encoded together, p get ``high`` bits: the least p such that the p entries with the most
    accumulated attention receive ``mass`` of it all. Which p they are is decided by the normalized attention.
    """

    mass: float = 0.975

    def judge(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> Tensor:
        received, seeing = self._probed(asked, row, keys, positions)
        most = received.sort(descending=True).values.double().cumsum(0)
        count = int((most < self.mass * most[-1]).sum()) + 1
        normal = received / seeing.clamp_min(1)
        salient = torch.zeros_like(normal)
        salient[normal.argsort(descending=True, stable=True)[:count]] = 1.0
        return salient

    def _bits(self, place: Place) -> Tensor:
        if place.salience is None:
            return torch.full((len(place.rows),), self.high, dtype=torch.uint8, device=place.rows.device)
        return torch.where(place.salience > 0, self.high, self.low).to(torch.uint8)
