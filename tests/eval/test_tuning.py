"""Tuning: the search on a known optimum, what a stopped run does again, and the command on a tiny model."""

import importlib.util
import json
import re
import warnings

import pytest
from test_runner import folder  # noqa: F401  # the fixture
from typer.testing import CliRunner

from kvbudget.cache import KVCache
from kvbudget.cli import app
from kvbudget.errors import KVBudgetError, PolicyError
from kvbudget.eval import tasks
from kvbudget.eval.results import ResultsFile
from kvbudget.eval.tuning import Evaluator, Search, Setup, tune
from kvbudget.methods import parse
from tiny import random_text, tiny_model, tiny_tokenizer

INSTALLED = importlib.util.find_spec("cmaes") is not None
needs_cmaes = pytest.mark.skipif(not INSTALLED, reason="cmaes is not installed")
GOAL = [1.6, 0.4, 1.0, 1.3, 0.7, 1.9, 0.5]


def likeness(population):
    return [-sum((w - g) ** 2 for w, g in zip(weights, GOAL, strict=True)) for weights in population]


@needs_cmaes
def test_a_known_optimum_is_found_and_the_same_seed_goes_the_same_way():
    best, value = Search(group=4, generations=40, seed=3).run(7, likeness)
    assert value > -0.01 and all(abs(w - g) < 0.1 for w, g in zip(best, GOAL, strict=True))
    seen = []
    for _ in range(2):
        seen.append([])
        Search(group=4, generations=3, seed=5).run(7, lambda p: seen[-1].append(p) or likeness(p))
    assert seen[0] == seen[1] and seen[0][0] == [(1.0,) * 7]


@needs_cmaes
def test_groups_take_turns_and_nothing_worse_than_equal_shares_is_returned():
    asked = []
    best, value = Search(group=4, generations=2).run(
        7, lambda p: asked.append(p) or [-float(w != (1.0,) * 7) for w in p]
    )
    assert best == (1.0,) * 7 and value == 0.0
    sides = [{i for weights in population for i in range(7) if weights[i] != 1.0} for population in asked[1:]]
    assert all(side <= {0, 1, 2} for side in sides[:2]) and all(side <= {3, 4, 5, 6} for side in sides[2:])


@needs_cmaes
def test_tied_layers_have_one_weight():
    best, value = Search(group=4, generations=40, seed=3, tie=2).run(
        7,
        lambda p: [-sum((w - g) ** 2 for w, g in zip(x, [1.5, 1.5, 0.6, 0.6, 1.2, 1.2, 0.9], strict=True)) for x in p],
    )
    assert value > -0.01 and best[0] == best[1] and best[2] == best[3] and best[4] == best[5] != best[6]


@needs_cmaes
def test_a_search_that_cannot_learn_is_refused():
    for few in (1, 2, 3):
        with pytest.raises(KVBudgetError, match=f"population of {few} .* at least 4"):
            Search(population=few)
    with pytest.raises(KVBudgetError, match="tie=7 leaves one weight for 7 layers"):
        Search(tie=7).run(7, likeness)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Search(group=4, population=4, generations=2).run(7, likeness)


def setup(folder, **changes) -> Setup:  # noqa: F811
    values = {"task": f"fidelity(length=40, tokens=6, text='{folder / 'text.txt'}')", "count": 2, "held_out": 2}
    return Setup(str(folder), budget="40%", policy="snapkv(window=4)", **(values | changes))


@needs_cmaes
def test_a_stopped_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):  # noqa: F811
    search, results = Search(group=2, generations=2), ResultsFile(tmp_path / "e.jsonl")
    computed = []
    original = Evaluator.fitness

    def counted(self, weights):
        if len(computed) == 5:
            raise KeyboardInterrupt
        computed.append(weights)
        return original(self, weights)

    monkeypatch.setattr(Evaluator, "fitness", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(setup(folder), search, results)
    assert len(results.cells(("value",))) == 5
    monkeypatch.setattr(Evaluator, "fitness", lambda self, w: computed.append(w) or original(self, w))
    found = tune(setup(folder), search, results)
    assert len(computed) == len(set(computed)) == len(results.cells(("value",)))
    whole = tune(setup(folder), search, ResultsFile(tmp_path / "other.jsonl"))
    assert found == whole
    before = len(computed)
    assert tune(setup(folder), search, results) == found and len(computed) == before
    assert found.fitness >= found.uniform_fitness and len(found.held_out["uniform"]) == 2


@pytest.mark.slow
@needs_cmaes
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_cluster_finds_what_one_process_finds(folder, tmp_path):  # noqa: F811
    search = Search(group=2, generations=1, population=4)
    own = tune(setup(folder), search, ResultsFile(tmp_path / "own.jsonl"))
    assert tune(setup(folder), search, ResultsFile(tmp_path / "ray.jsonl"), ray=True) == own


@needs_cmaes
def test_the_command_writes_a_policy_that_a_cache_takes(folder, tmp_path):  # noqa: F811
    rows = tmp_path / "tasks.jsonl"
    texts = [" ".join(f"w{i}" for i in range(6 + k, 60 + k)) for k in range(4)]
    rows.write_text("".join(json.dumps({"context": t, "question": " w7", "answer": " w8 w9"}) + "\n" for t in texts))
    output = tmp_path / "mine.yaml"
    arguments = ["tune", "--model", str(folder), "--task", str(rows), "--budget", "50%", "--policy", "knorm"]
    arguments += ["--count", "2", "--held-out", "2", "--group", "2", "--generations", "1", "--output", str(output)]
    told = json.loads(re.search(r"\{.*\}", CliRunner().invoke(app, [*arguments, "--json"]).stdout, re.S)[0])
    policy = parse(output)
    assert policy.names == ("knorm", "evolkv") and str(policy) == told["policy"] and told["score"] == "logprob"
    cache = KVCache(tiny_model("llama"), output, 32)
    assert cache.parts.layers.shares == policy.recipes[1].weights
    shown = CliRunner().invoke(app, arguments).stdout
    assert "pyramidkv" in shown and any(verdict in shown for verdict in ("cannot tell", "higher", "lower"))


def test_own_tasks_say_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"context": "w7 w8", "question": "w9"}\n')
    with pytest.raises(KVBudgetError, match=r"line 1 .* context, question, answer"):
        tasks.parse(f"own(rows='{path}')").examples(tiny_tokenizer(), 1)
    with pytest.raises(KVBudgetError, match="cannot be read"):
        tasks.parse("own(rows='nowhere.jsonl')").examples(tiny_tokenizer(), 1)
    path.write_text('{"context": "' + "\u0110" * 30 + '", "question": "\u0120", "answer": "\u0121\u0122"}\n')
    (example,) = tasks.parse(f"own(rows='{path}', length=12)").examples(tiny_tokenizer(), 1)
    assert len(example.context) == 12 and len(example.probes[0].answer) == 2
    with pytest.raises(KVBudgetError, match="1 lines, 2 were asked"):
        tasks.parse(f"own(rows='{path}')").examples(tiny_tokenizer(), 2)


def test_weights_must_fit_the_model():
    model = tiny_model("llama")
    with pytest.raises(PolicyError, match=r"3 weights for the 2 layers.*kvbudget tune"):
        cache = KVCache(model, "evolkv(weights=(1.0, 2.0, 3.0))", 40)
        model(random_text(120), past_key_values=cache)
    with pytest.raises(PolicyError, match="all weights are 0"):
        parse("evolkv(weights=(0.0, 0.0))")
    cache = KVCache(model, "snapkv(window=8)+evolkv(weights=(3.0, 1.0))", 40)
    model(random_text(120), past_key_values=cache)
    assert [layer[0] for layer in cache.report().kept] == [[56, 56], [24, 24]]
    tied, whole = (
        parse(f"evolkv({text})").parts().layers for text in ("weights=(3.0, 1.0), tie=3", "weights=(3, 3, 3, 1, 1)")
    )
    assert tied.weights([None] * 5, 40.0, 9.0) == whole.weights([None] * 5, 40.0, 9.0) == [3.0, 3.0, 3.0, 1.0, 1.0]
    with pytest.raises(PolicyError, match="tie=3 needs 3"):
        tied.weights([None] * 7, 40.0, 9.0)
