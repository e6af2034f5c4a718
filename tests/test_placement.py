"""Placements of ragged heads: brute force on small cases, copies that never hurt, and the simulation's command."""

import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvbudget.cli import app
from kvbudget.errors import KVBudgetError
from kvbudget.eval.parallel import simulate
from kvbudget.placement import Placement, balance, balanced, contiguous
from tiny import tiny_model, tiny_tokenizer

LOADS = st.lists(st.integers(0, 100).map(float), min_size=1, max_size=6)


@settings(max_examples=40)
@given(loads=LOADS, devices=st.integers(1, 3))
def test_partitions_are_the_best_ones(loads, devices):
    found = balanced(loads, devices)
    assert sorted(h for own in found.heads for h in own) == list(range(len(loads)))
    optimum = min(
        max(sum(load for load, p in zip(loads, places, strict=True) if p == device) for device in range(devices))
        for places in itertools.product(range(devices), repeat=len(loads))
    )
    assert found.slowest(loads) == pytest.approx(optimum)


@settings(max_examples=40)
@given(loads=LOADS, devices=st.integers(1, 4))
def test_copies_never_hurt_and_loads_are_conserved(loads, devices):
    before = float("inf")
    for extra in range(5):
        placement = balanced(loads, devices, extra)
        assert sum(placement.loads(loads)) == pytest.approx(sum(loads))
        assert sum(map(len, placement.heads)) <= len(loads) + extra
        assert {h for own in placement.heads for h in own} == set(range(len(loads)))
        assert placement.slowest(loads) <= before * (1 + 1e-9)
        before = placement.slowest(loads)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 9000), min_size=1, max_size=4), threads=st.integers(1, 3))
def test_threads_of_the_native_kernels_have_the_loads_of_copies_at_will(lengths, threads):
    native = pytest.importorskip("kvbudget.kernels.native")
    shares = native.thread_shares(lengths, threads)
    assert [sum(column) for column in zip(*shares, strict=True)] == lengths
    limit = balanced(lengths, threads, extra=len(lengths) * (threads - 1))
    even = pytest.approx([sum(lengths) / threads] * threads)
    assert limit.loads(lengths) == even
    assert all(abs(sum(own) - load) <= 32 for own, load in zip(shares, limit.loads(lengths), strict=True))
    assert sum(n > 0 for own in shares for n in own) - sum(n > 0 for n in lengths) <= threads - 1


def test_many_heads_stay_within_the_bound_of_longest_first():
    loads = (torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4 * 1000).tolist()
    for devices in (3, 8):
        bound = max(sum(loads) / devices, max(loads)) * (4 / 3)
        assert balanced(loads, devices).slowest(loads) <= bound


def test_equal_heads_keep_plain_tensor_parallelism():
    assert balanced([7.0] * 8, 4, extra=2) == contiguous(8, 4)
    assert balanced([5.0, 5.0], 4, extra=2) == contiguous(2, 4)
    assert balance([contiguous(8, 4)], [[7.0] * 8]).efficiency == 1.0


def test_layers_wait_for_their_own_slowest_device():
    plain = contiguous(2, 2)
    found = balance([plain, plain], [[3.0, 1.0], [1.0, 3.0]])
    assert found.slowest == 6.0 and found.mean == 4.0
    with pytest.raises(KVBudgetError, match="twice"):
        Placement(((0, 0), (1,)))
    with pytest.raises(KVBudgetError, match="0 devices"):
        contiguous(4, 0)
    with pytest.raises(KVBudgetError, match="finite"):
        balanced([1.0, float("nan")], 2)


def test_attention_does_not_depend_on_the_placement():
    """Each device attends with its heads and its part of the batch; put together, the answer is the same."""
    torch.manual_seed(0)
    lengths, batch = [50, 9, 30, 11], 4
    placement = balanced(lengths, 3, extra=2)
    assert max(placement.copies(h) for h in range(4)) > 1
    query = torch.randn(4, batch, 1, 8)
    keys, values = ([torch.randn(batch, n, 8) for n in lengths] for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    whole = torch.stack([attend(query[h], keys[h], values[h]) for h in range(4)])
    parts = torch.full_like(whole, float("nan"))
    served = [0] * 4
    for own in placement.heads:
        for h in own:
            share = [range(batch)[i :: placement.copies(h)] for i in range(placement.copies(h))][served[h]]
            served[h] += 1
            parts[h, list(share)] = attend(query[h, list(share)], keys[h][list(share)], values[h][list(share)])
    torch.testing.assert_close(parts, whole, atol=0, rtol=0)


def test_placements_are_made_for_the_profiled_texts_and_judged_on_others():
    ragged = [[[90.0, 10.0, 10.0, 10.0]], [[10.0, 10.0, 10.0, 90.0]]]
    found = simulate(ragged, 2, copies=(1, 4))
    assert [row[2] for row in found.rows] == pytest.approx([60 / 100, 60 / 90, 60 / 65, 1.0])
    assert found.rows[3][1] == 2.0 and all(row[3] < row[2] for row in found.rows[1:])
    assert found.spread == pytest.approx(3.0)


def test_the_command_measures_a_model(tmp_path):
    tiny_model("llama", num_key_value_heads=4).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("".join(chr(0x101 + i * i % 120) for i in range(3000)))
    arguments = ["plan", "--model", str(tmp_path), "--context", "120", "--policy", "snapkv(window=8)+adakv"]
    arguments += ["--budget", "30%", "--tensor-parallel", "2", "--text", str(tmp_path / "text.txt"), "--texts", "2"]
    told = json.loads(re.search(r"\{.*\}", CliRunner().invoke(app, [*arguments, "--json"]).stdout, re.S)[0])
    efficiency = [row["profiled"] for row in told["rows"]]
    assert efficiency[0] < 1 and efficiency == sorted(efficiency) and told["spread"] > 1
    shown = CliRunner().invoke(app, arguments).stdout
    assert "plain" in shown and "up to 4 copies" in shown


def test_one_device_is_refused():
    told = CliRunner().invoke(app, ["plan", "--context", "120", "--budget", "30%", "--tensor-parallel", "1"])
    assert told.exit_code == 2 and "greater than or equal to 2" in told.output
