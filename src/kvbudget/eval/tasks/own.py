"""A user's own task: contexts, questions and answers from a file."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.texts import beginning, encode, encode_pair, read_rows

FIELDS = ("context", "question", "answer")


@dataclass(frozen=True)
class Own(Task):
    """Lines of JSON with ``context``, ``question`` and ``answer``; the answer goes on right after the question.

    Attributes:
        rows: the ``.jsonl`` (or ``.jsonl.gz``) file.
        length: tokens of a context at most; longer ones lose their beginning (0: whole).
    """

    name = "own"
    headline: ClassVar[str] = "token_accuracy"

    rows: str = ""
    length: int = 0

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        rows = self._rows()
        if len(rows) < count:
            raise KVBudgetError(f"{self.rows} has {len(rows)} lines, {count} were asked for; lower the count")
        return [self._example(tokenizer, row) for row in random.Random(f"own {seed}").sample(rows, count)]

    def _rows(self) -> list[dict[str, Any]]:
        try:
            rows = read_rows(Path(self.rows))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise KVBudgetError(
                f"task file {self.rows!r} cannot be read: {reason}; give a .jsonl file, such as own(rows='tasks.jsonl')"
            ) from error
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in FIELDS):
                raise KVBudgetError(f"line {number} of {self.rows} must be an object with {', '.join(FIELDS)} as texts")
        return rows

    def _example(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Example:
        start = beginning(tokenizer)
        body = encode(tokenizer, row["context"])
        if self.length:
            body = body[-max(1, self.length - len(start)) :]
        question, answer = encode_pair(tokenizer, row["question"], row["answer"])
        return Example(torch.cat([start, body]), [Probe(question, answer)], {"length": len(start) + len(body)})
