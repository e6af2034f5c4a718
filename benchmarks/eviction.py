"""Measures what an eviction costs a decode step: microseconds per layer, with SmolLM2-135M's cache geometry.

A model of that geometry with random, narrow layers stands in, since only the cache's work counts. Layers are timed one by
one by the thread's own processor time: what follows the attention (scores, choice, moves), with an eviction and without, and
the whole attention call of the step, which also pays for whatever an eviction left to be prepared anew.

    python benchmarks/eviction.py [--entries 2048] [--steps 96] [--layers 30] [--dtype bfloat16] [--policies "snapkv;tova"]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peak_memory import stand_in
from transformers import AttentionInterface

import kvbudget
from kvbudget import attention

POLICIES = ("snapkv", "snapkv+adakv", "h2o", "tova", "snapkv+kivi(bits=4)", "snapkv+kivi(bits=2)", "h2o+kivi(bits=4)")


class Calls:
    """Attention calls as pairs of seconds: what follows the attention, which most steps do without, and the whole call."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []
        self._acted = 0.0

    def acting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What follows the attention, timed."""

        def timed(*arguments: Any) -> None:
            begin = time.thread_time()
            function(*arguments)
            self._acted += time.thread_time() - begin

        return timed

    def attention(self, *arguments: Any, **options: Any) -> Any:
        """The attention call, timed."""
        self._acted, begin = 0.0, time.thread_time()
        answer = attention.attention_function(*arguments, **options)
        self.pairs.append((self._acted, time.thread_time() - begin))
        return answer


def measure(model: Any, policy: str, entries: int, steps: int) -> dict[str, Any]:
    """Medians over the layers and steps of one cache that is full of random entries."""
    cache = kvbudget.KVCache(model, policy, entries)
    with torch.inference_mode():
        model(torch.randint(model.config.vocab_size, (1, entries + 64)), past_key_values=cache)
        calls = Calls()
        cache.enforcer.act = calls.acting(cache.enforcer.act)
        AttentionInterface.register(attention.NAME, calls.attention)
        found: dict[str, list[tuple[float, float]]] = {"evicting": [], "after": [], "resting": []}
        kind = "resting"
        for step in range(steps):
            calls.pairs.clear()
            before = cache.enforcer.evictions
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
            evicted = cache.enforcer.evictions > before
            kind = "evicting" if evicted else "after" if kind == "evicting" else "resting"
            if step >= steps // 4:
                found[kind] += calls.pairs
    record: dict[str, Any] = {"policy": policy, "entries": entries}
    for name, pairs in found.items():
        if pairs:
            acted, called = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
            record |= {f"{name}_us": round(acted), f"{name}_call_us": round(called)}
    return record


def main() -> None:
    """Prints one JSON line per policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policies", default=";".join(POLICIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = stand_in().to(getattr(torch, arguments.dtype))
    model.model.layers = model.model.layers[: arguments.layers]
    model.config.num_hidden_layers = arguments.layers
    for policy in arguments.policies.split(";"):
        print(json.dumps(measure(model, policy, arguments.entries, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
