"""MixAttention: few layers attend to everything, the others to a window, and layers of one kind share what they hold."""

from dataclasses import dataclass
from typing import Any

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe
from kvbudget.policy.sharing import Mixed


@dataclass(frozen=True)
class MixAttention(Recipe):
    """Full attention in every ``every``-th layer and sliding windows between, with keys and values shared in both classes.

    Paper: Rajput et al., arXiv 2409.15012, 2024 (NeurIPS ENLSP). The full layers share one cache, or ``caches`` of them
    (MA-Pairs: 2); ``first`` moves the first full layer deeper (MA-Offset), which the paper finds to matter most on long
    texts; each run of sliding layers shares one window, or one per ``run`` layers. Layout names and sizes are from memory,
    *unverified*, hence parameters. As with `cla`, models are trained with their map: this is their runtime (Gemma 3n brings
    such a map of its own, which needs no method), and on any other model it shows what the map costs untrained. Readers
    compute keys and values and drop them. A budget governs what the full layers hold; windows count as a fixed floor.
    Claim: much less memory at equal quality of short and long contexts, after training.

    Attributes:
        window: tokens that sliding layers see (paper: 1024).
        every: full layers are that many layers apart.
        first: the first full layer.
        caches: different caches of the full layers.
        run: sliding layers that share one window (0: all between two full ones).
    """

    name = "mixattention"
    role = "sharing map"
    phase = "prefill and decode"
    paper = "Inference-Friendly Models With MixAttention, arXiv 2409.15012, 2024"
    lossless_when_fits = False
    prefix_reusable = True

    window: int = 1024
    every: int = 4
    first: int = 0
    caches: int = 1
    run: int = 0

    def __post_init__(self) -> None:
        if min(self.window, self.every, self.caches) < 1:
            raise PolicyError(
                f"mixattention: window={self.window}, every={self.every} and caches={self.caches} must be at least 1"
            )

    def parts(self) -> dict[str, Any]:
        return {"sharing": Mixed(self.window, self.every, self.first, self.caches, self.run)}
