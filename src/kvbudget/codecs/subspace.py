"""Per-channel integer codes whose error avoids the directions that queries look along."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.base import Asked, Place
from kvbudget.codecs.integer import ChannelQuant
from kvbudget.kernels.encode import quantize
from kvbudget.kernels.operands import pack


@dataclass(frozen=True)
class SubspaceQuant(ChannelQuant):
    """As `ChannelQuant`, but the error of each block of channels is pushed into the next ones (SQuat, arXiv 2503.24358).

    Minimizes ``|d|^2 + weight |Q d|^2`` over the error d of a key, block by block of ``block`` channels (0: half a head): with
    ``P = (I + weight Q^T Q)^-1`` the channels that are not yet coded get ``P[rest, lead] P[lead, lead]^-1`` times the error so
    far, of which only the newest block's is not zero. ``Q [r, D]``, the state of a row, are the ``rank`` leading right singular
    vectors (D at most) of the queries that see the row's first coded entries, times their singular values; zeros where there
    are none, which leaves plain codes.
    """

    placed: ClassVar[bool] = True

    weight: float = 0.001
    rank: int = 20
    block: int = 0

    @property
    def asks(self) -> bool:
        return True

    def start(self, x: Tensor, row: int, asked: Asked | None) -> dict[str, Tensor]:
        width = x.shape[-1]
        count = min(self.rank, width)
        found = x.new_zeros(count, width, dtype=torch.float32)
        if asked is not None and count:
            query = asked.query[row][:, asked.steps[row] >= 0].flatten(0, 1).double()
            values, vectors = torch.linalg.eigh(query.T @ query)
            leading = vectors.T[-count:] * values[-count:].clamp_min(0).sqrt()[:, None]
            found = leading.clamp(-6e4, 6e4).float()
        return {"subspace": found.half()}

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        assert place is not None
        rest = x.float().unflatten(0, (-1, self.unit)).clone()
        width = rest.shape[-1]
        size = self.block or max(8, width // 2)
        subspace = place.of("subspace").double()
        inverse = torch.linalg.inv(torch.eye(width, dtype=torch.float64) + self.weight * subspace.mT @ subspace)
        parts = []
        for begin in range(0, width, size):
            end = min(begin + size, width)
            codes, scale, zero = quantize(rest[..., begin:end], self.bits, 1)
            parts.append((codes, scale[:, 0], zero[:, 0]))
            if end < width:
                error = codes.float() * scale.float() + zero.float() - rest[..., begin:end]
                lead = torch.linalg.inv(inverse[:, :end, :end])[..., begin:]
                push = (inverse[:, end:, :end] @ lead).float()
                rest[..., end:] += error @ push.mT
        codes, scale, zero = (torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True))
        return {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}

    def state_bytes(self, width: int) -> float:
        return 2 * min(self.rank, width) * width
