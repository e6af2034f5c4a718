"""The table of methods as Markdown, from the registry and, where there are any, measured results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbudget import auto
from kvbudget.eval.ranking import at_equal_bytes, divergences
from kvbudget.eval.results import gather
from kvbudget.methods import parse

HEADERS = (
    "method",
    "what it does",
    "role",
    "acts",
    "needs",
    "exact",
    "reusable",
    "defaults",
    "KL (nats)",
    "equal bytes",
    "tests",
    "paper",
)
# Beside the package in a clone of the repository; nowhere in an installation.
TESTS = Path(__file__).resolve().parents[3] / "tests"


def markdown(methods: Sequence[Mapping[str, Any]], results: Path | None = None) -> str:
    """A page with a row per method; ``methods`` are descriptions as `kvbudget.cli.methods.describe` gives them.

    The column of divergences holds what ``make bench`` measured for each method alone, or what a ``results`` file of ``kvbudget
    bench`` says.
    """
    command = "kvbudget methods --markdown" + (f" --results {results.as_posix()}" if results is not None else "")
    if results is not None:
        cells = gather([results])
        measured = divergences(cells), at_equal_bytes(cells)
    else:
        measured = auto.divergences(), auto.at_equal_bytes()
    rows = [
        [_cell(text) for text in _row(method, *(m.get(method["name"], "-") for m in measured))] for method in methods
    ]
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
        "mean over texts of the divergence from the full cache, by budget; [results.md](results.md) has the intervals. *Equal",
        "bytes*: the KL over that of `random`, which drops entries uniformly, inside as many bytes (the share is that of the full",
        "cache, and all that a method stores counts); =: cannot be told from it; [allocation.md](allocation.md). *Tests*: those of",
        "the method's formulas, checks and refusals, by file; `test_registry.py` runs every method besides. A release passes all.",
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|" + "---|" * len(HEADERS),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _row(method: Mapping[str, Any], *measured: str) -> Iterator[str]:
    yield f"`{method['name']}`"
    yield method["summary"]
    yield method["role"]
    yield method["phase"]
    yield ", ".join(method["needs"]) or "-"
    policy = parse(method["name"])  # with the scorer that it brings along
    yield "yes" if policy.lossless_when_fits else "no"
    yield "yes" if policy.prefix_reusable else "no"
    yield ", ".join(f"`{p['name']}={p['default']}`" for p in method["parameters"] if p["default"] != "") or "-"
    yield from measured
    yield _tests(method["name"])
    yield method["paper"]


def _tests(name: str) -> str:
    """How many tests are about a method: those of its own file, or of the two files that name it most often."""
    folders = ("methods", "codecs", "eval")
    files = {path.name: path for folder in folders for path in sorted((TESTS / folder).glob("test_*.py"))}
    files.pop("test_registry.py", None)
    if (own := files.get(f"test_{name}.py")) is not None:
        chosen = [own]
    else:
        word = re.compile(rf"\b{name}\b", re.IGNORECASE)
        named = {path: len(word.findall(path.read_text(encoding="utf-8"))) for path in files.values()}
        chosen = [path for path in sorted(named, key=lambda path: -named[path]) if named[path]][:2]
    counts = (len(re.findall(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE)) for path in chosen)
    return ", ".join(f"{count} in `{path.name}`" for count, path in zip(counts, chosen, strict=True)) or "-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")
