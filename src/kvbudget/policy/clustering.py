"""Clusters of vectors: k-means with seeded restarts."""

import torch
from torch import Tensor

STEPS = 50


def kmeans(points: Tensor, count: int, *, restarts: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """At most ``count`` clusters of ``points [N, d]``: centers ``[k, d]`` and each point's cluster ``[N]``.

    Lloyd's algorithm from k-means++ starts; the restart with the least squared distances counts. Clusters that lose all
    points are dropped. The same arguments give the same clusters.

    >>> centers, labels = kmeans(torch.tensor([[0.0], [10.0], [0.5], [9.5]]), 2)
    >>> labels[0] == labels[2] != labels[1] == labels[3]
    tensor(True)
    """
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        centers = _start(points, min(count, len(points)), generator)
        labels = torch.cdist(points, centers).argmin(1)
        for _ in range(STEPS):
            centers = torch.stack([points[labels == c].mean(0) for c in labels.unique()])
            before, labels = labels, torch.cdist(points, centers).argmin(1)
            if torch.equal(labels, before):
                break
        centers = torch.stack([points[labels == c].mean(0) for c in labels.unique()])
        labels = torch.unique(labels, return_inverse=True)[1]
        spread = float((points - centers[labels]).square().sum())
        if best is None or spread < best[0]:
            best = (spread, centers, labels)
    assert best is not None
    return best[1], best[2]


def _start(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centers that are far from each other: each next one is drawn by its squared distance to those before."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    while len(chosen) < count:
        distance = torch.cdist(points, points[chosen]).amin(1).square()
        if not float(distance.sum()) > 0:
            break
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
    return points[chosen]
