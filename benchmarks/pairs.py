"""Policies against others on the same contexts, from the results of kvbudget bench, as a table in a Markdown page.

    python benchmarks/pairs.py results/bench.jsonl --pairs "qfilters:random,kvzap:kvzip" --markdown docs/calibration.md

With ``--against NAME`` every policy of the results is compared with this one. A figure is how many times the other's KL the
policy's is (geometric mean over the contexts that both have), with its 95% interval.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from kvbudget.budget import Budget
from kvbudget.eval.leaderboard import excess, paired
from kvbudget.eval.results import ResultsFile, title
from kvbudget.eval.stats import bootstrap
from kvbudget.files import insert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="one file or more, of the same contexts")
    parser.add_argument("--pairs", help="policy:other, separated by semicolons")
    parser.add_argument("--against", help="compare all policies with this one")
    parser.add_argument("--task", default="fidelity", help="how the task's name begins")
    parser.add_argument("--markdown", type=Path, help="page with the marks <!-- NAME --> and <!-- /NAME -->")
    parser.add_argument("--name", default="pairs", help="of the marks")
    chosen = parser.parse_args()
    everything = [c for path in chosen.results for c in ResultsFile(path).report()]
    cells = [c for c in everything if title(c).startswith(chosen.task) and c["scores"]]
    policies = dict.fromkeys(c["policy"] for c in cells)
    if chosen.against:
        pairs = [(policy, chosen.against) for policy in policies if policy not in (chosen.against, "full")]
    else:
        pairs = [tuple(part.strip() for part in text.split(":")) for text in chosen.pairs.split(";")]
    text = table(cells, pairs, named=not chosen.against)
    print(text)
    if chosen.markdown:
        insert(chosen.markdown, chosen.name, text)


def table(cells: list[dict[str, Any]], pairs: list[tuple[str, ...]], *, named: bool) -> str:
    """Rows of ratios by budget, those of the lowest mean first where all are compared with one policy."""
    known = {(c["policy"], c["budget"]): c for c in cells}
    budgets = [b for b in dict.fromkeys(c["budget"] for c in cells) if b != "full"]
    rows = []
    for one, other in pairs:
        texts, logs, contexts = [], [], 0
        for budget in budgets if (one, budgets[0]) in known else ["full"]:
            mine, theirs = known.get((one, budget)), known.get((other, budget))
            if mine is None or theirs is None:
                texts.append("-")
                continue
            apart = bootstrap([a - b for a, b in zip(*paired(mine, theirs), strict=True)])
            logs.append(apart.mean)
            contexts = min(len(mine["examples"]), len(theirs["examples"]))
            figure, low, high = (math.exp(x) for x in (apart.mean, apart.low, apart.high))
            note = f" ({excess(mine)})" if excess(mine) else ""
            shown = f"{figure:.2f} [{low:.2f}, {high:.2f}]{note}"
            texts.append(f"**{shown}**" if high < 1 else shown)
        if len(texts) == 1 and budgets:
            texts += ["-"] * (len(budgets) - 1)
        rows.append((sum(logs) / max(len(logs), 1), one, other, contexts, texts))
    if not named:
        rows.sort(key=lambda row: row[0])
    heads = [_share(budget, cells) for budget in budgets]
    lines = [f"| policy | {'against | ' if named else ''}{' | '.join(heads)} | contexts |"]
    lines.append("|---" * (len(heads) + 2 + named) + "|")
    for _, one, other, contexts, texts in rows:
        first = f"`{one}` | `{other}`" if named else f"`{one}`"
        lines.append(f"| {first} | {' | '.join(texts)} | {contexts} |")
    return "\n".join(lines)


def _share(budget: str, cells: list[dict[str, Any]]) -> str:
    """A budget in bytes also as a share of the full cache."""
    if Budget.parse(budget).kind != "bytes":
        return budget
    full = next(c["costs"]["full_bytes"] for c in cells if c["budget"] == budget)
    return f"{budget} ({Budget.parse(budget).amount / full:.0%})"


if __name__ == "__main__":
    main()
