"""The ranking that ``policy="auto"`` reads: which policy lost least, by what the question showed and what share was kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbudget.budget import Budget
from kvbudget.errors import KVBudgetError, PolicyError
from kvbudget.eval.leaderboard import commands, excess, paired
from kvbudget.eval.results import informative, title
from kvbudget.eval.stats import bootstrap_over, compare
from kvbudget.methods import parse

Cells = Sequence[dict[str, Any]]


def utility(cell: dict[str, Any], scores: dict[str, float]) -> float:
    """What one context's ``scores`` are worth, 1 at best: the score above chance, or ``exp(-KL)`` where KL is measured."""
    if cell["headline"] == "log_kl":
        return math.exp(-math.exp(scores["log_kl"]))
    return (scores[cell["headline"]] - cell["chance"]) / (1.0 - cell["chance"])


def ranking(cells: Cells) -> dict[str, Any]:
    """The table of `kvbudget.auto` as plain data, from the cells of a results file.

    One situation per fraction of the text and whether the question was visible; distances from the full cache, which ask no
    question, count in both. ``utility`` is the mean over the informative tasks and their contexts; ``behind`` is the 95%
    interval of how much more the situation's best policy reached on the same contexts. Policies that lack a task, or hold
    more than the budget, are left out.
    """
    fulls = {title(c): c for c in cells if c["policy"] == "full"}
    useful = [c for c in cells if title(c) in fulls and informative(fulls[title(c)])]
    situations = []
    for visible in (False, True):
        mine = [c for c in useful if c["visible"] == visible or not c["labeled"]]
        if not any(c["visible"] == visible for c in mine):
            continue
        fractions = {c["budget"]: amount for c in useful if (amount := _budget(c, "fraction"))}
        tasks = {title(c) for c in mine if c["budget"] in fractions}
        for text, share in sorted(fractions.items(), key=lambda item: -item[1]):
            policies = _policies([c for c in mine if c["budget"] == text], tasks)
            if policies:
                situations.append({"visible": visible, "share": share, "policies": policies})
    return {
        "model": cells[0]["model"],
        "commands": commands(cells).split("\n"),
        "divergences": divergences(cells),
        "equal_bytes": at_equal_bytes(cells),
        "situations": situations,
    }


def divergences(cells: Cells) -> dict[str, str]:
    """Method and its mean KL by budget, for the cells in which it stands alone, with its defaults or others."""
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        score = (cell.get("scores") or {}).get("log_kl")
        if cell.get("error") or score is None or cell.get("labeled") or _budget(cell, "bytes"):
            continue
        try:
            names = parse(cell["policy"]).names
        except PolicyError:
            continue
        if len(names) == 1 and names[0] != "full":
            held = f" (holds {cell['costs']['kept_share']:.0%})" if cell.get("costs") and excess(cell) else ""
            # Of several forms or tasks the first counts, which is the one that the matrix lists first.
            found.setdefault(names[0], {}).setdefault(str(cell["budget"]), f"{math.exp(score['mean']):.2g}{held}")
    return {name: ", ".join(f"{budget}: {kl}" for budget, kl in budgets.items()) for name, budgets in found.items()}


def at_equal_bytes(cells: Cells, control: str = "random") -> dict[str, str]:
    """Method and its KL over that of the ``control`` inside the same bytes, by share of the full cache's bytes.

    A policy of several methods counts for the last one. ``=`` says that the two cannot be told apart on the same contexts.
    """
    found: dict[str, dict[str, str]] = {}
    measured = [c for c in cells if c.get("headline") == "log_kl" and not c["error"] and _budget(c, "bytes")]
    controls = {(title(c), c["budget"]): c for c in measured if c["policy"] == control}
    for cell in measured:
        other = controls.get((title(cell), cell["budget"]))
        if other is not None and other is not cell:
            verdict, apart = compare(*paired(cell, other))
            share = _budget(cell, "bytes") / other["costs"]["full_bytes"]
            text = f"{math.exp(apart.mean):.2g}x" + (" (=)" if verdict == "cannot tell" else "")
            found.setdefault(parse(cell["policy"]).names[-1], {}).setdefault(f"{share:.0%}", text)
    return {name: ", ".join(f"{share}: {text}" for share, text in row.items()) for name, row in found.items()}


def _budget(cell: dict[str, Any], kind: str) -> float:
    """The amount of a cell's budget where it is of this kind, else 0."""
    budget = Budget.parse(None if cell["budget"] == "full" else cell["budget"])
    return budget.amount if budget.kind == kind else 0.0


def _policies(cells: Cells, tasks: set[str]) -> dict[str, dict[str, Any]]:
    """Utilities by policy, best first."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        if not cell["error"] and not excess(cell):
            values = [utility(cell, example["scores"]) for example in cell["examples"]]
            found.setdefault(cell["policy"], {})[title(cell)] = values
    whole = {policy: by_task for policy, by_task in found.items() if set(by_task) == tasks}
    means = {policy: bootstrap_over(list(by_task.values())).mean for policy, by_task in whole.items()}
    ranked = sorted(means, key=lambda policy: -means[policy])
    table = {}
    for policy in ranked:
        # The same contexts, task by task; every task weighs the same, however many contexts it has. Fewer are the first ones.
        pairs = [zip(whole[ranked[0]][task], whole[policy][task], strict=False) for task in sorted(tasks)]
        behind = bootstrap_over([[best - own for best, own in pair] for pair in pairs])
        table[policy] = {"utility": round(means[policy], 4), "behind": [round(behind.low, 4), round(behind.high, 4)]}
    return table


def write_ranking(cells: Cells, path: Path) -> None:
    """Writes the table as JSON, a situation per line.

    Raises:
        KVBudgetError: where no cell was measured with, or none without, the question in sight; nothing is written then.
    """
    table = ranking(cells)
    for visible, task in ((False, "needle"), (True, "needle@visible")):
        if not any(row["visible"] == visible for row in table["situations"]):
            raise KVBudgetError(
                f"no cell at a fraction of the text was measured with the question {'visible' if visible else 'unknown'}, and "
                f"policy=auto needs both; run kvbudget bench --task {task} into the same results first"
            )
    rows = ",\n  ".join(json.dumps(row) for row in table.pop("situations"))
    path.write_text(f'{json.dumps(table)[:-1]},\n "situations": [\n  {rows}\n]}}\n', encoding="utf-8")
