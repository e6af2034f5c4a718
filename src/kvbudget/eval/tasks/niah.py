"""Needles in the style of RULER: one key, one key among distracting keys, one key with several values."""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import WORDS, bury, number, spread
from kvbudget.eval.texts import encode_pair, haystacks


@dataclass(frozen=True)
class _Niah(Task):
    """Sentences ``One of the special magic numbers for {key} is: {value}.`` in a text (RULER, arXiv 2404.06654)."""

    length: int = 1024
    text: str | None = None

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        found = []
        for i, sentences in enumerate(haystacks(tokenizer, self.length, count, seed, self.text)):
            rng = random.Random(f"{self.name} {seed} {i}")
            pairs, asked = self.pairs(rng)
            depths = spread(len(pairs), rng)
            lines = [f"{_phrase(key)} {value}." for key, value in pairs]
            context, at = bury(tokenizer, sentences, list(zip(depths, lines, strict=True)), self.length)
            hits = [n for n, (key, _) in enumerate(pairs) if key == asked]
            values = ", ".join(pairs[n][1] for n in hits)
            probe = Probe(
                *encode_pair(tokenizer, self.question(asked), f" {values}"),
                info={"key": asked, "depth": depths[hits[0]]},
            )
            info = {"length": self.length, "depth": depths[hits[0]], "positions": [at[n] for n in hits]}
            found.append(Example(context, [probe], info))
        return found

    @abstractmethod
    def pairs(self, rng: random.Random) -> tuple[list[tuple[str, str]], str]:
        """Keys with their values in the order of the text, and the key that is asked for."""

    def question(self, key: str) -> str:
        """The question, ending with the needle's own words and a colon, as the needle does."""
        return f"\n\nQuestion: What is the special magic number for {key}?\nAnswer: {_phrase(key)}"


@dataclass(frozen=True)
class NiahSingle(_Niah):
    """One key with one value."""

    name = "niah_single"

    def pairs(self, rng: random.Random) -> tuple[list[tuple[str, str]], str]:
        key = rng.choice(WORDS)
        return [(key, number(rng))], key


@dataclass(frozen=True)
class NiahMultikey(_Niah):
    """One key is asked for among ``keys`` of the same form."""

    name = "niah_multikey"

    keys: int = 4

    def pairs(self, rng: random.Random) -> tuple[list[tuple[str, str]], str]:
        names = rng.sample(WORDS, self.keys)
        return [(name, number(rng)) for name in names], rng.choice(names)


@dataclass(frozen=True)
class NiahMultivalue(_Niah):
    """One key has ``values`` values, all asked for, in the order of the text."""

    name = "niah_multivalue"
    headline = "token_accuracy"

    values: int = 4

    def pairs(self, rng: random.Random) -> tuple[list[tuple[str, str]], str]:
        key = rng.choice(WORDS)
        return [(key, number(rng)) for _ in range(self.values)], key

    def question(self, key: str) -> str:
        return (
            f"\n\nQuestion: What are all the special magic numbers for {key}, in the order in which they appear?\n"
            f"Answer: The special magic numbers for {key} are:"
        )


def _phrase(key: str) -> str:
    return f"One of the special magic numbers for {key} is:"
