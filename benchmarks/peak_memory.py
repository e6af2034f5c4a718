"""Measures how far the process's peak memory rises from a short prompt to a long one under a byte budget.

The short prompt is prefilled first and settles everything that does not depend on the length (weights, code, workspaces);
what the long prompt adds to the peak of the process (`ru_maxrss`) is the figure. Without a model name, a random model of
SmolLM2-135M's cache geometry (30 layers, 3 KV heads of 64 channels) with narrow layers stands in, whose weights and
vocabulary cost next to nothing.

    python benchmarks/peak_memory.py [--model smollm2-135m] [--tokens 2048,16384] [--budget 4MiB] [--policy snapkv]
"""

import argparse
import gc
import json
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import kvbudget

MIB = 2**20


def stand_in() -> PreTrainedModel:
    """A random model with SmolLM2-135M's cache geometry."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=32768,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def peak_bytes() -> int:
    """The largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Prints one JSON line per prompt length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", default="2048,16384")
    parser.add_argument("--budget", default="4MiB")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = kvbudget.load(arguments.model)[0] if arguments.model else stand_in()
    first = None
    for tokens in map(int, arguments.tokens.split(",")):
        cache = kvbudget.KVCache(model, arguments.policy, arguments.budget)
        ids = torch.randint(model.config.vocab_size, (1, tokens))
        begin = time.perf_counter()
        cache.prefill(model, ids)
        seconds = time.perf_counter() - begin
        first = first or peak_bytes()
        line = {
            "tokens": tokens,
            "policy": arguments.policy,
            "budget": arguments.budget,
            "cache_bytes": cache.nbytes,
            "cache_peak_bytes": cache.report().peak_bytes,
            "process_peak_mib": round(peak_bytes() / MIB, 1),
            "more_than_first_mib": round((peak_bytes() - first) / MIB, 1),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(line), flush=True)
        del cache
        gc.collect()


if __name__ == "__main__":
    main()
