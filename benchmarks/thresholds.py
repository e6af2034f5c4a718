"""Judges top_theta's thresholds on texts that they have not seen, beside the true top k that they stand for.

    kvbudget calibrate "top_theta(count=4)" --text wikitext2
    python benchmarks/thresholds.py [--model smollm2-135m] [--text books] [--texts 3] [--untrained results/untrained]

Per row of more entries than are always read: how many values are read, and how far the head's answer moves (root of the squared
change over the squared answer, mean over heads and layers), each layer asked as the full cache would ask it. ``1/k`` is what
needs no calibration: at most k weights exceed it. It is written as an artifact, so that `kvbudget bench` runs it:
``top_theta(file='results/untrained/top_theta.safetensors')``. ``random`` reads about as many values as the thresholds do.
"""

from dataclasses import replace

import torch
from judging import Judged
from torch import Tensor

from kvbudget.cache import KVCache
from kvbudget.methods.top_theta import TopTheta
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.selectors.thresholds import Thresholds
from kvbudget.segments.selective import Chosen, Reading

FORMS = ("thresholds", "true top k", "1/k", "random")


class Judge:
    """Lets a layer read everything, and notes what each form would read and answer."""

    prefill = True

    def __init__(self, calibrated: Thresholds, plain: Thresholds) -> None:
        self.calibrated, self.plain = calibrated, plain
        self.found: dict[tuple[str, bool], list[tuple[float, float, float]]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def select(self, reading: Reading) -> Chosen:
        full, early = reading.probabilities, reading.layer_idx < 2
        length = reading.visible.sum(-1)[:, :, None]
        k = self.calibrated.first if early else self.calibrated.k
        long = (length > k).expand(full.shape[:-1])
        if bool(long.any()):
            ours = self.calibrated.select(reading).weights > 0
            read = {
                "thresholds": ours,
                "true top k": full >= full.topk(min(k, full.shape[-1])).values[..., -1:],
                "1/k": self.plain.select(reading).weights > 0,
                "random": torch.rand(full.shape, generator=self.generator) * length[..., None]
                < ours.sum(-1, keepdim=True),
            }
            for form in FORMS:
                self.note(form, early, reading, full, full * read[form], long)
        return Chosen(full)

    def note(self, form: str, early: bool, reading: Reading, full: Tensor, kept: Tensor, long: Tensor) -> None:
        """Values read per row, and the change of the answers with and without the mean value for what is missing."""
        values = reading.values[:, :, None]
        visible = reading.visible.float()
        mean = (visible / visible.sum(-1, keepdim=True)) @ reading.values
        answer = full @ values
        missing = (1 - kept.sum(-1, keepdim=True)).clamp_min(0.0)
        changes = []
        for out in (kept @ values + missing * mean[:, :, None], kept @ values):
            apart = ((out - answer).square().sum(-1) * long).sum((0, 3))
            changes.append(float((apart / (answer.square().sum(-1) * long).sum((0, 3))).sqrt().mean()))
        number = float(((kept > 0).sum(-1) * long).sum() / long.sum())
        self.found.setdefault((form, early), []).append((number, *changes))


def main() -> None:
    judged = Judged.asked(__doc__)
    mark = judged.mark
    made = Artifact.load("top_theta", mark)
    if made.parameters["on"] != "weights":
        raise SystemExit("the thresholds were calibrated on logits; run: kvbudget calibrate top_theta")
    calibrated = TopTheta().bind(mark).selector
    flat = torch.full_like(made.tensors["thresholds"], 1 / calibrated.k)
    flat[:2] = 1 / calibrated.first
    Artifact("top_theta", mark, {**made.tensors, "thresholds": flat}, dict(made.parameters)).save(
        judged.folder / "top_theta.safetensors"
    )
    judge = Judge(calibrated, replace(calibrated, thresholds=flat))
    for ids in judged.texts:
        cache = KVCache(judged.model, "full")
        for layer in cache.enforcer.layers:
            layer.selector = judge
        with torch.inference_mode():
            judged.model.base_model(ids[None], past_key_values=cache, use_cache=True)
    print(f"{'form':14}{'layers':>9}{'read':>8}{'change':>9}{'without the mean value':>24}")
    for (form, early), rows in judge.found.items():
        number, change, bare = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        print(f"{form:14}{'first 2' if early else 'others':>9}{number:8.1f}{change:9.3f}{bare:24.3f}", flush=True)


if __name__ == "__main__":
    main()
