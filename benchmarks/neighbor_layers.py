"""How alike the keys and values of neighboring layers are, and what merging them as MiniCache does costs: a table by halves.

    python benchmarks/neighbor_layers.py [--model smollm2-135m] [--texts 2] [--length 512]

Errors are sums of squares over both layers, relative to the sums of squares of what was merged: of MiniCache's direction and
norms (no outliers kept), and of the plain mean of both layers.
"""

import argparse
import itertools

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvbudget.calibrate.base import watch
from kvbudget.eval.texts import passages
from kvbudget.layer import AttentionCall
from kvbudget.models import load
from kvbudget.segments.paired import interpolate


def compare(one: Tensor, other: Tensor, part: float) -> list[float]:
    """Cosine of two layers' vectors ``[..., D]``, error of the interpolated direction with both norms, error of the mean."""
    direction, norms, _ = interpolate(one, other, part)
    restored = [direction * norms[..., i, None] for i in (0, 1)]
    size = one.square().sum() + other.square().sum()
    errors = [
        sum((held - x).square().sum() for held, x in zip(kept, (one, other), strict=True)) / size
        for kept in (restored, [(one + other) / 2] * 2)
    ]
    return [float(cosine_similarity(one, other, dim=-1).mean()), *map(float, errors)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--part", type=float, default=0.6, help="weight of the upper layer's direction")
    chosen = parser.parse_args()
    model, tokenizer = load(chosen.model, dtype="float32")
    found: dict[tuple[str, str], list[list[float]]] = {}
    for ids in passages(tokenizer, chosen.length, chosen.texts):
        held: dict[int, AttentionCall] = {}
        watch(model, ids[None], lambda index, call, lse, held=held: held.update({index: call}))
        layers = sorted(held)
        for at, pair in enumerate(itertools.pairwise(layers)):
            half = "lower" if 2 * at < len(layers) - 1 else "upper"
            for name in ("key", "value"):
                row = compare(*(getattr(held[i], name).float() for i in pair), chosen.part)
                found.setdefault((half, name), []).append(row)
    print("| half | of | cosine | error, interpolated | error, mean |\n|---|---|---|---|---|")
    for (half, name), rows in found.items():
        cosine, interpolated, mean = torch.tensor(rows).mean(0).tolist()
        print(f"| {half} | {name}s | {cosine:.2f} | {interpolated:.2f} | {mean:.2f} |")


if __name__ == "__main__":
    main()
