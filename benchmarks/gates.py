"""Judges trained gates on texts that they have not seen, beside untrained ones, which it also writes as artifacts.

    kvbudget calibrate "kvzap(count=10)+fast_kvzip(count=10)+locret(count=10)" --text wikitext2 --seed 1
    kvbudget calibrate "wg_kv(count=8)" --text wikitext2
    python benchmarks/gates.py [--model smollm2-135m] [--text books] [--texts 3] [--untrained results/untrained]

Targets are those of the calibration. R2 (where targets are logarithms), rank correlation, and overlap: the share of the best
half and quarter of the tokens by the target that are also those by the gate; means over layers, KV heads and texts.

WG-KV's gate has no targets. It is judged by how far the layers' attention moves (root of the squared change over the squared
output, mean over layers) for queries that see, beside a local window, only what the gate admits: above its own limit, and the
best half and quarter of the tokens of each head.

The artifacts let `kvbudget bench` run the untrained forms: ``locret(file='results/untrained/locret.safetensors')``.
"""

from pathlib import Path

import torch
from judging import Judged
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate import build
from kvbudget.calibrate.admission import Admission, distance
from kvbudget.calibrate.base import watch
from kvbudget.calibrate.gates import GateCalibration, Taught, examples, features
from kvbudget.layer import AttentionCall
from kvbudget.methods.wg_kv import WGKV
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact


def ranks(values: Tensor) -> Tensor:
    """Ranks of ``[l, n, Hkv]`` over the tokens, less their mean, of length one."""
    order = values.argsort(1).argsort(1).float()
    order -= order.mean(1, keepdim=True)
    return order / order.norm(dim=1, keepdim=True)


def overlap(scores: Tensor, targets: Tensor, share: float) -> float:
    """Share of the best tokens by ``targets [l, n, Hkv]`` that are among as many best ones by the scores."""
    count = int(share * targets.shape[1])
    best = [torch.zeros_like(x).scatter_(1, x.topk(count, 1).indices, 1.0) for x in (scores, targets)]
    return float((best[0] * best[1]).sum(1).mean() / count)


def judge(scores: Tensor, targets: Tensor) -> list[float]:
    """R2, rank correlation, and overlap of the best half and quarter."""
    spread = (targets - targets.mean(1, keepdim=True)).square().sum(1)
    explained = 1 - (scores - targets).square().sum(1) / spread
    correlation = (ranks(scores) * ranks(targets)).sum(1)
    return [
        float(explained.mean()),
        float(correlation.mean()),
        overlap(scores, targets, 0.5),
        overlap(scores, targets, 0.25),
    ]


def judge_admission(fit: Admission, model: PreTrainedModel, ids: Tensor, weights: dict[str, Tensor]) -> list[float]:
    """Share of the tokens of ``ids [1, T]`` that are admitted, the change by it, and by the best half and quarter."""
    calls: dict[int, AttentionCall] = {}
    watch(model, ids, lambda index, call, lse: calls.update({index: call}))
    with torch.no_grad():
        x = features(fit.gate(), model, calls)
        gates = fit.gate().score(x, {name: weight[list(calls)] for name, weight in weights.items()})
    asked = torch.arange(fit.window, ids.shape[1], 8)

    def change(admitted: Tensor) -> float:
        hard = torch.where(admitted, 1.0, 1e-30)
        apart = [distance(call, asked, gate, fit.window) for call, gate in zip(calls.values(), hard, strict=True)]
        return float(torch.stack(apart).sqrt().mean())

    place = gates.argsort(1, descending=True).argsort(1)
    admitted = [gates > WGKV.admit, *(place < share * ids.shape[1] for share in (0.5, 0.25))]
    return [float(admitted[0].float().mean()), *map(change, admitted)]


def forms_of(fit: GateCalibration | Taught, model: PreTrainedModel, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The gate's weights as calibrated and, unless they are solved for, untrained; the latter are written to ``folder``."""
    mark = fingerprint(model)
    forms = {"trained": dict(Artifact.load(fit.method, mark).tensors)}
    if isinstance(fit, GateCalibration):
        forms["untrained"] = fit.untrained(model, torch.Generator().manual_seed(0))
        Artifact(fit.method, mark, forms["untrained"], {}).save(folder / f"{fit.method}.safetensors")
    return forms


def show(method: str, found: dict[str, list[list[float]]]) -> None:
    """A line of means over texts for each form of a gate."""
    for form, rows in found.items():
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        print(f"{method:12}{form:11}{means[0]:8.2f}{means[1]:12.2f}{means[2]:10.2f}{means[3]:10.2f}", flush=True)


def main() -> None:
    judged = Judged.asked(__doc__)
    model, texts = judged.model, judged.texts
    print(f"{'gate':12}{'':11}{'R2':>8}{'rank corr.':>12}{'best 50%':>10}{'best 25%':>10}")
    for method in ("kvzap", "fast_kvzip", "locret"):
        fit = build(method)
        assert isinstance(fit, Taught)
        forms = forms_of(fit, model, judged.folder)
        found: dict[str, list[list[float]]] = {form: [] for form in forms}
        for ids in texts:
            x, y, index = examples(fit, model, ids[None])
            for form, weights in forms.items():
                with torch.no_grad():
                    scores = fit.gate().score(x, {name: weight[index] for name, weight in weights.items()})
                found[form].append(judge(scores, y))
        show(method, found)
    print(f"{'gate':12}{'':11}{'share':>8}{'change':>12}{'best 50%':>10}{'best 25%':>10}")
    fit = build("wg_kv")
    assert isinstance(fit, Admission)
    forms = forms_of(fit, model, judged.folder)
    show("wg_kv", {form: [judge_admission(fit, model, ids[None], w) for ids in texts] for form, w in forms.items()})


if __name__ == "__main__":
    main()
