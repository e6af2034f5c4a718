"""The contract of a calibration: a frozen value with the parameters of a fit, and the fit."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Calibration(ABC):
    """How a method is fitted to a model once; its fields are the parameters, recorded in the artifact."""

    method: ClassVar[str]

    @abstractmethod
    def fit(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the method needs to know about this model, as named tensors."""
