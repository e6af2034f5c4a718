"""The report of an evaluation: one self-contained HTML page, its figures as PNG files, and the Markdown leaderboard."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbudget.budget import format_bytes
from kvbudget.eval import figures
from kvbudget.eval.leaderboard import against_best, best_of, commands, excess, leaderboard, score_name, shown
from kvbudget.eval.results import informative, title
from kvbudget.files import insert

Cells = Sequence[dict[str, Any]]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1320px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 12.5px; }
th, td { padding: .25rem .4rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
td:nth-child(-n+2) { max-width: 11rem; overflow: hidden; text-overflow: ellipsis; }
th { cursor: pointer; position: sticky; top: 0; background: Canvas; user-select: none; box-shadow: 0 1px var(--line); }
th::after { content: ""; display: inline-block; width: .9em; }
th[aria-sort=ascending]::after { content: "\\25B2"; } th[aria-sort=descending]::after { content: "\\25BC"; }
tbody tr:hover td { background: var(--soft); } .weak td { opacity: .55; } .best td:nth-child(4) { font-weight: 700; }
.bad td { color: #c33; } .bad td:last-child { text-align: left; white-space: normal; min-width: 26rem; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; background: white; border-radius: 6px; }
pre { background: var(--soft); border-radius: 4px; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
input { font: inherit; width: 100%; max-width: 24rem; box-sizing: border-box; margin-bottom: .6rem; padding: .3rem .5rem; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; } small { opacity: .7; }
"""

SCRIPT = """
const rows = [...document.querySelectorAll("table.sortable tbody tr")];
document.querySelector("input").addEventListener("input", ({ target }) => {
  const words = target.value.toLowerCase().split(/\\s+/);
  const texts = (row) => [...row.cells].slice(0, 3).map((cell) => cell.textContent).join(" ").toLowerCase();
  for (const row of rows) row.hidden = !words.every((word) => texts(row).includes(word));
});
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", ({ target }) => {
    const head = target.closest("th"), column = head.cellIndex, body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    // Cells that failed have no figures; they stay below in both directions.
    const value = (row) => row.cells[column]?.dataset.value ?? row.cells[column]?.textContent ?? "";
    const broken = (row) => row.classList.contains("bad");
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [Number(x), Number(y)];
      const order = x === "" || y === "" || isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
      return broken(a) - broken(b) || order * (down ? -1 : 1);
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
    "in its budget",
    "steady",
    "of full",
    "peak",
    "prefill s",
    "compress s",
    "tokens/s",
)


def write_report(cells: Cells, folder: Path, markdown: Path | None = None) -> Path:
    """Writes ``report.html``, ``leaderboard.md`` and PNG files from the cells of a bench; returns the page's path.

    The leaderboard is also written to ``markdown``: between its marks ``<!-- bench -->`` and ``<!-- /bench -->`` where that
    page exists and has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Path]] = []
    for name in dict.fromkeys(map(title, cells)):
        pictures += _pictures(name, [c for c in cells if title(c) == name], folder)
    for number, cell in enumerate(_ragged(cells)):
        path = figures.save(figures.kept_entries(cell), folder / f"kept_{number}.png")
        pictures.append((f"kept entries of {cell['policy']} at {cell['budget']}", path))
    text = leaderboard(cells)
    (folder / "leaderboard.md").write_text(text, encoding="utf-8")
    if markdown is not None and markdown.is_file() and "<!-- bench -->" in markdown.read_text(encoding="utf-8"):
        insert(markdown, "bench", text)
    elif markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text, encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(cells, pictures), encoding="utf-8")
    return page


def _pictures(name: str, cells: Cells, folder: Path) -> list[tuple[str, Path]]:
    """Draws the figures of one task."""
    file = re.sub(r"\W+", "_", name).strip("_")
    drawn = {
        "bytes": figures.quality_against_bytes(cells, name) if any(c["scores"] for c in cells) else None,
        "depth": figures.needle_heat_map(cells, name),
        "layers": figures.layer_errors(cells, name),
    }
    return [
        (f"{name}: {kind}", figures.save(figure, folder / f"{file}_{kind}.png"))
        for kind, figure in drawn.items()
        if figure is not None
    ]


def _ragged(cells: Cells) -> list[dict[str, Any]]:
    """At most four cells whose layers or heads keep different numbers of entries, one per policy."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if len({n for layer in cell["kept"] for n in layer}) > 1:
            found.setdefault(cell["policy"], cell)
    return list(found.values())[:4]


def _page(cells: Cells, pictures: Sequence[tuple[str, Path]]) -> str:
    first = cells[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    images = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for name, path in pictures
    )
    weak = {title(c) for c in cells if c["policy"] == "full" and c["scores"] and not informative(c)}
    notes = "".join(
        f"<li>{html.escape(t)}: not informative, the full cache itself cannot do it</li>" for t in sorted(weak)
    )
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(_row(c, cells, title(c) in weak) for c in cells)
    policies = len({c["policy"] for c in cells})
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>kvbudget: {html.escape(first['model'])}</title><style>{STYLE}</style></head><body>"
        f"<h1>KV-cache policies on {html.escape(first['model'])}</h1>"
        f"<p>{policies} policies, {len(cells)} cells, {html.escape(first['dtype'])}, seed {first['seed']}. "
        "Scores are means with 95% bootstrap intervals over contexts; the column <i>in its budget</i> names the best policy "
        "of the same task and budget, with = those that cannot be told from it, and what a policy holds that keeps more entries "
        "than the budget says. Click a column to sort; point at a row for its other scores.</p>"
        f"{f'<ul>{notes}</ul>' if notes else ''}"
        '<input type=search placeholder="show: words of task, policy, budget" aria-label="show"><div class=scroll>'
        f"<table class=sortable><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><h2>Figures</h2>{images}<h2>How to measure it again</h2>"
        f"<pre>{html.escape(commands(cells))}</pre><p><small>{html.escape(versions)}</small></p>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _row(cell: dict[str, Any], cells: Cells, weak: bool) -> str:
    names = [title(cell), cell["policy"], cell["budget"]]
    share = cell["costs"].get("nbytes", 0) / max(cell["costs"].get("full_bytes", 1), 1)
    if cell["error"]:
        tds = "".join(f"<td>{html.escape(name)}</td>" for name in names)
        error = html.escape(cell["error"])
        return f"<tr class=bad>{tds}<td colspan={len(COLUMNS) - 3}>{error}</td></tr>"
    headline, score, costs = cell["headline"], cell["scores"][cell["headline"]], cell["costs"]
    rivals = [c for c in cells if title(c) == title(cell) and c["budget"] == cell["budget"] and c["scores"]]
    beyond = excess(cell).partition(",")[0]
    mark = beyond or against_best(cell, best_of(rivals)) if cell["budget"] != "full" else ""
    mean, low, high = (shown(headline, score[part]) for part in ("mean", "low", "high"))
    speed = costs.get("decode_tokens_per_second")
    values = [
        *((html.escape(name), None) for name in names[:2]),
        (cell["budget"], share),
        (f"{mean:.3g} <small>{html.escape(score_name(headline).partition(' (')[0])}</small>", mean),
        (f"{low:.3g} to {high:.3g}", low),
        (mark, None),
        (format_bytes(int(costs["nbytes"])), costs["nbytes"]),
        (f"{share:.0%}", share),
        (format_bytes(int(costs["peak_bytes"])), costs["peak_bytes"]),
        (f"{costs['prefill_seconds']:.2f}", costs["prefill_seconds"]),
        (f"{costs['compression_seconds']:.2f}", costs["compression_seconds"]),
        ("" if speed is None else f"{speed:.1f}", speed or 0.0),
    ]
    tds = "".join(f"<td>{t}</td>" if v is None else f'<td data-value="{v}">{t}</td>' for t, v in values)
    others = ", ".join(f"{name} {found['mean']:.3g}" for name, found in cell["scores"].items())
    others = f"{names[0]}, {names[1]}: {others}"
    kind = " ".join(["weak"] * weak + ["best"] * (mark == "best"))
    return f'<tr class="{kind}" title="{html.escape(others)}">{tds}</tr>'
