"""The write gate of WG-KV, fitted to change each layer's attention as little as it can while it admits few tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import logits_of, watch
from kvbudget.calibrate.gates import GateCalibration, Lesson, features
from kvbudget.layer import AttentionCall
from kvbudget.policy.gates import Gate, WriteGate


@dataclass(frozen=True)
class Admission(GateCalibration):
    """WG-KV (arXiv 2512.17452, section 3.2): what is not local is weighed by its gate while it is trained.

    Queries at least ``window`` positions behind a token see it with ``log g`` added to its logit. The error is the change of
    the layer's attention output relative to its size, plus ``price`` times the mean over tokens of
    ``o + (1 - o) (1 - (1 - g)^2)`` with ``o = min(1, window / (T - t))``, the share of its life that a token is local. The
    paper measures the change at the model's end and back-propagates through it; here each layer's gate answers for its own
    layer, so that forward passes are enough.

    Attributes:
        window: positions that are local (paper: 256).
        price: of an admitted token (paper: 0.04 to 0.16 of another error).
        batch: queries of a text in each step, at most its tokens.
    """

    method: ClassVar[str] = "wg_kv"

    batch: int = 32
    window: int = 64
    price: float = 0.1

    def gate(self) -> Gate:
        return WriteGate()

    def lesson(self, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Lesson]:
        calls: dict[int, AttentionCall] = {}
        watch(model, ids, lambda index, call, lse: calls.update({index: call}))
        length = ids.shape[1]
        x, steps = features(self.gate(), model, calls), torch.arange(length, device=ids.device)
        share = (self.window / (length - steps)).clamp_max(1.0)[:, None]

        def error(weights: dict[str, Tensor], generator: torch.Generator) -> Tensor:
            gates = self.gate().score(x, weights)
            number, first = min(self.batch, length), min(self.window, length - 1)
            asked = torch.randint(first, length, (number,), generator=generator).to(ids.device)
            change = torch.stack(
                [distance(call, asked, gate, self.window) for call, gate in zip(calls.values(), gates, strict=True)]
            )
            price = (share + (1 - share) * (1 - (1 - gates) ** 2)).mean((1, 2))
            return (change + self.price * price).sum()

        return torch.tensor(list(calls)), error


def distance(call: AttentionCall, asked: Tensor, gates: Tensor, window: int) -> Tensor:
    """How far ``gates [T, Hkv]`` move the attention of the queries at positions ``asked``, over the size of its output."""
    logits, value = logits_of(call, asked), call.value[0].float().clone()  # no inference tensor goes into a gradient
    steps = torch.arange(value.shape[1], device=value.device)
    logits = logits.masked_fill(steps > asked[:, None], float("-inf"))
    bias = gates.log().T[:, None, None] * (asked[:, None] >= steps + window)
    full, gated = (torch.einsum("hgnt,htd->hgnd", x.softmax(-1), value) for x in (logits, logits + bias))
    return (gated - full).square().sum() / full.square().sum()
