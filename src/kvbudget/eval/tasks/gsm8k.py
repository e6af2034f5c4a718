"""GSM8K few-shot: worked grade-school problems as the context, new problems as probes."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache
from kvbudget.eval.generation import generate
from kvbudget.eval.tasks.base import Example, Outcome, Probe, Reading, Task
from kvbudget.eval.texts import beginning, data_file, encode, encode_pair, read_rows


@dataclass(frozen=True)
class GSM8K(Task):
    """Few-shot problems with their reasoning (Cobbe et al., arXiv 2110.14168); needs the data folder.

    ``correct`` compares the final number of a greedily generated answer; the other scores read the reference reasoning
    under teacher forcing.

    Attributes:
        shots: worked problems in the context (from the training part).
        asked: problems per context.
        max_new_tokens: of a generated answer.
    """

    name = "gsm8k"
    headline: ClassVar[str] = "correct"
    reads: ClassVar[bool] = False

    shots: int = 8
    asked: int = 2
    max_new_tokens: int = 192

    def examples(self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Example]:
        shots = read_rows(data_file("gsm8k", "train_head500.jsonl"))
        problems = read_rows(data_file("gsm8k", "test.jsonl"))
        rng = random.Random(f"gsm8k {seed}")
        asked = rng.sample(problems, count * self.asked)
        found = []
        for i in range(count):
            text = "".join(
                f"Question: {row['question']}\nAnswer: {_plain(row['answer'])}\n\n"
                for row in rng.sample(shots, self.shots)
            )
            context = torch.cat([beginning(tokenizer), encode(tokenizer, text)])
            probes = []
            for row in asked[i * self.asked : (i + 1) * self.asked]:
                pair = encode_pair(tokenizer, f"Question: {row['question']}\nAnswer:", " " + _plain(row["answer"]))
                probes.append(Probe(*pair, info={"answer": final_number(row["answer"])}))
            found.append(Example(context, probes, {"length": len(context)}))
        return found

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: KVCache,
        probe: Probe,
        full: Reading | None = None,
    ) -> Outcome:
        outcome = super().ask(model, tokenizer, cache, probe, full)
        text = generate(model, tokenizer, cache, probe.question, self.max_new_tokens, stop=("\n\n", "Question:"))
        outcome.scores["correct"] = float(final_number(text) == probe.info["answer"])
        return outcome


def final_number(text: str) -> str | None:
    """The number after ``####``, else the last number of a text; None without one.

    >>> final_number("He has 3 + 4 = 7 left. #### 1,007"), final_number("so 12.50 dollars"), final_number("none")
    ('1007', '12.5', None)
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.split("####")[-1])
    return None if not found else f"{float(found[-1].replace(',', '')):.10g}"


def _plain(answer: str) -> str:
    """The reasoning without the marks of the data set's calculator."""
    return re.sub(r"<<.*?>>", "", answer)
