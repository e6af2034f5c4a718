"""Common words: which words occur most often in a long list, in the style of RULER."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import WORDS
from kvbudget.eval.texts import beginning, encode, encode_pair


@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list in which ``common`` words occur ten times as often as the others (arXiv 2404.06654).

    The answer names them in the order of their first occurrence; few small models can do it.

    Attributes:
        length: tokens of the context at most.
        common: frequent words, all asked for.
    """

    name = "common_words"
    headline: ClassVar[str] = "token_accuracy"

    length: int = 1024
    common: int = 3

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        return [self._example(tokenizer, random.Random(f"common_words {seed} {i}")) for i in range(count)]

    def _example(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Example:
        words = rng.sample(WORDS, len(WORDS))
        frequent, rare = words[: self.common], words[self.common :]
        start = beginning(tokenizer)
        head = encode(tokenizer, "Here is a numbered list of words. Some of them occur often.\n")
        best: tuple[torch.Tensor, list[str]] | None = None
        for rounds in range(1, self.length):
            items = [word for word in frequent for _ in range(10 * rounds)]
            items += [word for word in rare[: 20 * rounds] for _ in range(max(1, 20 * rounds // len(rare)))]
            rng.shuffle(items)
            body = encode(tokenizer, " ".join(f"{n}. {word}" for n, word in enumerate(items, 1)))
            context = torch.cat([start, head, body])
            if len(context) > self.length:
                break
            best = context, items
        if best is None:
            raise KVBudgetError(f"a word list does not fit into {self.length} tokens; give at least {len(context)}")
        context, items = best
        ordered = sorted(frequent, key=items.index)
        question = (
            f"\n\nQuestion: Which {self.common} words occur most often in the list?\nAnswer: The most common words are:"
        )
        probe = Probe(*encode_pair(tokenizer, question, " " + ", ".join(ordered)))
        return Example(context, [probe], {"length": self.length, "words": ordered})
