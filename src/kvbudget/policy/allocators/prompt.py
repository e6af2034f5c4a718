"""Allocators over layers whose statistic is measured by the prompt and kept while decoding."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvbudget.policy.base import LayerAllocator
from kvbudget.policy.view import View

MEASURED_AGAIN = 16


@dataclass(frozen=True)
class PromptMeasured(LayerAllocator):
    """Only forwards that bring at least ``1 / MEASURED_AGAIN`` of the text measure a layer.

    Shares are fixed by the prompt in the papers, and shares that move at every step would only make layers lose what they
    hold.
    """

    measures: ClassVar[bool] = True

    @abstractmethod
    def measure(self, view: View) -> list[float]:
        """The layer's statistic per sequence."""

    def preference(self, view: View, last: Sequence[float | None]) -> Sequence[float | None]:
        due = [
            new > 0 and (old is None or new * MEASURED_AGAIN >= seen)
            for old, seen, new in zip(last, view.seen, view.new_tokens, strict=True)
        ]
        if not any(due):
            return last
        return [new if now else old for new, now, old in zip(self.measure(view), due, last, strict=True)]
