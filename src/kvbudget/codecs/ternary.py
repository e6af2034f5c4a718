"""Between one and two bits: keys whose hard channels get more bits than the others, and values of three levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.codecs.rotated import cosines
from kvbudget.kernels.apart import JoinedOperand
from kvbudget.kernels.encode import encode_units
from kvbudget.kernels.operands import ChannelQuantOperand, pack, packed_width, unpack
from kvbudget.kernels.trits import TritOperand, pack_trits


@dataclass(frozen=True)
class MixedChannels(Codec):
    """Two bits for the channels with the largest range, one bit in the frequency domain for the others (VidKV, keys).

    The ``share`` of the channels (whole bytes of codes) with the largest range in a row's first entries are coded min-max per
    unit. The others are transformed by cosines along the channels, and each coefficient keeps its sign and, per unit, its
    mean magnitude. The paper's complex FFT of n numbers makes 2 n, two bits each channel; cosines keep n.
    """

    unit: int = 32
    residual: int = 128
    cyclic: bool = True
    share: float = 0.5

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        order = (x.float().amax(0) - x.float().amin(0)).argsort(descending=True, stable=True)
        hard = self._hard(x.shape[-1])
        return {"channels": torch.cat([order[:hard].sort().values, order[hard:].sort().values]).to(torch.int16)}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        x, hard = x.float().unflatten(0, (-1, self.unit)), self._hard(x.shape[-1])
        sorted_channels = x.gather(-1, self._channels(place, x))
        codes, scale, zero = encode_units(sorted_channels[..., :hard].flatten(0, 1), 2, self.unit)
        turned = sorted_channels[..., hard:] @ cosines(x.shape[-1] - hard).to(x.device).T
        magnitude = turned.abs().mean(1).half()
        return {"codes": codes, "scale": scale, "zero": zero, "signs": pack(turned > 0, 1), "magnitude": magnitude}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        assert place is not None
        hard, easy = columns["scale"].shape[-1], columns["magnitude"].shape[-1]
        scale, zero = (columns[name][:, None].float() for name in ("scale", "zero"))
        first = unpack(columns["codes"], 2, hard).float() * scale + zero
        signs = unpack(columns["signs"], 1, easy).float() * 2 - 1
        rest = (signs * columns["magnitude"][:, None].float()) @ cosines(easy).to(signs.device)
        both = torch.cat([first, rest], dim=-1)
        return torch.zeros_like(both).scatter(-1, self._channels(place, both), both).flatten(0, 1)

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> JoinedOperand:
        """Both kinds of channels are affine codes, in the basis of what is coded."""
        magnitude = columns["magnitude"].float()
        hard, easy = columns["scale"].shape[-1], magnitude.shape[-1]
        signs = ChannelQuantOperand(columns["signs"], 2 * magnitude, -magnitude, 1, self.unit, starts, skip)
        first = ChannelQuantOperand(columns["codes"], columns["scale"], columns["zero"], 2, self.unit, starts, skip)
        channels = columns["channels"].long()
        basis = torch.eye(hard + easy, device=channels.device)
        basis[hard:, hard:] = cosines(easy).T
        found = JoinedOperand([first, signs], [hard, easy])
        found.basis = torch.zeros(len(channels), *basis.shape, device=channels.device)
        found.basis.scatter_(1, channels[..., None].expand_as(found.basis), basis.expand_as(found.basis))
        return found

    def state_bytes(self, width: int) -> float:
        return 2 * width

    def bytes_per_entry(self, width: int) -> float:
        hard = self._hard(width)
        easy = width - hard
        return packed_width(hard, 2) + packed_width(easy, 1) + (4 * hard + 2 * easy) / self.unit

    def _hard(self, width: int) -> int:
        return min(max(8, round(self.share * width / 8) * 8), width - 8)

    def _channels(self, place: Place, x: Tensor) -> Tensor:
        return place.of("channels").long()[:, None].expand_as(x)


@dataclass(frozen=True)
class Ternary(Codec):
    """Elements as -a, 0 or a with one a per channel and unit of entries; five of them in a byte (VidKV, values).

    Elements below half of the mean magnitude become 0. a is the mean magnitude of the others, which has less error than the
    paper's mean over all.
    """

    unit: int = 32
    residual: int = 128
    cyclic: bool = True

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        x = x.float().unflatten(0, (-1, self.unit))
        large = x.abs() > 0.5 * x.abs().mean(1, keepdim=True)
        magnitude = (x.abs() * large).sum(1) / large.sum(1).clamp_min(1)
        return {"codes": pack_trits((x.sign() * large).flatten(1)), "magnitude": magnitude.clamp_max(6e4).half()}

    def decode(self, columns: Mapping[str, Tensor], place: Place | None = None) -> Tensor:
        return self.operand(columns, [0], [0]).block(0, 0, self.unit * len(columns["codes"]))

    def operand(self, columns: Mapping[str, Tensor], starts: Sequence[int], skip: Sequence[int]) -> TritOperand:
        return TritOperand(columns["codes"], columns["magnitude"], self.unit, starts, skip)

    def bytes_per_entry(self, width: int) -> float:
        return (-(-self.unit * width // 5) + 2 * width) / self.unit
