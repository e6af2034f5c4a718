"""The report of an evaluation: one self-contained HTML page, its figures as PNG files, and a Markdown leaderboard."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbudget.budget import format_bytes
from kvbudget.errors import KVBudgetError
from kvbudget.eval import figures
from kvbudget.eval.results import ResultsFile
from kvbudget.eval.runner import informative
from kvbudget.eval.stats import compare

Cells = Sequence[dict[str, Any]]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13.5px; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
th { cursor: pointer; position: sticky; top: 0; background: Canvas; user-select: none; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
tr:hover td { background: var(--soft); } .weak td { opacity: .55; } .bad td { color: #c33; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; background: white; border-radius: 6px; }
code, pre { background: var(--soft); border-radius: 4px; padding: .1rem .3rem; } pre { padding: .8rem; overflow-x: auto; }
.scroll { overflow: auto; max-height: 75vh; } small { opacity: .7; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", ({ target }) => {
    const head = target.closest("th"), column = head.cellIndex, body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      return (isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q) * (down ? -1 : 1);
    });
    body.append(...rows);
  });
}
"""

COLUMNS = (
    "task",
    "policy",
    "budget",
    "score",
    "95% interval",
    "against full",
    "steady",
    "peak",
    "prefill s",
    "compress s",
    "tokens/s",
)


def write_report(results: Path, folder: Path, command: str = "") -> Path:
    """Writes ``report.html``, ``leaderboard.md`` and PNG files from a results file; returns the page's path."""
    cells = ResultsFile(results).cells()
    if not cells:
        raise KVBudgetError(f"{str(results)!r} holds no finished cell; run kvbudget bench --results {results} first")
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Path]] = []
    for task in dict.fromkeys(c["task"] for c in cells):
        if any(c["task"] == task and c["scores"] for c in cells):
            pictures.append(
                (task, figures.save(figures.quality_against_bytes(cells, task), folder / f"{task}_bytes.png"))
            )
        heat = figures.needle_heat_map(cells, task)
        if heat is not None:
            pictures.append((f"{task} by depth", figures.save(heat, folder / f"{task}_depth.png")))
    for number, cell in enumerate(_ragged(cells)):
        path = figures.save(figures.kept_entries(cell), folder / f"kept_{number}.png")
        pictures.append((f"kept entries of {cell['policy']} at {cell['budget']}", path))
    (folder / "leaderboard.md").write_text(leaderboard(cells), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(cells, pictures, command), encoding="utf-8")
    return page


def leaderboard(cells: Cells) -> str:
    """A Markdown table per task, best policy first at each budget, with what beats the next one for sure."""
    lines = []
    for task in dict.fromkeys(c["task"] for c in cells):
        mine = [c for c in cells if c["task"] == task]
        full = next((c for c in mine if c["policy"] == "full" and not c["error"]), None)
        good = [c for c in mine if not c["error"] and c["scores"]]
        if not good:
            continue
        name, higher = good[0]["headline"], good[0]["higher_is_better"]
        note = "" if full is None or informative(full) else " (not informative: the full cache cannot do it)"
        lines += [f"## {task}{note}", "", f"Headline: {name}, {'higher' if higher else 'lower'} is better.", ""]
        for budget in dict.fromkeys(c["budget"] for c in good):
            rows = sorted(
                (c for c in good if c["budget"] == budget), key=lambda c: c["scores"][name]["mean"], reverse=higher
            )
            lines += [f"| {budget} | {name} | 95% interval | against the next | bytes |", "|---|---|---|---|---|"]
            for row, following in zip(rows, [*rows[1:], None], strict=True):
                score = row["scores"][name]
                verdict = "" if following is None else _verdict(row, following, name, higher)
                size = format_bytes(int(row["costs"]["nbytes"]))
                lines.append(
                    f"| {row['policy']} | {score['mean']:.3g} | {score['low']:.3g} to {score['high']:.3g} | {verdict} | {size} |"
                )
            lines.append("")
    return "\n".join(lines)


def _verdict(one: dict[str, Any], other: dict[str, Any], name: str, higher: bool) -> str:
    a, b = ([e["scores"][name] for e in cell["examples"]] for cell in (one, other))
    if len(a) != len(b):
        return "not on the same contexts"
    better, _ = compare(a, b)
    return "better" if better == ("higher" if higher else "lower") else "cannot tell"


def _ragged(cells: Cells) -> list[dict[str, Any]]:
    """At most four cells whose layers or heads keep different numbers of entries, one per policy."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if len({n for layer in cell["kept"] for n in layer}) > 1:
            found.setdefault(cell["policy"], cell)
    return list(found.values())[:4]


def _page(cells: Cells, pictures: Sequence[tuple[str, Path]], command: str) -> str:
    first = cells[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    images = "".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for title, path in pictures
    )
    weak = {c["task"] for c in cells if c["policy"] == "full" and not c["error"] and not informative(c)}
    notes = "".join(
        f"<li>{html.escape(t)}: not informative, the full cache itself cannot do it</li>" for t in sorted(weak)
    )
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(_row(c, cells, c["task"] in weak) for c in cells)
    policies = sorted({c["policy"] for c in cells})
    budgets = sorted({c["budget"] for c in cells} - {"full"})
    tasks = sorted({c["task"] + ("@visible" if c["visible"] else "") for c in cells})
    rerun = (
        f"kvbudget bench --model {first['model']} --dtype {first['dtype']} --policy {','.join(policies)} "
        f"--budget {','.join(budgets)} --task {','.join(tasks)} "
        f"--count {first['count']} --seed {first['seed']}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>kvbudget: {html.escape(first['model'])}</title><style>{STYLE}</style>"
        f"<h1>KV-cache policies on {html.escape(first['model'])}</h1>"
        f"<p>{len(cells)} cells, {first['count']} contexts per task, {html.escape(first['dtype'])}, seed "
        f"{first['seed']}. Scores carry 95% bootstrap intervals over contexts; click a column to sort.</p>"
        f"<ul>{notes}</ul><div class=scroll><table class=sortable><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<h2>Figures</h2>{images}<h2>How to run it again</h2><pre>{html.escape(command or rerun)}</pre>"
        f"<p><small>{html.escape(versions)}</small></p><script>{SCRIPT}</script></html>"
    )


def _row(cell: dict[str, Any], cells: Cells, weak: bool) -> str:
    if cell["error"]:
        text = html.escape(cell["error"])
        return (
            f"<tr class=bad><td>{cell['task']}</td><td>{html.escape(cell['policy'])}</td><td>{cell['budget']}</td>"
            f'<td colspan="{len(COLUMNS) - 3}" style="text-align:left">{text}</td></tr>'
        )
    score, costs = cell["scores"][cell["headline"]], cell["costs"]
    full = next((c for c in cells if c["policy"] == "full" and c["task"] == cell["task"] and not c["error"]), None)
    verdict = ""
    if full is not None and full is not cell:
        name = cell["headline"]
        a, b = ([e["scores"][name] for e in c["examples"]] for c in (cell, full))
        verdict = compare(a, b)[0] if len(a) == len(b) else ""
    task = cell["task"] + (" (question visible)" if cell["visible"] else "")
    values = [
        (task, None),
        (html.escape(cell["policy"]), None),
        (cell["budget"], None),
        (f"{score['mean']:.4g}", score["mean"]),
        (f"{score['low']:.3g} to {score['high']:.3g}", score["low"]),
        (verdict, None),
        (format_bytes(int(costs["nbytes"])), costs["nbytes"]),
        (format_bytes(int(costs["peak_bytes"])), costs["peak_bytes"]),
        (f"{costs['prefill_seconds']:.2f}", costs["prefill_seconds"]),
        (f"{costs['compression_seconds']:.2f}", costs["compression_seconds"]),
        (f"{costs['decode_tokens_per_second']:.1f}", costs["decode_tokens_per_second"]),
    ]
    tds = "".join(f"<td>{t}</td>" if v is None else f'<td data-value="{v}">{t}</td>' for t, v in values)
    return f"<tr{' class=weak' if weak else ''}>{tds}</tr>"
