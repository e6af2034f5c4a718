"""Measures decode attention over compressed caches against torch's sdpa and against the machine's own floors.

Every variant of one shape is measured in turns (one call of each, then the next round), so that a slow moment of the
machine touches all of them. A variant cycles through as many copies of its cache as make it larger than the last-level
cache, as the layers of a model do: what is measured is decoding, where other data has passed between two visits.

A run of all lengths takes less than ten minutes and 4 GiB on an idle machine of two cores; the JSON grows with every shape.

    python benchmarks/attention.py [--threads 2] [--lengths 1024,8192,32768,131072] [--instruction-set avx2]
        [--json results/attention.json]
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvbudget import kernels
from kvbudget.kernels import (
    ChannelQuantOperand,
    CodebookOperand,
    DenseOperand,
    Operand,
    TokenQuantOperand,
    encode,
    flash,
    packed_width,
    reference,
)

SHAPES = [(9, 3, 64), (32, 8, 64), (9, 3, 128), (32, 8, 128)]
GROUP = 32
LAST_LEVEL = 32 << 20


@dataclass
class Variant:
    """One way to attend over one cache: a call per copy, and the bytes that a call has to read."""

    name: str
    calls: list[Callable[[], Any]]
    nbytes: int
    macs: int

    def __post_init__(self) -> None:
        self.seconds: list[float] = []
        self.turn = 0

    def step(self, clock: Callable[[], float]) -> None:
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        begin = clock()
        call()
        self.seconds.append(clock() - begin)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def clock_of(threads: int) -> Callable[[], float]:
    """One thread is timed by its own processor time, which other processes of the machine cannot stretch."""
    return time.thread_time if threads == 1 else time.perf_counter


def interleave(variants: Sequence[Variant], seconds: float, clock: Callable[[], float], least: int = 3) -> None:
    """One call of each variant per round until the time is up; none gets more than four times the time of the quickest.

    Every round has another order, since what a call leaves in the caches (dequantizing leaves much) delays the next one.
    Every variant is measured ``least`` times at any rate, which bounds what the slowest ones cost.
    """
    for variant in variants:
        variant.step(clock)
    for variant in variants:
        variant.seconds.clear()
    end, shuffled = time.perf_counter() + seconds, random.Random(0)
    while time.perf_counter() < end or any(len(variant.seconds) < least for variant in variants):
        share = 4 * min(sum(variant.seconds) for variant in variants)
        late = time.perf_counter() > end
        for variant in shuffled.sample(variants, len(variants)):
            if len(variant.seconds) < least or (not late and sum(variant.seconds) <= share):
                variant.step(clock)


def copies(nbytes: int, limit: int) -> int:
    return max(1, min(limit, math.ceil(2 * LAST_LEVEL / nbytes)))


def starts_of(lengths: Sequence[int], group: int = 1) -> list[int]:
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += -(-length // group)
    return starts


def filled(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random entries ``[rows, width]``; long columns repeat a shorter one, which costs less to draw."""
    few = torch.randn(min(rows, 4096), width).to(dtype)
    return few.repeat(-(-rows // len(few)), 1)[:rows]


def quantized(lengths: Sequence[int], width: int, bits: int) -> tuple[Operand, Operand, int]:
    """KIVI's layout: keys per channel, values per token, groups of 32, scales and zeros in half precision."""
    groups, entries = sum(-(-n // GROUP) for n in lengths), sum(lengths)
    packed = packed_width(width, bits)
    key_codes = torch.randint(0, 256, (groups, GROUP, packed), dtype=torch.uint8)
    value_codes = torch.randint(0, 256, (entries, packed), dtype=torch.uint8)
    half = torch.float16
    key_scale, key_zero = (filled(groups, width, half).abs() for _ in range(2))
    key = ChannelQuantOperand(key_codes, key_scale, key_zero, bits, GROUP, starts_of(lengths, GROUP))
    value_scale, value_zero = (filled(entries, width // GROUP, half).abs() for _ in range(2))
    value = TokenQuantOperand(value_codes, value_scale, value_zero, bits, GROUP, starts_of(lengths))
    nbytes = sum(t.nbytes for o in (key, value) for t in (o.codes, o.scale, o.zero))
    return key, value, nbytes


def codebook(lengths: Sequence[int], width: int) -> tuple[Operand, Operand, int]:
    """Coupled quantization at one bit per channel: groups of 8 channels, 256 codewords each."""
    words = torch.randn(2, len(lengths), 1, width // 8, 256, 8)
    codes = torch.randint(0, 256, (2, sum(lengths), 1, width // 8), dtype=torch.uint8)
    key, value = (CodebookOperand(codes[i], words[i], starts_of(lengths)) for i in range(2))
    return key, value, codes.nbytes


def dense(kv_heads: int, length: int, width: int, dtype: torch.dtype, limit: int) -> list[Tensor]:
    """Copies of a cache, keys and values ``[2, kv_heads * length, width]`` each, which several variants read in turns."""
    nbytes = 2 * kv_heads * length * width * dtype.itemsize
    return [filled(2 * kv_heads * length, width, dtype).view(2, -1, width) for _ in range(copies(nbytes, limit))]


def ours(
    name: str, caches: Sequence[tuple[Operand, Operand]], nbytes: int, query: Tensor, lengths: Sequence[int]
) -> Variant:
    scale = query.shape[-1] ** -0.5
    calls = [lambda k=k, v=v: kernels.attend(query, k, v, lengths, scale=scale) for k, v in caches]
    return Variant(name, calls, nbytes, 2 * query.shape[1] * query.shape[2] * sum(lengths))


def ours_dense(name: str, caches: Sequence[Tensor], query: Tensor, lengths: Sequence[int]) -> Variant:
    starts = starts_of(lengths)
    pairs = [(DenseOperand(cache[0], starts), DenseOperand(cache[1], starts)) for cache in caches]
    nbytes = 2 * sum(lengths) * query.shape[-1] * caches[0].itemsize
    return ours(name, pairs, nbytes, query, lengths)


def ours_coded(
    name: str, make: Callable[[], tuple[Operand, Operand, int]], query: Tensor, lengths: Sequence[int], limit: int
) -> Variant:
    made = [make()]
    made += [make() for _ in range(copies(made[0][2], limit) - 1)]
    return ours(name, [(key, value) for key, value, _ in made], made[0][2], query, lengths)


def torch_sdpa(name: str, caches: Sequence[Tensor], heads: int, kv_heads: int, expand: bool) -> Variant:
    """sdpa as models call it: grouped keys as they are (enable_gqa), or repeated for every query head beforehand."""
    width, nbytes = caches[0].shape[-1], caches[0].nbytes
    query = torch.randn(1, heads, 1, width).to(caches[0].dtype)
    pairs = [cache.view(2, 1, kv_heads, -1, width) for cache in caches]
    if expand:
        pairs = [
            pair.repeat_interleave(heads // kv_heads, 2) for pair in pairs[: copies(nbytes * heads // kv_heads, 64)]
        ]
    calls = [lambda p=p: sdpa(query, p[0], p[1], enable_gqa=not expand) for p in pairs]
    return Variant(name, calls, nbytes, 2 * heads * caches[0].shape[1] // kv_heads * width)


def dequantize_then_sdpa(heads: int, kv_heads: int, width: int, length: int, bits: int) -> Variant:
    """What a cache that is dequantized at every step costs (float32 arithmetic on unpacked codes, then bf16 sdpa)."""
    key, value, nbytes = quantized([length] * kv_heads, width, bits)
    query = torch.randn(1, heads, 1, width).bfloat16()

    def call() -> Tensor:
        rows = []
        for operand in (key, value):
            codes = kernels.unpack(operand.codes, bits, width).bfloat16()
            if isinstance(operand, ChannelQuantOperand):
                full = codes * operand.scale[:, None].bfloat16() + operand.zero[:, None].bfloat16()
            else:
                full = (
                    codes.unflatten(-1, (-1, GROUP)) * operand.scale[..., None].bfloat16()
                    + operand.zero[..., None].bfloat16()
                )
            rows.append(full.reshape(1, kv_heads, length, width))
        return sdpa(query, rows[0], rows[1], enable_gqa=True)

    return Variant(f"dequantize {bits} bits, sdpa", [call], nbytes, 2 * heads * width * length)


def floors() -> tuple[Variant, Variant]:
    """Reading memory, and float32 multiply-adds in the cache, with all threads: what no kernel can be faster than."""
    memory = torch.ones(16 << 20)  # 64 MiB
    small = torch.randn(256, 256)
    return (
        Variant("reading", [memory.sum], memory.nbytes, 0),
        Variant("multiplying", [lambda: [small @ small for _ in range(10)]], 0, 10 * 256**3),
    )


def run_shape(heads: int, kv_heads: int, width: int, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants of one shape, interleaved; one record per variant."""
    lengths = [length] * kv_heads
    groups = heads // kv_heads
    query = torch.randn(kv_heads, groups, width)
    limit = 64 if length <= 8192 else 8
    f32, bf16 = (dense(kv_heads, length, width, dtype, limit) for dtype in (torch.float32, torch.bfloat16))
    variants = [
        ours_dense("f32", f32, query, lengths),
        torch_sdpa("sdpa f32", f32, heads, kv_heads, expand=False),
        ours_dense("bf16", bf16, query, lengths),
        torch_sdpa("sdpa bf16", bf16, heads, kv_heads, expand=False),
    ]
    if length <= 8192:
        variants.append(torch_sdpa("sdpa f32, repeated", f32, heads, kv_heads, expand=True))
        variants.append(torch_sdpa("sdpa bf16, repeated", bf16, heads, kv_heads, expand=True))
    for bits in (8, 4, 2):
        make = lambda bits=bits: quantized(lengths, width, bits)  # noqa: E731
        variants.append(ours_coded(f"{bits} bits", make, query, lengths, limit))
    variants.append(ours_coded("codebook, 1 bit", lambda: codebook(lengths, width), query, lengths, limit))
    if length <= 32768:
        variants += [dequantize_then_sdpa(heads, kv_heads, width, length, bits) for bits in (4, 2)]
    skewed = [length * 8 // 5, length * 2 // 5] * (kv_heads // 2)  # 4 : 1
    even = [sum(skewed) // len(skewed)] * len(skewed)
    some = query[: len(skewed)].contiguous()
    variants.append(ours_dense("bf16, heads 4:1", bf16, some, skewed))
    variants.append(ours_dense("bf16, heads 1:1", bf16, some, even))
    # Who reads the same copies reads others of them at a time: nobody finds in the cache what a neighbor has just read.
    for number, variant in enumerate(variants):
        variant.turn = number * len(variant.calls) // len(variants)
    reading, multiplying = floors()
    interleave([*variants, reading, multiplying], args.seconds, clock_of(args.threads))
    read, multiply = reading.nbytes / reading.median, multiplying.macs / multiplying.median
    records = []
    for v in variants:
        floor = max(v.nbytes / read, v.macs / multiply)
        records.append(
            {
                "heads": heads, "kv_heads": kv_heads, "head_dim": width, "length": length, "variant": v.name,
                "ms": v.median * 1e3, "ns_per_entry": v.median / (kv_heads * length) * 1e9,
                "bytes": v.nbytes, "rounds": len(v.seconds), "GB/s": v.nbytes / v.median / 1e9,
                "ms_of_bytes": v.nbytes / read * 1e3, "ms_of_macs": v.macs / multiply * 1e3,
                "over_floor": v.median / floor,
            }
        )  # fmt: skip
    print(f"\nHq/Hkv {heads}/{kv_heads}, head_dim {width}, T {length}, {args.threads} threads; "
          f"reading {read / 1e9:.1f} GB/s, {multiply / 1e9:.1f} G multiply-adds/s")  # fmt: skip
    print(
        f"{'variant':24}{'ms':>9}{'ns/entry':>10}{'GB/s':>8}{'bytes ms':>10}{'macs ms':>9}{'x floor':>9}{'bf16 / it':>11}"
    )
    best = min(r["ms"] for r in records if r["variant"] in ("bf16", "sdpa bf16", "sdpa bf16, repeated"))
    for r in records:
        r["speedup_over_bf16"] = best / r["ms"]
        print(
            f"{r['variant']:24}{r['ms']:9.3f}{r['ns_per_entry']:10.1f}{r['GB/s']:8.1f}{r['ms_of_bytes']:10.3f}{r['ms_of_macs']:9.3f}"
            f"{r['over_floor']:9.2f}{r['speedup_over_bf16']:11.2f}",
            flush=True,
        )
    return records


def prefill_helpers(threads: int, tokens: int = 4096, width: int = 64, groups: int = 3) -> list[dict[str, Any]]:
    """Column sums and window weights of a prompt in one KV head, beside what they replace."""
    query, key = torch.randn(1, groups * tokens, width), torch.randn(tokens, width)
    lse = torch.full((1, groups * tokens), math.log(tokens))

    def options(steps: int) -> dict[str, Any]:
        return {
            "scale": width**-0.5, "causal_tail": steps, "entry_starts": [0],
            "positions": torch.arange(tokens).int(), "query_positions": tokens - steps + torch.arange(steps)[None],
        }  # fmt: skip

    operand, window = DenseOperand(key, [0]), groups * 32
    whole, few = options(tokens), options(32)
    newest, its_lse = query[:, -window:].contiguous(), lse[:, -window:].contiguous()
    grid = query.view(groups, tokens, width), key[None], key[None]
    pairs = {
        "sums of the causal weights": (
            lambda: kernels.mass(query, operand, [tokens], lse, **whole),
            lambda: reference.mass(query, operand, [tokens], lse, **whole),
        ),
        "causal flash attention": (lambda: flash.causal_grid_attend(*grid, scale=width**-0.5), None),
        "weights of the last 32 queries": (
            lambda: kernels.weights(newest, operand, [tokens], its_lse, **few),
            lambda: reference.weights(newest, operand, [tokens], its_lse, **few),
        ),
    }
    clock, records = clock_of(threads), []
    print(
        f"\nprefill helpers: one KV head, {groups} query heads, head_dim {width}, {tokens} tokens\n{'':42}{'ms':>9}{'torch ms':>10}"
    )
    for name, (native, plain) in pairs.items():
        ours, theirs = Variant(name, [native], 0, 0), Variant(name, [plain or native], 0, 0)
        for _ in range(6):
            ours.step(clock)
            theirs.step(clock)
        records.append({"variant": name, "ms": ours.median * 1e3, "torch_ms": theirs.median * 1e3 if plain else None})
        print(f"{name:42}{ours.median * 1e3:9.2f}" + (f"{theirs.median * 1e3:10.2f}" if plain else ""), flush=True)
    return records


def keeping(way: Callable[[Tensor], Any], rows: Sequence[Tensor]) -> list[Callable[[], None]]:
    """A call per tensor. Their results are kept until the next one of the same tensor, which is written where that one was: as in a
    cache that grows, results go to memory rather than to what the last call left in the processor's caches."""
    kept = [way(x) for x in rows]

    def call(i: int) -> None:
        kept[i] = None
        kept[i] = way(rows[i])

    return [partial(call, i) for i in range(len(rows))]


def encoding(
    threads: int, seconds: float, dtype: torch.dtype, kept: bool, entries: int = 16384, width: int = 64
) -> list[dict[str, Any]]:
    """Integer codes of entries that come from memory, beside the torch reference and beside copying the entries.

    Results go to memory where they are ``kept``, else to where the last one was, which the processor's caches still hold.
    """
    rows = [filled(entries, width, dtype) for _ in range(copies(dtype.itemsize * entries * width, 64))]
    ways: dict[str, Callable[[Tensor], Any]] = {"copy": torch.clone}
    for bits in (8, 4, 2):
        ways |= {
            f"{bits} bits per token": partial(kernels.encode_tokens, bits=bits, group=GROUP),
            f"{bits} bits per channel": partial(kernels.encode_units, bits=bits, unit=GROUP),
        }
    ways |= {
        "4 bits per token, torch": partial(encode.encode_tokens, bits=4, group=GROUP),
        "4 bits per channel, torch": partial(encode.encode_units, bits=4, unit=GROUP),
    }
    variants = []
    for number, (name, way) in enumerate(ways.items()):
        first = number * len(rows) // len(ways)  # elsewhere than the others, which leave what they read in the caches
        turned = rows[first:] + rows[:first]
        variants.append(Variant(name, keeping(way, turned) if kept else [partial(way, x) for x in turned], 0, 0))
    interleave(variants, seconds, clock_of(threads), least=6)
    title = f"{entries} {str(dtype).removeprefix('torch.')} entries of {width}, groups of {GROUP}"
    print(f"\nencoding {title}, results {'kept' if kept else 'dropped'}\n{'':42}{'ns/entry':>9}{'of a copy':>10}")
    records = []
    for variant in variants:
        times = variant.median / variants[0].median
        row = {"variant": variant.name, "dtype": str(dtype), "kept": kept}
        records.append(row | {"ns": variant.median * 1e9 / entries, "copies": times})
        print(f"{variant.name:42}{records[-1]['ns']:9.1f}{times:10.2f}", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="1024,8192,32768,131072")
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and length")
    parser.add_argument(
        "--instruction-set", choices=["generic", "avx2", "avx512"], help="of the native kernels; default: the best"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.instruction_set:
        from kvbudget.kernels import native  # not there where the extension was not built

        native.use_instruction_set(args.instruction_set)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"kernels: {kernels.backend()}, torch {torch.__version__}")
    tasks = [(*shape, int(length)) for length in args.lengths.split(",") if length for shape in SHAPES]
    found: dict[str, Any] = {"threads": args.threads, "records": [], "prefill": [], "encoding": []}
    begin = time.perf_counter()
    for number, task in enumerate(tasks, 1):
        found["records"] += run_shape(*task, args)
        print(f"[{number}/{len(tasks)}, {time.perf_counter() - begin:.0f} s]", flush=True)
        write(found, args.json)
    found["prefill"] = prefill_helpers(args.threads)
    for dtype, kept in ((torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)):
        found["encoding"] += encoding(args.threads, args.seconds, dtype, kept)
    write(found, args.json)


def write(found: dict[str, Any], path: Path | None) -> None:
    """What has been measured so far."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
