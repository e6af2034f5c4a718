"""Multi-turn: several questions about one context, one after the other, unknown when the context is compressed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.tasks.haystack import CITIES, bury, number, spread
from kvbudget.eval.texts import encode_pair, haystacks


@dataclass(frozen=True)
class MultiTurn(Task):
    """A dialogue over a shared context (the multi-turn mode of SCBench, arXiv 2412.10319).

    The question of turn t carries the turns before it with their right answers, so that turns are scored apart from
    earlier mistakes. Facts differ in kind, since small models mix up several of one kind.

    Attributes:
        length: tokens of the context at most.
        turns: questions per context, at most four.
    """

    name = "multi_turn"

    length: int = 1024
    turns: int = 3
    text: str | None = None

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        found = []
        for i, lines in enumerate(haystacks(tokenizer, self.length, count, seed, self.text)):
            rng = random.Random(f"multi_turn {seed} {i}")
            facts = rng.sample(_facts(rng), self.turns)
            depths = spread(self.turns, rng)
            needles = [(depth, f"{phrase} {value}.") for depth, (_, phrase, value) in zip(depths, facts, strict=True)]
            context, _ = bury(tokenizer, lines, needles, self.length)
            probes: list[Probe] = []
            history = torch.empty(0, dtype=torch.long)
            for turn, at in enumerate(rng.sample(range(self.turns), self.turns)):
                asked, phrase, value = facts[at]
                question, answer = encode_pair(tokenizer, f"\n\nQuestion: {asked}?\nAnswer: {phrase}", f" {value}")
                info = {"turn": turn, "depth": depths[at]}
                probes.append(Probe(torch.cat([history, question]), answer, info=info))
                history = torch.cat([history, question, answer])
            found.append(Example(context, probes, {"length": self.length}))
        return found


def _facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """Question, the words that the answer repeats, and the value."""
    city = rng.choice(CITIES)
    return [
        (f"What is the special magic number for {city}", f"The special magic number for {city} is", number(rng)),
        ("What is the pass key", "The pass key is", number(rng)),
        ("Which room is the meeting held in", "The meeting is held in room", number(rng, 3)),
        ("In which year was the old mill built", "The old mill was built in the year", str(rng.randint(1500, 1899))),
    ]
