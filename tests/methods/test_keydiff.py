"""KeyDiff against brute force."""

from collections.abc import Sequence

import pytest
import torch
from brute import Brute, Step, chunks, run, with_newest
from torch import Tensor

from kvbudget.cache import KVCache
from tiny import random_text, tiny_model


def dissimilar_keys(recent: int):
    def rule(step: Step, limit: int) -> Sequence[Tensor]:
        kept = []
        for head in step.heads:
            units = head.keys / head.keys.norm(dim=-1, keepdim=True)
            anchor = units.mean(0)
            scores = -(units @ anchor) / anchor.norm()
            kept.append(with_newest(scores, head.positions, step.seen - recent, limit))
        return kept

    return rule


@pytest.mark.parametrize("recent", [0, 8])
@pytest.mark.parametrize("sizes", [[150] + [1] * 30, chunks(150, 32) + [1] * 30], ids=len)
def test_keys_unlike_the_mean_stay(recent, sizes):
    model = tiny_model("llama")
    cache = KVCache(model, f"keydiff(recent={recent})", 24, when="every(1)")
    run(model, cache, random_text(180), sizes, Brute(dissimilar_keys(recent), 24))


def test_the_anchor_is_close_to_the_mean_pairwise_similarity():
    """The anchor's order is that of the mean cosine similarity over all pairs, which is what the paper sets out from."""
    units = torch.nn.functional.normalize(torch.randn(40, 16) + 0.5, dim=-1)
    pairwise, anchor = (units @ units.T).mean(1), units @ units.mean(0)
    assert pairwise.argsort().equal(anchor.argsort())
