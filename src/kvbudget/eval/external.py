"""LongBench, LongBench v2 and RULER, read through ``datasets`` or from files: rows become examples, answers get grades."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache
from kvbudget.errors import KVBudgetError, nearest
from kvbudget.eval import metrics
from kvbudget.eval.generation import generate
from kvbudget.eval.tasks.base import Example, Outcome, Probe, Reading, Task
from kvbudget.eval.texts import beginning, encode, encode_pair, read_rows


@dataclass(frozen=True)
class Item:
    """One row of a benchmark: what comes before the question, the question with the answer's first words, and the key.

    ``first_line`` grades only the first line of an answer.
    """

    context: str
    question: str
    references: Sequence[str]
    metric: str
    max_new_tokens: int
    classes: Sequence[str] = ()
    first_line: bool = False

    def grade(self, answer: str) -> float:
        """The published metric of an answer in [0, 1]; of several references the best counts."""
        if self.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        if self.metric in ("all_contained", "any_contained"):
            return getattr(metrics, self.metric)(answer, self.references)
        if self.metric == "classification":
            return max(metrics.classification(answer, reference, self.classes) for reference in self.references)
        return max(getattr(metrics, self.metric)(answer, reference) for reference in self.references)


@dataclass(frozen=True)
class External(Task):
    """A published benchmark whose answers are generated greedily and graded by its own metric (score ``grade``).

    The other scores read the first reference under teacher forcing. Prompts follow the published structure
    (instruction, context, question, beginning of the answer) in words of our own, so that figures compare methods, not
    papers. No chat template is applied.

    Attributes:
        subset: part of the benchmark.
        length: tokens of the context at most; longer ones lose their middle, as LongBench does it.
        rows: a local ``.jsonl`` (or ``.jsonl.gz``) file to read instead of downloading.
    """

    headline: ClassVar[str] = "grade"
    reads: ClassVar[bool] = False

    subset: str = ""
    length: int = 4096
    rows: str | None = None

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        rows = read_rows(Path(self.rows)) if self.rows else self.download()
        if len(rows) < count:
            raise KVBudgetError(
                f"{self.name} {self.subset} has {len(rows)} rows, {count} were asked for; lower the count"
            )
        chosen = random.Random(f"{self.name} {seed}").sample(list(rows), count)
        return [self.example(tokenizer, self.item(row)) for row in chosen]

    @abstractmethod
    def download(self) -> Any:
        """All rows of the subset, from the hub."""

    @abstractmethod
    def item(self, row: Any) -> Item:
        """What a row asks, in the benchmark's own columns."""

    def example(self, tokenizer: PreTrainedTokenizerBase, item: Item) -> Example:
        """The tokens of an item; its probe carries the item."""
        start = beginning(tokenizer)
        context = torch.cat([start, without_middle(encode(tokenizer, item.context), self.length - len(start))])
        probe = Probe(*encode_pair(tokenizer, item.question, f" {item.references[0]}"), info={"item": item})
        return Example(context, [probe], {"length": len(context), "subset": self.subset})

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: KVCache,
        probe: Probe,
        full: Reading | None = None,
    ) -> Outcome:
        outcome = super().ask(model, tokenizer, cache, probe, full)
        item: Item = probe.info["item"]
        answer = generate(model, tokenizer, cache, probe.question, item.max_new_tokens)
        outcome.scores["grade"] = item.grade(answer)
        return outcome


@dataclass(frozen=True)
class LongBench(External):
    """The English and code parts of LongBench (Bai et al., arXiv 2308.14508)."""

    name = "longbench"

    subset: str = "hotpotqa"

    def download(self) -> Any:
        """The subset's file inside of the archive that the benchmark publishes."""
        _known(self.name, self.subset, LONGBENCH)
        archive = "hf://datasets/THUDM/LongBench/data.zip"
        return _load("json", data_files=f"zip://data/{self.subset}.jsonl::{archive}", split="train")

    def item(self, row: Any) -> Item:
        """Columns ``context, input, answers, all_classes``."""
        _known(self.name, self.subset, LONGBENCH)
        part = LONGBENCH[self.subset]
        return Item(
            f"{part.instruction}\n\n{row['context']}\n\n",
            part.ask.format(input=row["input"]),
            row["answers"],
            part.metric,
            part.max_new_tokens,
            row.get("all_classes") or (),
            part.first_line,
        )


@dataclass(frozen=True)
class LongBenchV2(External):
    """LongBench v2: hard questions with four choices (Bai et al., arXiv 2412.15204). ``subset``: short, medium, long."""

    name = "longbench_v2"
    chance: ClassVar[float] = 0.25

    subset: str = "short"

    def download(self) -> Any:
        """The rows of one length group."""
        _known(self.name, self.subset, ("short", "medium", "long"))
        return [row for row in _load("THUDM/LongBench-v2", split="train") if row["length"] == self.subset]

    def item(self, row: Any) -> Item:
        """Columns ``context, question, choice_A, ..., choice_D, answer`` (a letter)."""
        choices = "\n".join(f"({letter}) {row[f'choice_{letter}']}" for letter in "ABCD")
        question = (
            f"\n\nQuestion: {row['question'].strip()}\nChoices:\n{choices}\n\n"
            'Reply with one line of the form "The correct answer is (letter)".\nAnswer:'
        )
        context = f"Read the text, then answer the question about it.\n\n{row['context'].strip()}"
        return Item(context, question, [f"The correct answer is ({row['answer']})"], "choice", 32)


@dataclass(frozen=True)
class Ruler(External):
    """RULER (Hsieh et al., arXiv 2404.06654) as prepared on the hub by the authors of kvpress.

    ``subset`` is one of its 13 tasks (niah_single_1, vt, cwe, qa_1, ...); ``tokens`` one of the prepared lengths. Nothing is
    cut out of the middle, where the needles are.
    """

    name = "ruler"

    subset: str = "niah_single_1"
    tokens: int = 4096
    length: int = 1_000_000

    def download(self) -> Any:
        """The rows of one task at one length."""
        rows = _load("simonjegou/ruler", str(self.tokens), split="test")
        return [row for row in rows if row["task"] == self.subset]

    def item(self, row: Any) -> Item:
        """Columns ``context, question, answer_prefix, answer`` (a list), ``task, max_new_tokens``."""
        references = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        metric = "any_contained" if row["task"].startswith("qa") else "all_contained"
        question = f"{row['question']}{row['answer_prefix']}"
        return Item(row["context"], question, references, metric, int(row["max_new_tokens"]))


@dataclass(frozen=True)
class Part:
    """How one part of LongBench is asked and graded."""

    instruction: str
    ask: str
    metric: str
    max_new_tokens: int
    first_line: bool = False


_SHORT = "\nAnswer with as few words as possible.\nQuestion: {input}\nAnswer:"
_SUMMARY = "\nWrite a summary of the text.\nSummary:"
_PASSAGES = "Answer the question from the passages below, in as few words as possible."
_SHOTS = "Go on in the form of the examples."
_CODE = "Complete the code."

LONGBENCH: dict[str, Part] = {
    "narrativeqa": Part(
        "Answer the question about the story below, in as few words as possible.", _SHORT, "qa_f1", 128
    ),
    "qasper": Part(
        'Answer the question about the article below, in as few words as possible; write "unanswerable" if it does not say, '
        '"yes" or "no" where that is the answer.',
        _SHORT,
        "qa_f1",
        128,
    ),
    "multifieldqa_en": Part("Read the text, then answer the question about it.", _SHORT, "qa_f1", 64),
    "hotpotqa": Part(_PASSAGES, _SHORT, "qa_f1", 32),
    "2wikimqa": Part(_PASSAGES, _SHORT, "qa_f1", 32),
    "musique": Part(_PASSAGES, _SHORT, "qa_f1", 32),
    "gov_report": Part("Summarize the government report below on one page.", _SUMMARY, "rouge_l", 512),
    "qmsum": Part(
        "Answer the request about the meeting below in a few sentences.", "\nRequest: {input}\nAnswer:", "rouge_l", 512
    ),
    "multi_news": Part("Summarize the news articles below on one page.", _SUMMARY, "rouge_l", 512),
    "trec": Part("Name the type of the question. " + _SHOTS, "\n{input}", "classification", 64, True),
    "triviaqa": Part("Answer the question from the passage. " + _SHOTS, "\n{input}", "qa_f1", 32, True),
    "samsum": Part("Summarize the dialogue in a few sentences. " + _SHOTS, "\n{input}", "rouge_l", 128, True),
    "passage_count": Part(
        "Some of the paragraphs below are the same. How many different ones are there?",
        "\nReply with the number of different paragraphs only.\nAnswer:",
        "count",
        32,
    ),
    "passage_retrieval_en": Part(
        "Which of the 30 paragraphs below does the summary at the end describe?",
        '\nSummary: {input}\nReply with the paragraph\'s name, such as "Paragraph 1".\nAnswer:',
        "retrieval",
        32,
    ),
    "lcc": Part(_CODE, "Next line of code:\n", "code_similarity", 64),
    "repobench-p": Part(_CODE, "{input}Next line of code:\n", "code_similarity", 64),
}


def without_middle(ids: Tensor, length: int) -> Tensor:
    """The first and the last half of ``length`` tokens of ``ids [n]``; all of them where they are not more."""
    if len(ids) <= length:
        return ids
    half = length // 2
    return torch.cat([ids[:half], ids[len(ids) - (length - half) :]])


def _known(benchmark: str, subset: str, names: Any) -> None:
    if subset not in names:
        raise KVBudgetError(f"{benchmark} has no subset {subset!r}{nearest(subset, names)}")


def _load(*args: Any, **options: Any) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise KVBudgetError(
            "this benchmark is read through the package datasets; run: pip install datasets, or give rows='file.jsonl'"
        ) from None
    try:
        return load_dataset(*args, **options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        source = options.get("data_files", args[0])
        raise KVBudgetError(f"the data set {source} cannot be loaded: {lines[0]}; give rows='file.jsonl'") from error
