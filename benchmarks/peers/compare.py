"""Compares kvbudget's methods with kvpress and transformers' QuantizedCache on the same contexts, row by row.

    python benchmarks/peers/compare.py --peer .venvs/kvpress/bin/python --markdown docs/fidelity.md

One JSON line per method, budget and context; the same command goes on where it was stopped. The table is written between
the marks ``<!-- peers -->`` and ``<!-- /peers -->`` of the Markdown file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import kvbudget
from kvbudget import KVBudgetError, KVCache
from kvbudget.assembly import bound
from kvbudget.budget import format_bytes
from kvbudget.cli.bench import _split
from kvbudget.eval import tasks
from kvbudget.eval.leaderboard import shown
from kvbudget.eval.replay import Recording, record, replay
from kvbudget.eval.results import ResultsFile
from kvbudget.eval.stats import bootstrap, compare
from kvbudget.eval.tasks.base import Example, Reading, Task, read
from kvbudget.files import insert
from kvbudget.methods import parse

# Two libraries that keep the same entries differ by rounding: below this, in the score's own units.
SAME = 0.02
WORKER = Path(__file__).with_name("worker.py")


class Pair(NamedTuple):
    """One method as both libraries name it, with the same parameters."""

    ours: str
    press: str | None
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    budgeted: bool = True


WINDOW = {"window_size": 64, "kernel_size": 5}
PAIRS = {
    "full": Pair("full", None, budgeted=False),
    "snapkv": Pair("snapkv(window=64)", "SnapKVPress", WINDOW),
    "knorm": Pair("knorm", "KnormPress"),
    "expected_attention": Pair("expected_attention", "ExpectedAttentionPress"),
    "streaming_llm": Pair("streaming_llm", "StreamingLLMPress"),
    "tova": Pair("tova", "TOVAPress"),
    # With its defaults (window 64, beta 20) kvpress falls back to SnapKV at a quarter of such texts.
    "pyramidkv": Pair(
        "snapkv(window=16)+pyramidkv(beta=4)", "PyramidKVPress", {"window_size": 16, "kernel_size": 5, "beta": 4}
    ),
    "adakv": Pair("snapkv(window=64)+adakv", "AdaKVPress(SnapKVPress)", WINDOW),
    "lagkv": Pair("lagkv", "LagKVPress"),
    "kvzip": Pair("kvzip", "KVzipPress"),
    "keydiff": Pair("keydiff", "KeyDiffPress"),
    # The peer's filters come from a model hub; it gets those that kvbudget calibrate qfilters has found.
    "qfilters": Pair("qfilters(recent=0)", "QFilterPress"),
    "quantized": Pair(
        "kivi(bits=4, group=64, residual=64)",
        "quantized",
        {"backend": "quanto", "nbits": 4, "q_group_size": 64, "residual_length": 64},
        False,
    ),
}


class Peer:
    """The worker process."""

    def __init__(self, python: str, folder: str, worker: Path = WORKER) -> None:
        self.process = subprocess.Popen([python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.ask(open=folder, threads=torch.get_num_threads())["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer; RuntimeError for what the worker could not do."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the worker ended; its messages are above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


@dataclass
class Context:
    """One example in both libraries."""

    model: Any
    tokenizer: Any
    task: Task
    example: Example
    peer: Peer
    full: list[Reading] = field(default_factory=list)
    recording: Recording | None = None

    def run(self, pair: Pair, budget: str) -> dict[str, Any]:
        """Scores and costs of both libraries on this example, and how far the two are from each other."""
        self._prepare()
        ours, costs = self._ours(pair, budget)
        theirs, other = self._theirs(pair, budget)
        return {"ours": self._scores(ours) | costs, "theirs": self._scores(theirs) | other}

    def _prepare(self) -> None:
        if self.recording is None:
            self.recording = record(self.model, self.example.context[None])
            cache = replay(self.recording, KVCache(self.model))
            self.full = [read(self.model, cache, probe) for probe in self.example.probes]
            self.peer.ask(context=self.example.context.tolist())

    def _ours(self, pair: Pair, budget: str) -> tuple[list[Reading], dict[str, float]]:
        context = self.example.context
        limit = budget if pair.budgeted else None
        cache = KVCache(self.model, pair.ours, limit, max_length=len(context))
        begin = time.perf_counter()
        if cache.parts.plan is not None:
            cache.prefill(self.model, context[None], tokenizer=self.tokenizer)
        else:
            assert self.recording is not None
            replay(self.recording, cache)
        seconds = time.perf_counter() - begin
        report = cache.report()
        readings = [read(self.model, cache, probe) for probe in self.example.probes]
        kept = report.kept_entries / report.seen_entries
        return readings, {"kept_share": kept, "nbytes": report.nbytes, "seconds": seconds}

    def _theirs(self, pair: Pair, budget: str) -> tuple[list[Reading], dict[str, float]]:
        ratio = 1 - float(budget.rstrip("%")) / 100 if pair.budgeted else 0.0
        options = pair.options | self._calibrated(pair)
        probes = [(p.question.tolist(), p.answer.tolist(), p.skip) for p in self.example.probes]
        with tempfile.NamedTemporaryFile() as file:
            costs = self.peer.ask(press=pair.press, options=options, ratio=ratio, probes=probes, file=file.name)
            width = self.full[0].logits.shape[-1]
            rows: Tensor = torch.from_numpy(np.fromfile(file.name, np.float32).reshape(-1, width))
        sizes = [len(reading.targets) for reading in self.full]
        pairs = zip(rows.split(sizes), self.full, strict=True)
        return [Reading(logits, reading.targets) for logits, reading in pairs], costs

    def _calibrated(self, pair: Pair) -> dict[str, Any]:
        """What a calibration of ours gives the peer too."""
        filters = getattr(bound(parse(pair.ours), self.model).recipes[0], "filters", None)
        return {} if filters is None else {"q_filters": filters.tolist()}

    def _scores(self, readings: Sequence[Reading]) -> dict[str, float]:
        """Means over the probes; distances are from kvbudget's full cache."""
        rows = [self.task.score(mine, full) for mine, full in zip(readings, self.full, strict=True)]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


Row = tuple[str, int, str, str]


def rows(options: argparse.Namespace) -> dict[str, Row]:
    """What is to be measured, by key: task, number of the context, method and budget (none for what keeps every entry)."""
    return {
        f"{task} {number} {options.seed} {PAIRS[name]} {budget}": (task, number, name, budget)
        for task in _split(options.tasks)
        for number in range(options.count)
        for name in options.methods.split(",")
        for budget in (options.budgets.split(",") if PAIRS[name].budgeted else ["full"])
    }


def measure(options: argparse.Namespace, missing: dict[str, Row], results: ResultsFile) -> None:
    """Adds the missing rows to the results file; a row that fails is named and left out."""
    disable_progress_bar()
    model, tokenizer = kvbudget.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        peer = Peer(options.peer, folder)
        for (text, number), group in groupby(missing.items(), key=lambda item: item[1][:2]):
            task = tasks.parse(text)
            example = task.examples(tokenizer, options.count, options.seed)[number]
            context = Context(model, tokenizer, task, example, peer)
            for key, (_, _, name, budget) in group:
                try:
                    found = context.run(PAIRS[name], budget)
                except (KVBudgetError, RuntimeError) as error:
                    print(f"failed: {text} {number}: {name} {budget}: {error}", flush=True)
                else:
                    line = {"key": key, "task": text, "example": number, "method": name, "budget": budget}
                    results.add_cell(line | found | {"versions": peer.versions})
                    print(f"{text} {number}: {name} {budget}", flush=True)


def table(lines: Sequence[dict[str, Any]], command: str) -> str:
    """Markdown: both libraries per task, method and budget, with the paired difference, and the ``command`` that measured it."""
    out = []
    for text in dict.fromkeys(line["task"] for line in lines):
        task = tasks.parse(text)
        score = "token_accuracy" if task.labeled else task.headline
        better = "higher" if task.higher_is_better else "lower"
        mine = [line for line in lines if line["task"] == text]
        contexts = len({line["example"] for line in mine})
        name = score.replace("log_kl", "KL, geometric mean").replace("_", " ")
        out += [f"### {text}", "", f"{name} ({better} is better), {contexts} contexts, 95% intervals.", ""]
        out += ["| method | budget | kvbudget | kvpress | kvbudget is | entries kept | bytes |", "|---" * 7 + "|"]
        for method, budget in dict.fromkeys((line["method"], line["budget"]) for line in mine):
            cells = [line for line in mine if (line["method"], line["budget"]) == (method, budget)]
            sides = [[cell[side][score] for cell in cells] for side in ("ours", "theirs")]
            word = _verdict(sides[0], sides[1], better)
            texts = [_interval(score, values) for values in sides]
            kept = " / ".join(f"{_mean(cells, side, 'kept_share'):.1%}" for side in ("ours", "theirs"))
            size = " / ".join(format_bytes(int(_mean(cells, side, "nbytes"))) for side in ("ours", "theirs"))
            out.append(f"| {method} | {budget} | {texts[0]} | {texts[1]} | {word} | {kept} | {size} |")
        out.append("")
    versions = ", ".join(f"{name} {number}" for name, number in lines[-1]["versions"].items())
    return "\n".join([*out, f"Measured by `{command}`; peers: {versions}."])


def _verdict(ours: Sequence[float], theirs: Sequence[float], better: str) -> str:
    """Which is better on the same contexts; ``the same`` when no context differs by more than rounding explains."""
    if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < SAME:
        return "the same"
    verdict, _ = compare(ours, theirs)
    return verdict if verdict == "cannot tell" else ("better" if verdict == better else "worse")


def _interval(score: str, values: Sequence[float]) -> str:
    found = bootstrap(values)
    mean, low, high = (f"{shown(score, value):.2g}" for value in found.__dict__.values())
    return f"{mean} [{low}, {high}]"


def _mean(cells: Sequence[dict[str, Any]], side: str, name: str) -> float:
    return sum(cell[side][name] for cell in cells) / len(cells)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", default=".venvs/kvpress/bin/python", help="Python of the peers' environment")
    parser.add_argument("--model", default="smollm2-135m")
    methods = [name for name in PAIRS if not PAIRS[name].budgeted or _exists(PAIRS[name].ours)]
    parser.add_argument("--methods", default=",".join(methods))
    parser.add_argument("--budgets", default="50%,25%,12.5%")
    parser.add_argument("--tasks", default="fidelity(length=1024),recall(length=1024),needle(length=1024)")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("results/peers.jsonl"))
    parser.add_argument("--markdown", type=Path, help="file with the marks, such as docs/fidelity.md")
    options = parser.parse_args()
    results = ResultsFile(options.results)
    wanted = rows(options)
    known = {line["key"] for line in results.cells()}
    if missing := {key: row for key, row in wanted.items() if key not in known}:
        measure(options, missing, results)
    found = {line["key"]: line for line in results.cells()}
    command = f"python benchmarks/peers/compare.py --tasks '{options.tasks}' --budgets {options.budgets} --count {options.count}"
    # In the order of the options, whenever a row was measured.
    text = table([found[key] for key in wanted if key in found], command)
    print(text)
    if options.markdown is not None:
        insert(options.markdown, "peers", text)


def _exists(policy: str) -> bool:
    try:
        parse(policy)
    except KVBudgetError:
        return False
    return True


if __name__ == "__main__":
    main()
