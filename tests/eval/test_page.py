"""The report: Markdown that tells what can be told, and a page that renders and sorts in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvbudget.errors import KVBudgetError
from kvbudget.eval.leaderboard import commands, leaderboard
from kvbudget.eval.page import write_report
from kvbudget.eval.results import ResultsFile, gather

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=4000"
# Runs in the page: what it looks like after one and two clicks on the score, one on the policy, and words to show.
PROBE = """<script>addEventListener("load", () => {
  const found = {errors: window.errors, images: [...document.images].map((i) => i.naturalWidth)};
  const column = (n) => [...document.querySelectorAll("tbody tr")].map((r) => r.cells[n].textContent);
  const heads = document.querySelectorAll("th"), table = document.querySelector("table");
  found.before = column(1);
  found.height = table.getBoundingClientRect().height;
  heads[3].click(); found.rising = column(1); found.mark = heads[3].getAttribute("aria-sort");
  heads[3].click(); found.falling = column(1);
  heads[1].click(); found.names = column(1);
  const box = document.querySelector("input"); box.value = "KN 10%"; box.dispatchEvent(new Event("input"));
  found.shown = [...document.querySelectorAll("tbody tr")].filter((r) => !r.hidden).map((r) => r.cells[1].textContent);
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
});</script>"""


def cell(policy: str, budget: str, scores: list[float], **changes: object) -> dict[str, object]:
    """A line of a results file as the runner writes it, with the same interval around each mean."""
    mean = sum(scores) / max(len(scores), 1)
    depths = [0.0, 0.5, 1.0]
    values: dict[str, object] = {
        "key": f"{policy} {budget} {changes}",
        "model": "tiny",
        "dtype": "float32",
        "policy": policy,
        "budget": budget,
        "task": "needle(length=64)",
        "visible": False,
        "count": len(scores),
        "seed": 0,
        "headline": "exact",
        "higher_is_better": True,
        "labeled": True,
        "chance": 0.0,
        "scores": {"exact": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}} if scores else {},
        "costs": {
            "nbytes": 2**20 * len(policy),
            "full_bytes": 2**24,
            "peak_bytes": 2**23,
            "kept_share": 0.3 if policy == "greedy" else 0.1,
            "prefill_seconds": 1.0,
            "compression_seconds": 0.5,
            "decode_tokens_per_second": 9.0,
        },
        "examples": [
            {"scores": {"exact": s, "token_accuracy": s, "logprob": -s}, "info": {"depth": depths[i % 3]}}
            for i, s in enumerate(scores)
        ],
        "kept": [[4, 4], [4, 4]],
        "layer_errors": [0.1, 0.4],
        "error": None,
        "versions": {"kvbudget": "0", "torch": "0", "transformers": "0", "python": "0"},
    }
    return values | changes


CELLS = [
    cell("full", "full", [1.0] * 9),
    cell("snapkv", "10%", [1.0, 0.0, 1.0] * 3, kept=[[3, 5], [4, 4]]),
    cell("knorm", "10%", [0.0] * 9),
    cell("tova", "10%", [0.0, 0.0, 1.0] * 3),
    cell("nearly", "10%", [1.0, 0.0, 1.0] * 2 + [0.0, 0.0, 1.0]),
    cell("greedy", "10%", [1.0] * 9),
    cell("broken<b>", "10%", [], error="ValueError: 1 < 2"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    results = ResultsFile(folder / "r.jsonl")
    for line in CELLS:
        results.add_cell(line)
    page = folder / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    return write_report(gather([results.path]), folder / "out", page)


def test_the_leaderboard_says_what_can_be_told_apart(written) -> None:
    text = (written.parent / "leaderboard.md").read_text()
    page = (written.parents[1] / "docs" / "results.md").read_text()
    assert page == f"before\n<!-- bench -->\n{text}\n<!-- /bench -->\nafter\n"
    assert "| snapkv | **0.67 [0.57, 0.77]** |" in text
    assert "| nearly | 0.56 [0.46, 0.66] = |" in text
    assert "| tova | 0.33 [0.23, 0.43] |" in text
    assert "| greedy | 1 [0.9, 1.1] (holds 30%, 38% of the bytes) |" in text
    assert "| snapkv | 1.00 / 1.00 / -1.00 | 0.00 / 0.00 / 0.00 | 1.00 / 1.00 / -1.00 |" in text
    assert "ValueError: 1 < 2" in text
    order = [text.index(f"| {name} | ") for name in ("snapkv", "nearly", "tova", "knorm")]
    assert order == sorted(order)


def test_logarithms_are_shown_as_what_they_are_of() -> None:
    means = {"log_kl": -2.302585, "kl_p95": 0.3, "agreement": 0.875, "perplexity_ratio": 1.25}
    scores = {name: {"mean": mean, "low": -4.60517, "high": 0.0} for name, mean in means.items()}
    examples = [{"scores": {"log_kl": -2.302585}, "info": {}}]
    changes: dict[str, object] = {
        "scores": scores,
        "examples": examples,
        "headline": "log_kl",
        "higher_is_better": False,
        "labeled": False,
    }
    text = leaderboard([cell("snapkv", "10%", [0.0]) | changes])
    assert "**0.1 [0.01, 1]**" in text
    assert "| snapkv | 0.3 / 0.875 / 1.25 |" in text


def test_a_task_that_the_full_cache_fails_is_marked() -> None:
    assert "Not informative" in leaderboard([cell("full", "full", [0.0, 1.0, 0.0])])
    assert "Not informative" not in leaderboard([cell("full", "full", [1.0, 1.0, 0.0])])


def test_the_command_names_policies_budgets_and_visible_tasks() -> None:
    text = commands([*CELLS[:3], cell("snapkv", "10%", [1.0] * 9, visible=True)])
    assert "--policy 'snapkv,knorm' --budget '10%' --task 'needle(length=64)' --count 9" in text
    assert "--policy 'snapkv' --budget '10%' --task 'needle(length=64)@visible'" in text


def test_an_empty_file_is_refused(tmp_path) -> None:
    with pytest.raises(KVBudgetError, match="does not exist"):
        gather([tmp_path / "none.jsonl"])
    (tmp_path / "cut.jsonl").write_text('{"key": "cut o')
    with pytest.raises(KVBudgetError, match="no finished cell"):
        gather([tmp_path / "cut.jsonl"])


def test_files_are_gathered_and_the_later_result_of_a_cell_counts(tmp_path) -> None:
    first, second = (ResultsFile(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    one, two = cell("snapkv", "10%", [1.0]), cell("knorm", "10%", [1.0])
    for line in (one, two):
        first.add_cell(line)
    second.add_cell(two | {"seed": 7})
    assert gather([first.path, second.path]) == [one, two | {"seed": 7}]


def test_the_page_needs_no_network(written) -> None:
    assert not re.search(r"(src|href)=\"?(https?:)?//", written.read_text())
    names = {path.name for path in written.parent.glob("*.png")}
    assert {"needle_length_64_bytes.png", "needle_length_64_depth.png", "needle_length_64_layers.png"} <= names
    assert "kept_0.png" in names


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_renders_and_sorts_in_chromium(written, tmp_path) -> None:
    page = written.read_text().replace(
        "<style>", "<script>errors = []; onerror = (e) => errors.push(e)</script><style>"
    )
    (tmp_path / "probed.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1280,900", written.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 20_000  # a blank page has about 5 kB
    dom = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "probed.html").as_uri()],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    found = json.loads(re.search(r"FOUND(.*)END", dom).group(1).replace("&lt;", "<").replace("&gt;", ">"))
    assert found["errors"] == []
    assert len(found["images"]) == 4 and min(found["images"]) > 300
    assert found["height"] > 100
    assert found["before"] == [line["policy"] for line in CELLS]
    assert found["rising"] == ["knorm", "tova", "nearly", "snapkv", "full", "greedy", "broken<b>"]
    assert found["mark"] == "ascending"
    assert found["falling"] == ["full", "greedy", "snapkv", "nearly", "tova", "knorm", "broken<b>"]
    assert found["shown"] == ["knorm"]
    assert found["names"] == ["full", "greedy", "knorm", "nearly", "snapkv", "tova", "broken<b>"]


def test_a_policy_on_fewer_contexts_says_so_and_is_compared_on_them() -> None:
    cells = [
        cell("full", "full", [1.0] * 4),
        cell("snapkv", "10%", [1.0, 0.0, 1.0, 1.0], count=4),
        cell("qfilters", "10%", [0.0, 1.0], count=2),
        cell("kivi", "full", [1.0, 1.0], count=2),
    ]
    text = leaderboard(cells)
    (row,) = [line for line in text.splitlines() if line.startswith("| qfilters | 0.5")]
    assert "= (2 contexts)" in row, "one of two each"
    assert "| kivi | 1 [0.9, 1.1] (2 contexts) |" in text
    assert "--count 2" in text and "--count 4" in text
