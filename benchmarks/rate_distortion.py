"""Measures the rate-distortion figure of all codecs: true bits per element, from storage, against KL on real text.

Every codec of the registry in every width that it takes (calibrated ones where `kvbudget calibrate` has been run), and those
that need a budget or a file (`BUDGETED`, `SAVED`), code the same contexts, once recorded with the full cache; KL is the mean
over the tokens of a continuation in nats, the geometric mean over texts. Results are one JSON line per text and codec and
are kept: a run that was stopped goes on, and one with new codecs measures only those. All codecs at once also write the
table and what became of the orderings that papers claim.

    python benchmarks/rate_distortion.py [--model smollm2-135m] [--context 1024] [--texts 4]
"""

import argparse
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

import kvbudget
from kvbudget.eval.fidelity import Fidelity, compare_logits, continuation_logits
from kvbudget.eval.rate import codecs, measure
from kvbudget.eval.replay import Recording, record, replay
from kvbudget.eval.stats import bootstrap, compare
from kvbudget.eval.texts import default_source, passages
from kvbudget.files import written_whole
from kvbudget.models import CacheGeometry, fingerprint
from kvbudget.policy.artifact import default_path

# Claims of papers about what is closer to the full cache, at equal or fewer bits: the better policy and the other one.
CLAIMS = (
    ("KIVI: keys per channel; 4 bits before 2", "kivi", "kivi(bits=2)"),
    ("GEAR: the low-rank term helps 2 bits", "gear(bits=2, sparsity=0.0)", "gear(bits=2, sparsity=0.0, rank=0)"),
    ("GEAR: outliers help on top", "gear(bits=2)", "gear(bits=2, sparsity=0.0)"),
    ("KVQuant: 1% of outliers helps 3 bits", "kvquant", "kvquant(sparsity=0.0)"),
    ("SQuat before KIVI at 2 bits", "squat(bits=2)", "kivi(bits=2, residual=32)"),
    ("RotateKV before KIVI at 2 bits", "rotatekv(bits=2)", "kivi(bits=2)"),
    ("the same, groups of 32 in both", "rotatekv(bits=2, group=32)", "kivi(bits=2, residual=32)"),
    ("AQUA-KV before KIVI at 2 bits", "aquakv", "kivi(bits=2)"),
    ("CommVQ before KIVI at 2 bits", "commvq", "kivi(bits=2)"),
    ("CommVQ before KVQuant at 2 bits", "commvq", "kvquant(bits=2)"),
    ("NSNQuant before KIVI at 2 bits", "nsnquant", "kivi(bits=2)"),
    ("NSNQuant before CQ at 1 bit", "nsnquant(bits=1)", "cq"),
    ("CSR at 1.5 bits before KIVI at 1 bit (2 stored)", "csr", "kivi(bits=1)"),
    ("VidKV at 1.5 bits before KIVI at 1 bit", "vidkv", "kivi(bits=1)"),
    ("TurboQuant at 4 bits before KIVI at 4", "turboquant", "kivi"),
    ("the same, as many true bits in both", "turboquant", "kivi(bits=3, residual=32)"),
    ("XQuant-CL before XQuant at 3 bits", "xquant_cl", "xquant(bits=3)"),
    ("XQuant before KIVI at 4 bits", "xquant", "kivi"),
    ("the same, as many true bits in both", "xquant", "kivi(bits=3, residual=32)"),
)
# A fifth of the entries in full precision and the others demoted; everything held, entry by entry.
BUDGETED = (*(f"mikv(bits={b})@20%" for b in (4, 3, 2)), *(f"quantized_pruning(bits={b})@100%" for b in (8, 4, 3, 2)))
# Caches that were saved and loaded again.
SAVED = tuple(f"kvtc(ratio={ratio})" for ratio in (5, 10, 20, 40))


def main() -> None:
    """Prints one JSON line per text and codec, and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default=None, help="what the model computes in; float32 by default")
    parser.add_argument("--text", default=None, help="source of texts, as in kvbudget bench")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--budget", default=None, help="for policies that evict, such as 2MiB; none by default")
    parser.add_argument(
        "--policies",
        default="",
        help="joined by ;, instead of all codecs; 'measured': those that all texts have been through",
    )
    parser.add_argument("--results", type=Path, default=Path("results/rate_distortion.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("docs/rate_distortion.png"))
    parser.add_argument("--table", type=Path, default=Path("docs/rate_distortion.md"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = arguments.text or default_source()
    setting = {name: getattr(arguments, name) for name in ("model", "dtype", "context", "continuation", "budget")} | {
        "source": source
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    known = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    lines = [line for line in map(json.loads, known) if all(line.get(name) == x for name, x in setting.items())]
    done = {(line["text"], line["policy"]) for line in lines}
    model, tokenizer = kvbudget.load(arguments.model, dtype=arguments.dtype or "float32")
    policies = arguments.policies.split(";") if arguments.policies else everything(model)
    if arguments.policies == "measured":
        once = dict.fromkeys(line["policy"] for line in lines)
        policies = [policy for policy in once if all((number, policy) in done for number in range(arguments.texts))]
    length = arguments.context + arguments.continuation
    with arguments.results.open("a") as file:
        for number, ids in enumerate(passages(tokenizer, length, arguments.texts, source=source)):
            missing = [policy for policy in policies if (number, policy) not in done]
            if not missing or arguments.policies == "measured":
                continue
            recording = record(model, ids[None, : arguments.context])
            continuation = ids[None, arguments.context :]
            whole = replay(recording, kvbudget.KVCache(model, "full"))
            full = continuation_logits(model, whole, recording.logits, continuation)
            for policy in missing:
                bits, fidelity = measured(model, recording, policy, continuation, full, arguments.budget)
                found = {"policy": policy, "bits": round(bits, 4), "kl": fidelity.kl_mean, "rise": fidelity.nll_rise}
                line = {"text": number, **found, "agreement": fidelity.agreement, **setting}
                print(json.dumps(line), file=file, flush=True)
                print(json.dumps(line), flush=True)
                lines.append(line)
    wanted = set(policies) - {"full"}
    lines = [line for line in lines if line["policy"] in wanted and line["text"] < arguments.texts]
    draw(lines, arguments.figure, arguments.model)
    if arguments.policies in ("", "measured"):
        with written_whole(arguments.table) as unfinished:
            unfinished.write_text(page(lines, setting, arguments.figure), encoding="utf-8")


def everything(model) -> list[str]:
    """All codecs that can be measured, and those that the claims name."""
    named = [policy for _, *pair in CLAIMS for policy in pair]
    found = codecs(model)
    methods = {policy.partition("(")[0] for policy in found}
    own = [policy for policy in named if policy.partition("(")[0] in methods]
    saved = SAVED if default_path("kvtc", fingerprint(model)).exists() else ()
    return list(dict.fromkeys(["full", *found, *own, *BUDGETED, *saved]))


def measured(
    model, recording: Recording, policy: str, continuation, full, budget: str | None
) -> tuple[float, Fidelity]:
    """True bits and fidelity of a policy, of ``policy@budget``, or of a saved cache, ``kvtc(ratio=...)``."""
    if policy not in SAVED:
        name, _, own = policy.partition("@")
        return measure(model, recording, name, continuation, full, own or budget)
    cache, wide = replay(recording, kvbudget.KVCache(model, "full")), model.dtype.itemsize / 2
    with tempfile.TemporaryDirectory() as folder:
        ratio = float(policy.partition("=")[2].rstrip(")"))
        saved = cache.save(Path(folder) / "cache", "kvtc", ratio=ratio * wide)
        loaded = kvbudget.KVCache.load(saved.path, model)
    shape = CacheGeometry.from_config(model.config).layers
    width = sum(layer.num_kv_heads * (layer.key_head_dim + layer.value_head_dim) for layer in shape)
    elements = width * recording.ids.shape[1]
    bits = 16 + 8 * (saved.stream_bytes - saved.coded_bytes / wide) / elements
    return bits, compare_logits(
        full, continuation_logits(model, loaded, recording.logits, continuation), continuation[0]
    )


def page(lines: list[dict], setting: dict, figure: Path) -> str:
    """The table of all codecs and the claims, in Markdown."""
    cells: dict[str, list[dict]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["text"]):
        cells[line["policy"]].append(line)
    texts = len({line["text"] for line in lines})
    logs = {policy: [math.log(max(line["kl"], 1e-9)) for line in found] for policy, found in cells.items()}
    rows = []
    for policy, found in cells.items():
        kl = bootstrap(logs[policy])
        bits, rise, agreement = (
            sum(line[name] for line in found) / len(found) for name in ("bits", "rise", "agreement")
        )
        between = f"{math.exp(kl.mean):.2g} [{math.exp(kl.low):.2g}, {math.exp(kl.high):.2g}]"
        rows.append((bits, f"| {policy} | {bits:.2f} | {between} | {rise:+.4f} | {agreement:.1%} |"))
    judged = []
    for claim, better, other in CLAIMS:
        if better in cells and other in cells:
            verdict, gap = compare(logs[better], logs[other])
            factor = f"{math.exp(gap.mean):.2f} [{math.exp(gap.low):.2f}, {math.exp(gap.high):.2f}]"
            holds = {"lower": "yes", "higher": "no, the other way round"}.get(verdict, verdict)
            judged.append(f"| {claim} | {better} | {other} | {factor} | {holds} |")
    return "\n".join(
        [
            f"# Rate and distortion of codecs on {setting['model']}",
            "",
            f"{texts} texts of {setting['source']}: {setting['context']} tokens in the cache, coded once, and the "
            f"{setting['continuation']} that follow. True bits",
            "per element are those stored for keys and values: codes, scales, what rows keep, and tails and first entries in 16",
            "bits. KL to the full cache in nats, geometric mean over texts with a 95% bootstrap interval over them.",
            "",
            f"![KL against bits]({figure.name})",
            "",
            "| codec | true bits | KL | NLL rise | top-1 agreement |",
            "|---|---|---|---|---|",
            *[row for _, row in sorted(rows)],
            "",
            "## What papers order",
            "",
            "Ratio of KL, paired over the texts: below 1 the first is closer to the full cache.",
            "",
            "| claim | first | second | ratio | as measured |",
            "|---|---|---|---|---|",
            *judged,
            "",
            f"    python benchmarks/rate_distortion.py --model {setting['model']} --text {setting['source']} "
            f"--context {setting['context']} --continuation {setting['continuation']} --texts {texts}",
            "",
        ]
    )


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
