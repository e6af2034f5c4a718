"""Prose: a seeded writer of plain English, so that haystacks exist where no text is at hand."""

from __future__ import annotations

import random


def _list(text: str) -> list[str]:
    return text.split("|")


PEOPLE = _list("Agnes|Bertram|Celia|Dorian|Edith|Felix|Greta|Hugo|Imogen|Jasper|Lydia|Magnus|Nora|Oswald|Petra|Rufus")
TRADES = _list("baker|carpenter|clockmaker|ferryman|gardener|librarian|miller|painter|surveyor|tailor|teacher|watchman")
PLACES = _list(
    "the harbor|the old bridge|the market square|the orchard|the reading room|the railway station|the north gate|"
    "the lighthouse|the workshop|the kitchen|the town hall|the river path|the chapel yard|the upper meadow"
)
THINGS = _list(
    "a brass key|a folded map|a basket of pears|a broken lantern|a bundle of letters|a blue coat|a wooden flute|a jar of honey|"
    "a ledger|a spool of thread|a silver spoon|a garden spade|a box of candles|a torn photograph"
)
TIMES = _list(
    "in the early morning|before noon|late in the afternoon|after supper|on the first day of spring|during the long rain|"
    "at the end of the week|when the bells had stopped|under a low gray sky|while the others slept"
)
CARRIED = _list("carried|found|hid|mended|sold|borrowed|wrapped|examined|lost|returned|described|offered")
WENT = _list(
    "walked to|hurried past|waited near|turned back at|slept beside|worked behind|stood before|looked out over"
)
SAID = _list(
    "the road would be closed until autumn|nobody had asked the right question|the price of flour was rising again|"
    "the winter would be a mild one|the water had never been so clear|a stranger had come by on foot|"
    "there was still time to change the plan|the work should have been finished long ago|"
    "silence is often the better answer|the roof could not bear another storm"
)
MOODS = _list("calm|doubtful|cheerful|weary|curious|patient|restless|proud|uneasy|grateful")
LINKS = _list("because|although|so that|while|and yet|as if|even though|until")
WEATHER = _list(
    "the wind came in from the sea|the snow lay thick on the roofs|smoke rose straight into the air|the grass was wet|"
    "the streets were almost empty|a dog barked somewhere far off|the lamps were being lit|the tide was going out"
)


def write(words: int, seed: int = 0) -> str:
    """At least ``words`` words in paragraphs of three to seven sentences, the same for the same seed.

    >>> write(50, seed=1) == write(50, seed=1) != write(50, seed=2)
    True
    """
    rng = random.Random(seed)
    cast = [f"{name} the {trade}" for name, trade in zip(rng.sample(PEOPLE, 6), rng.sample(TRADES, 6), strict=True)]
    paragraphs: list[str] = []
    written = 0
    while written < words:
        hero, other = rng.sample(cast, 2)
        lines = [_sentence(rng, hero, other) for _ in range(rng.randint(3, 7))]
        paragraphs.append(" ".join(lines))
        written += len(paragraphs[-1].split())
    return "\n\n".join(paragraphs)


def _sentence(rng: random.Random, hero: str, other: str) -> str:
    who = rng.choice((hero, hero.split()[0], other))
    whom = rng.choice((other.split()[0], hero.split()[0], "a neighbor", "everybody"))
    pick = rng.choice
    patterns = (
        lambda: f"{pick(TIMES)}, {who} {pick(WENT)} {pick(PLACES)} and {pick(CARRIED)} {pick(THINGS)}",
        lambda: f"{who} told {whom} that {pick(SAID)}",
        lambda: f"{who} was {pick(MOODS)} {pick(LINKS)} {pick(WEATHER)}",
        lambda: f"at {pick(PLACES).removeprefix('at ')} {pick(WEATHER)}, and {who} {pick(CARRIED)} {pick(THINGS)}",
        lambda: f"{pick(WEATHER)} {pick(TIMES)}, {pick(LINKS)} {who} had seen {pick(THINGS)} near {pick(PLACES)}",
        lambda: f"it was {whom} who {pick(CARRIED)} {pick(THINGS)}, {pick(LINKS)} {pick(SAID)}",
        lambda: f"nobody at {pick(PLACES)} felt {pick(MOODS)} that day, for {pick(SAID)}",
    )
    line = pick(patterns)()
    return line[0].upper() + line[1:] + "."
