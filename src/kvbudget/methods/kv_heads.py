"""Fewer KV heads: groups of them are held as one, in the basis that a text's keys and values span best."""

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe
from kvbudget.policy.projection import HeadProjection


@dataclass(frozen=True)
class KVHeads(Recipe):
    """Holds each group of KV heads as one head, by the singular vectors of their joint keys and values on texts.

    Paper: Yu et al., Effectively Compress KV Heads for LLM, arXiv 2406.07056, 2024. ``kvbudget calibrate kv_heads --model M``
    takes the leading right singular vectors of the keys and of the values of a group, side by side, over texts ("SVD-a");
    the error on those is the tail of the singular values. Keys are projected after RoPE, for rotations do not commute with
    the basis: exact algebra, at the price of a product with the basis per new token and query, which the paper folds into
    the weights where there is no RoPE (*unverified*: which form it ships with RoPE). Nothing is fine-tuned here, as the
    paper does lightly afterwards, so expect more loss than it reports; models with few KV heads lose most. Evicting methods
    judge the heads that are held; those that move or rotate keys do not go with it. Claim: half to three quarters of the
    heads removed at comparable quality, after fine-tuning.

    Attributes:
        file: the calibration, which decides size of groups and rank ("": where ``kvbudget calibrate`` puts it).
    """

    name = "kv_heads"
    aliases = ("eckvh",)
    role = "projection of heads"
    phase = "prefill and decode"
    paper = "Effectively Compress KV Heads for LLM, arXiv 2406.07056, 2024"
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    file: str = ""
    bases: HeadProjection = field(default=HeadProjection(), repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        return {"projection": self.bases}

    def bind(self, fingerprint: str) -> "KVHeads":
        tensors = Artifact.load(self.name, fingerprint, self.file).tensors
        return replace(self, bases=HeadProjection(tensors["keys"], tensors["values"]))
