"""A2ATS: codes of keys that know no position say which entries a query reads."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbudget.codecs.codebook import nearest
from kvbudget.errors import PolicyError
from kvbudget.models import Rotation
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe, Selector
from kvbudget.policy.selection import rank
from kvbudget.segments.selective import Chosen, Reading


@dataclass(frozen=True)
class Retrieved(Selector):
    """Reads the ``window`` newest entries, the first ``sinks`` positions, and the best ``share`` of all by their codes.

    A key before RoPE is the nearest word ``w`` of its head by ``|(k - w) L|`` with the factor ``L L^T`` of the queries'
    second moment; its score is the product of w with the query turned to position ``base``, whatever the distance (windowed
    RoPE). Query heads of a group read what any of them wants, exactly.
    """

    prefill: ClassVar[bool] = False

    share: float = 0.03
    window: int = 64
    sinks: int = 8
    found: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def select(self, reading: Reading) -> Chosen:
        assert reading.steps is not None and reading.positions is not None
        steps, positions, device = reading.steps, reading.positions, reading.keys.device
        inside = reading.visible & (positions[:, :, None] > (steps - self.window)[:, None, :, None])
        inside |= reading.visible & (positions < self.sinks)[:, :, None]
        far = reading.visible & ~inside
        scores = self.scores(reading).masked_fill(~far[:, :, None], float("-inf"))
        count = (self.share * reading.visible.sum(-1)).ceil()[:, :, None, :, None].to(device)
        read = ((rank(scores) < count) & far[:, :, None]).any(2) | inside
        logits = reading.logits.masked_fill(~read[:, :, None], float("-inf"))
        return Chosen(logits.softmax(-1).nan_to_num(0.0))

    def scores(self, reading: Reading) -> Tensor:
        """Approximate logits by the codes of the keys ``[B, Hkv, G, n, T]``, up to a factor."""
        assert reading.steps is not None and reading.positions is not None
        words, factor = (self.found[name][reading.layer_idx].to(reading.keys) for name in ("words", "factor"))
        rotation = Rotation(
            self.found["inv_freq"][reading.layer_idx],
            "interleaved" if bool(self.found["interleaved"]) else "half",
            float(self.found["scaling"]),
        )
        keys = rotation.strip(reading.keys, reading.positions)
        codes = torch.stack([nearest(sequence @ factor, words @ factor) for sequence in keys])
        query = rotation.rotate(reading.query, int(self.found["base"]) - reading.steps[:, None, None])
        table = torch.einsum("bhgnd,hwd->bhgnw", query, words)
        return table.gather(-1, codes[:, :, None, None].expand(*table.shape[:4], -1))


@dataclass(frozen=True)
class A2ATS(Recipe):
    """Reads the entries whose coded keys promise the most, which takes one product with a codebook per generated token.

    Paper: He et al., arXiv 2502.12665, 2025 (ACL Findings). ``kvbudget calibrate a2ats --model M`` fits a codebook to the
    keys before RoPE of every layer and KV head by k-means in the metric of the queries (query-aware vector quantization).
    Far entries are scored as if all of them were equally far away, which takes the position out of a key. In the paper
    exact keys and values stay in slower memory beside an index of 12 bits per key; here everything is resident, codes are
    found anew at each step in plain torch and nothing leaves the cache: it measures what reading less loses, not how fast
    it could be. The prompt is attended to densely. Claim: lower loss than other retrieval at the same reads, up to 2.7
    times the throughput.

    Attributes:
        share: of the entries that a query head reads beside the window and the first ones (paper: 0.03).
        window: newest positions that are always read (paper: 64).
        sinks: first positions that are always read (paper: 8).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "a2ats"
    role = "selector"
    phase = "decode, reads only"
    paper = (
        "A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware Vector Quantization, "
        "arXiv 2502.12665, 2025"
    )
    needs = ("queries", "calibration")
    lossless_when_fits = False
    prefix_reusable = True

    share: float = 0.03
    window: int = 64
    sinks: int = 8
    file: str = ""
    found: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.window < 1:
            raise PolicyError(
                f"a2ats: share={self.share} must be a share of the entries, and window={self.window} at least 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"selector": Retrieved(self.share, self.window, self.sinks, self.found or {})}

    def bind(self, fingerprint: str) -> "A2ATS":
        return replace(self, found=dict(Artifact.load(self.name, fingerprint, self.file).tensors))
