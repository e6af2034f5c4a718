"""Codes that commute with RoPE: the algebra, the least squares, greedy codes by brute force, and errors over stages."""

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.calibrate.commuting import pair_order
from kvbudget.codecs import commuting
from kvbudget.codecs.base import Place
from kvbudget.codecs.commuting import Commuting, assign, centers, fitted, laid_out
from kvbudget.errors import PolicyError
from kvbudget.kernels.codebook import paired, unpaired
from kvbudget.models import fingerprint, rotation_of
from kvbudget.policy.artifact import Artifact
from tiny import random_text, tiny_model


@pytest.mark.parametrize("name", ["llama", "glm", "stablelm", "cohere"])
def test_centers_commute_with_the_models_rotation(name):
    model = tiny_model(name)
    rotation, order = rotation_of(model, 0), pair_order(model)
    width = len(order)
    assert sorted(order.tolist()) == list(range(width))
    table = torch.randn(64, width)
    a, b, position = torch.randint(64, (30,)), torch.randint(64, (30,)), torch.randint(500, (30,))

    def placed(z: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(z)
        out[:, order] = z
        return out

    def embedded(z: torch.Tensor) -> torch.Tensor:
        return rotation.embed(placed(z), position)[:, order]

    # Turning the words one by one, then joining them, is turning the center.
    torch.testing.assert_close(
        embedded(centers(table, a, b)), embedded(table[a]) + commuting.turned(embedded(table[b])), atol=1e-4, rtol=1e-4
    )


def test_the_nearest_center_is_the_nearest():
    x, table = torch.randn(40, 6), torch.randn(64, 6)
    every = centers(table, torch.arange(64).repeat_interleave(64), torch.arange(64).repeat(64))
    a, b = assign(x, table)
    assert torch.equal(a * 64 + b, torch.cdist(x, every).argmin(1))


def test_maximization_is_the_least_squares_of_the_tables():
    x, table = torch.randn(500, 4), 0.5 * torch.randn(64, 4)
    weight = (commuting.scores(x, table) * 2 / 0.3).flatten(1).softmax(1)
    new = commuting._maximized(x, table, 0.3)
    # The relation of tables to centers, written out: each element of a center is a sum of two elements of the table.
    relation = torch.zeros(64 * 64, 2, 64, 2)
    for a in range(64):
        for b in range(64):
            relation[a * 64 + b, 0, a, 0] += 1
            relation[a * 64 + b, 1, a, 1] += 1
            relation[a * 64 + b, 0, b, 1] -= 1
            relation[a * 64 + b, 1, b, 0] += 1
    mass, sums = weight.sum(0), weight.T @ x
    flat = relation.flatten(0, 1).flatten(1).double()
    for pair in range(2):
        target = sums[:, [pair, pair + 2]].flatten().double()
        system = flat.T @ (mass.repeat_interleave(2)[:, None].double() * flat)
        kept = 1e-4 * float(system.diagonal().mean())
        before = table[:, [pair, pair + 2]].flatten().double()
        expected = torch.linalg.solve(system + kept * torch.eye(128), flat.T @ target + kept * before)
        torch.testing.assert_close(new[:, [pair, pair + 2]].flatten().double(), expected, atol=1e-3, rtol=1e-3)


def test_every_stage_helps_and_codes_have_their_size():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator)
    x, other = (torch.randn(n, 16, generator=generator) @ mix for n in (600, 300))
    tables = fitted(torch.nn.functional.normalize(x, dim=-1), 3, steps=4)[None, None]
    order, errors = torch.arange(16), []
    for stages in (1, 2, 3):
        codec = Commuting(stages=stages, vectors=laid_out(tables, order), order=order).at(0)
        columns = codec.encode(other)
        assert sum(c.numel() * c.itemsize for c in columns.values()) == 300 * codec.bytes_per_entry(16)
        errors.append(float((codec.decode(columns) - other).square().mean() / other.square().mean()))
    assert errors[0] < 0.5 and errors[1] < 0.5 * errors[0] and errors[2] < 0.7 * errors[1]
    assert torch.equal(tables[0, 0], fitted(torch.nn.functional.normalize(x, dim=-1), 3, steps=4))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_twelve_bits_come_back(count):
    codes = torch.randint(64, (30, 2 * count))
    packed = paired(codes)
    assert packed.shape == (30, count + (count + 1) // 2)
    assert torch.equal(unpaired(packed, count), codes)


def test_heads_have_tables_of_their_own():
    tables = torch.randn(2, 4, 64, 8)
    order = torch.randperm(8)
    codec, x = Commuting(stages=2, vectors=laid_out(tables, order), order=order), torch.randn(10, 8)
    place = Place(torch.arange(10) % 4)
    mixed = codec.decode(codec.encode(x, place), place)
    for head in range(2):
        own = torch.arange(10) % 2 == head
        alone = Commuting(stages=2, vectors=laid_out(tables[head : head + 1], order), order=order)
        torch.testing.assert_close(mixed[own], alone.decode(alone.encode(x[own])), atol=1e-6, rtol=1e-6)


def test_calibrated_tables_beat_foreign_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model, ids = tiny_model("llama"), random_text(80, seed=9)
    calibrate("commvq", model, texts=[random_text(80, seed=i)[0] for i in range(2)], count=2, length=80, steps=3)
    found = Artifact.load("commvq", fingerprint(model))
    assert found.tensors["tables"].shape == (2, 2, 3, 64, 16)
    exact = KVCache(model, "full")
    exact.prefill(model, ids)
    errors = []
    for tables in (found.tensors["tables"], found.tensors["tables"].flip(0)):
        Artifact("commvq", found.fingerprint, {**found.tensors, "tables": tables}, {}).save()
        for bits in (2, 1):
            cache = KVCache(model, f"commvq(bits={bits}, residual=0)")
            cache.prefill(model, ids)
            pairs = zip(cache.enforcer.layers, exact.enforcer.layers, strict=True)
            errors.append(sum(float((c.main[0].keys() - e.main[0].keys()).square().mean()) for c, e in pairs))
    assert errors[0] < errors[1] and errors[0] < 0.8 * errors[2] and errors[1] < errors[3]
    with pytest.raises(PolicyError, match="bits=3"):
        KVCache(model, "commvq(bits=3)")
