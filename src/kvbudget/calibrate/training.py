"""Training of small weights beside a model's layers: Adam on one text after the other, resumable between two."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from kvbudget.budget import format_bytes
from kvbudget.calibrate.base import TextCalibration
from kvbudget.errors import PolicyError

Lesson = Callable[[dict[str, Tensor], torch.Generator], Tensor]
WIDEST = 4096
"""Channels of what is trained, at most: four times as many as any paper trains."""


@dataclass(frozen=True)
class Training(TextCalibration):
    """Weights stacked over all layers of a model, trained by Adam; moments and weights are kept between texts.

    Attributes:
        count: number of texts.
        length: tokens of each.
        steps: of the optimizer on each text.
        batch: tokens of a text in each step.
        rate: learning rate.
        seed: of the untrained weights and the batches.

    ``widths`` names the parameters that count channels of what is trained, from 1 to `WIDEST`.
    """

    widths: ClassVar[tuple[str, ...]] = ()

    steps: int = 30
    batch: int = 256
    rate: float = 3e-3
    seed: int = 0

    @abstractmethod
    def untrained(self, model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
        """The first weights by name, ``[L, ...]``."""

    @abstractmethod
    def lesson(self, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Lesson]:
        """Which layers of the model learn from a text ``[1, T]``, and the error of their stacked weights on a part of it."""

    def add(self, model: PreTrainedModel, ids: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state) or self.start(model)
        index, lesson = self.lesson(model, ids)
        number = int(state["number"])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        names = [name.removeprefix("weight.") for name in state if name.startswith("weight.")]
        with torch.enable_grad():
            for _ in range(self.steps):
                number += 1
                weights = {name: state[f"weight.{name}"][index].requires_grad_() for name in names}
                lesson(weights, generator).backward()
                for name, weight in weights.items():
                    assert weight.grad is not None
                    one, two = (state[f"{moment}.{name}"] for moment in ("first", "second"))
                    one[index] = 0.9 * one[index] + 0.1 * weight.grad
                    two[index] = 0.999 * two[index] + 0.001 * weight.grad**2
                    slope = (one[index] / (1 - 0.9**number)) / ((two[index] / (1 - 0.999**number)).sqrt() + 1e-8)
                    state[f"weight.{name}"][index] = weight.detach() - self.rate * slope
        state["number"] = torch.tensor([number])
        return state

    def start(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Untrained weights and empty moments.

        Raises:
            PolicyError: when they, with their gradients, need more memory than is free.
        """
        with FakeTensorMode():  # their sizes alone
            drawn = self.untrained(model, torch.Generator())
        needed, free = 4 * sum(tensor.nbytes for tensor in drawn.values()), psutil.virtual_memory().available
        if needed > free:
            widths = ", ".join(f"{name}={getattr(self, name)}" for name in self.widths)
            raise PolicyError(
                f"{self.method}: weights, gradients and moments of {widths} need {format_bytes(needed)}, and {format_bytes(free)} "
                "of memory are free; give less"
            )
        weights = self.untrained(model, torch.Generator().manual_seed(self.seed))
        state = {f"weight.{name}": tensor for name, tensor in weights.items()}
        for moment in ("first", "second"):
            state |= {f"{moment}.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
        return state | {"number": torch.zeros(1, dtype=torch.long)}

    def finish(self, model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("weight."): x for name, x in state.items() if name.startswith("weight.")}
