"""kvbudget methods: the table of methods, and one of them explained from its recipe."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from kvbudget.cli import catalog
from kvbudget.cli.shell import print_json, stdout
from kvbudget.errors import KVBudgetError
from kvbudget.methods import registry
from kvbudget.policy.base import Recipe
from kvbudget.policy.policy import find

_PARAMETER = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def methods(
    name: Annotated[str | None, typer.Argument(help="A method to explain.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as a Markdown page.")] = False,
    results: Annotated[
        Path | None, typer.Option("--results", help="Results of kvbudget bench for the page's divergences.")
    ] = None,
) -> None:
    """List the methods, or explain one: what it does, its paper, its parameters and how to call it.

    [dim]$[/dim] kvbudget methods

    [dim]$[/dim] kvbudget methods snapkv

    [dim]$[/dim] kvbudget methods --markdown > docs/methods.md
    """
    if (results is not None and not markdown) or (markdown and (name is not None or json)):
        raise KVBudgetError("--markdown prints the whole list, alone or with --results; leave out the name and --json")
    if name is None:
        if markdown:
            print(catalog.markdown([describe(kind) for kind in registry().values()], results), end="")
        elif json:
            print_json([describe(kind) for kind in registry().values()])
        else:
            _table()
        return
    kind = find(registry(), name)
    if json:
        print_json(describe(kind))
    else:
        _explain(kind)


def describe(kind: type[Recipe]) -> dict[str, Any]:
    """A method as plain data."""
    text = inspect.cleandoc(kind.__doc__ or "")
    summary, _, rest = text.partition("\n")
    body, _, _ = rest.partition("\nAttributes:")
    return {
        "name": kind.name,
        "aliases": list(kind.aliases),
        "role": kind.role,
        "phase": kind.phase,
        "needs": list(kind.needs),
        "prefill_peak": kind.prefill_peak,
        "lossless_when_fits": kind.lossless_when_fits,
        "prefix_reusable": kind.prefix_reusable,
        "paper": kind.paper,
        "summary": summary.strip(),
        "description": " ".join(body.split()),
        "parameters": _parameters(kind, text),
        "examples": examples(kind),
    }


def examples(kind: type[Recipe]) -> list[str]:
    """Lines that work as they stand, in the roles that the method can take."""
    recipe = kind()
    roles = {*recipe.parts(), *recipe.defaults()}
    policy = kind.name
    lines = [f"kvbudget calibrate {kind.name} --model smollm2-135m"] if "calibration" in kind.needs else []
    budget = "" if "scorer" not in roles and "plan" not in roles else " --budget 25%"
    lines.append(f'kvbudget run --model smollm2-135m --policy {policy}{budget} --prompt-file long.txt --question "..."')
    changed = next((f for f in fields(kind) if f.repr and f.default is not MISSING), None)  # type: ignore[arg-type]
    if changed is not None:
        policy = f"{policy}({changed.name}={changed.default!r})"
    both = f"{policy}+kivi(bits=4)"
    if roles & {"codec", "sharing"}:
        both = f"snapkv+{policy}"
    elif "selector" in roles:
        both = policy
    amount = "25%" if kind.prefill_peak == "full_prompt" else "16MiB"
    lines.append(f'cache = kvbudget.KVCache(model, policy="{both}", budget="{amount}")')
    if "plan" in kind.needs:
        lines.append("cache.prefill(model, input_ids, tokenizer=tokenizer)")
    return lines


def _parameters(kind: type[Recipe], text: str) -> list[dict[str, Any]]:
    meaning: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition("\nAttributes:")[2].splitlines():
        entry = _PARAMETER.match(line.strip()) if re.match(r" {4}\S", line) else None
        if entry is not None:
            names = entry[1].split(", ")
            meaning |= dict.fromkeys(names, entry[2])
        elif line.strip():
            meaning |= {name: f"{meaning[name]} {line.strip()}" for name in names}
    return [
        {
            "name": field.name,
            "default": None if field.default is MISSING else field.default,
            "meaning": meaning.get(field.name, ""),
        }
        for field in fields(kind)  # type: ignore[arg-type]
        if field.repr
    ]


def _table() -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("method", "role", "acts", "needs", "prefill peak", "exact", "paper"):
        table.add_column(header, no_wrap=header in ("method", "paper"), overflow="fold")
    for kind in registry().values():
        table.add_row(
            f"[bold]{kind.name}[/bold]",
            kind.role,
            kind.phase,
            ", ".join(kind.needs) or "-",
            kind.prefill_peak.replace("_", " "),
            "yes" if kind.lossless_when_fits else "no",
            escape(_short(kind.paper)),
        )
    console = stdout()
    console.print(table)
    console.print("exact: nothing is lost while everything fits. kvbudget methods NAME explains one.")
    console.print("Methods of different roles are joined by +: snapkv+adakv+kivi(bits=4)")


def _explain(kind: type[Recipe]) -> None:
    console = stdout()
    about = describe(kind)
    title = f"[bold]{kind.name}[/bold]"
    if kind.aliases:
        title += f" (also {', '.join(kind.aliases)})"
    console.print(f"{title}: {_plain(about['summary'])}\n")
    console.print(_plain(about["description"]) + "\n")
    facts = {
        "role": kind.role,
        "acts": kind.phase,
        "needs": ", ".join(kind.needs) or "nothing beyond the entries",
        "prefill": "holds the whole prompt before anything leaves (no byte budget)"
        if kind.prefill_peak == "full_prompt"
        else "stays inside the budget",
        "when all fits": "exact" if kind.lossless_when_fits else "not exact: entries are coded anyway",
        "question": "not looked at: one compressed context serves many questions"
        if kind.prefix_reusable
        else "may be looked at: the result depends on what the prompt ends with",
        "paper": kind.paper,
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        wrapped = textwrap.fill(value, max(console.width, 40), initial_indent="", subsequent_indent=" " * (width + 2))
        console.print(f"[bold]{name:<{width}}[/bold]  {escape(wrapped)}", soft_wrap=True)
    if about["parameters"]:
        table = Table("parameter", "default", "meaning")
        for parameter in about["parameters"]:
            table.add_row(parameter["name"], escape(repr(parameter["default"])), _plain(parameter["meaning"]))
        console.print(table)
    for line in about["examples"]:
        console.print(escape(line), soft_wrap=True)


def _short(paper: str) -> str:
    """The identifier of a paper, or where it appeared."""
    found = re.search(r"arXiv[: ]\s*(\d{4}\.\d{4,5})", paper)
    return f"arXiv {found[1]}" if found else paper.rpartition(", ")[2].partition(" (")[0]


def _plain(text: str) -> str:
    """Docstring markup to terminal markup."""
    return re.sub(r"`+([^`]+)`+", r"[cyan]\1[/cyan]", escape(text))
