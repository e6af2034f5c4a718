"""Figures of an evaluation: quality against bytes, needles per depth, kept entries per layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

Cells = Sequence[dict[str, Any]]
# Tableau's ten colors and four markers tell forty policies apart without a legend that has to be read twice.
MARKERS = "osD^vP*X"


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


def quality_against_bytes(cells: Cells, task: str) -> Figure:
    """The task's headline score over resident bytes, a line per policy, the Pareto front in gray behind."""
    rows = [c for c in cells if c["task"] == task and not c["error"] and c["scores"]]
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    higher = rows[0]["higher_is_better"] if rows else True
    name = rows[0]["headline"] if rows else ""
    points = [(c["costs"]["nbytes"] / 2**20, c["scores"][c["headline"]]["mean"]) for c in rows]
    front = pareto(points, higher_is_better=higher)
    axes.plot(*zip(*[points[i] for i in front], strict=True), color="0.8", linewidth=8, zorder=0, label="Pareto front")
    for number, policy in enumerate(dict.fromkeys(c["policy"] for c in rows)):
        mine = sorted((c for c in rows if c["policy"] == policy), key=lambda c: c["costs"]["nbytes"])
        x = [c["costs"]["nbytes"] / 2**20 for c in mine]
        means = [c["scores"][name]["mean"] for c in mine]
        low = [max(0.0, m - c["scores"][name]["low"]) for m, c in zip(means, mine, strict=True)]
        high = [max(0.0, c["scores"][name]["high"] - m) for m, c in zip(means, mine, strict=True)]
        marker = MARKERS[number // 10 % len(MARKERS)]
        axes.errorbar(x, means, yerr=[low, high], marker=marker, capsize=2, linewidth=1.2, label=policy)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="resident cache (MiB)", ylabel=f"{name} ({'higher' if higher else 'lower'} is better)", title=task)
    if not higher and points and min(p[1] for p in points if p[1] > 0) > 0:
        axes.set_yscale("symlog", linthresh=1e-3)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def needle_heat_map(cells: Cells, task: str, score: str = "token_accuracy") -> Figure | None:
    """Mean score by depth (down) and policy with budget (across); None when the task has no depths."""
    rows = [c for c in cells if c["task"] == task and not c["error"]]
    depths = sorted({e["info"]["depth"] for c in rows for e in c["examples"] if "depth" in e["info"]})
    if not depths:
        return None
    grid = np.full((len(depths), len(rows)), np.nan)
    for column, cell in enumerate(rows):
        for line, depth in enumerate(depths):
            found = [e["scores"][score] for e in cell["examples"] if e["info"].get("depth") == depth]
            if found:
                grid[line, column] = sum(found) / len(found)
    figure, axes = plt.subplots(
        figsize=(max(5.0, 0.42 * len(rows) + 2.5), 0.34 * len(depths) + 3.0), layout="constrained"
    )
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    names = [c["policy"] if c["budget"] == "full" else f"{c['policy']} {c['budget']}" for c in rows]
    axes.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="depth of the needle", title=f"{task}: {score.replace('_', ' ')}")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


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
