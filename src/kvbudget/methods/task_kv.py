"""Task-KV: heads whose meaning differs from their layer's keep everything, the others what a window votes for."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.whole import WholeHeads
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Protect, Recipe
from kvbudget.policy.scorers.semantic import SemanticHeads


@dataclass(frozen=True)
class TaskKV(Recipe):
    """Keeps the heads that lie far from their layer's semantic center whole, and of the others what the window votes for.

    Paper: Task-KV, arXiv 2501.15113, 2025. Per layer, with ``C_h`` the mean attention of the last ``window`` queries and
    ``v'_h = sum over the top entries of C_h * v``: the heads farthest from the mean of all ``v'``, and the one nearest to it,
    keep every entry; the others keep sinks, the newest entries and those in the middle with the most votes. The number of
    whole heads falls linearly from ``share`` of the heads in the first layer to ``least`` in the last; a budget that is too
    small for them makes fewer heads whole. How query heads of one KV head are joined is not stated there (here: the
    farthest one counts; unverified), and the nearest head is counted among them. Which heads differ is judged anew by every
    forward of at least ``window`` tokens, or once for all prompts by ``kvbudget calibrate task_kv --model M``. Claim: as
    good as the full cache on summaries and synthetic tasks at 40%.

    Attributes:
        window: queries that vote.
        kernel: pooling width over positions.
        top: heaviest entries that make a head's semantic vector.
        share: part of the KV heads that is kept whole in the first layer (paper: 0.25 and 0.3).
        least: heads kept whole in the last layer (paper: 4 of 32, 1 for grouped-query models).
        sinks: first entries that always stay.
        recent: newest entries that always stay (paper: 256).
        judged: heads differ by each prompt (paper), or by the texts of a calibration, as they do where there is a file.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "task_kv"
    aliases = ("taskkv",)
    role = "scorer and allocator over heads"
    phase = "prefill, goes on in decode"
    paper = "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads, arXiv 2501.15113, 2025"
    needs = ("queries",)

    window: int = 32
    kernel: int = 7
    top: int = 256
    share: float = 0.25
    least: int = 1
    sinks: int = 16
    recent: int = 64
    judged: Literal["prompt", "texts"] = "prompt"
    file: str = ""
    found: tuple[tuple[float, ...], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.least < 0:
            raise PolicyError(f"task_kv: share={self.share} must be from 0 to 1 and least={self.least} at least 0")
        if self.top < 1:
            raise PolicyError(f"task_kv: top={self.top} must be at least 1 entry")
        if self.recent < self.window:
            raise PolicyError(
                f"task_kv: recent={self.recent} must cover the window={self.window}, whose entries have no votes"
            )

    def parts(self) -> dict[str, Any]:
        scorer = SemanticHeads(
            self.window, self.kernel, top=self.top, share=self.share, least=self.least, found=self.found
        )
        return {"scorer": scorer, "heads": WholeHeads(), "protect": Protect(sinks=self.sinks, recent=self.recent)}

    @property
    def calibrated(self) -> bool:
        return self.judged == "texts" or bool(self.file)

    def bind(self, fingerprint: str) -> "TaskKV":
        found = Artifact.load(self.name, fingerprint, self.file).tensors["distance"]
        return replace(self, found=tuple(map(tuple, found.tolist())))
