"""Measures what a plan's extra passes cost: prefill time under a policy, as a multiple of a plain prefill, in turns.

The figure is the processor time of the whole process, so that a busy machine changes it little: 1.7 means that the passes
take 1.7 plain prefills on top of the one that every policy pays for.

    python benchmarks/plan_time.py [--model smollm2-135m] [--policy kvzip] [--tokens 2048,6144] [--rounds 3]
"""

import argparse
import json
import statistics
import time

import torch
from transformers import PreTrainedModel

import kvbudget


def prefill_seconds(model: PreTrainedModel, policy: str, budget: str | None, ids: torch.Tensor) -> float:
    """Processor time of one prefill of ``ids [1, T]``."""
    cache = kvbudget.KVCache(model, policy, budget)
    begun = time.process_time()
    cache.prefill(model, ids)
    return time.process_time() - begun


def main() -> None:
    """Prints one JSON line per prompt length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="kvzip")
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--tokens", default="2048,6144")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, _ = kvbudget.load(arguments.model)
    for tokens in map(int, arguments.tokens.split(",")):
        ids = torch.randint(model.config.vocab_size, (1, tokens))
        pairs = [
            (prefill_seconds(model, "full", None, ids), prefill_seconds(model, arguments.policy, arguments.budget, ids))
            for _ in range(arguments.rounds)
        ]
        ratios = [planned / plain - 1 for plain, planned in pairs]
        line = {
            "policy": arguments.policy,
            "tokens": tokens,
            "plain_seconds": round(statistics.median(plain for plain, _ in pairs), 2),
            "extra_prefills": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
