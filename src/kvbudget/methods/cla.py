"""Cross-layer attention: each group of consecutive layers holds one layer's entries."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe
from kvbudget.policy.sharing import Consecutive, Listed


@dataclass(frozen=True)
class CLA(Recipe):
    """Every ``factor`` consecutive layers attend to the keys and values of the first of them, which are held once.

    Paper: Brandon et al., arXiv 2405.12981, 2024 (NeurIPS). Layer l is an owner where ``l % factor == 0``; the cache has
    ``ceil(L / factor)`` layers. Models are trained with such a map from the start, and this is their runtime; where a model's
    own code shares layers (Gemma 3n), that map is followed under every policy, and this one is refused. On a model that was
    not trained so, it converts the cache and not the weights: the text is answered far worse (the measured divergence is in the
    table of methods), which a fine-tuning would have to heal. Readers still compute keys and values of their own, as their
    modules do, and drop them: bytes are saved, not compute. Evicting methods watch the owner's queries. Claim: half the
    cache of a model with one KV head, at nearly the same quality, after training.

    Attributes:
        factor: layers that share one cache (paper: 2).
        owners: a model's own map in place of that: for each full-attention layer the one whose entries it reads.
    """

    name = "cla"
    role = "sharing map"
    phase = "prefill and decode"
    paper = "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention, arXiv 2405.12981, 2024"
    lossless_when_fits = False
    prefix_reusable = True

    factor: int = 2
    owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise PolicyError(f"cla: factor={self.factor} must be at least 1")

    def parts(self) -> dict[str, Any]:
        return {"sharing": Listed(self.owners) if self.owners else Consecutive(self.factor)}
