"""kvbudget demo: a pass key in a long text, asked for with the full cache and under budgets."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from kvbudget.budget import Budget
from kvbudget.cli.shell import INTERRUPTED, LAST_SEED, notice, print_json
from kvbudget.cli.show import Prefilling, print_table, to_dict
from kvbudget.compare import Run, Setting, compare
from kvbudget.errors import KVBudgetError
from kvbudget.eval.tasks.passkey import Passkey
from kvbudget.eval.texts import default_source
from kvbudget.methods import parse
from kvbudget.models import load

# The digits of the key are tokens of their own, so pooling must be wide enough to keep them together.
SETTINGS = ("snapkv(kernel=15)@10%", "kivi(bits=4)@40MiB")
QUESTION = "Question: What is the pass key?\nAnswer: The pass key is "


def demo(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, hub id, folder or .gguf file.")
    ] = "smollm2-135m",
    setting: Annotated[
        list[str] | None, typer.Option("--setting", "-s", help="POLICY@BUDGET to run (may be repeated) instead.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file or folder to hide the key in; else $KVBUDGET_TEXT, books, or prose.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the text.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the key and its place.", min=0, max=LAST_SEED)] = 0,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", help="Tokens that each run decodes.")] = 48,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone, at the end.")] = False,
) -> None:
    """Hide a pass key in a long text and ask for it: the full cache against budgets, with what each cost and lost.

    The question is the end of the prompt. Whether a policy got to see it while it compressed is a row of the table: a
    byte budget compresses block by block, so there the text is cut before the question comes.

    [dim]$[/dim] kvbudget demo

    [dim]$[/dim] kvbudget demo --text my_book.txt --setting "snapkv@50%" --setting "streaming_llm@25%" --seed 3
    """
    settings = [_setting(value) for value in setting or SETTINGS]
    network, tokenizer = load(model)
    source = text or os.environ.get("KVBUDGET_TEXT") or default_source()
    (example,) = Passkey(length=length, text=source).examples(tokenizer, 1, seed)
    (probe,) = example.probes
    context = str(tokenizer.decode(example.context))
    key = str(tokenizer.decode(probe.answer)).strip()
    if not json:
        print(f"{source}: {len(example.context):,} tokens; the pass key {key} is at token {example.info['position']:,}")
    runs: list[Run] = []
    prefilling = Prefilling()
    options: dict[str, Any] = {
        "question": QUESTION,
        "question_visible": True,
        "chat": False,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,  # all runs decode equally many tokens, so that their speeds compare
        "progress": prefilling,
    }
    try:
        with prefilling:
            for run in compare(network, tokenizer, context, settings, **options):
                runs.append(run)
                if not json:
                    report = run.generation.report
                    print(f"{report.policy}, {report.budget}: {_answer(run)!r}", flush=True)
    except KeyboardInterrupt:
        notice("interrupted in a prefill")
        raise typer.Exit(INTERRUPTED) from None
    found = [key in _answer(run).replace(" ", "") for run in runs]
    if json:
        print_json({"key": key, "runs": [to_dict(run) | {"found": ok} for run, ok in zip(runs, found, strict=True)]})
        return
    print_table(
        runs, [("answer", [_answer(run) for run in runs]), ("pass key", ["found" if ok else "missed" for ok in found])]
    )


def _answer(run: Run) -> str:
    """The first line of an answer; what a small model goes on to write is not asked for."""
    return next((line.strip() for line in run.generation.text.splitlines() if line.strip()), "")[:32]


def _setting(value: str) -> Setting:
    policy, mark, budget = value.rpartition("@")
    if not mark:
        raise KVBudgetError(f"--setting {value!r} is not POLICY@BUDGET, such as snapkv@25%")
    return parse(policy), Budget.parse(budget)
