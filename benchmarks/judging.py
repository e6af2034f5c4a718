"""What benchmarks that judge calibrations share: options, the model, texts that it has not seen, where untrained forms go."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

import kvbudget
from kvbudget.eval.texts import passages
from kvbudget.models import check_supported, fingerprint


@dataclass(frozen=True)
class Judged:
    """The ``model`` and its fingerprint ``mark``, the ``texts`` ``[T]`` each, and the ``folder`` of untrained artifacts."""

    model: PreTrainedModel
    mark: str
    texts: list[Tensor]
    folder: Path

    @classmethod
    def asked(cls, description: str | None) -> "Judged":
        """What the command line asks for."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--model", default="smollm2-135m")
        parser.add_argument("--text", default="books")
        parser.add_argument("--texts", type=int, default=3)
        parser.add_argument("--length", type=int, default=1024)
        parser.add_argument("--seed", type=int, default=5)
        parser.add_argument("--untrained", type=Path, default=Path("results/untrained"))
        chosen = parser.parse_args()
        model, tokenizer = kvbudget.load(chosen.model)
        check_supported(model)
        chosen.untrained.mkdir(parents=True, exist_ok=True)
        texts = passages(tokenizer, chosen.length, chosen.texts, seed=chosen.seed, source=chosen.text)
        return cls(model, fingerprint(model), texts, chosen.untrained)
