"""The contract of a task: contexts with probes, each a question and the answer that the model should continue with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache
from kvbudget.driver import revising
from kvbudget.eval.chorus import Chorus
from kvbudget.eval.fidelity import compare_logits
from kvbudget.policy.base import LookingBack


@dataclass(frozen=True)
class Probe:
    """One question about a context: ``question`` is fed, then ``answer`` is teacher-forced; both are token ids ``[n]``.

    ``question`` has at least one token. ``skip`` leaves the answer's first tokens out of the scores (a verbatim recall
    needs a few tokens to find its place).
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
class Outcome:
    """What came of one probe: its scores by name, and the reading that later caches are compared with."""

    scores: dict[str, float]
    reading: Reading


@dataclass(frozen=True)
class Task(ABC):
    """Makes seeded examples and scores the answers to their probes.

    ``headline`` names the score that reports lead with, and ``higher_is_better`` its direction; ``chance`` is what a
    blind guess reaches. ``labeled`` tasks have answers that are right or wrong, so a model can fail them with a full
    cache; the others measure distances from the full cache and are informative with any model. ``diagnose`` asks the runner
    for the error of every layer's attention output too. Tasks that generate their answers instead of `read`ing them say
    ``reads = False``.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[str] = "exact"
    higher_is_better: ClassVar[bool] = True
    labeled: ClassVar[bool] = True
    chance: ClassVar[float] = 0.0
    diagnose: ClassVar[bool] = False
    reads: ClassVar[bool] = True

    @abstractmethod
    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        """``count`` examples, the same for the same seed."""

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: KVCache,
        probe: Probe,
        full: Reading | None = None,
    ) -> Outcome:
        """Asks one probe of a filled cache, which is left as it was; ``full`` is the full cache's reading of it."""
        reading = read(model, cache, probe)
        return Outcome(self.score(reading, full), reading)

    def score(self, reading: Reading, full: Reading | None = None) -> dict[str, float]:
        """`Reading.scores`, and given the full cache's reading also the distances `fidelity_scores`."""
        return reading.scores() | fidelity_scores(reading, full)


def fidelity_scores(reading: Reading, full: Reading | None) -> dict[str, float]:
    """``log_kl`` (of the mean over tokens), ``kl_mean``, ``kl_p95``, ``agreement``, ``nll_rise``, ``perplexity_ratio``.

    Empty without ``full``.
    """
    if full is None:
        return {}
    found = compare_logits(full.logits, reading.logits, reading.targets)
    names = ("log_kl", "kl_mean", "kl_p95", "agreement", "nll_rise", "perplexity_ratio")
    return {name: getattr(found, name) for name in names}


@torch.inference_mode()
def read(model: PreTrainedModel, cache: KVCache, probe: Probe) -> Reading:
    """Asks one probe of a filled cache, which is left as it was: question and answer go through a fork in one forward.

    Greedy decoding would produce the answer exactly if every token of it is the most likely one given those before, so
    no generation is needed. Policies whose queries read less in decoding alone get the answer token by token, those that
    revise earlier tokens under their driver.
    """
    fork = cache.fork()
    with revising(model, fork):
        logits = _answered(model, fork, 1, probe, _selects_in_decoding(cache))
    return Reading(logits[0], _targets(model, probe))


def _answered(model: PreTrainedModel, cache: Cache, count: int, probe: Probe, by_token: bool) -> Tensor:
    """Logits ``[count, n, V]`` of the scored tokens, from a cache of ``count`` sequences that takes them all."""
    ids = torch.cat([probe.question, probe.answer])[None, :-1].to(model.device).expand(count, -1)
    scored, pieces = len(probe.answer) - probe.skip, [ids]
    if by_token:
        pieces = [ids[:, : len(probe.question) - 1], *ids[:, len(probe.question) - 1 :].split(1, dim=1)]
    keep = scored if len(pieces) == 1 else 0
    rows = [
        model(piece, past_key_values=cache, logits_to_keep=keep or piece.shape[1]).logits
        for piece in pieces
        if piece.shape[1]
    ]
    return torch.cat(rows, dim=1)[:, -scored:].float()


def _targets(model: PreTrainedModel, probe: Probe) -> Tensor:
    return probe.answer[probe.skip :].to(model.device)


def _selects_in_decoding(cache: KVCache) -> bool:
    selector = cache.parts.selector
    return isinstance(selector, LookingBack) or (selector is not None and not selector.prefill)


@torch.inference_mode()
def read_together(model: PreTrainedModel, caches: Sequence[KVCache], probe: Probe) -> list[Reading]:
    """As `read` from each of several caches of the same context; those that read alike share their forwards."""
    driven = [i for i, cache in enumerate(caches) if isinstance(cache.parts.selector, LookingBack)]
    readings = {i: read(model, caches[i], probe) for i in driven}
    for by_token in (False, True):
        alike = [i for i, c in enumerate(caches) if i not in driven and _selects_in_decoding(c) is by_token]
        if alike:
            logits = _answered(model, Chorus([caches[i] for i in alike]), len(alike), probe, by_token)
            readings |= {i: Reading(row, _targets(model, probe)) for i, row in zip(alike, logits, strict=True)}
    return [readings[i] for i in range(len(caches))]


def visible_form(example: Example, probe: Probe) -> tuple[Tensor, Probe]:
    """The query-aware form of a probe: the context ``[T]`` that ends with its question, and what is left to probe.

    The question's last token stays outside, because the first answer token must be predicted from the compressed cache.
    """
    context = torch.cat([example.context, probe.question[:-1]])
    return context, replace(probe, question=probe.question[-1:])


def shuffled(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """A control: the answers are dealt out anew over all probes, so that a sound task scores at chance.

    No probe keeps its own answer unless two are equal; contexts and questions stay.
    """
    answers = [probe.answer for example in examples for probe in example.probes]
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed)).tolist()
    # One step along a random cycle leaves nobody in place.
    dealt = {order[i]: answers[order[i - 1]] for i in range(len(order))}
    place = iter(range(len(answers)))
    return [
        replace(example, probes=[replace(probe, answer=dealt[next(place)]) for probe in example.probes])
        for example in examples
    ]
