"""Keys by one codec, values by another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from kvbudget.codecs.base import Codec
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe
from kvbudget.policy.policy import Policy


@dataclass(frozen=True)
class KVCodecs(Recipe):
    """Codes keys as one method does and values as another: ``kv_codecs(keys=commvq, values='kivi(bits=2)')``.

    Paper: Liu et al., arXiv 2402.02750, 2024 (KIVI), section 3, shows why keys and values want different codes: outliers of
    keys stay in their channels, those of values do not. Some papers have a new idea for one side alone; any two go together
    here. Each side is coded, stored and read as in its own method, with its own full-precision window.

    Attributes:
        keys: the codec whose keys are used, with its parameters.
        values: the codec whose values are used.
    """

    name = "kv_codecs"
    role = "codec"
    phase = "prefill and decode"
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750, 2024"
    lossless_when_fits = False

    keys: str = "rotatekv"
    values: str = "turboquant(bits=3)"
    found: tuple[Policy, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        keys, values = self.parts()["codec"]
        if keys.unit != values.unit and min(keys.unit, values.unit) > 1:
            raise PolicyError(
                f"kv_codecs: {self.keys} codes keys {keys.unit} at a time and {self.values} values {values.unit} at a time; "
                "give both the same group"
            )
        tails = [(side.residual, side.cyclic, side.lump, side.sinks) for side in (keys, values)]
        if (keys.judges or values.judges) and tails[0] != tails[1]:
            raise PolicyError(
                f"kv_codecs: {self.keys} and {self.values} keep different windows, where one of them codes by attention; "
                "give both sides that one, or another"
            )

    def parts(self) -> dict[str, Any]:
        keys, values = self.found or self._sides()
        return {"codec": (_codec(keys)[0], _codec(values)[1])}

    @property
    def calibrated(self) -> bool:
        return any(recipe.calibrated for side in self._sides() for recipe in side.recipes)

    def bind(self, fingerprint: str) -> KVCodecs:
        return replace(self, found=tuple(_bound(side, fingerprint) for side in self._sides()))

    def _sides(self) -> tuple[Policy, ...]:
        from kvbudget.methods import parse  # it knows this recipe, too

        return parse(self.keys), parse(self.values)


def _codec(policy: Policy) -> tuple[Codec, Codec]:
    parts = policy.parts()
    if parts.codec is None or any(recipe.role != "codec" for recipe in policy.recipes):
        raise PolicyError(
            f"kv_codecs: {policy} does not code keys and values of a KV head by themselves; give a codec that does, such as kivi"
        )
    return parts.codec


def _bound(policy: Policy, fingerprint: str) -> Policy:
    return Policy(tuple(recipe.bind(fingerprint) if recipe.calibrated else recipe for recipe in policy.recipes))
