"""Questions over long documents: paragraphs with reading-comprehension questions, and meetings with queries."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.base import Example, Probe, Task
from kvbudget.eval.texts import beginning, data_file, encode, encode_pair, meeting, read_rows


@dataclass(frozen=True)
class XQuAD(Task):
    """Several Wikipedia paragraphs as one document, and questions about some of them (Artetxe et al., arXiv 1910.11856).

    Needs the data folder.

    Attributes:
        length: tokens of the document at most, in whole paragraphs.
        asked: questions per document, each about another paragraph where there are enough.
    """

    name = "xquad"
    headline: ClassVar[str] = "token_accuracy"

    length: int = 1024
    asked: int = 4

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        articles = json.loads(data_file("xquad_en", "xquad.en.json").read_text(encoding="utf-8"))["data"]
        rng = random.Random(f"xquad {seed}")
        paragraphs = [p for article in articles for p in article["paragraphs"]]
        queue = iter([p for _ in range(1 + count) for p in rng.sample(paragraphs, len(paragraphs))])
        return [self._example(tokenizer, queue, rng) for _ in range(count)]

    def _example(self, tokenizer: PreTrainedTokenizerBase, queue: Any, rng: random.Random) -> Example:
        start = beginning(tokenizer)
        pieces, used = [start], []
        room = self.length - len(start)
        for paragraph in queue:
            ids = encode(tokenizer, f"{paragraph['context']}\n\n")
            if len(ids) > room:
                break
            room -= len(ids)
            pieces.append(ids)
            used.append(paragraph)
        if not used:
            raise KVBudgetError(f"no paragraph fits into {self.length} tokens; give length=512 or more")
        chosen = (rng.sample(used, len(used)) * self.asked)[: self.asked]
        probes = []
        for turn, paragraph in enumerate(chosen):
            qa = paragraph["qas"][turn // len(used) % len(paragraph["qas"])]
            pair = encode_pair(tokenizer, f"Question: {qa['question']}\nAnswer:", f" {qa['answers'][0]['text']}")
            probes.append(Probe(*pair, info={"depth": (used.index(paragraph) + 0.5) / len(used)}))
        return Example(torch.cat(pieces), probes, {"length": self.length})


@dataclass(frozen=True)
class QMSum(Task):
    """A meeting's transcript and its queries with reference summaries, read under teacher forcing (arXiv 2104.05938).

    Needs the data folder. Queries are those whose relevant turns lie within the part of the meeting that fits.

    Attributes:
        length: tokens of the transcript at most.
        asked: queries per meeting at most.
        tokens: tokens of a reference answer that are read.
    """

    name = "qmsum"
    headline: ClassVar[str] = "logprob"

    length: int = 4096
    asked: int = 3
    tokens: int = 64

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        rows = read_rows(data_file("qmsum", "test.jsonl"))
        found: list[Example] = []
        for row in random.Random(f"qmsum {seed}").sample(rows, len(rows)):
            if len(found) == count:
                break
            example = self._example(tokenizer, row)
            if example.probes:
                found.append(example)
        if len(found) < count:
            raise KVBudgetError(
                f"{len(found)} meetings have queries within their first {self.length} tokens, {count} were asked for; "
                "lower the count or raise length="
            )
        return found

    def _example(self, tokenizer: PreTrainedTokenizerBase, row: Any) -> Example:
        start = beginning(tokenizer)
        ids, turns = start, 0
        for line in meeting(row).split("\n"):
            more = encode(tokenizer, f"{line}\n")
            if len(ids) + len(more) > self.length:
                break
            ids, turns = torch.cat([ids, more]), turns + 1
        inside = [
            query
            for query in row["specific_query_list"]
            if query["relevant_text_span"] and all(int(end) < turns for _, end in query["relevant_text_span"])
        ]
        probes = []
        for query in inside[: self.asked]:
            question, answer = encode_pair(tokenizer, f"\nQuestion: {query['query']}\nAnswer:", f" {query['answer']}")
            probes.append(Probe(question, answer[: self.tokens]))
        return Example(ids, probes, {"length": self.length})
