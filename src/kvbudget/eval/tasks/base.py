"""The contract of a task: contexts with probes, each a question and the answer that the model should continue with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache


@dataclass(frozen=True)
class Probe:
    """One question about a context: ``question`` is fed, then ``answer`` is teacher-forced; both are token ids ``[n]``.

    ``skip`` leaves the answer's first tokens out of the scores (a verbatim recall needs a few tokens to find its place).
    """

    question: Tensor
    answer: Tensor
    skip: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A context ``[T]`` and the probes asked of it one by one, each from the same compressed cache."""

    context: Tensor
    probes: Sequence[Probe]
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """Logits ``[n, V]`` that predict the n scored tokens of a probe's answer, and these tokens."""

    logits: Tensor
    targets: Tensor

    @property
    def correct(self) -> Tensor:
        """Which answer tokens greedy decoding would produce, given the ones before: bool ``[n]``."""
        return self.logits.argmax(-1) == self.targets

    def scores(self) -> dict[str, float]:
        """``exact`` (greedy decoding gives the answer word for word), ``token_accuracy``, ``logprob`` (mean, nats)."""
        logprob = self.logits.float().log_softmax(-1).gather(-1, self.targets[:, None])
        correct = self.correct
        return {
            "exact": float(correct.all()),
            "token_accuracy": float(correct.float().mean()),
            "logprob": float(logprob.mean()),
        }


@dataclass(frozen=True)
class Task(ABC):
    """Makes seeded examples. ``headline`` names the score that reports lead with; higher is better."""

    name: ClassVar[str]
    headline: ClassVar[str] = "exact"
    chance: ClassVar[float] = 0.0

    @abstractmethod
    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        """``count`` examples, the same for the same seed."""


@torch.inference_mode()
def read(model: PreTrainedModel, cache: KVCache, probe: Probe) -> Reading:
    """Asks one probe of a filled cache, which is left as it was: question and answer go through a fork in one forward.

    Greedy decoding would produce the answer exactly if every token of it is the most likely one given those before, so
    no generation is needed.
    """
    ids = torch.cat([probe.question, probe.answer])[None, :-1]
    logits = model(ids, past_key_values=cache.fork()).logits[0, -len(probe.answer) :]
    return Reading(logits[probe.skip :].float(), probe.answer[probe.skip :])
