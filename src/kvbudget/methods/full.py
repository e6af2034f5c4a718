"""The full cache: the baseline that every method is measured against."""

from dataclasses import dataclass
from typing import Any

from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class Full(Recipe):
    """Keeps every entry in the model's precision; a budget that the text does not fit into is refused."""

    name = "full"
    role = "baseline"
    phase = "always"
    paper = "none (the cache as the model defines it)"
    prefix_reusable = True

    def parts(self) -> dict[str, Any]:
        return {}
