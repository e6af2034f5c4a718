"""Task-KV against its formulas in float64, and the checks of its card."""

import pytest
import torch
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import PolicyError
from kvbudget.policy.allocators.whole import WholeHeads
from kvbudget.policy.scorers.semantic import SemanticHeads
from kvbudget.policy.view import View
from tiny import random_text, tiny_model


class Given(View):
    """A view of one layer whose attention and values are given."""

    def __init__(self, weights: Tensor, values: Tensor, depth: float = 0.0) -> None:
        self.weights, self.given = weights, values
        self.layer = type("Layer", (), {"depth": depth, "num_kv_heads": values.shape[1]})()

    @property
    def values(self) -> Tensor:
        return self.given

    def window_attention(self, last: int) -> Tensor:
        return self.weights


def given(heads: int = 8, group: int = 3, length: int = 40) -> Given:
    return Given(torch.rand(2, heads, group, 4, length).softmax(-1), torch.randn(2, heads, length, 6))


def far(weights: Tensor, values: Tensor, top: int) -> list[int]:
    """KV heads of one sequence, the farthest first, by the card's steps."""
    vectors: dict[tuple[int, int], Tensor] = {}
    for h, head in enumerate(weights.double()):
        for g, rows in enumerate(head):
            columns = rows.mean(0)
            best = sorted(range(len(columns)), key=lambda t: -float(columns[t]))[:top]
            vectors[h, g] = sum(columns[t] * values[h, t].double() for t in best)
    center = torch.stack(list(vectors.values())).mean(0)
    distance = [max(float((v - center).norm()) for (i, _), v in vectors.items() if i == h) for h in range(len(values))]
    return sorted(range(len(values)), key=lambda h: -distance[h])


@pytest.mark.parametrize("top", [5, 40])
def test_the_farthest_heads_and_the_nearest_are_marked(top: int) -> None:
    view = given()
    order = SemanticHeads(4, top=top, share=0.5).order(view)
    for b in range(2):
        ranked = far(view.weights[b], view.values[b], top)
        assert order[b].nonzero()[:, 0].tolist() == sorted([*ranked[:3], ranked[-1]])
        assert [int(order[b, h]) for h in (*ranked[:3], ranked[-1])] == [1, 2, 3, 4]


def test_a_head_with_values_of_its_own_is_marked() -> None:
    view = given()
    view.given[1, 5] += 10.0
    assert SemanticHeads(4, share=0.25, least=2).order(view)[1, 5] == 1


def test_equal_heads_are_as_far_from_the_center() -> None:
    view = given(heads=1, group=1)
    equal = Given(view.weights.expand(2, 8, 1, 4, 40), view.given.expand(2, 8, 40, 6))
    assert SemanticHeads(4, share=0.5).order(equal).tolist() == [[1, 2, 3, 0, 0, 0, 0, 4]] * 2, "ties by index"


def test_fewer_heads_are_whole_in_later_layers() -> None:
    scorer = SemanticHeads(4, share=0.5, least=1)
    assert [scorer.count(8, depth / 4) for depth in range(5)] == [4, 3, 2, 2, 1]
    assert SemanticHeads(4, share=0.25).count(2, 1.0) == 1
    assert [int((scorer.order(Given(v.weights, v.given, d)) > 0).sum(1)[0]) for v, d in ((given(), 0.0), (given(), 1.0))] == [
        4,
        1,
    ]  # fmt: skip


def test_whole_heads_leave_the_others_what_is_protected() -> None:
    valid = torch.ones(4, 100, dtype=torch.bool)
    protected = torch.zeros_like(valid)
    protected[:, :10] = True
    order = torch.tensor([0.0, 2.0, 0.0, 1.0])
    found = {total: WholeHeads().split(valid.float(), protected, valid, total, order) for total in (400, 260, 150, 60)}
    assert found == {400: [100] * 4, 260: [30, 100, 30, 100], 150: [17, 17, 16, 100], 60: [15] * 4}
    assert WholeHeads().split(valid.float(), protected, valid, 60) == [15] * 4


def test_what_is_whole_stays_whole_until_it_leaves_too_little() -> None:
    model, ids = (
        tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3),
        random_text(200),
    )
    policy = "task_kv(window=8, sinks=2, recent=8, share=0.5, top=20)"
    cache = KVCache(model, policy, 80)
    with torch.inference_mode():
        model(ids[:, :120], past_key_values=cache)
        held = [store.kept()[0] for store in cache.enforcer.layers]
        assert [row.count(120) for row in held] == [2, 2, 1]
        assert all(320 - 16 * 4 <= sum(row) <= 320 for row in held)
        for step in range(120, 200):
            model(ids[:, step : step + 1], past_key_values=cache)
            cache.check_integrity()
    held = [store.kept()[0] for store in cache.enforcer.layers]
    assert all(sum(row) <= 320 and max(row) <= 200 for row in held)
    # 200 + 3 * 11 entries fit into 320, two whole heads do not.
    assert all(row.count(max(row)) == 1 for row in held)


@pytest.mark.parametrize("bad", ["share=2.0", "least=-1", "top=0", "recent=8"])
def test_bad_parameters_are_refused(bad: str) -> None:
    with pytest.raises(PolicyError, match=bad.split("=")[0]):
        KVCache(tiny_model("llama"), f"task_kv({bad})", 100)


def test_a_calibration_on_one_text_finds_the_heads_that_the_text_itself_would(tmp_path) -> None:
    model, text = (
        tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3),
        random_text(120),
    )
    path = calibrate("task_kv", model, tmp_path / "heads", texts=[text[0]], count=1, length=120, window=8, top=20)
    for chunk, whole in ((120, [[2, 2, 1]] * 2), (4, [[0, 0, 0], [2, 2, 1]])):
        held = []
        for judged in ("", f", judged=texts, file={str(path)!r}"):
            cache = KVCache(model, f"task_kv(window=8, sinks=2, recent=8, share=0.5, top=20{judged})", 80)
            with torch.inference_mode():
                for part in text.split(chunk, dim=1):
                    model(part, past_key_values=cache)
            held.append([store.kept()[0] for store in cache.enforcer.layers])
        assert [[row.count(120) for row in rows] for rows in held] == whole, (
            "few queries do not judge, a calibration has"
        )
        if chunk == 120:
            assert held[0] == held[1]
