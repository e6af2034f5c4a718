"""The table of policy="auto": utilities, what is left out, and that the best policy of each situation leads."""

import json
import math

import pytest
from test_page import cell

from kvbudget.eval.ranking import at_equal_bytes, divergences, ranking, utility, write_ranking


def distances(policy: str, budget: str, values: list[float], **changes: object) -> dict:
    """A label-free cell with these KL."""
    examples = [{"scores": {"log_kl": math.log(v)}, "info": {}} for v in values]
    scores = {"log_kl": {"mean": -1.0, "low": -2.0, "high": 0.0}}
    fixed = {"task": "fidelity", "headline": "log_kl", "higher_is_better": False, "labeled": False}
    return cell(policy, budget, [0.0]) | fixed | {"examples": examples, "scores": scores} | changes


CELLS = [
    cell("full", "full", [1.0] * 4),
    cell("snapkv", "10%", [1.0, 0.0, 1.0, 1.0]),
    cell("knorm", "10%", [0.0] * 4),
    cell("greedy", "10%", [1.0] * 4),
    cell("partly", "10%", [1.0] * 4),
    distances("full", "full", [1e-7] * 4),
    distances("snapkv", "10%", [0.1] * 4),
    distances("knorm", "10%", [0.5] * 4),
    distances("greedy", "10%", [0.01] * 4),
    cell("full", "full", [0.0] * 4, task="hard"),
    cell("knorm", "10%", [1.0] * 4, task="hard"),
    cell("full", "full", [1.0] * 4, visible=True),
    cell("knorm", "10%", [1.0] * 4, visible=True),
]


def test_a_utility_is_one_at_best_and_zero_at_chance() -> None:
    line = cell("snapkv", "10%", [1.0], chance=0.25)
    assert utility(line, {"exact": 1.0}) == 1.0
    assert utility(line, {"exact": 0.25}) == 0.0
    assert utility(distances("snapkv", "10%", [0.1]), {"log_kl": math.log(0.1)}) == pytest.approx(math.exp(-0.1))


def test_the_best_leads_and_what_cannot_be_compared_is_left_out() -> None:
    hidden, visible = ranking(CELLS)["situations"]
    assert (hidden["visible"], hidden["share"]) == (False, 0.1)
    # "greedy" holds more than its budget, "partly" lacks a task, "hard" is not informative.
    assert list(hidden["policies"]) == ["snapkv", "knorm"]
    assert hidden["policies"]["snapkv"] == {
        "utility": pytest.approx((0.75 + math.exp(-0.1)) / 2, abs=1e-4),
        "behind": [0, 0],
    }
    low, high = hidden["policies"]["knorm"]["behind"]
    mean = hidden["policies"]["snapkv"]["utility"] - hidden["policies"]["knorm"]["utility"]
    assert 0 < low < mean < high
    assert visible["visible"] and list(visible["policies"]) == ["knorm"]


def test_the_file_says_how_it_was_measured(tmp_path) -> None:
    write_ranking(CELLS, tmp_path / "auto.json")
    table = json.loads((tmp_path / "auto.json").read_text())
    assert table["model"] == "tiny" and table["situations"] == ranking(CELLS)["situations"]
    assert any("--policy 'snapkv,knorm,greedy,partly'" in line for line in table["commands"])


def test_divergences_are_those_of_methods_alone_and_say_what_is_held_beyond_the_budget() -> None:
    cells = [
        distances("full", "full", [1e-7]),
        distances("snapkv(window=16)", "10%", [0.1]),
        distances("snapkv", "10%", [0.2]),
        distances("snapkv+adakv", "10%", [0.3]),
        distances("knorm", "10%", [0.5], costs=cell("knorm", "10%", [0.0])["costs"] | {"kept_share": 0.2}),
        cell("tova", "10%", [1.0]),
    ]
    text = f"10%: {math.exp(-1):.2g}"
    assert divergences(cells) == {"snapkv": text, "knorm": f"{text} (holds 20%)"}
    assert ranking(cells)["divergences"] == divergences(cells)


def test_equal_bytes_are_compared_with_the_control_on_the_same_contexts() -> None:
    full = cell("random", "10%", [0.0])["costs"]["full_bytes"]
    budget, texts = f"{int(full / 4)}B", [0.1, 0.4, 0.2]
    cells = [
        distances("random", budget, texts),
        distances("snapkv", budget, [v / 2 for v in texts]),
        distances("snapkv+adakv", budget, [0.2, 0.2, 0.2]),
        distances("adakv", budget, [v * 3 for v in texts]),
    ]
    found = at_equal_bytes(cells)
    assert list(found) == ["snapkv", "adakv"] and found["snapkv"] == "25%: 0.5x"
    assert found["adakv"] == "25%: 1x (=)"  # the first policy that ends in it
    assert not divergences(cells), "shares of the bytes are not in the column of shares of the text"
    assert ranking(CELLS + cells)["situations"] == ranking(CELLS)["situations"]
    assert ranking(cells)["equal_bytes"] == found
