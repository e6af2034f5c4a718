"""Metrics of generated answers as LongBench, LongBench v2 and RULER publish them; each gives a share in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher


def qa_f1(answer: str, reference: str) -> float:
    """F1 over the words of two texts without case, punctuation and articles (SQuAD).

    >>> qa_f1("The capital is Paris.", "Paris")
    0.5
    """
    given, wanted = _words(answer), _words(reference)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004, one sequence per text).

    >>> rouge_l("the cat sat down", "the cat lay down")
    0.75
    """
    given, wanted = answer.split(), reference.split()
    if not given or not wanted:
        return 0.0
    row = [0] * (len(wanted) + 1)
    for word in given:
        before = 0
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(given) + len(wanted))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of class names that an answer mentions, if the right one is among them.

    Names that are a part of the right one do not count as mentioned.

    >>> classification("Food or Music", "Music", ["Food", "Music", "Art"])
    0.5
    """
    named = [name for name in classes if name in answer and not (name in reference and name != reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str) -> float:
    """Share of the numbers in an answer that are the number of the right paragraph.

    >>> retrieval("Paragraph 12, or 3", "Paragraph 12")
    0.5
    """
    wanted = re.findall(r"Paragraph (\d+)", reference)
    return _share_of_numbers(answer, wanted[0] if wanted else reference)


def count(answer: str, reference: str) -> float:
    """Share of the numbers in an answer that equal the right count.

    >>> count("There are 7.", "7")
    1.0
    """
    return _share_of_numbers(answer, reference.strip())


def code_similarity(answer: str, reference: str) -> float:
    """Similarity of the first line of code in an answer and the right line, by matching blocks, in whole percent.

    >>> code_similarity("# here it is\\nreturn x\\n", "return x")
    1.0
    """
    lines = (line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return round(100 * SequenceMatcher(None, next(lines, ""), reference).ratio()) / 100


def all_contained(answer: str, references: Sequence[str]) -> float:
    """Share of the references that an answer contains, case ignored (RULER's needles, tracking and words).

    >>> all_contained("12 and 34", ["12", "34", "56", "78"])
    0.5
    """
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def any_contained(answer: str, references: Sequence[str]) -> float:
    """Whether an answer contains one of the references, case ignored (RULER's questions).

    >>> any_contained("It was Paris.", ["paris", "the capital"])
    1.0
    """
    return float(any(reference.lower() in answer.lower() for reference in references))


def choice(answer: str, reference: str) -> float:
    """Whether an answer says "The correct answer is (X)" with the letter of the reference sentence (LongBench v2).

    >>> choice("So: The correct answer is B.", "The correct answer is (B)"), choice("B", "The correct answer is (B)")
    (1.0, 0.0)
    """
    given, wanted = (
        re.search(r"The correct answer is \(?([A-D])\b", text.replace("*", "")) for text in (answer, reference)
    )
    return float(given is not None and wanted is not None and given.group(1) == wanted.group(1))


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _share_of_numbers(answer: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", answer)
    return sum(n == wanted for n in numbers) / len(numbers) if numbers else 0.0
