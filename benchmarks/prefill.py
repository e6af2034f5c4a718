"""Measures the time of prefills under several policies, in turns, beside that of the full cache.

Policies take turns, so that whatever else the machine does meets all of them; the shortest of the repeats counts. Processor
time is what wall time would be with one thread on a machine that does nothing else.

    python benchmarks/prefill.py [--model smollm2-135m] [--tokens 1024,2048] [--policies snapkv,pyramidinfer] [--budget 25%]
"""

import argparse
import json
import time

import torch

import kvbudget
from kvbudget.eval.texts import passages


def main() -> None:
    """Prints one JSON line per prompt length and policy: seconds, and the ratio of processor time to the full cache's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", default="1024,2048")
    parser.add_argument("--policies", default="snapkv,pyramidinfer")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = kvbudget.load(arguments.model)
    policies = ["full", *arguments.policies.split(",")]
    for tokens in map(int, arguments.tokens.split(",")):
        ids = passages(tokenizer, tokens, 1)[0][None]
        spent: dict[str, list[tuple[float, float]]] = {policy: [] for policy in policies}
        for _ in range(arguments.repeats):
            for policy in policies:
                budget = None if policy == "full" else arguments.budget
                cache = kvbudget.KVCache(model, policy, budget, max_length=tokens)
                begin = time.process_time(), time.perf_counter()
                cache.prefill(model, ids)
                spent[policy].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
        full = min(spent["full"])[0]
        for policy, runs in spent.items():
            processor, wall = min(runs)
            line = {
                "tokens": tokens,
                "policy": policy,
                "processor_seconds": round(processor, 2),
                "wall_seconds": round(wall, 2),
            }
            print(json.dumps(line | {"of_full": round(processor / full, 3)}), flush=True)


if __name__ == "__main__":
    main()
