"""Which heads look back at earlier occurrences of the same text: echo and induction scores on repeated random tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import Calibration, watch
from kvbudget.errors import PolicyError
from kvbudget.kernels.reference import capped
from kvbudget.layer import AttentionCall
from kvbudget.models import CacheGeometry

BLOCK = 2500
POSITIONS = 4 * BLOCK + 1
"""What a model is given to read that names no number of positions."""
ROWS = 1024
"""Queries whose products with keys are held at a time."""


@dataclass(frozen=True)
class RetrievalHeads(Calibration):
    """RazorAttention (arXiv 2407.15891, section 3.2): one forward over a beginning-of-text token and ``repeats`` copies of
    a block of random tokens.

    A head's echo score is the mean attention from a token to its earlier copies, its induction score that to the tokens
    after them. Query heads of a KV head count by their maximum. The artifact holds ``echo, induction [L, Hkv]`` float32
    over all layers of the model (-1 where there is no such head, as in layers that no budget governs).

    Attributes:
        block: tokens of the block (paper: 2500; None: that, or what the model's positions allow).
        repeats: copies of it (paper: 4).
        seed: of the random tokens.
    """

    method: ClassVar[str] = "razor_attention"

    block: int | None = None
    repeats: int = 4
    seed: int = 0

    def fit(self, model: PreTrainedModel) -> dict[str, Tensor]:
        block = self._block(model)
        text = model.config.get_text_config(decoder=True)
        generator = torch.Generator().manual_seed(self.seed)
        copied = torch.randint(text.vocab_size, (block,), generator=generator)
        begin = text.bos_token_id if isinstance(text.bos_token_id, int) else int(copied[-1])
        ids = torch.cat([torch.tensor([begin]), copied.repeat(self.repeats)])[None].to(model.device)
        layers = CacheGeometry.from_config(model.config).layers
        scores = torch.full((2, len(layers), max(layer.num_kv_heads for layer in layers)), -1.0)

        def look(index: int, call: AttentionCall, lse: Tensor) -> None:
            found = echo_and_induction(call, lse, block)
            scores[:, index, : found.shape[1]] = found

        watch(model, ids, look)
        return {"echo": scores[0], "induction": scores[1]}

    def _block(self, model: PreTrainedModel) -> int:
        if self.repeats < 2:
            raise PolicyError(f"repeats={self.repeats}: nothing is repeated; give at least 2")
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        positions = positions or POSITIONS
        room = (positions - 1) // self.repeats
        if room < 2:
            raise PolicyError(
                f"repeats={self.repeats} of a block of two tokens do not fit into {positions} positions; give 2 to "
                f"{(positions - 1) // 2}"
            )
        if self.block is None:
            return min(BLOCK, room)
        if not 2 <= self.block <= room:
            raise PolicyError(
                f"block={self.block} repeated {self.repeats} times does not fit into the model's {positions} positions; "
                f"give 2 to {room}, or fewer repeats="
            )
        return self.block


def echo_and_induction(call: AttentionCall, lse: Tensor, block: int) -> Tensor:
    """Echo and induction scores ``[2, Hkv]`` of one layer, from its queries and keys over one token and repeated blocks.

    Only the diagonals that lie a multiple of ``block`` apart are computed, ``ROWS`` queries at a time. ``lse [1, Hq, n]``
    is the log-sum-exp of the layer's attention.
    """
    heads = call.key.shape[1]
    query = call.query[0].unflatten(0, (heads, -1)).float()
    key = call.key[0].float()
    total = lse[0].unflatten(0, (heads, -1))
    length = key.shape[1]
    sums, number = torch.zeros(2, *query.shape[:2], device=key.device), 0
    for distance in range(block, length - 1, block):
        for begin in range(1 + distance, length, ROWS):
            end = min(begin + ROWS, length)
            for kind in (0, 1):
                target = key[:, None, begin - distance + kind : end - distance + kind]
                logits = capped((query[:, :, begin:end] * target).sum(-1) * call.scale, call.softcap)
                sums[kind] += (logits - total[:, :, begin:end]).exp().sum(-1)
        number += length - 1 - distance
    return (sums / max(number, 1)).amax(-1)
