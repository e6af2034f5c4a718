"""Recall probe: a verbatim span of the context as its continuation, which the cache must still hold to predict."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.texts import beginning, passages


@dataclass(frozen=True)
class Recall(Task):
    """KL against the full cache, and token accuracy, on spans of the context repeated word for word.

    The first ``skip`` tokens of a span let the model find its place and are not scored. No labels are needed, and unlike a
    natural continuation it sees what the cache has forgotten.

    Attributes:
        length: tokens of the context.
        tokens: tokens of a span.
        skip: tokens of a span that are not scored.
        spans: probes per context, one drawn from each equal part of it.
    """

    name = "recall"
    headline: ClassVar[str] = "log_kl"
    higher_is_better: ClassVar[bool] = False
    labeled: ClassVar[bool] = False

    length: int = 1024
    tokens: int = 40
    skip: int = 8
    spans: int = 4
    text: str | None = None

    def __post_init__(self) -> None:
        if self.skip >= self.tokens or self.tokens * self.spans > self.length:
            raise KVBudgetError(
                f"task recall: {self.spans} spans of {self.tokens} tokens, of which {self.skip} are skipped, in {self.length} "
                "tokens leave nothing to score; give skip < tokens, and tokens times spans at most length"
            )

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        start = beginning(tokenizer)
        body = self.length - len(start)
        part = body // self.spans
        found = []
        for number, ids in enumerate(passages(tokenizer, body, count, seed, self.text)):
            rng = random.Random(f"recall {seed} {number}")
            context = torch.cat([start, ids])
            probes = []
            for index in range(self.spans):
                begin = len(start) + index * part + rng.randint(0, part - self.tokens)
                span = context[begin : begin + self.tokens]
                depth = begin / self.length
                probes.append(Probe(span[:1], span[1:], self.skip - 1, {"position": begin, "depth": depth}))
            found.append(Example(context, probes, {"length": self.length}))
        return found
