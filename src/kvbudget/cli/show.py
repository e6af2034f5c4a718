"""What run and demo print: streamed answers, progress over the prefill, and the closing table."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvbudget.budget import format_bytes
from kvbudget.cli.shell import stderr, stdout
from kvbudget.compare import Run


class Prefilling:
    """A progress bar on stderr that ends with the prefill; `done` and `total` stay readable after an interrupt."""

    def __init__(self) -> None:
        self.done = self.total = 0
        columns = (
            TextColumn("prefill"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        console = stderr()
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar = self._bars.add_task("prefill", total=None)

    def __call__(self, done: int, total: int) -> None:
        """Takes tokens done and in total, as `kvbudget.generate` reports them."""
        if done == 0:
            self._bars.start()
        self.done, self.total = done, total
        self._bars.update(self._bar, completed=done, total=total)
        if done >= total:
            self._bars.stop()

    def __enter__(self) -> Prefilling:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()


def print_piece(text: str) -> None:
    """Streams a piece of an answer to stdout."""
    print(text, end="", flush=True)


def to_dict(run: Run) -> dict[str, Any]:
    """A run as plain data for JSON."""
    generation, report, fidelity = run.generation, run.generation.report, run.fidelity
    data: dict[str, Any] = {
        "policy": report.policy,
        "budget": report.budget,
        "answer": generation.text,
        "interrupted": generation.interrupted,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": len(generation.token_ids),
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        "decode_tokens_per_second": generation.decode_tokens_per_second,
        "report": report.to_dict(),
    }
    if fidelity is not None:
        data["fidelity"] = {
            "top1_agreement": fidelity.agreement,
            "kl_mean": fidelity.kl_mean,
            "tokens": fidelity.tokens,
        }
    return data


def print_table(runs: Sequence[Run], extra: Sequence[tuple[str, Sequence[str]]] = ()) -> None:
    """One column per run, one row per measure; ``extra`` rows come last."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(escape(f"{run.generation.report.policy}\n{run.generation.report.budget}"), justify="right")
    for name, cells in [*_rows(runs), *extra]:
        table.add_row(name, *map(escape, cells))
    stdout().print(table)
    for reason in dict.fromkeys(run.generation.report.reason for run in runs):
        if reason:
            stdout().print(f"auto: {escape(reason)}")


def _rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    generations = [run.generation for run in runs]
    reports = [generation.report for generation in generations]
    visible = {True: "yes", False: "no", None: "not known"}
    rows = [
        ("prompt tokens", [f"{g.prompt_tokens:,}" for g in generations]),
        ("kept entries", [f"{r.kept_entries:,} ({r.kept_entries / max(r.seen_entries, 1):.1%})" for r in reports]),
        ("cache, steady", [format_bytes(r.nbytes) for r in reports]),
        ("cache, peak", [format_bytes(r.peak_bytes) for r in reports]),
        ("full cache needs", [format_bytes(r.full_bytes) for r in reports]),
        ("prefill", [f"{g.prefill_seconds:.2f} s" for g in generations]),
        ("decode", [f"{g.decode_tokens_per_second:.1f} tokens/s" for g in generations]),
        ("question seen by the policy", [visible[r.question_visible] for r in reports]),
    ]
    if len(runs) > 1:
        found = [run.fidelity for run in runs]
        rows.append(("top-1 agreement", ["-" if f is None else f"{f.agreement:.0%}" for f in found]))
        rows.append(("mean KL (nats)", ["-" if f is None else f"{f.kl_mean:.4f}" for f in found]))
    return rows
