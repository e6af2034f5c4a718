"""Passkey retrieval: a number that the text asks to remember, at a random depth."""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import bury, number
from kvbudget.eval.texts import encode_pair, haystacks


@dataclass(frozen=True)
class Passkey(Task):
    """A pass key, said twice, in a text; asked for at the end (Mohtashami and Jaggi, arXiv 2305.16300).

    Attributes:
        length: tokens of the context at most.
    """

    name = "passkey"

    length: int = 1024
    text: str | None = None

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        found = []
        for i, lines in enumerate(haystacks(tokenizer, self.length, count, seed, self.text)):
            rng = random.Random(f"passkey {seed} {i}")
            key, depth = number(rng), (i + rng.random()) / count
            sentence = f"The pass key is {key}. Keep it in mind: the pass key is {key}."
            context, at = bury(tokenizer, lines, [(depth, sentence)], self.length)
            question = "\n\nQuestion: What is the pass key?\nAnswer: The pass key is"
            probe = Probe(*encode_pair(tokenizer, question, f" {key}"), info={"depth": depth})
            found.append(Example(context, [probe], {"depth": depth, "length": self.length, "position": at[0]}))
        return found
