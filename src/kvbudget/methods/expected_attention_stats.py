"""Expected Attention with calibrated statistics: the queries' moments are the model's, not the prompt's."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.methods.expected_attention import ExpectedAttentionRecipe
from kvbudget.policy.artifact import Artifact


@dataclass(frozen=True)
class ExpectedAttentionStats(ExpectedAttentionRecipe):
    """`expected_attention` with the mean and the covariance of the model's queries over a corpus.

    Paper: Devoto et al., arXiv 2510.00636, 2025; kvpress keeps the form with statistics apart too (100 texts of 1000 tokens).
    Nothing is learned from the prompt, so no query needs to be seen and the cache holds no moments;
    ``kvbudget calibrate expected_attention_stats --model M`` runs the model over texts once.

    Attributes:
        sinks: first entries that always stay (kvpress: 4).
        future: positions that the mean rotation averages over (kvpress: 512).
        covariance: whether the covariance counts.
        value_norm: whether the values' norm counts.
        epsilon: added to the expected attention before that (kvpress: 0).
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "expected_attention_stats"
    needs = ("keys", "calibration")

    file: str = ""
    mean: Tensor | None = field(default=None, repr=False, compare=False)
    spread: Tensor | None = field(default=None, repr=False, compare=False)

    def parts(self) -> dict[str, Any]:
        parts = super().parts()
        return parts | {"scorer": replace(parts["scorer"], mean=self.mean, spread=self.spread)}

    def bind(self, fingerprint: str) -> "ExpectedAttentionStats":
        found = Artifact.load(self.name, fingerprint, self.file).tensors
        return replace(self, mean=found["mean"], spread=found["covariance"])
