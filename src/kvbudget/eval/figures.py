"""Figures of an evaluation: quality against bytes, needles per depth, kept entries per layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from kvbudget.eval.leaderboard import DEPTH_SCORES, SHOWN, score_name, shown

Cells = Sequence[dict[str, Any]]
# Tableau's ten colors and these markers tell policies apart.
MARKERS = "osD^vP*X"
# Policies that a figure of lines names; more cannot be told apart, and stand in gray behind these.
MOST_NAMED = 20


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Indices of the points (cost, quality) that no other point beats in both; by rising cost.

    >>> pareto([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)], higher_is_better=True)
    [0, 2]
    """
    sign = 1.0 if higher_is_better else -1.0
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if not front or sign * points[index][1] > sign * points[front[-1]][1]:
            front.append(index)
    return front


def quality_against_bytes(cells: Cells, name: str) -> Figure:
    """The headline score of one task's cells over resident bytes, a line per policy, the Pareto front in gray behind.

    Where distances from the full cache are measured, the full cache itself is left out. Of many policies, those on the
    front and the best of each budget are named.
    """
    rows = [c for c in cells if c["scores"] and (c["labeled"] or c["policy"] != "full")]
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    headline, higher = (rows[0]["headline"], rows[0]["higher_is_better"]) if rows else ("", True)
    points = [(c["costs"]["nbytes"] / 2**20, shown(headline, c["scores"][headline]["mean"])) for c in rows]
    front = pareto(points, higher_is_better=higher)
    if len(front) > 1:
        axes.plot(
            *zip(*[points[i] for i in front], strict=True), color="0.85", linewidth=9, zorder=0, label="Pareto front"
        )
    named = _leading(rows, [rows[i]["policy"] for i in front])
    others = [policy for policy in dict.fromkeys(c["policy"] for c in rows) if policy not in named]
    for number, policy in enumerate([*others, *named]):
        mine = sorted((c for c in rows if c["policy"] == policy), key=lambda c: c["costs"]["nbytes"])
        x = [c["costs"]["nbytes"] / 2**20 for c in mine]
        mean, low, high = (
            [shown(headline, c["scores"][headline][part]) for c in mine] for part in ("mean", "low", "high")
        )
        if policy in others:
            label = "" if number else f"{len(others)} others"
            axes.plot(x, mean, ".-", color="0.75", markersize=3, linewidth=0.6, zorder=1, label=label)
            continue
        below = [max(0.0, m - v) for m, v in zip(mean, low, strict=True)]
        above = [max(0.0, v - m) for m, v in zip(mean, high, strict=True)]
        place = number - len(others)
        axes.errorbar(
            x,
            mean,
            yerr=[below, above],
            marker=MARKERS[place // 10 % len(MARKERS)],
            color=f"C{place % 10}",
            label=_shortened(policy),
            markersize=5,
            capsize=2,
            linewidth=1.2,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    direction = "higher" if higher else "lower"
    axes.set(xlabel="resident cache (MiB)", ylabel=f"{score_name(headline)}, {direction} is better", title=name)
    if headline in SHOWN and len({value for _, value in points}) > 1:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    if rows:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _leading(cells: Cells, front: Sequence[str]) -> list[str]:
    """The policies that a figure names: all, or where they are too many those of the front and the best of each budget."""
    policies = list(dict.fromkeys(c["policy"] for c in cells))
    if len(policies) <= MOST_NAMED:
        return policies
    budgets = dict.fromkeys(c["budget"] for c in cells if c["budget"] != "full")
    best = [_ranked([c for c in cells if c["budget"] == budget]) for budget in budgets]
    places = (policy for place in zip_longest(*best) for policy in place if policy is not None)
    return list(dict.fromkeys([*front, *places]))[:MOST_NAMED]


def _ranked(cells: Cells) -> list[str]:
    """Policies by the mean of their headline scores, best first."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        sign = -1.0 if cell["higher_is_better"] else 1.0
        found.setdefault(cell["policy"], []).append(sign * cell["scores"][cell["headline"]]["mean"])
    return sorted(found, key=lambda policy: sum(found[policy]) / len(found[policy]))


def _grouped(cells: Cells) -> tuple[list[str], list[str]]:
    """Policies that keep every entry, best first, then the others, best first; and the budgets, that of the former first."""
    keep = {c["policy"] for c in cells if c["budget"] == "full"}
    budgets = dict.fromkeys(c["budget"] for c in cells)
    return sorted(_ranked(cells), key=lambda p: p not in keep), sorted(budgets, key=lambda b: b != "full")


def needle_heat_map(cells: Cells, name: str) -> Figure | None:
    """Exact match, token accuracy and log-probability, a panel each: a line per policy, best first; depths by budget across.

    None when the task has no depths.
    """
    rows = [c for c in cells if c["scores"]]
    depths = sorted({e["info"]["depth"] for c in rows for e in c["examples"] if "depth" in e["info"]})
    if not depths:
        return None
    policies, budgets = _grouped(rows)
    columns = len(budgets) * len(depths)
    size = (2.4 + 3 * max(1.6, 0.17 * columns), 0.17 * len(policies) + 2.2)
    figure, panels = plt.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
    for axes, score in zip(panels, DEPTH_SCORES, strict=True):
        limits = (-3.5, 0.0) if score == "logprob" else (0.0, 1.0)
        values = {(c["policy"], c["budget"]): [_at_depth(c, depth, score) for depth in depths] for c in rows}
        image = _side_by_side(axes, policies, budgets, values, vmin=limits[0], vmax=limits[1], cmap="RdYlGn")
        axes.set_title(score.replace("_", " "), fontsize=10, pad=18)
        axes.set_xticks(range(columns), [f"{depth:.0%}" for depth in depths] * len(budgets), rotation=90, fontsize=6)
        axes.set_xlabel("depth of the needle, by budget", fontsize=8)
        figure.colorbar(image, ax=axes, location="bottom", fraction=0.4 / size[1], pad=0.01)
    figure.suptitle(name, fontsize=11)
    return figure


def _at_depth(cell: dict[str, Any], depth: float, score: str) -> float:
    found = [e["scores"][score] for e in cell["examples"] if e["info"].get("depth") == depth]
    return sum(found) / len(found) if found else float("nan")


def layer_errors(cells: Cells, name: str) -> Figure | None:
    """Relative error of each layer's attention output: a line per policy, layers by budget across.

    It shows where a policy loses, not which policy is better. None where no cell has measured it.
    """
    rows = [c for c in cells if c["layer_errors"] and c["scores"] and c["policy"] != "full"]
    if not rows:
        return None
    policies, budgets = _grouped(rows)
    layers = len(rows[0]["layer_errors"])
    figure, axes = plt.subplots(figsize=(12, 0.17 * len(policies) + 1.8), layout="constrained")
    values = {(c["policy"], c["budget"]): c["layer_errors"] for c in rows}
    image = _side_by_side(axes, policies, budgets, values, vmin=0, vmax=1, cmap="magma")
    marks = sorted({0, layers // 2})
    places = [number * layers + mark for number in range(len(budgets)) for mark in marks]
    axes.set_xticks(places, [str(mark) for mark in marks] * len(budgets), fontsize=7)
    axes.set_xlabel("layer, by budget", fontsize=8)
    axes.set_title(f"{name}: relative error of the attention output (a diagnostic)", fontsize=11, pad=18)
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.02)
    return figure


def _side_by_side(
    axes: Axes,
    policies: Sequence[str],
    budgets: Sequence[str],
    values: Mapping[tuple[str, str], Sequence[float]],
    **look: Any,
) -> AxesImage:
    """Draws equally many values of each policy and budget: a line per policy, budgets side by side, gaps left blank."""
    width = len(next(iter(values.values())))
    blank = [float("nan")] * width
    grid = [[v for budget in budgets for v in values.get((policy, budget), blank)] for policy in policies]
    image = axes.imshow(np.array(grid, dtype=float), aspect="auto", interpolation="nearest", **look)
    for number, budget in enumerate(budgets):
        if number:
            axes.axvline(number * width - 0.5, color="white", linewidth=3)
        middle = (number + 0.5) * width - 0.5
        axes.text(middle, 1.0, budget, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(policies)), map(_shortened, policies), fontsize=7)
    return image


def _shortened(policy: str) -> str:
    """What a figure has room for; the table has the whole name."""
    return policy if len(policy) <= 28 else f"{policy[:27]}…"


def kept_entries(cell: dict[str, Any]) -> Figure:
    """Kept entries per layer (across) and KV head (down) of a cell's first example."""
    grid = np.array(cell["kept"], dtype=float).T
    figure, axes = plt.subplots(figsize=(6.4, 0.3 * grid.shape[0] + 1.3), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="layer", ylabel="KV head", title=f"{cell['policy']} {cell['budget']}: kept entries")
    axes.set_yticks(range(grid.shape[0]))
    figure.colorbar(image, ax=axes)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
