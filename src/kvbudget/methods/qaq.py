"""QAQ: bits per entry by a bound on the error of the attention."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.adaptive import AdaptiveQuant
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class QAQ(Recipe):
    """Gives each key and value as few bits as a bound on the attention's error allows: values that are looked at get more.

    Paper: Dong et al., arXiv 2403.04643, 2024. Keys are bounded by the range of their elements alone, values in inverse
    proportion to the most attention that the newest ``window`` queries give them; outliers of an entry stay in half
    precision. At long texts the limits ``least`` and ``most`` decide most entries. The paper keeps a copy elsewhere, to code
    entries again when attention turns to them; here bits are chosen once. True bits per element: ``E[b]``, 24 per outlier,
    40 / head_dim for mean, scale and b; a byte budget counts every entry with ``most`` bits. Claim: 10x smaller, negligible
    loss.

    Attributes:
        eps: the bound (paper: 1, 3, 10 or 30; not a relative error).
        least, most: fewest and most bits of an element (0 to 4; paper: 0 to 2 and 2 to 4).
        window: queries that values are judged by; all but one of as many newest entries get ``most`` bits (paper: 1 or 5).
        outliers: share of an entry's elements in half precision, at least one (0: none; paper: 0.01).
        residual: new entries that are coded together.
    """

    name = "qaq"
    role = "codec"
    phase = "prefill and decode"
    paper = "QAQ: Quality Adaptive Quantization for LLM KV Cache, arXiv 2403.04643, 2024"
    needs = ("queries",)
    lossless_when_fits = False

    eps: float = 1.0
    least: int = 2
    most: int = 4
    window: int = 1
    outliers: float = 0.01
    residual: int = 32

    def __post_init__(self) -> None:
        if not self.eps or self.outliers > 0.5 or not self.window:
            raise PolicyError(
                f"qaq: eps={self.eps} and window={self.window} must be above 0, outliers={self.outliers} at most 0.5"
            )
        self.parts()

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"low": self.least, "high": self.most, "eps": self.eps, "window": self.window}
        shared |= {"share": self.outliers, "residual": max(1, self.residual), "cyclic": True}
        return {"codec": (AdaptiveQuant(side="keys", **shared), AdaptiveQuant(side="values", **shared))}
