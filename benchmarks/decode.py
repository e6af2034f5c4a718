"""Measures decoding end to end: tokens per second and bytes held, for kvbudget's caches and for what others offer.

SmolLM2-135M with bf16 weights. Only speed and bytes count here, so the keys and values of the prompt are random numbers put
into each cache directly; its last 64 tokens and all new ones go through the model. All caches of one length take their
steps in turns, so that a slow moment of the machine touches all of them; one thread is timed by its own processor time.

    python benchmarks/decode.py [--quick] [--threads 2] [--lengths 1024,2048,4096,8192,16384] [--tokens 128]
        [--json results/decode.json] [--plot docs/decode.png] [--kvpress-python path] [--llama-python path --gguf file]

Peers that are not there are left out with one line each: optimum-quanto (pip install optimum-quanto), and in environments of
their own kvpress (it needs an older transformers; see decode_kvpress.py) and llama.cpp (see decode_llamacpp.py). What the
JSON file holds for the same threads and tokens is not measured again, so that a run goes on where it was stopped.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from attention import clock_of
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel, QuantizedCache

import kvbudget
from kvbudget import attention, kernels

MODEL = "smollm2-135m"
LAST = 64  # tokens of the prompt that the model itself processes
MIB = 2**20
OURS = [
    ("kvbudget full", "full", None),
    ("kvbudget kivi 4 bits", "kivi(bits=4)", None),
    ("kvbudget kivi 2 bits", "kivi(bits=2)", None),
    ("kvbudget snapkv 25%", "snapkv", "25%"),
    ("kvbudget snapkv 10%", "snapkv", "10%"),
    ("kvbudget snapkv 25% + kivi 4 bits", "snapkv+kivi(bits=4)", None),
]
TOKEN = torch.ones(1, 1, dtype=torch.long)


@dataclass
class Run:
    """One cache of one length, and the seconds that its steps took."""

    name: str
    model: PreTrainedModel
    cache: Cache
    seconds: list[float] = field(default_factory=list)

    def step(self, clock: Callable[[], float]) -> None:
        begin = clock()
        self.model(TOKEN, past_key_values=self.cache, logits_to_keep=1)
        self.seconds.append(clock() - begin)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds."""
        return self.cache.nbytes if isinstance(self.cache, kvbudget.KVCache) else held(self.cache)


def held(cache: Cache) -> int:
    """Bytes of the tensors that one of transformers' caches reaches, each storage counted once."""
    found: dict[int, int] = {}
    todo: list[Any] = [vars(layer) for layer in cache.layers]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            inner = [getattr(item, name, None) for name in ("_data", "_scale", "_shift")]
            if type(item) is Tensor:
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            else:
                todo += [x for x in inner if x is not None]
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
    return sum(found.values())


def entries(model: PreTrainedModel, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random keys and values ``[1, Hkv, length, D]`` of each layer."""
    config = model.config
    shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for _ in range(config.num_hidden_layers):
        yield torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype)


def filled(model: PreTrainedModel, cache: Cache, length: int) -> Cache:
    """A cache that holds a prompt of ``length`` tokens."""
    for index, (key, value) in enumerate(entries(model, length - LAST)):
        if isinstance(cache, kvbudget.KVCache):
            layer = cache.layers[index]
            layer.store.append(key, value, None)
            layer.columns += key.shape[2]
        else:
            cache.update(key, value, index)
    model(torch.ones(1, LAST, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    return cache


def quantized_cache(model: PreTrainedModel) -> Callable[[], Cache] | None:
    """transformers' own quantized cache with 4 bits; None, after one line, where neither backend can be had."""
    reasons = []
    for backend, options in (("quanto", {}), ("hqq", {"axis_key": 1, "axis_value": 1})):
        try:
            QuantizedCache(backend, model.config, nbits=4, **options)
        except Exception as error:  # both backends fail in ways of their own
            reasons.append(f"{backend}: {str(error).splitlines()[0]}")
        else:
            return lambda: QuantizedCache(backend, model.config, nbits=4, **options)
    print(f"left out: transformers QuantizedCache ({'; '.join(reasons)})")
    return None


def caches(plain: PreTrainedModel, ours: PreTrainedModel, length: int, quantized: bool) -> Iterator[Run]:
    """Every cache of this process, filled."""
    yield Run("transformers DynamicCache", plain, filled(plain, DynamicCache(config=plain.config), length))
    make = quantized_cache(plain) if quantized else None
    if make is not None:
        yield Run("transformers QuantizedCache 4 bits", plain, filled(plain, make(), length))
    for name, policy, budget in OURS:
        if "snapkv+" in policy:
            budget = str(length // 4)
        yield Run(name, ours, filled(ours, kvbudget.KVCache(ours, policy, budget), length))


def measure(runs: list[Run], tokens: int, clock: Callable[[], float]) -> None:
    """Steps of all caches in turns; what is far slower than the quickest takes part in every fourth round."""
    for run in runs:
        run.step(clock)
        run.step(clock)
    quickest = min(run.seconds[-1] for run in runs)
    slow = {run.name for run in runs if run.seconds[-1] > 4 * quickest}
    for run in runs:
        run.seconds.clear()
    for turn in range(tokens):
        for run in runs:
            if run.name not in slow or turn % 4 == 0:
                run.step(clock)


class Stopwatch:
    """Time inside of some functions: what a decode step spends in kvbudget, and of that in its kernels."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.total = clock, 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begin = self.clock()
            try:
                return function(*args, **options)
            finally:
                self.total += self.clock() - begin

        return timed


def overhead(ours: PreTrainedModel, length: int, steps: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Microseconds per layer and step that kvbudget adds to its kernels: bookkeeping, appends, merges, policies, codecs."""
    if kernels.backend().name != "native":
        print("left out: kvbudget's own share of a step (the native kernels are not built)")
        return []
    from kvbudget.kernels import native

    records = []
    for name, policy, budget in OURS:
        budget = str(length // 4) if "snapkv+" in policy else budget
        cache = filled(ours, kvbudget.KVCache(ours, policy, budget), length)
        inside, kernel = Stopwatch(clock), Stopwatch(clock)
        extension = native._native
        native._native = Timed(extension, kernel)
        AttentionInterface.register(attention.NAME, inside.around(attention.attention_function))
        update = cache.update
        cache.update = inside.around(update)
        step = Run(name, ours, cache)
        try:
            for _ in range(5):
                step.step(clock)
            step.seconds.clear()
            spent, computed = [], []
            for _ in range(steps):
                inside.total = kernel.total = 0.0
                step.step(clock)
                spent.append(inside.total)
                computed.append(kernel.total)
        finally:
            native._native = extension
            AttentionInterface.register(attention.NAME, attention.attention_function)
        per = 1e6 / ours.config.num_hidden_layers
        own = [total - part for total, part in zip(spent, computed, strict=True)]
        columns = {"us_step": step.seconds, "us_in_kvbudget": spent, "us_in_kernels": computed, "us_overhead": own}
        medians = {column: statistics.median(values) * per for column, values in columns.items()}
        records.append({"name": name, "length": length, "us_overhead_mean": statistics.mean(own) * per} | medians)
    return records


class Timed:
    """The extension module, or one of its lanes, with a stopwatch around its functions."""

    def __init__(self, extension: Any, watch: Stopwatch) -> None:
        names = ("attend", "mass", "mass_of_logits", "encode", "merge", "step", "accumulate")
        for name in (*names, "scatter", "count_kept", "compact", "select"):
            if hasattr(extension, name):
                setattr(self, name, watch.around(getattr(extension, name)))
        if hasattr(extension, "Lane"):
            self.Lane = lambda *arguments: Timed(extension.Lane(*arguments), watch)


def kvpress(arguments: argparse.Namespace, folder: str, length: int) -> list[dict[str, Any]]:
    """SnapKV at a quarter by kvpress, in its own environment; nothing, after one line, where there is none."""
    if arguments.kvpress_python is None:
        print("left out: kvpress (give --kvpress-python, an interpreter that has it)")
        return []
    script = Path(__file__).with_name("decode_kvpress.py")
    numbers = [str(n) for n in (length, arguments.tokens, arguments.threads)]
    command = [arguments.kvpress_python, str(script), folder, "0.75", *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"left out: kvpress ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
        return []
    return [json.loads(done.stdout.splitlines()[-1])]


def llama_cpp(arguments: argparse.Namespace, lengths: list[int]) -> list[dict[str, Any]]:
    """llama.cpp on the model's GGUF file with an f16 and a q4_0 cache; nothing, after one line, where it is missing."""
    if arguments.llama_python is None or arguments.gguf is None:
        print(
            "left out: llama.cpp (give --llama-python, an interpreter that has xllamacpp, and --gguf, the model's file)"
        )
        return []
    script = Path(__file__).with_name("decode_llamacpp.py")
    options = ["--lengths", ",".join(map(str, lengths)), "--tokens", str(arguments.tokens)]
    command = [arguments.llama_python, str(script), arguments.gguf, *options, "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"left out: llama.cpp ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
        return []
    return list(json.loads(done.stdout.splitlines()[-1])["records"])


def show(records: list[dict[str, Any]], length: int) -> None:
    """The table of one length; the first line is what the others are compared with."""
    print(f"\nprompt of {length} tokens\n{'cache':38}{'tokens/s':>10}{'ms':>9}{'MiB':>9}{'x Dynamic':>11}")
    mine = [r for r in records if r["length"] == length]
    for r in mine:
        ratio = r["tokens_per_s"] / mine[0]["tokens_per_s"]
        ms, mib = 1e3 / r["tokens_per_s"], r["bytes"] / MIB
        print(f"{r['name']:38}{r['tokens_per_s']:10.2f}{ms:9.1f}{mib:9.1f}{ratio:11.2f}", flush=True)


def slopes(records: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds per token and MiB of cache, by least squares over the lengths, for each name that has several."""
    found = {}
    for name in dict.fromkeys(record["name"] for record in records):
        points = [(r["bytes"] / MIB, 1e3 / r["tokens_per_s"]) for r in records if r["name"] == name]
        if len(points) > 1:
            found[name] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return found


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second and bytes against the length, one line per cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    lengths = sorted({record["length"] for record in records})
    figure, (speed, size) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for i, name in enumerate(dict.fromkeys(record["name"] for record in records)):
        mine = sorted((r for r in records if r["name"] == name), key=lambda r: r["length"])
        own = name.startswith("kvbudget")
        style = {
            "marker": "o",
            "markersize": 3,
            "linestyle": "-" if own else "--",
            "color": colors[(2 * i + i // 10) % 20],
        }
        speed.plot([r["length"] for r in mine], [r["tokens_per_s"] for r in mine], label=name, **style)
        size.plot([r["length"] for r in mine], [r["bytes"] / MIB for r in mine], **style)
    for axes, label in ((speed, "tokens per second"), (size, "MiB held")):
        axes.set(xlabel="tokens of the prompt", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Prints a table per length, then slopes and kvbudget's own share of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 and 2048 tokens, 8 steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--no-quantized-cache", action="store_true", help="it takes most of the time")
    parser.add_argument(
        "--instruction-set", choices=["generic", "avx2", "avx512"], help="of the native kernels; default: the best"
    )
    parser.add_argument("--json", type=Path, default=Path("results/decode.json"))
    parser.add_argument("--plot", type=Path, default=Path("results/decode.png"))
    parser.add_argument("--kvpress-python")
    parser.add_argument("--llama-python")
    parser.add_argument("--gguf")
    arguments = parser.parse_args()
    lengths = [1024, 2048] if arguments.quick else [int(n) for n in arguments.lengths.split(",")]
    arguments.tokens = 8 if arguments.quick else arguments.tokens
    if arguments.instruction_set:
        from kvbudget.kernels import native  # not there where the extension was not built

        native.use_instruction_set(arguments.instruction_set)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = clock_of(arguments.threads)
    plain = kvbudget.load(MODEL, dtype="bfloat16")[0]
    ours = copy.deepcopy(plain)
    print(f"kernels: {kernels.backend()}, torch {torch.__version__}, {arguments.threads} threads", flush=True)
    settings = {"threads": arguments.threads, "tokens": arguments.tokens}
    result: dict[str, Any] = {**settings, "records": []}
    if arguments.json.exists():
        known = json.loads(arguments.json.read_text())
        result = known if settings.items() <= known.items() else result
    records = result["records"]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        names = {r["name"].split()[0] for r in records if r["length"] == length}
        if "kvbudget" not in names:
            runs = list(caches(plain, ours, length, not arguments.no_quantized_cache))
            measure(runs, arguments.tokens, clock)
            for run in runs:
                speed = 1 / statistics.median(run.seconds)
                records.append(
                    {"name": run.name, "length": length, "tokens_per_s": speed, "bytes": run.nbytes,
                     "steps": len(run.seconds)}
                )  # fmt: skip
            del runs
        if "kvpress" not in names and length in (8192, max(lengths)):
            records += kvpress(arguments, plain.name_or_path, length)
        show(records, length)
        arguments.json.write_text(json.dumps(result, indent=1))
    if not any(r["name"].startswith("llama.cpp") for r in records):
        # llama.cpp really reads its prompts, and refuses what does not fit the 8192 positions of the model.
        records += llama_cpp(arguments, [length for length in lengths if length <= 4096])
        for r in (r for r in records if r["name"].startswith("llama.cpp")):
            print(f"{r['name']:20}{r['length']:8} tokens{r['tokens_per_s']:10.2f} tokens/s{r['bytes'] / MIB:9.1f} MiB")
    per_mib = slopes(records)
    print("\nmilliseconds per token and MiB of cache (slope over the lengths)")
    for name, slope in per_mib.items():
        print(f"{name:38}{slope:10.3f}")
    shares = overhead(ours, lengths[0], arguments.tokens, clock)
    print(f"\nmicroseconds per layer and step at {lengths[0]} tokens, medians; the mean counts evictions and sealing")
    print(f"{'':38}{'step':>9}{'kvbudget':>10}{'kernels':>9}{'the rest':>10}{'its mean':>10}")
    for s in shares:
        figures = [
            s[column] for column in ("us_step", "us_in_kvbudget", "us_in_kernels", "us_overhead", "us_overhead_mean")
        ]
        print(f"{s['name']:38}{figures[0]:9.0f}" + "".join(f"{figure:10.0f}" for figure in figures[1:]))
    result |= {"ms_per_mib": per_mib, "shares": shares}
    arguments.json.write_text(json.dumps(result, indent=1))
    draw(records, arguments.plot)
    print(f"\nwrote {arguments.json} and {arguments.plot}", file=sys.stderr)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
