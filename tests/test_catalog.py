"""docs/methods.md says what the registry says, and its measured column what a results file says."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbudget import auto
from kvbudget.cli import app
from kvbudget.methods import registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["methods", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def rows(page: str) -> dict[str, list[str]]:
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells] for cells in lines}


def test_the_page_is_what_its_command_prints(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(PAGE.parents[1])
    page = PAGE.read_text(encoding="utf-8")
    (command,) = re.findall(r"<!-- kvbudget methods (.*) -->", page)
    assert page == printed(*command.split()), f"run: kvbudget methods {command} > docs/methods.md"


def test_every_method_has_a_row_with_its_defaults():
    table = rows(printed("--markdown"))
    assert list(table) == list(registry())
    for name, kind in registry().items():
        assert len(table[name]) == 12 and table[name][-1] == kind.paper
        assert all(f"`{parameter}=" in table[name][7] for parameter, x in kind.parameters().items() if x != "")
    assert all(re.match(r"\d+ in `test_", cells[10]) for cells in table.values()), "nothing is untested"
    assert table["kivi"][5:7] == ["no", "yes"] and table["adakv"][6] == "no", "its own scorer looks at queries"


def test_measured_divergences_fill_their_column(tmp_path: Path):
    lines = [
        {
            "key": "a",
            "policy": "snapkv(window=16)",
            "budget": "25%",
            "scores": {"log_kl": {"mean": -2.302585}},
            "error": None,
        },
        {"key": "b", "policy": "snapkv", "budget": 64, "scores": {"log_kl": {"mean": 0.0}}, "error": None},
        {"key": "c", "policy": "snapkv+adakv", "budget": 64, "scores": {"log_kl": {"mean": 1.0}}, "error": None},
        {"key": "d", "policy": "knorm", "budget": 64, "scores": {}, "error": "RuntimeError: no"},
        {"key": "e", "policy": "h2o", "budget": 64, "scores": {"accuracy": {"mean": 1.0}}, "error": None},
        {"key": "f", "policy": "gone_method", "budget": 64, "scores": {"log_kl": {"mean": 1.0}}, "error": None},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text(
        "".join(json.dumps(line | {"task": "fidelity", "visible": False, "labeled": False}) + "\n" for line in lines)
    )
    table = rows(printed("--markdown", "--results", str(path)))
    assert table["snapkv"][8] == "25%: 0.1, 64: 1"
    assert {cells[8] for name, cells in table.items() if name != "snapkv"} == {"-"}


def test_without_results_the_column_is_that_of_the_shipped_table(monkeypatch):
    monkeypatch.setattr(auto, "divergences", lambda: {"snapkv": "25%: 0.3"})
    table = rows(printed("--markdown"))
    assert (table["snapkv"][8], table["knorm"][8]) == ("25%: 0.3", "-")


@pytest.mark.parametrize("arguments", [["snapkv", "--markdown"], ["--markdown", "--json"], ["--results", "x.jsonl"]])
def test_the_page_is_the_whole_list(arguments):
    result = CliRunner().invoke(app, ["methods", *arguments])
    assert result.exit_code == 2 and "leave out the name" in result.stderr


def test_results_that_are_not_there_are_refused():
    result = CliRunner().invoke(app, ["methods", "--markdown", "--results", "nowhere.jsonl"])
    assert result.exit_code == 2 and "'nowhere.jsonl' does not exist" in result.stderr
