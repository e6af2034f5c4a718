"""KVQuant: gradients by finite differences, codebooks against plain k-means, and the orderings of the paper."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvbudget.calibrate import calibrate
from kvbudget.calibrate.sensitivity import sensitivities
from kvbudget.codecs.base import Codec, Place
from kvbudget.codecs.nonuniform import NonUniform, codebook, q_norm
from kvbudget.errors import PolicyError
from kvbudget.methods import parse
from kvbudget.models import fingerprint, rotation_of
from kvbudget.policy.artifact import Artifact
from tiny import random_text, tiny_model


class Nudged(DynamicCache):
    """Adds ``delta`` to one element of a key (before RoPE) or of a value."""

    def __init__(self, model, layer, side, head, step, channel, delta) -> None:
        super().__init__(config=model.config)
        self.rotation, self.at = rotation_of(model, layer), (layer, side, head, step, channel, delta)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args, **kwargs):
        layer, side, head, step, channel, delta = self.at
        if layer_idx == layer:
            nudge = torch.zeros(key.shape[-1])
            nudge[channel] = delta
            if side == "keys":
                key[0, head, step] += self.rotation.embed(nudge, torch.tensor(step))
            else:
                value[0, head, step] += nudge
        return super().update(key, value, layer_idx, *args, **kwargs)


def test_gradients_are_those_of_finite_differences():
    model, ids = tiny_model("llama").double(), random_text(12)
    found = sensitivities(model, ids)

    def loss(*at) -> float:
        with torch.no_grad():
            logits = model(ids, past_key_values=Nudged(model, *at)).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    for layer, side in ((0, "keys"), (1, "keys"), (0, "values")):
        gradient = found[layer].key_gradient if side == "keys" else found[layer].value_gradient
        head, step, channel = (int(i) for i in torch.unravel_index(gradient.abs().argmax(), gradient.shape))
        at = (layer, side, head, step, channel)
        numeric = (loss(*at, 1e-2) - loss(*at, -1e-2)) / 2e-2
        assert float(gradient[head, step, channel]) == pytest.approx(numeric, rel=1e-2)


def test_codebook_is_weighted_k_means():
    x, weight = torch.randn(3000), torch.rand(3000)
    values = codebook(x, weight, 3)
    nearest = (x[:, None] - values).abs().argmin(1)
    for c in range(8):  # a fixed point of Lloyd's iteration
        mine = nearest == c
        assert float((x * weight)[mine].sum() / weight[mine].sum()) == pytest.approx(float(values[c]), abs=2e-2)
    uniform = torch.linspace(float(x.min()), float(x.max()), 8)

    def error(book: Tensor) -> float:
        return float((weight * (x[:, None] - book).abs().amin(1).square()).sum())

    assert error(values) < 0.7 * error(uniform)


def test_q_norm_keeps_mean_and_deviation():
    x = torch.randn(5000) * 0.3 + 0.1
    book = codebook(x, torch.ones(5000), 2)
    decoded = q_norm(x, book)[(x[:, None] - book).abs().argmin(1)]
    torch.testing.assert_close(torch.stack([decoded.mean(), decoded.std()]), torch.stack([x.mean(), x.std()]))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Tensor]:
    model = tiny_model("llama")
    texts = [random_text(96, seed=seed)[0] for seed in range(3)]
    folder = tmp_path_factory.mktemp("kvquant")
    path = calibrate("kvquant", model, folder / "a.safetensors", texts=texts, count=3, length=96, tokens=64)
    return dict(Artifact.load("kvquant", fingerprint(model), path).tensors)


def coded_error(codec: Codec, x: Tensor) -> float:
    place = Place(torch.zeros(len(x), dtype=torch.long))
    return float((codec.decode(codec.encode(x, place), place) - x).square().mean())


def test_more_bits_and_outliers_apart_are_closer(found):
    model = tiny_model("llama")
    seen = sensitivities(model, random_text(120, seed=9))[1]
    offset, spread = found["offset"][1], found["spread"][1]
    for side, x in (("keys", seen.keys[0]), ("values", seen.values[0])):
        error = {}
        for bits in (2, 3, 4):
            for share in (0.0, 0.01):
                codec = NonUniform(bits=bits, share=share, side=side, book=found[f"{side}_{bits}"])
                error[bits, share] = coded_error(
                    NonUniform(bits=bits, share=share, side=side, book=codec.book[1], offset=offset, spread=spread),
                    x,
                )
            assert error[bits, 0.01] < error[bits, 0.0]
        assert error[4, 0.01] < error[3, 0.01] < error[2, 0.01]


def test_true_bits_are_the_formulas():
    keys, values = parse("kvquant(bits=3)").parts().codec
    assert keys.bytes_per_entry(128) * 8 / 128 == 3 + 24 / 128
    assert values.bytes_per_entry(128) * 8 / 128 == 3 + 24 / 128 + 32 / 128


def test_a_model_without_rotation_and_a_missing_calibration_are_refused(tmp_path, monkeypatch):
    from kvbudget.cache import KVCache
    from kvbudget.errors import UnsupportedModel

    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    with pytest.raises(PolicyError, match="kvbudget calibrate kvquant"):
        KVCache(tiny_model("llama"), "kvquant")
    with pytest.raises(UnsupportedModel, match="GPT2"):
        KVCache(tiny_model("gpt2"), "rotatekv")
    with pytest.raises(PolicyError, match="2, 3 and 4"):
        parse("kvquant(bits=8)")
