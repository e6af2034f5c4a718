"""Haystacks: sentences buried at given depths of a text, and the words that needles are made of."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.texts import beginning, encode


def _words(text: str) -> list[str]:
    return text.split()


CITIES = _words(
    "Amsterdam Athens Bangkok Barcelona Berlin Bogota Boston Brussels Budapest Cairo Chicago Copenhagen Dakar Delhi Dublin "
    "Geneva Hamburg Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Mexico Milan "
    "Montreal Moscow Mumbai Munich Nairobi Naples Oslo Paris Prague Quito Rome Seattle Seoul Singapore Stockholm Sydney "
    "Tokyo Toronto Vienna Warsaw Zurich"
)
WORDS = _words(
    "apple anchor arrow basket beacon bottle branch bridge bucket button candle canyon carpet castle circle cotton cradle "
    "desert dragon engine falcon feather fiddle forest garden ginger glacier hammer harbor helmet island jacket jungle kettle "
    "ladder lantern lemon marble meadow mirror monkey needle ocean orange paddle palace pepper pillow planet pocket puzzle "
    "rabbit ribbon river rocket saddle silver spider spring summer temple thunder ticket tunnel turtle valley velvet violin "
    "walnut whistle window winter zipper"
)


def number(rng: random.Random, digits: int = 5) -> str:
    """A number of exactly ``digits`` digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def bury(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    needles: Sequence[tuple[float, str]],
    length: int,
) -> tuple[Tensor, list[int]]:
    """A context of at most ``length`` tokens that holds each needle at its depth between two sentences.

    ``needles`` are ``(depth in [0, 1], sentence)``; needles of one place keep their order. Returns the token ids ``[T]``,
    less than one sentence short of ``length``, and the position of each needle's first token.

    Raises:
        KVBudgetError: when the needles leave no room for text.
    """
    pins = _ids(tokenizer, [sentence for _, sentence in needles])
    start = beginning(tokenizer).tolist()
    room = length - len(start) - sum(map(len, pins))
    if room <= 0:
        raise KVBudgetError(
            f"a context of {length} tokens has no room for text beside what is hidden in it; give more than {length - room} tokens"
        )
    straw: list[list[int]] = []
    edges = [0]
    for ids in _ids(tokenizer, sentences):
        if edges[-1] + len(ids) > room:
            break
        straw.append(ids)
        edges.append(edges[-1] + len(ids))
    # Each needle goes to the sentence boundary nearest to its depth.
    places = [min(range(len(edges)), key=lambda e: abs(edges[e] - depth * edges[-1])) for depth, _ in needles]
    context, found = start, [0] * len(needles)
    for edge in range(len(edges)):
        for index, place in enumerate(places):
            if place == edge:
                found[index] = len(context)
                context = context + pins[index]
        if edge < len(straw):
            context = context + straw[edge]
    return torch.tensor(context, dtype=torch.long), found


def _ids(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> list[list[int]]:
    return [encode(tokenizer, " " + sentence).tolist() for sentence in sentences]


def spread(count: int, rng: random.Random) -> list[float]:
    """``count`` depths in ascending order, one drawn from each equal part of the text."""
    return [(i + rng.random()) / count for i in range(count)]
