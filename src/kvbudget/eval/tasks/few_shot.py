"""Few-shot classification: labeled example sentences in the context, new ones as probes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.texts import beginning, encode, encode_pair

# Sentence patterns and fillers per label; the label is what a reader would say.
TOPICS: dict[str, tuple[str, str, str]] = {
    "food": (
        "The {0} was served with {1}.|She cooked {1} and a {0} for dinner.|I had a {0} with {1} for lunch.",
        "soup|salad|sandwich|roast|pie|stew|pancake|omelet",
        "fresh bread|melted butter|rice and beans|baked potatoes|tomato sauce|grilled onions",
    ),
    "sports": (
        "The {0} won the match after {1}.|Fans cheered as the {0} made {1}.|The {0} trained for weeks and finished with {1}.",
        "goalkeeper|striker|tennis player|home team|swimmer|boxer|captain|sprinter",
        "a late goal|a perfect serve|a new record|a penalty kick|two points in overtime|a gold medal",
    ),
    "weather": (
        "There will be {0} in the {1}.|The {1} brought {0} again.|Expect {0} through the {1}.",
        "heavy rain|strong winds|thick fog|bright sunshine|light snow|thunderstorms|a hard frost|hail",
        "early morning|afternoon|northern valleys|coming night|weekend|coastal towns",
    ),
    "music": (
        "The {0} played {1} on the stage.|He recorded {1} with a {0}.|The audience loved {1} by the {0}.",
        "violinist|jazz band|orchestra|pianist|choir|drummer|guitarist|cellist",
        "a slow ballad|an old folk song|a new album|the second symphony|a long solo|a cheerful melody",
    ),
}


@dataclass(frozen=True)
class FewShot(Task):
    """Sentences with their topic as demonstrations, and unseen ones whose topic is asked; `chance` is one of four.

    Attributes:
        shots: demonstrations in the context, labels balanced.
        asked: probes per context, labels balanced.
        renamed: demonstrations and answers use the labels under a random renaming, so that only the context tells what
            a label means.
    """

    name = "few_shot"
    chance: ClassVar[float] = 1 / len(TOPICS)

    shots: int = 48
    asked: int = 8
    renamed: bool = False

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        return [self._example(tokenizer, random.Random(f"few_shot {seed} {i}")) for i in range(count)]

    def _example(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Example:
        labels = list(TOPICS)
        words = rng.sample(labels, len(labels)) if self.renamed else labels
        named = dict(zip(labels, words, strict=True))
        seen: set[str] = set()
        rows = [(label, _sentence(label, rng, seen)) for label in _balanced(labels, self.shots + self.asked, rng)]
        shots, asked = rows[: self.shots], rows[self.shots :]
        text = "".join(f"Text: {sentence}\nTopic: {named[label]}\n\n" for label, sentence in shots)
        context = torch.cat([beginning(tokenizer), encode(tokenizer, text)])
        probes = []
        for label, sentence in asked:
            question, answer = encode_pair(tokenizer, f"Text: {sentence}\nTopic:", f" {named[label]}")
            probes.append(Probe(question, answer, info={"label": named[label]}))
        return Example(context, probes, {"length": len(context)})


def _balanced(labels: list[str], count: int, rng: random.Random) -> list[str]:
    """``count`` labels in random order; each run of ``len(labels)`` has every label once."""
    return [label for _ in range(-(-count // len(labels))) for label in rng.sample(labels, len(labels))][:count]


def _sentence(label: str, rng: random.Random, seen: set[str]) -> str:
    patterns, first, second = (options.split("|") for options in TOPICS[label])
    while True:
        sentence = rng.choice(patterns).format(rng.choice(first), rng.choice(second))
        if sentence not in seen:
            seen.add(sentence)
            return sentence
