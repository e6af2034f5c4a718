"""The table of methods as Markdown, from the registry and, where there are any, measured results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbudget import auto
from kvbudget.eval.ranking import divergences
from kvbudget.eval.results import ResultsFile
from kvbudget.methods import parse

HEADERS = ("method", "what it does", "role", "acts", "needs", "exact", "reusable", "defaults", "KL (nats)", "paper")


def markdown(methods: Sequence[Mapping[str, Any]], results: Path | None = None) -> str:
    """A page with a row per method; ``methods`` are descriptions as `kvbudget.cli.methods.describe` gives them.

    The column of divergences holds what ``make bench`` measured for each method alone, or what a ``results`` file of ``kvbudget
    bench`` says.
    """
    command = "kvbudget methods --markdown" + (f" --results {results.as_posix()}" if results is not None else "")
    measured = divergences(ResultsFile(results).report()) if results is not None else auto.divergences()
    rows = [[_cell(text) for text in _row(method, measured.get(method["name"], ""))] for method in methods]
    lines = [
        "# Methods",
        "",
        f"<!-- {command} -->",
        "",
        f"Made by `{command}`; do not edit. Methods of different roles are joined by `+`; `kvbudget methods NAME` explains one.",
        "",
        "*Exact*: nothing is lost while everything fits. *Reusable*: the question is not looked at, so that one compressed",
        "context serves many. *Needs*: queries or keys of the entries; tokens (a tokenizer in `prefill`, without which it knows",
        "less); calibration (`kvbudget calibrate`); a plan or a driver (`cache.prefill` or `kvbudget.generate`). *KL*: geometric",
        "mean over texts of the divergence from the full cache, by budget; [results.md](results.md) has the intervals.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "---|" * len(HEADERS),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _row(method: Mapping[str, Any], measured: str) -> Iterator[str]:
    yield f"`{method['name']}`"
    yield method["summary"]
    yield method["role"]
    yield method["phase"]
    yield ", ".join(method["needs"]) or "-"
    policy = parse(method["name"])  # with the scorer that it brings along
    yield "yes" if policy.lossless_when_fits else "no"
    yield "yes" if policy.prefix_reusable else "no"
    yield ", ".join(f"`{p['name']}={p['default']}`" for p in method["parameters"] if p["default"] != "") or "-"
    yield measured or "-"
    yield method["paper"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")
