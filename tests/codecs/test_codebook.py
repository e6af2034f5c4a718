"""Vector quantization: nearest words by brute force, errors in the papers' order, stored bytes, fused against decoded."""

import pytest
import torch

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.codecs.base import Place, alone
from kvbudget.codecs.codebook import Coupled, Normalized, Prompted, codewords, nearest, normal_words
from kvbudget.codecs.rotated import NormalCodes, Rotated
from kvbudget.errors import PolicyError
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact
from tiny import random_text, tiny_model


def coupled_error(x: torch.Tensor, channels: int, count: int) -> float:
    """Mean squared error of the last 500 of ``x [N, D]`` in codebooks of ``count`` words per group, fitted to the others."""
    sets = x.unflatten(-1, (-1, channels)).transpose(0, 1)
    words, rest = codewords(sets[:, :-500], count), sets[:, -500:]
    chosen = nearest(rest, words)
    return float((rest - torch.stack([w[c] for w, c in zip(words, chosen, strict=True)])).square().mean())


def test_nearest_is_the_nearest():
    x, words = torch.randn(3, 50, 4), torch.randn(3, 20, 4)
    assert torch.equal(nearest(x, words), torch.cdist(x, words).argmin(-1))


def test_words_are_a_fixed_point_and_weights_count_copies():
    x = torch.randn(2, 300, 2)
    words = codewords(x, 8, steps=100)
    labels = nearest(x, words)
    for b in range(2):
        for c in range(8):
            torch.testing.assert_close(words[b, c], x[b, labels[b] == c].mean(0), atol=1e-5, rtol=1e-5)
    weights = torch.randint(1, 4, (1, 40)).float()
    many = x[:1, :40].repeat_interleave(weights[0].long(), dim=1)
    one, other = codewords(x[:1, :40], 1, weights=weights), codewords(many, 1)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert codewords(x[:, :3], 8).shape == (2, 8, 2)


def test_more_coupled_channels_lose_less_at_the_same_bits_where_channels_go_together():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(3000, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    x = shared + 0.3 * torch.randn(3000, 16, generator=generator)
    one, four, eight = coupled_error(x, 1, 2), coupled_error(x, 4, 16), coupled_error(x, 8, 256)
    assert eight < 0.5 * four < 0.4 * one
    plain = torch.randn(3000, 16, generator=generator)
    alone_, coupled = coupled_error(plain, 1, 2), coupled_error(plain, 8, 256)
    assert 0.8 * alone_ < coupled < 1.1 * alone_  # no more than what vectors gain on their own


def test_cq_stores_codes_alone_and_uses_the_codebook_of_the_head():
    words = torch.randn(3, 2, 256, 8)
    codec = Coupled(channels=8, words=words)
    x = torch.randn(12, 16)
    place = Place(torch.arange(12) % 6)
    columns = codec.encode(x, place)
    assert {name: tuple(c.shape) for name, c in columns.items()} == {"codes": (12, 2)}
    assert sum(c.numel() * c.itemsize for c in columns.values()) == 12 * codec.bytes_per_entry(16)
    decoded = codec.decode(columns, place)
    for n in range(12):
        for p in range(2):
            best = torch.cdist(x[n : n + 1, 8 * p : 8 * p + 8], words[n % 6 % 3, p]).argmin()
            assert torch.equal(decoded[n, 8 * p : 8 * p + 8], words[n % 6 % 3, p, best])


def test_cq_calibrated_beats_other_words_and_its_channels_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    model = tiny_model("llama")
    texts = [random_text(90, seed=i)[0] for i in range(4)]
    options = {"texts": texts, "count": 4, "length": 90, "channels": 4, "steps": 6}
    words = {}
    for fisher in (False, True):
        calibrate("cq", model, fisher=fisher, **options)
        words[fisher] = Artifact.load("cq", fingerprint(model)).tensors["key"]
        assert words[fisher].shape == (2, 2, 4, 256, 4)
        ids = random_text(90, seed=9)
        cache = KVCache(model, "cq(channels=4, residual=0, sinks=0)")
        exact = KVCache(model, "full")
        cache.prefill(model, ids)
        exact.prefill(model, ids)
        (segment,), (true,) = cache.enforcer.layers[1].main, exact.enforcer.layers[1].main
        for mine, theirs in ((segment.keys(), true.keys()), (segment.values(), true.values())):
            assert (mine - theirs).square().mean() < 0.35 * theirs.square().mean()
    assert not torch.equal(words[False], words[True])
    with pytest.raises(PolicyError, match=r'kvbudget calibrate "cq\(channels=8\)"'):
        KVCache(model, "cq")
    with pytest.raises(PolicyError, match="channels=5 does not divide the 16"):
        calibrate("cq", model, **(options | {"channels": 5}))


def test_normal_words_are_near_what_eight_dimensions_allow():
    x = torch.randn(1, 5000, 8, generator=torch.Generator().manual_seed(5))
    first, second = normal_words(2)
    left = x[0] - first[nearest(x, first[None])[0]]
    assert (
        0.25 < float(left.square().mean()) < 0.335
    )  # the bound of rate distortion at 1 bit, and well below 0.363 of signs
    left = left - second[nearest(left[None], second[None])[0]]
    assert 0.0625 < float(left.square().mean()) < 0.115  # 0.1175 for the best scalars of 2 bits


@pytest.mark.parametrize("stages", [1, 2])
def test_normalize_shift_normalize(stages):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(128, 64, generator=generator) + 5 * torch.randn(64, generator=generator)) * torch.rand(
        128, 1, generator=generator
    ).exp()
    codec = Rotated(base=Normalized(unit=64, stages=stages))
    columns = codec.encode(x)
    turned = codec._turn(x).unflatten(0, (2, 64))
    first = turned.norm(dim=-1, keepdim=True) / 8
    mean = (turned / first).mean(1, keepdim=True)
    second = (turned / first - mean).norm(dim=-1, keepdim=True) / 8
    normal = ((turned / first - mean) / second).flatten(0, 1)
    assert abs(float(normal.mean())) < 0.05 and abs(float(normal.var()) - 1) < 0.05
    torch.testing.assert_close(columns["shift"].float(), first[..., 0], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(columns["scale"].float(), (first * second)[..., 0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(columns["mean"].float(), mean[:, 0], atol=1e-2, rtol=1e-2)
    assert tuple(columns["codes"].shape) == (2, 64, 8 * stages)
    # In order of the paper: normalized twice, normalized and rotated, scalar codes at the same bits.
    cosine = [
        float(torch.cosine_similarity(x, each.decode(each.encode(x), alone(each, x)), dim=-1).mean())
        for each in (codec, Rotated(base=NormalCodes(bits=stages)), NormalCodes(bits=stages))
    ]
    assert cosine[0] > cosine[1] > cosine[2]
    if stages == 2:
        one = Rotated(base=Normalized(unit=64))
        assert cosine[0] > float(torch.cosine_similarity(x, one.decode(one.encode(x)), dim=-1).mean())


def test_words_of_the_prompt_serve_later_entries_and_logits_are_looked_up():
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(16, 16, generator=generator)
    first, later = (torch.randn(n, 16, generator=generator) @ mix for n in (700, 90))
    codec = Prompted(channels=4)
    place = Place(torch.zeros(90, dtype=torch.long), alone(codec, first).state)
    columns = codec.encode(later, place)
    decoded, words = codec.decode(columns, place), place.state["words"][0].float()
    assert words.shape == (4, 256, 4) and codec.state_bytes(16) == 2 * words.numel()
    assert (decoded - later).square().mean() < 0.15 * later.square().mean()
    query = torch.randn(16, generator=generator)
    table = torch.einsum("pwc,pc->pw", words, query.unflatten(0, (4, 4)))
    logits = table[torch.arange(4), columns["codes"].long()].sum(1)
    torch.testing.assert_close(decoded @ query, logits, atol=1e-4, rtol=1e-4)
    few = codec.decode(codec.encode(first[:20], alone(codec, first[:20])), alone(codec, first[:20]))
    torch.testing.assert_close(few, first[:20], atol=1e-2, rtol=1e-2)  # as many words as entries


def test_true_bits():
    assert Normalized(unit=64).bytes_per_entry(128) * 8 / 128 == 1 + 32 / 128 + 16 / 64
    assert Normalized(unit=64, stages=2).bytes_per_entry(128) * 8 / 128 == 2 + 32 / 128 + 16 / 64
    assert Coupled(channels=8).bytes_per_entry(128) * 8 / 128 == 1.0


@pytest.mark.parametrize("text", ["nsnquant(bits=3)", "nsnquant(chunk=1)"])
def test_impossible_parameters_are_refused(text):
    with pytest.raises(PolicyError, match="nsnquant"):
        KVCache(tiny_model("llama"), text)
