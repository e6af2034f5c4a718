"""kvbudget tune: search layer budgets for a task of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvbudget.cli.shell import LAST_SEED, notice, print_json, progress, stdout
from kvbudget.errors import KVBudgetError


def tune(
    budget: Annotated[str, typer.Option("--budget", "-b", help="The budget to tune for, such as 25%.")],
    task: Annotated[
        str,
        typer.Option("--task", "-t", help="A task of kvbudget bench, or a .jsonl file of context, question, answer."),
    ] = "fidelity",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, hub id, folder or .gguf file.")
    ] = "smollm2-135m",
    policy: Annotated[str, typer.Option("--policy", "-p", help="The scorer inside of each layer.")] = "snapkv",
    output: Annotated[Path, typer.Option("--output", "-o", help="The policy file to write.")] = Path("tuned.yaml"),
    score: Annotated[
        str, typer.Option(help="What to improve; by default the task's distance, or its answers' log-probability.")
    ] = "",
    length: Annotated[int | None, typer.Option(help="Tokens per context, for tasks that name none.")] = None,
    count: Annotated[int, typer.Option(help="Examples that judge candidates.", min=1)] = 8,
    held_out: Annotated[int, typer.Option(help="Examples that judge the result.", min=1)] = 16,
    group: Annotated[int, typer.Option(help="Weights of layers that are searched together.", min=2)] = 8,
    tie: Annotated[int, typer.Option(help="Neighboring layers that share one weight.", min=1)] = 1,
    generations: Annotated[int, typer.Option(help="Of each group.", min=1)] = 6,
    population: Annotated[
        int, typer.Option(help="Candidates per generation, 4 or more; 0: by the size of a group.", min=0)
    ] = 0,
    sigma: Annotated[float, typer.Option(help="First step of the search; 1 is a layer's mean share.", min=0.01)] = 0.3,
    seed: Annotated[int, typer.Option(help="Of examples and search.", min=0, max=LAST_SEED)] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    workers: Annotated[str, typer.Option(help="in-process, or ray (needs kvbudget\\[ray]).")] = "in-process",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search how layers should share a budget for one task, and write the policy that kvbudget run loads.

    Evolutionary (EvolKV): groups of layers, from the bottom up. The result is compared with equal and pyramid shares on
    examples that the search has not seen. Stop it at any time: the same command goes on where it stopped, from the
    evaluations beside the policy file.

    [dim]$[/dim] kvbudget tune --model smollm2-135m --task tasks.jsonl --budget 25% --output mine.yaml

    [dim]$[/dim] kvbudget run --model smollm2-135m --policy mine.yaml --budget 25% --prompt-file long.txt
    """
    from kvbudget.eval.results import ResultsFile
    from kvbudget.eval.tuning import Search, Setup
    from kvbudget.eval.tuning import tune as search

    if workers not in ("in-process", "ray"):
        raise KVBudgetError(f"--workers {workers} is not known; give in-process or ray")
    if output.is_dir():
        raise KVBudgetError(f"--output {output} is a folder; give a file for the policy")
    if task.endswith((".jsonl", ".jsonl.gz")):
        task = f"own(rows={task!r})"
    setup = Setup(model, task, budget, policy, count, held_out, seed, dtype, length, score)
    known = ResultsFile(output.with_suffix(".evaluations.jsonl"))
    with progress() as bars:
        bar = bars.add_task("equal shares", total=None)

        def show(done: int, total: int, best: float) -> None:
            bars.update(bar, completed=done, total=total, description=f"best {best:.4g}")

        steps = Search(group, generations, population, sigma, seed, tie)
        found = search(setup, steps, known, ray=workers == "ray", progress=show)
    found.policy.to_yaml(output)
    notice(f"policy: {output}")
    if json:
        print_json(found.to_dict())
        return
    table = Table("shares", f"{found.score}, held out (higher is better)", "tuned is")
    for name, values in found.held_out.items():
        verdict, gain = found.gain(name)
        verdict = {"higher": "better", "lower": "worse"}.get(verdict, verdict)
        told = "" if name == "evolkv" else f"{verdict}, by {gain}"
        table.add_row(name, f"{sum(values) / len(values):.4g}", told)
    stdout().print(table)
    stdout().print(f"on the {count} examples of the search: {found.uniform_fitness:.4g} -> {found.fitness:.4g}")
