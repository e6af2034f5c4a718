"""Variable tracking: a value handed from variable to variable through a text, in the style of RULER."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import bury, number, spread
from kvbudget.eval.texts import encode_pair, haystacks

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class VariableTracking(Task):
    """All variables of a chain ``X = 12345``, ``Y = X``, ... are asked for, in the order of the text (arXiv 2404.06654).

    Attributes:
        length: tokens of the context at most.
        hops: assignments after the first one of a chain.
        chains: chains in the text; one of them is asked for.
    """

    name = "variable_tracking"
    headline: ClassVar[str] = "token_accuracy"

    length: int = 1024
    hops: int = 2
    chains: int = 1
    text: str | None = None

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        found = []
        for i, sentences in enumerate(haystacks(tokenizer, self.length, count, seed, self.text)):
            rng = random.Random(f"variable_tracking {seed} {i}")
            names = iter(_names(rng, self.chains * (self.hops + 1)))
            needles: list[tuple[float, str]] = []
            chains = []
            for _ in range(self.chains):
                chain, value = [next(names) for _ in range(self.hops + 1)], number(rng)
                chains.append((chain, value))
                sources = [value, *(f"VAR {name}" for name in chain)]
                lines = [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)]
                needles += zip(spread(len(lines), rng), lines, strict=True)
            context, _ = bury(tokenizer, sentences, needles, self.length)
            chain, value = rng.choice(chains)
            question = (
                f"\n\nQuestion: Which variables have the value {value}, directly or through other variables?\n"
                f"Answer: The variables that have the value {value} are:"
            )
            probe = Probe(*encode_pair(tokenizer, question, " " + ", ".join(chain)), info={"value": value})
            found.append(Example(context, [probe], {"length": self.length}))
        return found


def _names(rng: random.Random, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choices(LETTERS, k=3))
        if name not in names:
            names.append(name)
    return names
