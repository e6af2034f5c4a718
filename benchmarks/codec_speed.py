"""Measures what a decode step costs over each codec, against the full cache and against its own bytes.

    python benchmarks/codec_speed.py [--model smollm2-135m] [--length 4096] [--steps 8] [--codecs "kivi;int8;..."]
        [--markdown docs/codecs.md]

bf16 weights, one thread's own processor time. Only speed and bytes count here: the keys and values of the prompt are random
numbers put into each cache, its last 64 tokens and the steps go through the model, and all caches take their steps in
turns. Medians. Codecs that need a calibration are left out, with one line each, where the model has none.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from decode import Run, filled, measure
from transformers import PreTrainedModel

import kvbudget
from kvbudget.errors import KVBudgetError
from kvbudget.files import insert
from kvbudget.methods import parse, registry


def table(runs: list[Run]) -> str:
    """Milliseconds of a step, and times of the full cache's step and bytes, the quickest first."""
    full = runs[0]
    seconds = {run.name: statistics.median(run.seconds) for run in runs}
    lines = ["| codec | ms per step | times of full's | bytes, of full's |", "|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: seconds[run.name]):
        times = seconds[run.name] / seconds[full.name]
        share = run.nbytes / full.nbytes
        lines.append(f"| `{run.name}` | {1e3 * seconds[run.name]:.0f} | {times:.2f} | {share:.0%} |")
    return "\n".join(lines)


def prepared(model: PreTrainedModel, name: str, length: int) -> kvbudget.KVCache:
    """A cache with a prompt of ``length`` tokens; layers that are coded together read one, since they share their entries."""
    cache = kvbudget.KVCache(model, name)
    if getattr(parse(name).parts().sharing, "layered", False):
        model(torch.randint(1000, (1, length)), past_key_values=cache, logits_to_keep=1)
        return cache
    return filled(model, cache, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--codecs", help="separated by semicolons; all codecs by default")
    parser.add_argument("--markdown", type=Path, help="a page with the marks <!-- speed --> and <!-- /speed -->")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, _ = kvbudget.load(chosen.model, dtype="bfloat16")
    every = [name for name, kind in registry().items() if kind.role == "codec"]
    runs = []
    with torch.inference_mode():
        for name in ["full", *(chosen.codecs.split(";") if chosen.codecs else every)]:
            try:
                runs.append(Run(name, model, prepared(model, name, chosen.length)))
            except KVBudgetError as error:
                print(f"left out: {name} ({error})")
        measure(runs, chosen.steps, time.process_time)
    text = table(runs)
    print(text)
    if chosen.markdown:
        insert(chosen.markdown, "speed", text)


if __name__ == "__main__":
    main()
