"""The vocabulary of policies: the values of a recipe's parts, how they compose, and what a recipe is; `roles` has the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from kvbudget.policy.roles import (
    Destination,
    Evicted,
    HeadAllocator,
    LayerAllocator,
    LookingBack,
    Part,
    Refinement,
    Scorer,
    Selector,
    Span,
)
from kvbudget.segments.joint import MOVED

if TYPE_CHECKING:
    from kvbudget.codecs.base import Codec
    from kvbudget.policy.projection import Projection
    from kvbudget.policy.sharing import Sharing
    from kvbudget.policy.view import View

__all__ = [
    "CHOSEN",
    "Destination",
    "Evicted",
    "Granularity",
    "HeadAllocator",
    "LayerAllocator",
    "LookingBack",
    "Part",
    "Parts",
    "Plan",
    "Protect",
    "Recipe",
    "Refinement",
    "Role",
    "Scorer",
    "Selector",
    "Span",
    "Stages",
    "Trigger",
]

CHOSEN = 1e6
"""A refined score above all others, below the infinity of protected entries."""
Role = Literal[
    "scorer",
    "layers",
    "heads",
    "refinement",
    "threshold",
    "selector",
    "granularity",
    "stages",
    "destination",
    "codec",
    "trigger",
    "plan",
    "protect",
    "sharing",
    "projection",
    "thinning",
]


@dataclass(frozen=True)
class Granularity(Part):
    """Units in which entries are evicted: ``size`` consecutive stored entries, once a unit is full."""

    size: int = 1

    def units(self, view: View) -> Tensor | None:
        """Units by position, int64 ``[B, Hkv, T]``: cells with one number stay or go together. None: `size` decides.

        Protected cells are units of their own, and units of coded keys come first.
        """
        return None


@dataclass(frozen=True)
class Protect(Part):
    """Entries that are kept whatever the scorer says: the first ``sinks`` and the last ``recent`` positions.

    ``recent_share`` protects that share of a head's kept entries as newest ones instead of a fixed number. Where ``most`` is
    below 1, the last ``recent`` positions shrink to that share of a budget that would otherwise be spent on them.
    """

    sinks: int = 0
    recent: int = 0
    recent_share: float = 0.0
    most: float = 1.0

    @property
    def firm(self) -> int:
        """The last positions that no budget shrinks."""
        return self.recent if self.most >= 1 else 0

    def window(self, mean: float, marked: int = 0) -> int:
        """The last positions that are kept when a head keeps ``mean`` entries, ``marked`` of them by the user's spans."""
        if self.most >= 1:
            return self.recent
        return int(min(self.recent, max(1.0, min(self.most * mean, mean - self.sinks - marked))))


@dataclass(frozen=True)
class Stages(Part):
    """Pools of the budget: entries of the prompt, and those of what came after it, which never displace the former.

    The prompt is what came in the first forward, or in the call of `KVCache.prefill` that began the text. Its entries get
    the share ``prompt`` of the budget, and `answer` judges the others, whose pool is the rest; with ``length`` it grows to
    that over so many tokens, from ``recent`` entries on.
    """

    answer: Scorer
    prompt: float = 0.5
    recent: int = 0
    length: int = 0

    def entries(self, mean: float, prompt: int, seen: int) -> float:
        """Entries per layer and KV head out of ``mean``, when ``seen`` tokens have come after and with ``prompt`` of them."""
        first = self.prompt * mean
        steps, pool = seen - prompt, mean - first
        if steps <= 0:
            return first
        if self.length <= self.recent:
            return mean
        return first + min(pool, self.recent + steps * (pool - self.recent) / (self.length - self.recent))


@dataclass(frozen=True)
class Trigger(Part):
    """When the policy acts: whenever a layer is over its share, at most once every ``every`` small steps.

    Without ``every`` those are 16, or where a head holds more than 1024 entries, as many as a 64th of them: an eviction moves
    all that stay. ``after_prefill`` acts on the forward that fills an empty cache (and at the end of a plan) only; what is
    generated later is appended and never evicted.
    """

    every: int | None = None
    after_prefill: bool = False

    @property
    def small(self) -> int:
        """The most tokens of a small step."""
        return 16 if self.every is None else self.every

    def stretch(self, entries: int) -> int:
        """Small steps from one eviction to the next, from heads that may hold so many entries: an eighth of them at most."""
        most = min(self.small, max(1, entries // 8))
        return most if self.every is not None else max(most, entries // 64)


@dataclass(frozen=True)
class Plan(Part):
    """How the prompt is driven through the model by `KVCache.prefill`; executed by `kvbudget.prefill`.

    ``uses_question`` says that the plan looks at the ``question_ids`` of the call.
    """

    uses_question: ClassVar[bool] = False


@dataclass(frozen=True)
class Parts:
    """A resolved policy: one part per role. ``scorer=None`` keeps everything.

    Entries that score below ``threshold`` leave even where the budget has room for them (None: only what exceeds it leaves).
    ``position_mode``: keys keep their ``original`` positions, or positions are those inside of the cache, either by turning
    the queries for the sinks (``cache``, for sinks and a recent window) or by moving keys as others leave (``moved``).
    With ``thinning``, tokens of a prompt that a layer evicts right away take no part in the attention of the layers above.
    """

    scorer: Scorer | None = None
    layers: LayerAllocator | None = None
    heads: HeadAllocator | None = None
    refinement: Refinement | None = None
    threshold: float | None = None
    selector: Selector | LookingBack | None = None
    granularity: Granularity = Granularity()
    stages: Stages | None = None
    sharing: Sharing | None = None
    projection: Projection | None = None
    destination: Destination | None = None
    codec: tuple[Codec, Codec] | None = None
    trigger: Trigger = Trigger()
    plan: Plan | None = None
    protect: Protect = Protect()
    position_mode: Literal["original", "cache", "moved"] = "original"
    thinning: bool = False

    @property
    def uses_marks(self) -> bool:
        """Whether one of the parts looks at what kinds of tokens the entries belong to."""
        return any(getattr(part, "uses_marks", False) for part in self.__dict__.values())

    @property
    def states(self) -> tuple[str, ...]:
        """Columns that are held per entry: running states of the parts, and what keys have been moved by."""
        scorer = () if self.scorer is None else self.scorer.states
        extra = () if self.destination is None else self.destination.columns
        return (*scorer, *extra, *(() if self.selector is None else self.selector.states), *self.moves)

    @cached_property
    def votes(self) -> bool:
        """Whether heads, or layers, that want different entries hold the same ones, since these are coded together."""
        return self.sharing is not None and self.sharing.aligned and (self.heads is not None or self.jury)

    @cached_property
    def jury(self) -> bool:
        """Whether all layers, each by its own queries, vote on what is coded for all of them, or select what they read of it."""
        if self.sharing is None or not self.sharing.stacked:
            return False
        others = (self.heads, self.layers, self.destination, self.selector)
        return any(part is not None for part in others) or not (self.scorer is None or self.scorer.by_position)

    @property
    def moves(self) -> tuple[str, ...]:
        """The column of what keys have been moved by, for entries that are coded together before RoPE."""
        return (MOVED,) if self.position_mode == "moved" and self.sharing is not None and self.sharing.merges else ()

    @property
    def replayable(self) -> bool:
        """Whether what the full cache's prefill was asked, recorded once, is what this policy's own begins with."""
        changes = self.thinning or self.sharing is not None or self.projection is not None
        return not changes and (self.selector is None or not getattr(self.selector, "prefill", False))


class Recipe:
    """A published method: a frozen dataclass that names its paper and composes `parts`.

    Class attributes: ``name``; ``aliases``; ``role`` and ``phase`` (one line each, for the table of methods); ``paper``;
    ``needs`` (plan, calibration, driver, queries, keys, tokens); ``prefill_peak`` ("bounded", or "full_prompt" when the whole
    prompt must be held before anything can leave); ``lossless_when_fits``; ``prefix_reusable`` (the question is not
    looked at, so one compressed context serves many questions).
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[str]
    phase: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    prefill_peak: ClassVar[Literal["bounded", "full_prompt"]] = "bounded"
    lossless_when_fits: ClassVar[bool] = True
    prefix_reusable: ClassVar[bool] = False

    def parts(self) -> dict[str, Any]:
        """The parts that this recipe decides, by field name of `Parts`."""
        raise NotImplementedError

    def defaults(self) -> dict[str, Any]:
        """Parts that this recipe brings along unless another recipe of the policy decides them."""
        return {}

    @property
    def calibrated(self) -> bool:
        """Whether `bind` has an artefact to load: what needs calibration, and what may be given one."""
        return "calibration" in self.needs

    def bind(self, fingerprint: str) -> Recipe:
        """This recipe with its calibration artefact for the model of this `fingerprint` loaded (where it is `calibrated`).

        Raises:
            PolicyError: when there is none, or it is another model's, naming the command that makes one.
        """
        return self

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Names and defaults of what a user may set; fields with ``repr=False`` are what `bind` loads."""
        return {f.name: f.default for f in fields(cls) if f.repr}  # type: ignore[arg-type]

    def changed(self) -> dict[str, Any]:
        """Parameters that differ from their defaults."""
        return {name: x for name, default in self.parameters().items() if (x := getattr(self, name)) != default}

    def __str__(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self.changed().items()]
        return self.name + (f"({', '.join(changed)})" if changed else "")
