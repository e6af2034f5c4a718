"""llama.cpp's part of benchmarks/decode.py, for an environment that has the wheel xllamacpp (pip install xllamacpp).

    python benchmarks/decode_llamacpp.py MODEL.gguf --lengths 1024,8192 [--tokens 32] [--threads 2]

Prints one JSON list: for each type of the KV cache and length, tokens per second and the bytes of keys and values.
"""

import argparse
import json
import sys

import xllamacpp
from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

# Names and bytes per 32 numbers of the types measured.
KINDS = {"f16": (ggml_type.GGML_TYPE_F16, 64), "q4_0": (ggml_type.GGML_TYPE_Q4_0, 18)}


def measure(server: Server, length: int, tokens: int) -> float:
    """Tokens per second after a prompt of ``length`` tokens, the prefill left out."""
    prompt = [1 + (7 * i) % 1000 for i in range(length)]
    asked = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": True, "temperature": 0.0}
    answer = server.handle_completions(asked)
    if "timings" not in answer:
        raise SystemExit(f"llama.cpp gave no timings at {length} tokens: {str(answer)[:200]}")
    return float(answer["timings"]["predicted_per_second"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", help="the model's file")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bytes-per-token", type=int, default=30 * 2 * 3 * 64, help="numbers that a token stores")
    arguments = parser.parse_args()
    lengths = sorted(int(n) for n in arguments.lengths.split(","))
    records = []
    for kind, (code, per_block) in KINDS.items():
        params = CommonParams()
        params.model.path = arguments.gguf
        params.n_ctx = lengths[-1] + arguments.tokens
        params.n_parallel = 1
        params.cache_type_k = params.cache_type_v = code
        params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
        params.verbosity = 0
        server = Server(params)
        for length in lengths:
            speed = measure(server, length, arguments.tokens)
            nbytes = arguments.bytes_per_token * length * per_block // 32
            records.append({"name": f"llama.cpp {kind}", "length": length, "tokens_per_s": speed, "bytes": nbytes})
        del server
    print(json.dumps({"version": xllamacpp.__version__, "records": records}), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
