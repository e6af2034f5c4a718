"""In-context key-value recall: pairs in a list, each of which may be asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import CITIES, WORDS
from kvbudget.eval.texts import beginning, encode, encode_pair


@dataclass(frozen=True)
class KeyValue(Task):
    """A list of lines ``city: word``; the probes ask for the word of several cities, and guessing hardly ever helps.

    Attributes:
        pairs: distinct cities.
        repeats: times that the whole list is said, each time in another order.
        asked: probes per context.
    """

    name = "key_value"

    pairs: int = 16
    repeats: int = 4
    asked: int = 4

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        if self.pairs > min(len(CITIES), len(WORDS)) or self.asked > self.pairs:
            raise KVBudgetError(
                f"key_value has {min(len(CITIES), len(WORDS))} cities and asks each once, so pairs={self.pairs} and "
                f"asked={self.asked} are too many; lower them"
            )
        return [self._example(tokenizer, random.Random(f"key_value {seed} {i}")) for i in range(count)]

    def _example(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Example:
        pairs = list(zip(rng.sample(CITIES, self.pairs), rng.sample(WORDS, self.pairs), strict=True))
        lines = []
        for _ in range(self.repeats):
            lines += [f"{key}: {value}\n" for key, value in rng.sample(pairs, len(pairs))]
        context = torch.cat([beginning(tokenizer), encode(tokenizer, "".join(lines))])
        probes = []
        for key, value in rng.sample(pairs, self.asked):
            last = max(n for n, line in enumerate(lines) if line.startswith(f"{key}:"))
            question, answer = encode_pair(tokenizer, f"{key}:", f" {value}")
            probes.append(Probe(question, answer, info={"key": key, "depth": (last + 0.5) / len(lines)}))
        return Example(context, probes, {"length": len(context), "pairs": self.pairs})
