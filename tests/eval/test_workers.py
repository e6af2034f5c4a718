"""Cells on a Ray cluster: the same results as in this process, nothing redone, failures recorded."""

import importlib.util

import pytest
from test_runner import folder, matrix  # noqa: F401  # the fixture

from kvbudget.errors import KVBudgetError
from kvbudget.eval.results import ResultsFile
from kvbudget.eval.runner import Bench
from kvbudget.eval.workers import run_on_ray

INSTALLED = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(INSTALLED, reason="ray is installed")
def test_the_missing_package_is_named(folder, tmp_path):  # noqa: F811
    with pytest.raises(KVBudgetError, match=r"kvbudget\[ray\]"):
        run_on_ray(matrix(folder), ResultsFile(tmp_path / "r.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="ray is not installed")
def test_a_cluster_gives_what_one_process_gives(folder, tmp_path):  # noqa: F811
    cells = matrix(folder, policies=("snapkv(window=8)", "knorm"), budgets=("2 tokens", "50%"), count=2)
    own = Bench(cells, ResultsFile(tmp_path / "own.jsonl")).run()
    results = ResultsFile(tmp_path / "ray.jsonl")
    seen = []
    lines = run_on_ray(cells, results, lambda done, total, what: seen.append((done, total)))
    assert {line["key"]: line["scores"] for line in lines} == {line["key"]: line["scores"] for line in own}
    assert [line["error"] is None for line in sorted(lines, key=lambda c: c["key"])] == [
        line["error"] is None for line in sorted(own, key=lambda c: c["key"])
    ]
    assert seen[-1] == (5, 5)
    finished = results.path.read_text()
    again = []
    run_on_ray(cells, results, lambda done, total, what: again.append(what))
    # Only the cell that failed is tried again.
    assert len(again) == 1 and "2 tokens" in again[0]
    assert results.path.read_text().startswith(finished)
