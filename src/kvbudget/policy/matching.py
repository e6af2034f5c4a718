"""Bipartite soft matching of neighboring keys: which entry of a chunk resembles which other one."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

ALONE = float("-inf")


def match(keys: Tensor, chunk: int, odd: bool = False) -> tuple[Tensor, Tensor]:
    """For the entries at even places of each chunk, the best cosine to one at an odd place and which it is: ``[n]`` each.

    ``keys [n, D]`` are cut into chunks of ``chunk`` consecutive ones (an even number; the last may be shorter). With ``odd``
    the sides are exchanged. Entries of the other side, and those that have nobody there, have the similarity `ALONE`.

    >>> similarity, partner = match(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 1.0]]), 4)
    >>> partner[[0, 2]].tolist()
    [3, 1]
    """
    number = len(keys)
    chunk = min(chunk, number + number % 2)
    directions = pad(normalize(keys.float(), dim=-1), (0, 0, 0, -number % chunk)).unflatten(0, (-1, chunk))
    real = (torch.arange(directions.shape[0] * chunk, device=keys.device) < number).unflatten(0, (-1, chunk))
    first, second = (1, 0) if odd else (0, 1)
    similarity = directions[:, first::2] @ directions[:, second::2].mT
    best = similarity.masked_fill(~real[:, None, second::2], ALONE).max(dim=-1)
    out = similarity.new_full(real.shape, ALONE)
    out[:, first::2] = best.values.masked_fill(~real[:, first::2], ALONE)
    partner = torch.zeros_like(real, dtype=torch.long)
    begin = torch.arange(len(real), device=keys.device)[:, None] * chunk
    partner[:, first::2] = begin + 2 * best.indices + second
    return out.flatten()[:number], partner.flatten()[:number]


def centroids(x: Tensor, count: Tensor, members: Tensor, anchors: Tensor) -> Tensor:
    """``x [n, D]`` with the ``members`` joined to their ``anchors`` (indices ``[M]``), weighted by ``count [n]``; float32."""
    total = (x.float() * count[:, None]).index_add(0, anchors, x[members].float() * count[members, None])
    number = count.index_add(0, anchors, count[members])
    return total / number[:, None]
