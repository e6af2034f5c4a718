"""The evaluation runner: cells, resumption after a kill, failures, determinism and the report."""

import json
import sys

import pytest
import torch

from kvbudget.errors import KVBudgetError
from kvbudget.eval import runner
from kvbudget.eval.leaderboard import leaderboard
from kvbudget.eval.matrix import Matrix
from kvbudget.eval.results import ResultsFile, informative
from kvbudget.eval.runner import Bench
from kvbudget.methods import parse
from test_cli import invoke, tiny_tokenizer
from tiny import VOCAB_SIZE, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer and a text that it can read."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    draw = torch.randint(6, VOCAB_SIZE, (4000,), generator=torch.Generator().manual_seed(5))
    (path / "text.txt").write_text(" ".join(f"w{i}" for i in draw.tolist()))
    return path


def matrix(folder, **changes) -> Matrix:
    values = {
        "model": str(folder),
        "policies": ("snapkv(window=8)", "random", "kivi(bits=8)"),
        "budgets": ("50%", "25%"),
        "tasks": ("fidelity(tokens=16)",),
        "length": 96,
        "count": 3,
        "text": str(folder / "text.txt"),
    }
    return Matrix(**{**values, **changes})


def scores(lines):
    return {(c["policy"], c["budget"]): c["scores"] for c in lines}


def test_cells_have_scores_costs_and_the_full_cache_as_yardstick(folder, tmp_path):
    lines = Bench(matrix(folder), ResultsFile(tmp_path / "r.jsonl")).run()
    assert [(c["policy"], c["budget"]) for c in lines] == [
        ("full", "full"),
        ("snapkv(window=8)", "50%"),
        ("snapkv(window=8)", "25%"),
        ("random", "50%"),
        ("random", "25%"),
        ("kivi(bits=8)", "full"),
    ]
    found = scores(lines)
    assert found["full", "full"]["kl_mean"]["mean"] <= 1e-6
    assert found["full", "full"]["agreement"]["mean"] == 1.0
    assert found["random", "25%"]["kl_mean"]["mean"] > 1e-3
    for line in lines:
        assert line["error"] is None
        assert len(line["examples"]) == 3
        assert line["costs"]["decode_tokens_per_second"] > 0
    full, half = lines[0]["costs"], lines[1]["costs"]
    assert half["nbytes"] < 0.6 * full["nbytes"]
    assert not (tmp_path / "r.jsonl.journal").exists()


def test_a_killed_run_goes_on_without_redoing_or_losing_anything(folder, tmp_path, monkeypatch):
    whole = Bench(matrix(folder), ResultsFile(tmp_path / "whole.jsonl")).run()
    results = ResultsFile(tmp_path / "r.jsonl")
    ran = []

    def kill_after(limit):
        def progress(done, total, what):
            ran.append(what)
            if len(ran) == limit:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        Bench(matrix(folder), results, kill_after(8)).run()
    with results.journal.open("a") as journal:
        journal.write('{"key": "cut o')
    before = len(results.examples())
    assert before == 8
    computed = []
    original = runner.Runs._fill
    monkeypatch.setattr(runner.Runs, "_fill", lambda self, cell, *a: computed.append(cell) or original(self, cell, *a))
    lines = Bench(matrix(folder), results).run()
    assert len(computed) == 6 * 3 - before
    assert scores(lines) == scores(whole)


def test_a_run_under_way_can_be_reported(folder, tmp_path):
    results = ResultsFile(tmp_path / "r.jsonl")

    def kill_in_the_third_context(done, total, what):
        if done == 2 * 6 + 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(matrix(folder), results, kill_in_the_third_context).run()
    assert results.cells() == []
    lines = results.report()
    assert [(c["policy"], len(c["examples"])) for c in lines[::5]] == [("full", 2), ("kivi(bits=8)", 2)]
    assert "2 contexts.\nUnder way: 3 contexts are asked for." in leaderboard(lines)
    whole = Bench(matrix(folder), results).run()
    assert results.report() == whole
    assert [e["scores"] for e in whole[1]["examples"][:2]] == [e["scores"] for e in lines[1]["examples"]]


def test_a_finished_run_computes_nothing_and_more_budgets_only_add(folder, tmp_path, monkeypatch):
    results = ResultsFile(tmp_path / "r.jsonl")
    Bench(matrix(folder, budgets=("50%",)), results).run()
    computed = []
    original = runner.Runs._fill
    monkeypatch.setattr(runner.Runs, "_fill", lambda self, cell, *a: computed.append(cell) or original(self, cell, *a))
    Bench(matrix(folder, budgets=("50%",)), results).run()
    assert computed == []
    Bench(matrix(folder), results).run()
    assert {cell.budget for cell in computed} == {"25%"}


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(folder, tmp_path):
    lines = Bench(matrix(folder, budgets=("2 tokens", "50%")), ResultsFile(tmp_path / "r.jsonl")).run()
    by = {(c["policy"], c["budget"]): c["error"] for c in lines}
    assert "BudgetError" in by["snapkv(window=8)", "2 tokens"]
    assert by["snapkv(window=8)", "50%"] is None


def test_a_task_without_examples_is_recorded_and_the_others_go_on(folder, tmp_path):
    tasks = ("fidelity(text='nothing')", "fidelity(length=1100)", "fidelity(tokens=8)")
    lines = Bench(
        matrix(folder, tasks=tasks, policies=("knorm",), budgets=("50%",), count=1), ResultsFile(tmp_path / "r.jsonl")
    ).run()
    assert all("'nothing' is neither" in line["error"] for line in lines[:2])
    assert all("trained for 1024 positions" in line["error"] for line in lines[2:4])
    assert [line["error"] for line in lines[4:]] == [None, None]


def test_a_file_takes_one_run_at_a_time_and_keeps_what_another_left_unfinished(folder, tmp_path):
    results = ResultsFile(tmp_path / "r.jsonl")

    def kill(done, total, what):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(matrix(folder), results, kill).run()
    left = results.examples()
    with results.held(), pytest.raises(KVBudgetError, match="another run"):
        Bench(matrix(folder), results).run()
    Bench(matrix(folder, policies=("tova",), tasks=("recall(spans=1)",)), results).run()
    assert len(left) == 3 and results.examples() == left


def test_every_policy_can_be_measured(folder, tmp_path):
    cells = matrix(folder, policies=("all", "auto"), budgets=("50%",), length=320, count=1)
    lines = Bench(cells, ResultsFile(tmp_path / "r.jsonl")).run()
    assert {line["policy"]: line["error"] for line in lines if line["error"]} == {}
    assert len(lines) > 16
    for line in lines:
        assert len(line["layer_errors"]) == 2
        kl = line["scores"]["kl_mean"]["mean"]
        if line["policy"] == "full":
            assert kl <= 1e-6
        elif line["policy"] == "auto" or parse(line["policy"]).parts().sharing is None:
            # Methods that share between layers may find nothing to share in two.
            assert kl > 1e-9, line["policy"]


def test_a_name_behind_a_minus_is_left_out(folder):
    cells = [c for group in matrix(folder, policies=("all", "-finch", "-h2o")).groups() for c in group]
    named = {c.policy for c in cells}
    assert "snapkv" in named and not {"finch", "h2o"} & named
    with pytest.raises(KVBudgetError, match="finc"):
        list(matrix(folder, policies=("all", "-finc")).groups())


def test_only_the_first_task_times_decoding(folder, tmp_path):
    cells = matrix(
        folder, policies=("knorm",), budgets=("50%",), tasks=("fidelity(tokens=8)", "recall(spans=1)"), count=1
    )
    lines = Bench(cells, ResultsFile(tmp_path / "r.jsonl")).run()
    assert ["decode_tokens_per_second" in line["costs"] for line in lines] == [True, True, False, False]


def test_a_cache_that_cannot_be_read_does_not_spoil_those_read_with_it(folder, tmp_path, monkeypatch):
    original = runner.Runs._fill

    def broken(self, cell, *a):
        cache, costs = original(self, cell, *a)
        if cell.policy == "random":
            cache.broken = "layer 1"
        return cache, costs

    whole = scores(Bench(matrix(folder), ResultsFile(tmp_path / "whole.jsonl")).run())
    monkeypatch.setattr(runner.Runs, "_fill", broken)
    lines = Bench(matrix(folder), ResultsFile(tmp_path / "r.jsonl")).run()
    for line in lines:
        if line["policy"] == "random":
            assert "CacheError" in line["error"] and not line["examples"]
        else:
            found = line["scores"]["log_kl"]["mean"]
            assert found == pytest.approx(whole[line["policy"], line["budget"]]["log_kl"]["mean"], abs=1e-3)


def test_unknown_names_are_refused_before_any_work(folder, tmp_path):
    with pytest.raises(KVBudgetError, match="unknown task 'fidelty'"):
        Bench(matrix(folder, tasks=("fidelty",)), ResultsFile(tmp_path / "r.jsonl")).run()
    with pytest.raises(KVBudgetError, match="no field 'polices'"):
        Matrix.from_mapping({"polices": ["snapkv"]})
    for changes in ({"count": 0}, {"length": "long"}, {"budgets": ()}, {"seed": None}, {"seed": -1}, {"text": [1]}):
        with pytest.raises(KVBudgetError, match=next(iter(changes))):
            matrix(folder, **changes)
    with pytest.raises(KVBudgetError, match=r"must be a list, such as \[snapkv\]"):
        Matrix.from_mapping({"policies": "snapkv"})
    assert not (tmp_path / "r.jsonl").exists()
    (tmp_path / "m.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(KVBudgetError, match="cannot be read"):
        Matrix.from_yaml(tmp_path / "m.yaml")


def test_yaml_gives_the_same_cells(folder, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("policies: [snapkv, knorm]\nbudgets: [50%]\ntasks: [needle@visible]\ncount: 2\n")
    cells = [cell for group in Matrix.from_yaml(path).groups() for cell in group]
    assert [c.policy for c in cells] == ["full", "snapkv", "knorm"]
    assert all(c.visible for c in cells)


def test_the_command_line_measures_reports_and_names_what_shows_nothing(folder, tmp_path):
    results, page = tmp_path / "r.jsonl", tmp_path / "docs.md"
    found = invoke(
        "bench", "--model", str(folder), "--policy", "random,knorm", "--budget", "50%", "--task", "fidelity(tokens=8),niah",
        "--length", "96", "--count", "2", "--text", str(folder / "text.txt"), "--results", str(results),
        "--markdown", str(page), "--json",
    )  # fmt: skip
    assert found.exit_code == 0
    assert "the full cache itself cannot do needle(length=96" in found.stderr.replace("\n", "")
    assert len(json.loads(found.stdout)) == 6
    assert page.read_text() == (tmp_path / "r" / "leaderboard.md").read_text()
    assert "Not informative" in page.read_text()
    again = invoke("report", str(results), "--folder", str(tmp_path / "other"))
    assert again.exit_code == 0 and (tmp_path / "other" / "report.html").exists()
    auto = invoke("report", str(results), "--auto", str(tmp_path / "auto.json"))
    assert auto.exit_code == 2 and "--task needle@visible" in " ".join(auto.stderr.split())
    assert not (tmp_path / "auto.json").exists()


def test_a_report_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments in (("bench", "--results", str(tmp_path / "r.jsonl")), ("report", str(tmp_path / "r.jsonl"))):
        found = invoke(*arguments)
        assert found.exit_code == 2 and "kvbudget[eval]" in " ".join(found.stderr.split())
    assert not list(tmp_path.iterdir())


def test_tasks_that_the_full_cache_cannot_do_are_not_informative():
    line = {"labeled": True, "headline": "exact", "chance": 0.0, "scores": {"exact": {"mean": 0.2}}}
    assert not informative(line)
    assert informative({**line, "scores": {"exact": {"mean": 0.9}}})
    assert informative({**line, "labeled": False})


def test_lines_on_disk_are_whole_json(folder, tmp_path):
    results = ResultsFile(tmp_path / "r.jsonl")
    Bench(matrix(folder, policies=("knorm",), budgets=("50%",)), results).run()
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert len(lines) == 2
    assert {"key", "policy", "budget", "task", "scores", "costs", "versions"} <= set(lines[0])
