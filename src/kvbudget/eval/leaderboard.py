"""The leaderboard: bench results as Markdown, a table per task with intervals and what can be told apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from kvbudget.budget import Budget, format_bytes
from kvbudget.eval.results import informative, title
from kvbudget.eval.stats import compare

Cells = Sequence[dict[str, Any]]
# Logarithms average well and read badly: they are shown as what they are the logarithm of.
SHOWN = {"log_kl": "KL (geometric mean, nats)"}
DEPTH_SCORES = ("exact", "token_accuracy", "logprob")


def leaderboard(cells: Cells) -> str:
    """Markdown of all cells: per task the scores by policy and budget, needles per depth, costs, commands and versions."""
    first = cells[0]
    lines = [
        f"# Policies on {first['model']}",
        "",
        f"{first['dtype']}, seed {first['seed']}. Means with 95% bootstrap intervals over contexts. **Bold**: the best of its "
        "budget; =: cannot be told from the best on the same contexts (paired bootstrap, 95%). A policy that holds more "
        "entries than the budget says is marked with what it holds and does not compete for the best. Where a policy was run on "
        "fewer contexts, those are the first of the others', and it is compared on them.",
        "",
    ]
    for name in dict.fromkeys(map(title, cells)):
        mine = [c for c in cells if title(c) == name]
        if any(c["scores"] for c in mine):
            lines += [*_task(name, mine), *_distances(mine), *_depths(mine)]
    lines += [*_costs(cells), *_failures(cells), "## How it was measured", ""]
    lines += ["Into one `--results` file, from which `kvbudget report --markdown` wrote this page.", ""]
    lines += ["```sh", commands(cells), "```", ""]
    lines.append(", ".join(f"{name} {number}" for name, number in first["versions"].items()) + ".")
    return "\n".join(lines) + "\n"


def commands(cells: Cells) -> str:
    """The command lines that measure these cells again, one per set of tasks that share policies, budgets and counts."""
    tasks: dict[tuple[str, ...], list[str]] = {}
    for name, count in dict.fromkeys((title(c), c["count"]) for c in cells):
        mine = [c for c in cells if (title(c), c["count"]) == (name, count)]
        policies = dict.fromkeys(c["policy"] for c in mine if c["policy"] != "full")
        budgets = dict.fromkeys(c["budget"] for c in mine if c["budget"] != "full")
        first = mine[0]
        shared = (first["model"], first["dtype"], ",".join(policies), ",".join(budgets), count, first["seed"])
        tasks.setdefault(shared, []).append(name)
    return "\n".join(
        f"kvbudget bench --model {model} --dtype {dtype} --policy '{policies or 'full'}' --budget '{budgets or 'full'}' "
        f"--task '{','.join(names)}' --count {count} --seed {seed}"
        for (model, dtype, policies, budgets, count, seed), names in tasks.items()
    )


def score_name(headline: str) -> str:
    """What a headline score is called where it is shown."""
    return SHOWN.get(headline, headline.replace("_", " "))


def shown(headline: str, value: float) -> float:
    """The value under which a score is shown: logarithms as their arguments."""
    return math.exp(value) if headline in SHOWN else value


def against_best(cell: dict[str, Any], best: dict[str, Any]) -> str:
    """``best``, ``=`` where the two cannot be told apart on the same contexts, else nothing.

    A cell of fewer contexts does not become the best of all; where it beats it on those, it is said to be ``better``.
    """
    if cell is best:
        return "best"
    better = "higher" if cell["higher_is_better"] else "lower"
    return {"cannot tell": "=", better: "better"}.get(compare(*paired(cell, best))[0], "")


def values(cell: dict[str, Any]) -> list[float]:
    """The headline score of every context."""
    return [example["scores"][cell["headline"]] for example in cell["examples"]]


def paired(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The headline scores of the contexts that both cells have: a cell of fewer contexts has the first ones."""
    number = min(len(one["examples"]), len(other["examples"]))
    return values(one)[:number], values(other)[:number]


def best_of(cells: Cells) -> dict[str, Any]:
    """The cell with the best mean among those that stay in their budget, if there are any, and have all contexts."""
    sign = 1.0 if cells[0]["higher_is_better"] else -1.0
    most = max(len(c["examples"]) for c in cells)
    fair = [c for c in cells if not excess(c) and len(c["examples"]) == most] or cells
    return max(fair, key=lambda c: sign * c["scores"][c["headline"]]["mean"])


def excess(cell: dict[str, Any]) -> str:
    """What a cell holds where that is clearly more entries than its fraction of the text.

    That is so where protected entries do not fit, or where entries are kept at few bits instead of leaving.
    """
    budget = Budget.parse(None if cell["budget"] == "full" else cell["budget"])
    costs = cell["costs"]
    if budget.kind != "fraction" or costs["kept_share"] <= 1.1 * budget.amount:
        return ""
    return f"holds {costs['kept_share']:.0%}, {costs['nbytes'] / costs['full_bytes']:.0%} of the bytes"


def _task(name: str, cells: Cells) -> Iterator[str]:
    full = next((c for c in cells if c["policy"] == "full"), None)
    good = [c for c in cells if c["scores"]]
    headline, higher = good[0]["headline"], good[0]["higher_is_better"]
    yield from (f"## {name}", "")
    done, asked = len(good[0]["examples"]), good[0]["count"]
    yield f"{score_name(headline)}, {'higher' if higher else 'lower'} is better, {done} contexts."
    if done < asked:
        yield f"Under way: {asked} contexts are asked for."
    if full is not None and not informative(full):
        yield "Not informative: the full cache itself cannot do it."
    if full is not None and full["labeled"] and full["scores"]:
        yield f"Full cache: {_interval(full)}."
    yield ""
    budgets = [b for b in dict.fromkeys(c["budget"] for c in good) if b != "full"]
    best = {budget: best_of([c for c in good if c["budget"] == budget]) for budget in budgets}
    rows = {policy: {c["budget"]: c for c in good if c["policy"] == policy} for policy in _policies(good)}
    ranked = [policy for policy in _ranked(rows, budgets, higher) if any(b in rows[policy] for b in budgets)]
    if ranked:
        yield f"| policy | {' | '.join(budgets)} |"
        yield "|---|" + "---|" * len(budgets)
    for policy in ranked:
        texts = [_cell(rows[policy].get(budget), best[budget], done) for budget in budgets]
        yield f"| {policy} | {' | '.join(texts)} |"
    keepers = [rows[policy]["full"] for policy in rows if policy != "full" and "full" in rows[policy]]
    if keepers:
        yield from (
            "",
            f"| keeps every entry | {score_name(headline)} | bytes | of the full cache |",
            "|---|---|---|---|",
        )
    for cell in keepers:
        costs = cell["costs"]
        size, share = format_bytes(int(costs["nbytes"])), costs["nbytes"] / costs["full_bytes"]
        yield f"| {cell['policy']} | {_interval(cell)}{_fewer(cell, done)} | {size} | {share:.0%} |"
    yield ""


def _distances(cells: Cells) -> Iterator[str]:
    """The other distances from the full cache, where the logarithm of the KL leads."""
    good = [c for c in cells if c["headline"] == "log_kl" and c["scores"] and c["policy"] != "full"]
    if not good:
        return
    budgets = list(dict.fromkeys(c["budget"] for c in good))
    yield "95th percentile of the KL over tokens / top-1 agreement / perplexity ratio."
    yield from ("", f"| policy | {' | '.join(budgets)} |", "|---|" + "---|" * len(budgets))
    for policy in _policies(good):
        means = {
            c["budget"]: {name: s["mean"] for name, s in c["scores"].items()} for c in good if c["policy"] == policy
        }
        texts = [
            "{kl_p95:.2g} / {agreement:.3f} / {perplexity_ratio:.3g}".format(**means[b]) if b in means else ""
            for b in budgets
        ]
        yield f"| {policy} | {' | '.join(texts)} |"
    yield ""


def _depths(cells: Cells) -> Iterator[str]:
    """Needles per depth: exact match, token accuracy and log-probability."""
    depths = sorted({e["info"]["depth"] for c in cells for e in c["examples"] if "depth" in e["info"]})
    if not depths:
        return
    yield "Per depth: exact match / token accuracy / log-probability."
    for budget in dict.fromkeys(c["budget"] for c in cells):
        yield from ("", f"| {budget} | " + " | ".join(f"{depth:.0%}" for depth in depths) + " |")
        yield "|---|" + "---|" * len(depths)
        for cell in (c for c in cells if c["budget"] == budget and c["scores"]):
            texts = []
            for depth in depths:
                found = [e["scores"] for e in cell["examples"] if e["info"].get("depth") == depth]
                means = [sum(s[name] for s in found) / len(found) for name in DEPTH_SCORES] if found else []
                texts.append(" / ".join(f"{mean:.2f}" for mean in means))
            yield f"| {cell['policy']} | {' | '.join(texts)} |"
    yield ""


def _costs(cells: Cells) -> Iterator[str]:
    """Bytes and speed, on the first task."""
    name = title(cells[0])
    yield from (f"## Cost ({name})", "")
    yield "Times are of the wall clock, whatever else the machine was doing: compare them only where it was quiet."
    yield ""
    yield "| policy | budget | steady | of full | peak | prefill s | compression s | decode tokens/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in (c for c in cells if title(c) == name and c["scores"]):
        costs = cell["costs"]
        yield (
            f"| {cell['policy']} | {cell['budget']} | {format_bytes(int(costs['nbytes']))} | "
            f"{costs['nbytes'] / costs['full_bytes']:.0%} | {format_bytes(int(costs['peak_bytes']))} | "
            f"{costs['prefill_seconds']:.2f} | {costs['compression_seconds']:.2f} | "
            f"{costs.get('decode_tokens_per_second', math.nan):.1f} |"
        )
    yield ""


def _failures(cells: Cells) -> Iterator[str]:
    failed = [c for c in cells if c["error"]]
    if failed:
        yield from ("## Cells that failed", "", "| task | policy | budget | error |", "|---|---|---|---|")
    for cell in failed:
        error = " ".join(cell["error"].split()).replace("|", "\\|")
        yield f"| {title(cell)} | {cell['policy']} | {cell['budget']} | {error} |"
    if failed:
        yield ""


def _policies(cells: Cells) -> list[str]:
    return list(dict.fromkeys(c["policy"] for c in cells))


def _ranked(rows: dict[str, dict[str, Any]], budgets: Sequence[str], higher: bool) -> list[str]:
    """Policies by the mean of their scores over the budgets, best first; those that lack a budget come last."""

    def key(policy: str) -> tuple[int, float]:
        found = [rows[policy][b] for b in budgets if b in rows[policy]]
        mean = sum(c["scores"][c["headline"]]["mean"] for c in found) / max(len(found), 1)
        return len(budgets) - len(found), -mean if higher else mean

    return sorted(rows, key=key)


def _cell(cell: dict[str, Any] | None, best: dict[str, Any], contexts: int) -> str:
    if cell is None:
        return "failed"
    mark = f"({excess(cell)})" if excess(cell) else against_best(cell, best)
    text = f"**{_interval(cell)}**" if mark == "best" else f"{_interval(cell)} {mark}".rstrip()
    return text + _fewer(cell, contexts)


def _fewer(cell: dict[str, Any], contexts: int) -> str:
    """What is said of a cell that ran on fewer contexts than its table."""
    number = len(cell["examples"])
    return f" ({number} contexts)" if number < contexts else ""


def _interval(cell: dict[str, Any]) -> str:
    name = cell["headline"]
    mean, low, high = (f"{shown(name, cell['scores'][name][part]):.2g}" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
