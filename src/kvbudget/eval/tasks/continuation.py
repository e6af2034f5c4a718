"""Continuation fidelity: how far next-token distributions move when the cache of a real text is compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.eval.tasks.base import Example, Probe, Reading, Task, fidelity_scores
from kvbudget.eval.texts import beginning, passages


@dataclass(frozen=True)
class Continuation(Task):
    """KL, agreement and perplexity against the full cache on the text that follows a context; works with any model.

    Attributes:
        length: tokens of the context.
        tokens: scored tokens per continuation.
        continuations: probes per context. The first goes on where the context ends; each further one goes on with the
            stretch of text after it, as if the text between had been cut, so that more of the context is asked for.
        text: see `kvbudget.eval.texts.documents`.
    """

    name = "fidelity"
    headline: ClassVar[str] = "log_kl"
    higher_is_better: ClassVar[bool] = False
    labeled: ClassVar[bool] = False
    diagnose: ClassVar[bool] = True

    length: int = 1024
    tokens: int = 64
    continuations: int = 2
    text: str | None = None

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        # The token that is fed first is not scored: the last row of the prefill predicts it, and that one is exact.
        step = self.tokens + 1
        start = beginning(tokenizer)
        body = self.length - len(start)
        found = []
        for ids in passages(tokenizer, body + self.continuations * step, count, seed, self.text):
            pieces = ids[body:].split(step)
            probes = [Probe(piece[:1], piece[1:], info={"gap": i * step}) for i, piece in enumerate(pieces)]
            found.append(Example(torch.cat([start, ids[:body]]), probes, {"length": self.length}))
        return found

    def score(self, reading: Reading, full: Reading | None = None) -> dict[str, float]:
        """Only distances: whether the text itself was predicted says nothing about the cache."""
        return fidelity_scores(reading, full)
