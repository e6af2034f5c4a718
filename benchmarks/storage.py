"""Measures what a cache loses when it is saved transform-coded (kvtc): bytes and fidelity over ratios, on real text.

    python benchmarks/storage.py [--model smollm2-135m] [--source books] [--tokens 2048] [--texts 2] [--ratios 10,20,40]

Run ``kvbudget calibrate kvtc`` first; texts are other passages than those of the calibration. A cache is prefilled with a
text, saved and loaded, and the next 256 tokens of the text follow both the loaded and the original cache. Ratios are counted
against 16 bits per element, whatever the model runs in, as the paper does. Seconds are processor time.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

import kvbudget
from kvbudget.eval.fidelity import compare_logits, continuation_logits
from kvbudget.eval.texts import passages

FOLLOWING = 256
SEED = 1000


def main() -> None:
    """Prints one JSON line per ratio, means over the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--source", default=None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--ratios", default="10,20,40")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = kvbudget.load(arguments.model)
    wide = model.dtype.itemsize / 2
    texts = passages(tokenizer, arguments.tokens + FOLLOWING, arguments.texts, seed=SEED, source=arguments.source)
    found: dict[float, list[dict[str, float]]] = {float(ratio): [] for ratio in arguments.ratios.split(",")}
    for ids in texts:
        context, following = ids[None, : arguments.tokens], ids[None, arguments.tokens :]
        cache = kvbudget.KVCache(model, "full")
        last = cache.prefill(model, context)
        exact = continuation_logits(model, cache, last, following)
        for ratio, lines in found.items():
            with tempfile.TemporaryDirectory() as folder:
                begun = time.process_time()
                saved = cache.save(Path(folder) / "cache", "kvtc", ratio=ratio * wide)
                between = time.process_time()
                loaded = kvbudget.KVCache.load(saved.path, model)
                ended = time.process_time()
            fidelity = compare_logits(exact, continuation_logits(model, loaded, last, following), following[0])
            lines.append(
                {
                    "coded_ratio": saved.coded_ratio / wide,
                    "file_ratio": saved.cache_bytes / wide / saved.nbytes,
                    "kl_mean": fidelity.kl_mean,
                    "kl_p95": fidelity.kl_p95,
                    "agreement": fidelity.agreement,
                    "nll_rise": fidelity.nll_rise,
                    "save_seconds": between - begun,
                    "load_seconds": ended - between,
                }
            )
    for ratio, lines in found.items():
        means = {name: round(mean(line[name] for line in lines), 5) for name in lines[0]}
        print(json.dumps({"ratio": ratio, "tokens": arguments.tokens, "texts": len(lines), **means}), flush=True)


if __name__ == "__main__":
    main()
