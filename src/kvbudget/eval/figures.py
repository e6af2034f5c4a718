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

from kvbudget.eval.leaderboard import DEPTH_SCORES, SHOWN, score_name, shown

Cells = Sequence[dict[str, Any]]
# Tableau's ten colors and four markers tell forty policies apart without a legend that has to be read twice.
MARKERS = "osD^vP*X"
# Policies with budgets that a heat map has side by side at most.
WIDEST = 40


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

    Where distances from the full cache are measured, the full cache itself is left out.
    """
    rows = [c for c in cells if c["scores"] and (c["labeled"] or c["policy"] != "full")]
    policies = list(dict.fromkeys(c["policy"] for c in rows))
    # As high as its legend.
    figure, axes = plt.subplots(figsize=(8.5, max(4.8, 0.172 * len(policies) + 0.4)), layout="constrained")
    headline, higher = (rows[0]["headline"], rows[0]["higher_is_better"]) if rows else ("", True)
    points = [(c["costs"]["nbytes"] / 2**20, shown(headline, c["scores"][headline]["mean"])) for c in rows]
    front = pareto(points, higher_is_better=higher)
    if len(front) > 1:
        axes.plot(
            *zip(*[points[i] for i in front], strict=True), color="0.85", linewidth=9, zorder=0, label="Pareto front"
        )
    for number, policy in enumerate(policies):
        mine = sorted((c for c in rows if c["policy"] == policy), key=lambda c: c["costs"]["nbytes"])
        x = [c["costs"]["nbytes"] / 2**20 for c in mine]
        mean, low, high = (
            [shown(headline, c["scores"][headline][part]) for c in mine] for part in ("mean", "low", "high")
        )
        below = [max(0.0, m - v) for m, v in zip(mean, low, strict=True)]
        above = [max(0.0, v - m) for m, v in zip(mean, high, strict=True)]
        marker = MARKERS[number // 10 % len(MARKERS)]
        axes.errorbar(x, mean, yerr=[below, above], marker=marker, markersize=5, capsize=2, linewidth=1.2, label=policy)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="resident cache (MiB)", ylabel=score_name(headline), title=name)
    axes.set_title(f"{'higher' if higher else 'lower'} is better", loc="right", fontsize=8, color="0.4")
    if headline in SHOWN and points:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def needle_heat_map(cells: Cells, name: str) -> Figure | None:
    """Exact match, token accuracy and log-probability by depth (down) and policy with budget (across).

    Where that gets too wide, policies go down and depths across. None when the task has no depths.
    """
    rows = [c for c in cells if c["scores"]]
    depths = sorted({e["info"]["depth"] for c in rows for e in c["examples"] if "depth" in e["info"]})
    if not depths:
        return None
    labels = [f"{depth:.0%}" for depth in depths]
    tall = len(rows) > WIDEST
    shape, size = (3, 1), (max(6.0, 0.36 * len(rows) + 2.5), 3 * (0.26 * len(depths) + 0.5) + 1.8)
    if tall:
        shape, size = (1, 3), (8.5, 0.165 * len(rows) + 1.4)
    figure, panels = plt.subplots(*shape, figsize=size, layout="constrained", sharex=not tall, sharey=tall)
    for axes, score in zip(panels, DEPTH_SCORES, strict=True):
        grid = np.full((len(depths), len(rows)), np.nan)
        for column, cell in enumerate(rows):
            for line, depth in enumerate(depths):
                found = [e["scores"][score] for e in cell["examples"] if e["info"].get("depth") == depth]
                grid[line, column] = np.mean(found) if found else np.nan
        limits = (-3.5, 0.0) if score == "logprob" else (0.0, 1.0)
        shown_grid = grid.T if tall else grid
        image = axes.imshow(shown_grid, vmin=limits[0], vmax=limits[1], cmap="RdYlGn", aspect="auto")
        axes.set_title(score.replace("_", " "), loc="left", fontsize=9)
        figure.colorbar(image, ax=axes, pad=0.01, location="bottom" if tall else "right")
        # A line between policies, so that the budgets of one stand together.
        for at in range(1, len(rows)):
            if rows[at]["policy"] != rows[at - 1]["policy"]:
                (axes.axhline if tall else axes.axvline)(at - 0.5, color="white", linewidth=2)
        if tall:
            axes.set_xticks(range(len(depths)), labels, fontsize=8)
            axes.set_xlabel("depth", fontsize=8)
        else:
            axes.set_yticks(range(len(depths)), labels, fontsize=8)
            axes.set_ylabel("depth", fontsize=8)
    if tall:
        panels[0].set_yticks(range(len(rows)), [_named(c) for c in rows], fontsize=7)
    else:
        panels[-1].set_xticks(range(len(rows)), [_named(c) for c in rows], rotation=60, ha="right", fontsize=8)
    figure.suptitle(name, fontsize=11)
    return figure


def layer_errors(cells: Cells, name: str) -> Figure | None:
    """Relative error of each layer's attention output by policy with budget; None where no cell has measured it.

    It shows where a policy loses, not which policy is better.
    """
    rows = [c for c in cells if c["layer_errors"] and c["policy"] != "full"]
    if not rows:
        return None
    grid = np.array([c["layer_errors"] for c in rows], dtype=float)
    figure, axes = plt.subplots(figsize=(8.5, 0.19 * len(rows) + 1.6), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes.set_yticks(range(len(rows)), [_named(c) for c in rows], fontsize=7)
    axes.set(xlabel="layer", title=f"{name}: relative error of the attention output (a diagnostic)")
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def _named(cell: dict[str, Any]) -> str:
    return cell["policy"] if cell["budget"] == "full" else f"{cell['policy']} {cell['budget']}"


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
