"""Needle in a haystack: one sentence with a number, at a grid of depths and lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import CITIES, bury, number
from kvbudget.eval.texts import encode_pair, haystacks


@dataclass(frozen=True)
class Needle(Task):
    """One needle in a real text, always reported per depth.

    Kamradt 2023 has the idea; the needle is a sentence with five digits, and the answer begins with that sentence's own
    words, which small models can complete. Example i belongs to cell ``i % len(depths)``; the examples of one round over
    the depths share haystack and needle, so that depths are compared on the same text. ``info`` of an example has
    ``depth``, ``length`` and the needle's ``position``.

    Attributes:
        length: tokens of the context at most.
        depths: where the needle is: 0 the beginning, 1 the end.
    """

    name = "needle"
    aliases: ClassVar[tuple[str, ...]] = ("niah",)
    headline: ClassVar[str] = "exact"

    length: int = 1024
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    text: str | None = None

    def __post_init__(self) -> None:
        if not self.depths or not all(isinstance(depth, (int, float)) and 0 <= depth <= 1 for depth in self.depths):
            raise KVBudgetError(f"task needle: depths={self.depths!r} must be numbers from 0 (beginning) to 1 (end)")

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        cells = len(self.depths)
        texts = haystacks(tokenizer, self.length, -(-count // cells), seed, self.text)
        found = []
        for i in range(count):
            rng = random.Random(f"needle {seed} {i // cells}")
            depth = self.depths[i % cells]
            city, digits = rng.choice(CITIES), number(rng)
            phrase = f"The special magic number for {city} is"
            context, at = bury(tokenizer, texts[i // cells], [(depth, f"{phrase} {digits}.")], self.length)
            question = f"\n\nQuestion: What is the special magic number for {city}?\nAnswer: {phrase}"
            probe = Probe(*encode_pair(tokenizer, question, f" {digits}"), info={"depth": depth, "city": city})
            info = {"depth": depth, "length": self.length, "position": at[0]}
            found.append(Example(context, [probe], info))
        return found
