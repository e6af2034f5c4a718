"""kvbudget bench and report: measure policies on a model, and look at the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbudget.cli.shell import LAST_SEED, notice, print_json, progress, with_model
from kvbudget.errors import KVBudgetError


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, hub id, folder or .gguf file.")
    ] = "smollm2-135m",
    policy: Annotated[
        str,
        typer.Option(
            "--policy", "-p", help="Policies, separated by commas; all: every method that needs no calibration."
        ),
    ] = "snapkv,knorm,streaming_llm",
    budget: Annotated[str, typer.Option("--budget", "-b", help="Budgets, separated by commas.")] = "50%,25%,10%",
    task: Annotated[
        str, typer.Option("--task", "-t", help="Tasks, separated by commas; needle@visible shows the question.")
    ] = "fidelity,needle",
    matrix: Annotated[Path | None, typer.Option(help="A YAML file with all of these instead.")] = None,
    results: Annotated[Path, typer.Option("--results", "-o", help="JSON lines, one per finished cell.")] = Path(
        "results/bench.jsonl"
    ),
    length: Annotated[int | None, typer.Option(help="Tokens per context, for tasks that name none.")] = None,
    count: Annotated[int, typer.Option(help="Contexts per cell (16 or more tell methods apart).")] = 16,
    seed: Annotated[int, typer.Option(help="Of the contexts.", min=0, max=LAST_SEED)] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    text: Annotated[str | None, typer.Option(help="A file or folder of texts for contexts.")] = None,
    workers: Annotated[str, typer.Option(help="in-process, or ray (needs kvbudget\\[ray]).")] = "in-process",
    report: Annotated[bool, typer.Option(help="Write the report beside the results.")] = True,
    markdown: Annotated[Path | None, typer.Option(help="Write the leaderboard there too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
) -> None:
    """Measure policies x budgets x tasks on one model; the full cache runs first, as the yardstick.

    Stop it at any time: the same command goes on where it stopped. A cell that fails is recorded with its error.

    [dim]$[/dim] kvbudget bench --policy snapkv,knorm,"kivi(bits=4)" --budget 50%,25%,10% --task fidelity,needle

    [dim]$[/dim] kvbudget bench --matrix matrix.yaml --results results/mine.jsonl
    """
    from kvbudget.eval.matrix import Matrix
    from kvbudget.eval.results import ResultsFile, title
    from kvbudget.eval.runner import Bench

    if report:
        _check_figures()
    cells = (
        Matrix.from_yaml(matrix)
        if matrix is not None
        else Matrix(model, _split(policy), _split(budget), _split(task), length, count, seed, dtype, text)
    )
    if workers not in ("in-process", "ray"):
        raise KVBudgetError(f"--workers {workers} is not known; give in-process or ray")
    with progress() as bars:
        bar = bars.add_task("starting", total=None)

        def show(done: int, total: int, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=what[:60])

        try:
            if workers == "ray":
                from kvbudget.eval.workers import run_on_ray

                lines = run_on_ray(cells, ResultsFile(results), show)
            else:
                lines = Bench(cells, ResultsFile(results), show).run()
        except KeyboardInterrupt:
            notice(f"the same command goes on where {results} stops")
            raise
    failed: dict[str, list[str]] = {}
    for line in lines:
        if line["error"]:
            failed.setdefault(line["error"], []).append(f"{title(line)} {line['policy']} {line['budget']}")
    if len(failed) == 1 and all(line["error"] for line in lines):
        raise KVBudgetError(f"no cell could be measured: {next(iter(failed)).partition(': ')[2]}")
    for error, names in failed.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        notice(f"failed: {names[0]}{more}: {with_model(error, cells.model)}")
    if json:
        print_json(lines)
    for name in ResultsFile(results).weak_tasks():
        notice(f"not informative: the full cache itself cannot do {name}")
    if report:
        _write([results], results.with_suffix(""), markdown)


def report(
    results: Annotated[list[Path], typer.Argument(help="What kvbudget bench wrote; several files make one report.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", "-o", help="Where to write; beside the first of the results.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the leaderboard there too.")] = None,
    auto: Annotated[Path | None, typer.Option(help="Write only the table that policy=auto reads.")] = None,
) -> None:
    """Write one HTML page without network needs, PNG figures and a Markdown leaderboard from bench results.

    [dim]$[/dim] kvbudget report results/bench.jsonl
    """
    if auto is None:
        _write(results, folder or results[0].with_suffix(""), markdown)
    elif folder is not None or markdown is not None:
        raise KVBudgetError(
            "--auto writes a table and no report; run kvbudget report again without it for --folder and --markdown"
        )
    else:
        from kvbudget.eval.ranking import write_ranking
        from kvbudget.eval.results import gather

        write_ranking(gather(results), auto)


def _check_figures() -> None:
    """Says before any work what the figures of a report need."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise KVBudgetError(
            "a report's figures need matplotlib; install it with pip install 'kvbudget[eval]' (or bench with --no-report)"
        ) from error


def _write(results: list[Path], folder: Path, markdown: Path | None) -> None:
    _check_figures()
    from kvbudget.eval.page import write_report
    from kvbudget.eval.results import gather

    notice(f"report: {write_report(gather(results), folder, markdown)}")


def _split(text: str) -> tuple[str, ...]:
    """Splits at commas outside of parentheses.

    >>> _split("kivi(bits=4, group=32),snapkv")
    ('kivi(bits=4, group=32)', 'snapkv')
    """
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return tuple(part.strip() for part in parts if part.strip())
