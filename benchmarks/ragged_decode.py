"""Measures what ragged heads cost in decode: snapkv+adakv and kvzip against uniform snapkv and the full cache, in turns.

Every round decodes one token with each cache, so that a slow moment of the machine touches all of them; the figure is the
ratio of medians. Without a model name, a random model with SmolLM2-135M's cache geometry and narrow layers stands in: there
the cache's work is most of the step, so the ratio is the least favorable one.

    python benchmarks/ragged_decode.py [--model smollm2-135m] [--tokens 2048] [--budget 10%] [--rounds 200]
"""

import argparse
import json
import statistics
import time

import torch
from peak_memory import stand_in
from transformers import PreTrainedModel

import kvbudget

POLICIES = ("snapkv", "snapkv+adakv", "kvzip", "full")


def filled(model: PreTrainedModel, policy: str, budget: str, ids: torch.Tensor) -> kvbudget.KVCache:
    """A cache that holds a prompt."""
    cache = kvbudget.KVCache(model, policy, None if policy == "full" else budget)
    cache.prefill(model, ids)
    return cache


def decode_seconds(
    model: PreTrainedModel, caches: dict[str, kvbudget.KVCache], rounds: int, warmup: int = 5
) -> dict[str, list[float]]:
    """Seconds of single decode steps per cache, measured in turns by the thread's own processor time."""
    token = torch.ones(1, 1, dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        for round_ in range(-warmup, rounds):
            for name, cache in caches.items():
                begin = clock()
                model(token, past_key_values=cache)
                if round_ >= 0:
                    seconds[name].append(clock() - begin)
    return seconds


def main() -> None:
    """Prints one JSON line per policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = kvbudget.load(arguments.model)[0] if arguments.model else stand_in()
    model = model.to(getattr(torch, arguments.dtype))
    ids = torch.randint(model.config.vocab_size, (1, arguments.tokens))
    caches = {policy: filled(model, policy, arguments.budget, ids) for policy in POLICIES}
    full = caches["full"].report().full_bytes
    held = {policy: cache.nbytes for policy, cache in caches.items()}
    seconds = decode_seconds(model, caches, arguments.rounds)
    base = statistics.median(seconds["snapkv"])
    for policy, times in seconds.items():
        line = {
            "policy": policy,
            "tokens": arguments.tokens,
            "budget": arguments.budget,
            "dtype": arguments.dtype,
            "bytes_of_full": round(held[policy] / full, 4),
            "decode_ms_median": round(1e3 * statistics.median(times), 3),
            "decode_ms_mean": round(1e3 * statistics.mean(times), 3),
            "speed_of_snapkv": round(base / statistics.median(times), 3),
            "mean_speed_of_snapkv": round(statistics.mean(seconds["snapkv"]) / statistics.mean(times), 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
