"""Sparse codes: exact with a whole basis, better with every term and than plain pursuit, of their size, and fitted."""

import pytest
import torch
from torch.nn.functional import normalize

from kvbudget import kernels
from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.codecs.dictionary import Sparse, pursue
from kvbudget.errors import PolicyError
from kvbudget.kernels import AtomOperand
from kvbudget.kernels.operands import DecodedOperand
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from kvbudget.segments.store import SEALED
from tiny import random_text, tiny_model


def rebuilt(x: torch.Tensor, atoms: torch.Tensor, count: int) -> torch.Tensor:
    index, coefficients = pursue(x, atoms, count)
    return (coefficients[:, None] @ atoms[index])[:, 0]


def plain_pursuit(x: torch.Tensor, atoms: torch.Tensor, count: int) -> torch.Tensor:
    left = x.clone()
    for _ in range(count):
        for row in left:
            best = int((atoms @ row).abs().argmax())
            row -= (atoms[best] @ row) * atoms[best]
    return x - left


def test_a_full_basis_is_exact_and_every_term_helps():
    x, atoms = torch.randn(60, 8), normalize(torch.randn(40, 8), dim=-1)
    torch.testing.assert_close(rebuilt(x, atoms, 8), x, atol=2e-2, rtol=0)
    errors = [float((rebuilt(x, atoms, s) - x).square().mean()) for s in range(1, 8)]
    assert errors == sorted(errors, reverse=True)
    for s in (2, 4):
        assert errors[s - 1] < float((plain_pursuit(x, atoms, s) - x).square().mean())
    assert rebuilt(x[:0], atoms, 3).shape == (0, 8)


def test_stored_bytes_and_the_lookup_form_of_logits():
    atoms = normalize(torch.randn(2, 300, 32), dim=-1)
    codec = Sparse(terms=5, atoms=atoms).at(1)
    x = torch.randn(20, 32) * torch.rand(20, 1).exp()
    columns = codec.encode(x)
    assert sum(c.numel() * c.itemsize for c in columns.values()) == 20 * codec.bytes_per_entry(32) == 20 * 17
    query = torch.randn(32)
    table = atoms[1] @ query
    logits = (columns["codes"].float() * table[columns["index"].long()]).sum(1) * columns["scale"][:, 0].float()
    torch.testing.assert_close(codec.decode(columns) @ query, logits, atol=1e-4, rtol=1e-4)
    finer = rebuilt(x, atoms[1], 5)
    assert float((codec.decode(columns) - finer).norm()) < 0.02 * float(finer.norm())


def test_a_fitted_dictionary_beats_samples_as_atoms(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama")
    texts = [random_text(90, seed=i)[0] for i in range(3)]
    options = {"texts": texts, "count": 3, "length": 90, "atoms": 64, "terms": 3}
    exact = KVCache(model, "full")
    exact.prefill(model, random_text(90, seed=9))
    errors = []
    for steps in (0, 4):
        calibrate("csr", model, steps=steps, **options)
        atoms = Artifact.load("csr", fingerprint(model)).tensors["value"]
        torch.testing.assert_close(atoms.float().norm(dim=-1), torch.ones(2, 64), atol=1e-2, rtol=0)
        cache = KVCache(model, "csr(terms=3, residual=0, sinks=0)")
        cache.prefill(model, random_text(90, seed=9))
        pairs = [
            (c.main[0].values(), e.main[0].values())
            for c, e in zip(cache.enforcer.layers, exact.enforcer.layers, strict=True)
        ]
        errors.append(sum(float((mine - theirs).square().mean()) for mine, theirs in pairs))
    assert errors[1] < 0.95 * errors[0]
    with pytest.raises(PolicyError, match="more than the 64 atoms"):
        KVCache(model, "csr(terms=65)")
    with pytest.raises(PolicyError, match="terms=0"):
        KVCache(model, "csr(terms=0)")
    with pytest.raises(PolicyError, match="atoms=2"):
        calibrate("csr", model, **(options | {"atoms": 2}))


def test_atoms_are_attended_without_decoding(tmp_path, monkeypatch):
    """Keys that were fitted after RoPE, and values: the dictionary meets the queries, and the weights of its atoms."""
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama")
    texts = [random_text(90, seed=i)[0] for i in range(2)]
    calibrate("csr", model, texts=texts, count=2, length=90, atoms=32, terms=3, steps=1, before_rope=False)
    cache = KVCache(model, "csr(terms=3, residual=8)")
    cache.prefill(model, random_text(120, seed=9))
    (segment,) = cache.enforcer.layers[1].main
    operands = [store.operand([0, 5], SEALED) for store in (segment.key, segment.value)]
    assert all(type(operand) is AtomOperand for operand in operands)
    lengths, query = [n - skip for n, skip in zip(segment.key.num_sealed, (0, 5), strict=True)], torch.randn(2, 3, 16)
    plain = [DecodedOperand(operand.block) for operand in operands]
    found, expected = (kernels.attend(query, *pair, lengths, scale=0.3) for pair in (operands, plain))
    torch.testing.assert_close(found.out, expected.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-5, rtol=1e-4)
    for row, x in enumerate(kernels.mass(query, operands[0], lengths, found.lse, scale=0.3)):
        torch.testing.assert_close(float(x.sum()), 3.0, atol=1e-4, rtol=0, msg=f"row {row}")
