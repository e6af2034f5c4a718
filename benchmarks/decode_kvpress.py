"""One peer of decode.py in an environment of its own: SnapKV by kvpress, on the same weights, timed the same way.

python benchmarks/decode_kvpress.py <model folder> <ratio of entries to drop> <prompt tokens> <new tokens> <threads>
"""

import json
import statistics
import sys
import time

import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    """Prints one JSON line."""
    folder, ratio, length, tokens, threads = sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.randint(model.config.vocab_size, (1, length))
    cache = DynamicCache()
    with torch.inference_mode():
        with SnapKVPress(compression_ratio=ratio)(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        clock = time.thread_time if threads == 1 else time.perf_counter
        seconds = []
        token = torch.ones(1, 1, dtype=torch.long)
        for step in range(-2, tokens):
            position = torch.tensor([[length + 2 + step]])
            begin = clock()
            model(token, past_key_values=cache, position_ids=position, logits_to_keep=1)
            if step >= 0:
                seconds.append(clock() - begin)
    nbytes = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    speed = 1 / statistics.median(seconds)
    name = f"kvpress SnapKV {100 * (1 - ratio):.0f}%"
    print(json.dumps({"name": name, "length": length, "tokens_per_s": speed, "bytes": nbytes, "steps": tokens}))


if __name__ == "__main__":
    main()
