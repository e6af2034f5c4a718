"""Tuning: layer budgets searched by CMA-ES for one task, every evaluation kept on disk so that a run can go on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kvbudget.budget import Budget
from kvbudget.errors import KVBudgetError, nearest
from kvbudget.eval import tasks
from kvbudget.eval.matrix import Matrix
from kvbudget.eval.results import ResultsFile
from kvbudget.eval.runner import Runs
from kvbudget.eval.stats import Interval, compare
from kvbudget.methods import parse
from kvbudget.models import CacheGeometry, load, load_config
from kvbudget.passes import bounds
from kvbudget.policy.policy import Policy

LEAST, MOST = 0.05, 4.0
"""Bounds of a layer's weight, where 1 is the mean."""
FEWEST = 4
"""Candidates per generation that CMA-ES needs: with fewer, its better half is a single one, and it adapts no covariance."""
Weights = tuple[float, ...]
Progress = Callable[[int, int, float], None]
Compute = Callable[[Sequence[Weights]], Iterable[float]]
LOWER_IS_BETTER = ("log_kl", "kl_mean", "kl_p95", "nll_rise", "perplexity_ratio")


@dataclass(frozen=True)
class Setup:
    """What is tuned for what: the fields of a cell, and how the examples are parted.

    The first ``count`` examples of the task judge candidates, the ``held_out`` that follow only the result. ``score`` names
    the score to be raised (or lowered, where lower is better; "": log-probability of the answers for tasks that have them,
    else the task's headline).
    """

    model: str
    task: str
    budget: str
    policy: str = "snapkv"
    count: int = 8
    held_out: int = 16
    seed: int = 0
    dtype: str = "float32"
    length: int | None = None
    score: str = ""

    def policy_of(self, weights: Weights, tie: int = 1) -> Policy:
        """The policy with these weights of its layers (none: without any), one for ``tie`` neighbors."""
        tied = f", tie={tie}" if tie > 1 else ""
        return parse(f"{self.policy}+evolkv(weights={weights[::tie]!r}{tied})" if weights else self.policy)

    @property
    def matrix(self) -> Matrix:
        """The task as `Matrix` has it, with the length filled in."""
        names = (self.policy,), (self.budget,), (self.task,)
        return Matrix(self.model, *names, self.length, self.count + self.held_out, self.seed, self.dtype)

    @cached_property
    def layers(self) -> int:
        """Layers that the budget governs."""
        return len(CacheGeometry.from_config(load_config(self.model)).budgeted_layers)


class Evaluator:
    """Scores policies on the examples of a setup, those that judge candidates recorded once; higher is better."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.cell = next(iter(setup.matrix.groups()))[-1]
        self.task = tasks.parse(self.cell.task)
        self.score = setup.score or ("logprob" if self.task.labeled else self.task.headline)
        lower = not self.task.higher_is_better and self.score == self.task.headline
        self.sign = -1.0 if lower or self.score in LOWER_IS_BETTER else 1.0
        self.shown = f"-{self.score}" if self.sign < 0 else self.score
        self.model, self.tokenizer = load(setup.model, dtype=setup.dtype)
        self.examples = self.task.examples(self.tokenizer, setup.count + setup.held_out, setup.seed)
        self.runs = [self._runs(number) for number in range(setup.count)]

    def fitness(self, weights: Weights) -> float:
        """The mean over the examples that judge candidates."""
        policy = str(self.setup.policy_of(weights))
        return sum(self._value(runs, policy) for runs in self.runs) / len(self.runs)

    def held_out(self, policies: Mapping[str, Policy | str]) -> dict[str, list[float]]:
        """The scores of policies on the examples that judge no candidate."""
        found: dict[str, list[float]] = {name: [] for name in policies}
        for number in range(self.setup.count, len(self.examples)):
            runs = self._runs(number)
            for name, policy in policies.items():
                found[name].append(self._value(runs, str(policy)))
        return found

    def _runs(self, number: int) -> Runs:
        example, visible = self.examples[number], self.cell.visible
        return Runs(self.model, self.tokenizer, self.task, example, visible, first=False, timed=False)

    def _value(self, runs: Runs, policy: str) -> float:
        cell = replace(self.cell, policy=policy)
        found = runs.run([cell])[cell.key]
        if isinstance(found, Exception):
            raise found
        scores = found["scores"]
        if self.score not in scores:
            raise KVBudgetError(f"task {self.task.name} has no score {self.score!r}{nearest(self.score, scores)}")
        return self.sign * scores[self.score]


Map = Callable[[Sequence[Weights]], list[float]]


@dataclass(frozen=True)
class Search:
    """EvolKV's search (arXiv 2509.08315): groups of layers from the bottom up, each by ``generations`` of CMA-ES.

    All other layers keep the best weights so far, which begin as equal; nothing worse than them is ever returned. The same
    seed and scores give the same candidates.

    Attributes:
        group: weights per group (nearly equal groups of at most so many; paper: 8, *unverified*).
        generations: per group.
        population: candidates per generation, at least `FEWEST` (0: ``4 + 3 ln group``).
        sigma: first step, where 1 is a layer's mean budget (paper: 0.3, *unverified*).
        seed: of the search.
        tie: neighboring layers that have one weight (paper: 1): fewer to find by as many evaluations, and to be fitted to them.
    """

    group: int = 8
    generations: int = 6
    population: int = 0
    sigma: float = 0.3
    seed: int = 0
    tie: int = 1

    def __post_init__(self) -> None:
        if 0 < self.population < FEWEST:
            raise KVBudgetError(
                f"a population of {self.population} is too small for CMA-ES, which learns from the better half of it; give at "
                f"least {FEWEST}, or 0 for a size that goes with the group"
            )

    def run(self, layers: int, fitness: Map, progress: Progress | None = None) -> tuple[Weights, float]:
        """The best weights found for ``layers`` layers, and their fitness.

        Raises:
            KVBudgetError: when the package cmaes is not installed, or all layers are tied to one weight.
        """
        cmaes = _cmaes()
        tied = -(-layers // self.tie)
        if tied < 2:
            raise KVBudgetError(
                f"tie={self.tie} leaves one weight for {layers} layers, so that there is nothing to search; two are needed: a "
                "smaller tie, or a model of more layers"
            )

        def spread(weights: Weights) -> Weights:
            return tuple(weights[layer // self.tie] for layer in range(layers))

        best: Weights = (1.0,) * tied
        highest = fitness([spread(best)])[0]
        groups = bounds(0, tied, max(2, self.group))
        done, total = 1, 1 + sum(self.generations * self._size(end - begin) for begin, end in groups)
        for number, (begin, end) in enumerate(groups):
            size = self._size(end - begin)
            optimizer = cmaes.CMA(
                mean=np.array(best[begin:end]),
                sigma=self.sigma,
                bounds=np.array([[LEAST, MOST]] * (end - begin)),
                seed=self.seed + number,
                population_size=size,
            )
            for _ in range(self.generations):
                drawn = [np.round(optimizer.ask(), 3) for _ in range(size)]
                candidates = [(*best[:begin], *map(float, weights), *best[end:]) for weights in drawn]
                values = fitness([spread(candidate) for candidate in candidates])
                optimizer.tell([(weights, -value) for weights, value in zip(drawn, values, strict=True)])
                for value, candidate in zip(values, candidates, strict=True):
                    if value > highest:
                        best, highest = candidate, value
                done += size
                if progress is not None:
                    progress(done, total, highest)
        return spread(best), highest

    def _size(self, weights: int) -> int:
        return self.population or 4 + int(3 * math.log(weights))


@dataclass(frozen=True)
class Tuned:
    """What a search found: ``weights``, their fitness and that of equal shares on the examples that judged them.

    ``held_out[name]`` are the scores (higher is better) of uniform, pyramidkv and the tuned shares on examples that the search
    has not seen; ``score`` is what was scored, ``-score`` where lower is better.
    """

    weights: Weights
    fitness: float
    uniform_fitness: float
    score: str
    held_out: dict[str, list[float]]
    policy: Policy

    def gain(self, over: str) -> tuple[str, Interval]:
        """Paired comparison of the tuned shares with another allocation on the held-out examples."""
        return compare(self.held_out["evolkv"], self.held_out[over])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        gains = {name: self.gain(name) for name in self.held_out if name != "evolkv"}
        return {
            "policy": str(self.policy),
            "score": self.score,
            "fitness": self.fitness,
            "uniform_fitness": self.uniform_fitness,
            "held_out": self.held_out,
            "gains": {name: {"verdict": verdict, **asdict(gain)} for name, (verdict, gain) in gains.items()},
        }


def tune(
    setup: Setup, search: Search, cache: ResultsFile, *, ray: bool = False, progress: Progress | None = None
) -> Tuned:
    """Searches layer budgets for a setup and compares the result on held-out examples.

    Every evaluation is appended to ``cache``; the same call goes on where it was stopped.

    Raises:
        KVBudgetError: when an optional package is missing, nothing is evicted, or the task has no such score.
    """
    _cmaes()
    if parse(setup.policy).parts().scorer is None or Budget.parse(setup.budget).kind == "none":
        raise KVBudgetError(
            f"policy {setup.policy} under budget {setup.budget} leaves layers nothing to share out; give an evicting policy, such "
            "as snapkv, and a budget, such as 25%"
        )
    mark = json.dumps(asdict(setup), sort_keys=True)
    known = {line["key"]: line["value"] for line in cache.cells(("value",))}
    own: list[Evaluator] = []

    def evaluator() -> Evaluator:
        if not own:
            own.append(Evaluator(setup))
        return own[0]

    with _population(setup, evaluator, ray) as compute:

        def fitness(population: Sequence[Weights]) -> list[float]:
            keys = [hashlib.sha256(f"{mark}{weights!r}".encode()).hexdigest()[:20] for weights in population]
            missing = {key: weights for key, weights in zip(keys, population, strict=True) if key not in known}
            for key, value in zip(missing, compute(list(missing.values())), strict=False):
                known[key] = value
                cache.add_cell({"key": key, "weights": list(missing[key]), "value": value})
            return [known[key] for key in keys]

        weights, highest = search.run(setup.layers, fitness, progress)
        uniform = fitness([(1.0,) * setup.layers])[0]
    judge = evaluator()
    policy = setup.policy_of(weights, search.tie)
    rivals: dict[str, Policy | str] = {
        "uniform": setup.policy,
        "pyramidkv": f"{setup.policy}+pyramidkv",
        "evolkv": policy,
    }
    return Tuned(weights, highest, uniform, judge.shown, judge.held_out(rivals), policy)


@contextmanager
def _population(setup: Setup, evaluator: Callable[[], Evaluator], on_ray: bool) -> Iterator[Compute]:
    """How a population is evaluated: one after the other in this process, or by an actor for each processor of a cluster."""
    if not on_ray:
        yield lambda population: (evaluator().fitness(weights) for weights in population)
        return
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise KVBudgetError("--workers ray needs Ray; install it with pip install 'kvbudget[ray]'") from error
    started = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        number = max(1, int(ray.cluster_resources().get("CPU", 1)))
        pool = ActorPool([ray.remote(num_cpus=1)(Evaluator).remote(setup) for _ in range(number)])
        yield lambda population: pool.map(lambda actor, weights: actor.fitness.remote(weights), population)
    finally:
        if started:
            ray.shutdown()


def _cmaes() -> Any:
    """The CMA-ES that Optuna's sampler is built on."""
    try:
        import cmaes
    except ImportError as error:
        raise KVBudgetError("kvbudget tune needs cmaes; install it with pip install 'kvbudget[tune]'") from error
    return cmaes
