"""Measures the rate-distortion figure of all codecs: true bits per element, from storage, against KL on real text.

Every codec of the registry in every width that it takes (calibrated ones where `kvbudget calibrate` has been run) codes the
same contexts, once recorded with the full cache; KL is the mean over the tokens of a continuation in nats, the geometric
mean over texts. Results are one JSON line per text and codec and are kept: a run that was stopped goes on, and one with new
codecs measures only those.

    python benchmarks/rate_distortion.py [--model smollm2-135m] [--context 1024] [--texts 4] [--figure docs/rate_distortion.png]
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import torch

import kvbudget
from kvbudget.eval.fidelity import continuation_logits
from kvbudget.eval.rate import codecs, measure
from kvbudget.eval.replay import record, replay
from kvbudget.eval.texts import default_source, passages


def main() -> None:
    """Prints one JSON line per text and codec, and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=None, help="source of texts, as in kvbudget bench")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--policies", default="", help="joined by ;, instead of all codecs")
    parser.add_argument("--results", type=Path, default=Path("results/rate_distortion.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("docs/rate_distortion.png"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = arguments.text or default_source()
    setting = {name: getattr(arguments, name) for name in ("model", "context", "continuation")} | {"source": source}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    known = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    lines = [line for line in map(json.loads, known) if all(line[name] == x for name, x in setting.items())]
    done = {(line["text"], line["policy"]) for line in lines}
    model, tokenizer = kvbudget.load(arguments.model)
    policies = arguments.policies.split(";") if arguments.policies else ["full", *codecs(model)]
    length = arguments.context + arguments.continuation
    with arguments.results.open("a") as file:
        for number, ids in enumerate(passages(tokenizer, length, arguments.texts, source=source)):
            missing = [policy for policy in policies if (number, policy) not in done]
            if not missing:
                continue
            recording = record(model, ids[None, : arguments.context])
            continuation = ids[None, arguments.context :]
            whole = replay(recording, kvbudget.KVCache(model, "full"))
            full = continuation_logits(model, whole, recording.logits, continuation)
            for policy in missing:
                bits, fidelity = measure(model, recording, policy, continuation, full)
                found = {"policy": policy, "bits": round(bits, 4), "kl": fidelity.kl_mean, "rise": fidelity.nll_rise}
                line = {"text": number, **found, "agreement": fidelity.agreement, **setting}
                print(json.dumps(line), file=file, flush=True)
                print(json.dumps(line), flush=True)
                lines.append(line)
    draw([line for line in lines if line["policy"] != "full"], arguments.figure, arguments.model)


def draw(lines: list[dict], path: Path, model: str) -> None:
    """One curve per method: geometric mean of KL over texts against bits."""
    from kvbudget.eval.figures import MARKERS, plt, save

    cells: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        cells[line["policy"].partition("(")[0]][line["policy"]].append(line)
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    for number, (method, settings) in enumerate(sorted(cells.items())):
        points = []
        for found in settings.values():
            logs = [math.log(max(line["kl"], 1e-7)) for line in found]
            points.append((sum(line["bits"] for line in found) / len(found), math.exp(sum(logs) / len(logs))))
        marker = MARKERS[number // 10 % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=5, linewidth=1.1, label=method)
    axes.set(xlabel="true bits per element", ylabel="KL to the full cache (nats)", xscale="log", yscale="log")
    axes.set_xticks([1, 2, 3, 4, 6, 8, 16], ["1", "2", "3", "4", "6", "8", "16"])
    axes.set_title(f"{model}: {len({line['text'] for line in lines})} texts of {lines[0]['source']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    save(figure, path)


if __name__ == "__main__":
    main()
