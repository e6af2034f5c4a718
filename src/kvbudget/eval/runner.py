"""The runner: fills the cells of a matrix, one recorded prefill per context for all policies, resumable after a kill."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, KVBudgetError
from kvbudget.eval import tasks
from kvbudget.eval.fidelity import attention_calls, attention_errors
from kvbudget.eval.filling import Filler
from kvbudget.eval.matrix import Cell, Matrix
from kvbudget.eval.replay import record, replay
from kvbudget.eval.results import ResultsFile, mean, summary
from kvbudget.eval.tasks.base import Example, Probe, Reading, Task, read_together, visible_form
from kvbudget.layer import AttentionCall
from kvbudget.models import load

Progress = Callable[[int, int, str], None]
DECODE_STEPS = 8
# Caches that are read in one forward; more hold more memory and gain little.
TOGETHER = 8


@dataclass(frozen=True)
class Bench:
    """Runs the missing cells of a matrix into a results file.

    ``progress(done, total, what)`` is called after every example; ``only`` restricts the run to some cell keys (workers).
    """

    matrix: Matrix
    results: ResultsFile
    progress: Progress | None = None
    only: frozenset[str] | None = None

    def run(self) -> list[dict[str, Any]]:
        """Returns the results of the matrix's cells; a failed cell is recorded with its error and does not stop the rest."""
        groups = [[c for c in group if self.only is None or c.key in self.only] for group in self.matrix.groups()]
        with self.results.held():
            finished = {line["key"] for line in self.results.cells() if not line["error"]}
            missing = [[c for c in group if c.key not in finished] for group in groups]
            if any(missing):
                model, tokenizer = load(self.matrix.model, dtype=self.matrix.dtype)
                self.fill(model, tokenizer, [group for group in missing if group])
                self.results.drop_journal()
        keys = {cell.key for group in groups for cell in group}
        return [line for line in self.results.cells() if line["key"] in keys]

    def fill(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: list[list[Cell]]) -> None:
        """Runs groups of cells that share their contexts."""
        done, total = 0, sum(len(group) * group[0].count for group in groups)
        known = self.results.examples()
        first = next(self.matrix.groups())[0]
        for group in groups:
            task = tasks.parse(group[0].task)
            lines: dict[str, list[dict[str, Any]]] = {cell.key: [] for cell in group}
            about = {cell.key: _about(cell, task) for cell in group}
            errors: dict[str, str] = {}
            is_first = (group[0].task, group[0].visible) == (first.task, first.visible)
            timed = is_first and self.matrix.decode_speed
            examples: list[Example] = []
            try:
                examples = _examples(task, group[0], model, tokenizer)
            except Exception as error:  # no text or no data set for this task; the others go on
                errors = dict.fromkeys(lines, _said(error))
            for number, example in enumerate(examples):
                runs = Runs(model, tokenizer, task, example, group[0].visible, first=not number, timed=timed)
                for begin in range(0, len(group), TOGETHER):
                    cells = group[begin : begin + TOGETHER]
                    missing = [c for c in cells if (c.key, number) not in known and c.key not in errors]
                    found = runs.run(missing)
                    for cell in cells:
                        line = known.get((cell.key, number))
                        result = found.get(cell.key)
                        if isinstance(result, Exception):
                            errors[cell.key] = _said(result)
                        elif result is not None:
                            line = {"key": cell.key, "example": number, **result, "cell": about[cell.key]}
                            self.results.add_example(line)
                        if line is not None:
                            lines[cell.key].append(line)
                        done += 1
                        if self.progress is not None:
                            self.progress(done, total, f"{task.name}: {cell.policy} {cell.budget}")
            done += len(group) * (group[0].count - len(examples))
            for cell in group:
                self.results.add_cell(summary(cell.key, about[cell.key], lines[cell.key], errors.get(cell.key)))


class Runs:
    """One example through many policies: each of its contexts is recorded once and replayed into every cache.

    The ``first`` example also gives what need not be measured often: kept entries ``[layer][head]``, where ``timed`` the
    decode speed, and for tasks that ask for it the error of each layer's attention output.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        example: Example,
        visible: bool,
        *,
        first: bool,
        timed: bool,
    ) -> None:
        self.model, self.tokenizer, self.task, self.example, self.visible = model, tokenizer, task, example, visible
        self.first, self.timed = first, timed
        self.contexts = list(self._contexts())
        self.fillers: dict[int, tuple[Filler | None, float]] = {}
        self.fulls: dict[int, KVCache] = {}
        self.full: dict[tuple[int, int], Reading] = {}
        self.calls: dict[int, AttentionCall] = {}

    def run(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any] | Exception]:
        """Scores and costs at this example by key of the cell, averaged over probes, or what went wrong with it."""
        scores: dict[str, list[dict[str, float]]] = {cell.key: [] for cell in cells}
        costs: dict[str, list[dict[str, float]]] = {cell.key: [] for cell in cells}
        details: dict[str, dict[str, Any]] = {cell.key: {} for cell in cells}
        failed: dict[str, Exception] = {}
        for index, (context, probes) in enumerate(self.contexts):
            caches: dict[str, KVCache] = {}
            for cell in cells:
                if cell.key not in failed:
                    try:
                        cache, costing = self._fill(cell, index, context)
                        if self.first and not index:
                            details[cell.key] = self._details(cache, costing, context, probes[0])
                        caches[cell.key] = cache
                        costs[cell.key].append(costing)
                    except Exception as error:  # whatever a policy does wrong, the other cells go on
                        failed[cell.key] = error
            for number, probe in enumerate(probes):
                for key, found in self._ask(caches, probe, index, number).items():
                    if isinstance(found, Exception):
                        failed.setdefault(key, found)
                    else:
                        scores[key].append(found)
        info = dict(self.example.info)
        return {
            cell.key: failed.get(cell.key)
            or {"scores": mean(scores[cell.key]), "costs": mean(costs[cell.key]), "info": info, **details[cell.key]}
            for cell in cells
        }

    def _ask(
        self, caches: dict[str, KVCache], probe: Probe, index: int, number: int
    ) -> dict[str, dict[str, float] | Exception]:
        """The scores of one probe: all caches are read in one forward where that works, and else one by one."""
        try:
            full = self._full(index, number, probe) if caches else None
        except Exception as error:  # without the full cache there is nothing to compare with
            return dict.fromkeys(caches, error)
        if self.task.reads and len(caches) > 1:
            try:
                readings = read_together(self.model, list(caches.values()), probe)
                return {key: self.task.score(mine, full) for key, mine in zip(caches, readings, strict=True)}
            except Exception:  # one of them cannot do it; asked alone, it says so
                pass
        found: dict[str, dict[str, float] | Exception] = {}
        for key, cache in caches.items():
            try:
                found[key] = self.task.ask(self.model, self.tokenizer, cache, probe, full).scores
            except Exception as error:
                found[key] = error
        return found

    def _details(self, cache: KVCache, costing: dict[str, float], context: Tensor, probe: Probe) -> dict[str, Any]:
        if self.timed:
            costing["decode_tokens_per_second"] = self._decode_speed(cache, context)
        details: dict[str, Any] = {"kept": [layer[0] for layer in cache.report().kept]}
        if self.task.diagnose:
            details["layer_errors"] = self._layer_errors(cache, context, probe)
        return details

    def _contexts(self) -> Iterator[tuple[Tensor, list[Probe]]]:
        if not self.visible:
            yield self.example.context, list(self.example.probes)
            return
        for probe in self.example.probes:
            context, rest = visible_form(self.example, probe)
            yield context, [rest]

    def _fill(self, cell: Cell, index: int, context: Tensor) -> tuple[KVCache, dict[str, float]]:
        budget = None if cell.budget == "full" else cell.budget
        cache = KVCache(self.model, cell.policy, budget, max_length=context.numel())
        filler, prefill = self._filler(index, context)
        if filler is None or not cache.parts.replayable:
            begin = time.perf_counter()
            cache.prefill(self.model, context[None], tokenizer=self.tokenizer)
            spent = time.perf_counter() - begin
            costing = {"prefill_seconds": prefill or spent, "compression_seconds": max(0.0, spent - prefill)}
        else:
            costing = {"prefill_seconds": prefill, "compression_seconds": filler.fill(cache)}
        cache.question_visible = self.visible
        report = cache.report()
        return cache, costing | {
            "nbytes": report.nbytes,
            "peak_bytes": report.peak_bytes,
            "full_bytes": report.full_bytes,
            "kept_share": report.kept_entries / max(report.seen_entries, 1),
        }

    def _filler(self, index: int, context: Tensor) -> tuple[Filler | None, float]:
        """What fills caches with a context, and the seconds of the recorded prefill; None where none can be recorded."""
        if index not in self.fillers:
            begin = time.perf_counter()
            try:
                filler = Filler(self.model, self.tokenizer, record(self.model, context[None]))
                self.fillers[index] = (filler, time.perf_counter() - begin)
            except CacheError:
                self.fillers[index] = (None, 0.0)
        return self.fillers[index]

    def _full(self, index: int, number: int, probe: Probe) -> Reading:
        """The full cache's reading of a probe, which distances are measured from."""
        if (index, number) not in self.full:
            cache = self._full_cache(index)
            self.full[index, number] = self.task.ask(self.model, self.tokenizer, cache, probe).reading
        return self.full[index, number]

    def _full_cache(self, index: int) -> KVCache:
        if index not in self.fulls:
            context = self.contexts[index][0]
            filler, _ = self._filler(index, context)
            cache = KVCache(self.model, "full")
            if filler is None:
                cache.prefill(self.model, context[None])
            else:
                replay(filler.recording, cache)
            self.fulls[index] = cache
        return self.fulls[index]

    def _layer_errors(self, cache: KVCache, context: Tensor, probe: Probe) -> list[float]:
        full = self._full_cache(0)
        if not self.calls:
            self.calls = attention_calls(self.model, full, torch.cat([probe.question, probe.answer])[None])
        return attention_errors(self.calls, full, cache)

    def _decode_speed(self, cache: KVCache, context: Tensor) -> float:
        fork = cache.fork()
        times = []
        with torch.inference_mode():
            for _ in range(DECODE_STEPS):
                begin = time.perf_counter()
                self.model(context[None, -1:], past_key_values=fork)
                times.append(time.perf_counter() - begin)
        return 1.0 / sorted(times)[len(times) // 2]


def _examples(task: Task, cell: Cell, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of a cell; refuses those that go beyond the positions which the model was trained for."""
    examples = task.examples(tokenizer, cell.count, cell.seed)
    probes = [(example, probe) for example in examples for probe in example.probes]
    longest = max(len(e.context) + len(probe.question) + len(probe.answer) for e, probe in probes)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and longest > positions:
        raise KVBudgetError(
            f"{task.name} takes {longest} tokens, question and answer included, and the model was trained for {positions} "
            "positions; ask for shorter contexts"
        )
    return examples


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _about(cell: Cell, task: Task) -> dict[str, Any]:
    """What a cell is, as plain data."""
    return {
        **asdict(cell),
        "headline": task.headline,
        "higher_is_better": task.higher_is_better,
        "labeled": task.labeled,
        "chance": task.chance,
        "versions": {name: version(name) for name in ("kvbudget", "torch", "transformers")}
        | {"python": platform.python_version()},
    }
