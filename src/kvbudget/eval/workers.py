"""Workers: the cells of a matrix on a Ray cluster, a task per group of cells that share their contexts and a policy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbudget.errors import KVBudgetError
from kvbudget.eval.matrix import Matrix
from kvbudget.eval.results import ResultsFile
from kvbudget.eval.runner import Bench


def run_on_ray(
    matrix: Matrix, results: ResultsFile, progress: Callable[[int, int, str], None] | None = None
) -> list[dict[str, Any]]:
    """As `Bench.run`, with the missing cells spread over a Ray cluster (a local one unless ``RAY_ADDRESS`` names one).

    Each worker loads the model once per task and records its contexts anew; finished cells arrive one by one.

    Raises:
        KVBudgetError: when Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise KVBudgetError("--workers ray needs Ray; install it with pip install 'kvbudget[ray]'") from error
    groups = list(matrix.groups())
    with results.held():
        finished = {line["key"] for line in results.cells() if not line["error"]}
        jobs: list[frozenset[str]] = []
        for group in groups:
            for policy in dict.fromkeys(cell.policy for cell in group):
                keys = frozenset(c.key for c in group if c.policy == policy and c.key not in finished)
                if keys:
                    jobs.append(keys)
        if jobs:
            started = not ray.is_initialized()
            ray.init(ignore_reinit_error=True, log_to_driver=False)
            try:
                remote = ray.remote(num_cpus=1)(_run_cells)
                waiting = [remote.remote(matrix, keys) for keys in jobs]
                total, done = sum(map(len, jobs)), 0
                while waiting:
                    ready, waiting = ray.wait(waiting)
                    for line in ray.get(ready[0]):
                        results.add_cell(line)
                        done += 1
                        if progress is not None:
                            progress(done, total, f"{line['task']}: {line['policy']} {line['budget']}")
            finally:
                if started:
                    ray.shutdown()
    keys_of_matrix = {cell.key for group in groups for cell in group}
    return [line for line in results.cells() if line["key"] in keys_of_matrix]


def _run_cells(matrix: Matrix, keys: frozenset[str]) -> list[dict[str, Any]]:
    """Runs some cells of a matrix in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return Bench(matrix, ResultsFile(Path(folder) / "cells.jsonl"), only=keys).run()
