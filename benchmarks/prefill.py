"""Measures the wall time of prefills under several policies, in turns, beside that of the full cache.

Policies take turns, so that whatever else the machine does meets all of them; the shortest of the repeats counts.

    python benchmarks/prefill.py [--model smollm2-135m] [--tokens 1024,2048] [--policies snapkv,pyramidinfer] [--budget 25%]
"""

import argparse
import json
import time

import torch

import kvbudget
from kvbudget.eval.texts import passages


def main() -> None:
    """Prints one JSON line per prompt length and policy: seconds, and their ratio to the full cache's."""
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
        seconds: dict[str, list[float]] = {policy: [] for policy in policies}
        for _ in range(arguments.repeats):
            for policy in policies:
                budget = None if policy == "full" else arguments.budget
                cache = kvbudget.KVCache(model, policy, budget, max_length=tokens)
                begin = time.perf_counter()
                cache.prefill(model, ids)
                seconds[policy].append(time.perf_counter() - begin)
        for policy, spent in seconds.items():
            ratio = min(spent) / min(seconds["full"])
            line = {"tokens": tokens, "policy": policy, "seconds": round(min(spent), 2), "of_full": round(ratio, 3)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
