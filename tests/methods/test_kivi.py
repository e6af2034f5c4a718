"""KIVI through the cache: a transformers cache that decodes what its rules have coded gives the same logits."""

from collections.abc import Sequence

import pytest
import torch
from brute import chunks, run
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvbudget import kernels
from kvbudget.cache import KVCache
from kvbudget.errors import PolicyError
from kvbudget.segments.quantized import QuantizedSegment
from min_max import per_channel, per_token
from tiny import left_padded, random_text, tiny_model


class Decoded(DynamicCache):
    """Holds keys and values as KIVI would decode them: new tokens are attended to in full precision and coded afterwards."""

    def __init__(self, config: object, bits: tuple[int, int], group: int, residual: int) -> None:
        super().__init__(config=config)
        self.bits, self.group, self.residual = bits, group, residual
        self.coded: dict[int, list[int]] = {}
        self.due: list[int] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: object) -> tuple[Tensor, Tensor]:
        if layer_idx in self.due:
            self.code(layer_idx)
        self.due.append(layer_idx)
        return super().update(key, value, layer_idx, *args)

    def code(self, layer_idx: int) -> None:
        """What algorithm 1 does after the attention of a forward."""
        layer = self.layers[layer_idx]
        length = layer.keys.shape[2]
        keys, values = self.coded.get(layer_idx, [0, 0])
        lump = max(1, min(16, self.residual // 8))
        end_k, end_v = length // self.residual * self.residual, max(0, length - self.residual) // lump * lump
        group = next(g for g in range(self.group, 0, -1) if layer.values.shape[-1] % g == 0)
        for b in range(layer.keys.shape[0]):
            for h in range(layer.keys.shape[1]):
                layer.keys[b, h, keys:end_k] = per_channel(
                    layer.keys[b, h, keys:end_k], self.bits[0], self.group
                ).float()
        if end_v > values:
            layer.values[:, :, values:end_v] = per_token(layer.values[:, :, values:end_v], self.bits[1], group).float()
        self.coded[layer_idx] = [end_k, end_v]
        self.due.remove(layer_idx)


def reference(model: PreTrainedModel, ids: Tensor, sizes: Sequence[int], cache: DynamicCache) -> Tensor:
    logits, begin = [], 0
    for size in sizes:
        with torch.inference_mode():
            logits.append(model(ids[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
    return torch.cat(logits, dim=1)


def quantized(cache: KVCache) -> list[QuantizedSegment]:
    return [
        segment for store in cache.enforcer.layers for segment in store.main if isinstance(segment, QuantizedSegment)
    ]


@pytest.mark.parametrize("sizes", [[90] + [1] * 12, chunks(90, 25) + [1] * 12, [5] * 10 + [1] * 45], ids=len)
@pytest.mark.parametrize("bits", [(1, 2), (2, 2), (3, 4), (4, 3), (8, 1), (8, 8)], ids=str)
def test_logits_are_those_of_the_decoded_cache(bits, sizes):
    model, ids = tiny_model("llama"), random_text(sum(sizes))
    cache = KVCache(model, f"kivi(bits_k={bits[0]}, bits_v={bits[1]}, group=8, residual=16)")
    logits = run(model, cache, ids, sizes)
    expected = reference(model, ids, sizes, Decoded(model.config, bits, 8, 16))
    # Sums in another order move a few keys across the edge between two codes.
    off = (logits - expected).abs()
    assert float(off.flatten().quantile(0.99)) < 2e-3 and float(off.max()) < 2e-2


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_head_dimensions(head_dim):
    model = tiny_model("qwen3", head_dim=head_dim, num_attention_heads=3, num_key_value_heads=1, hidden_size=64)
    sizes = [70, *[1] * 10]
    ids = random_text(80)
    logits = run(model, KVCache(model, "kivi(bits=4, residual=32)"), ids, sizes)
    expected = reference(model, ids, sizes, Decoded(model.config, (4, 4), 32, 32))
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shorter_than_the_residual_is_the_full_cache(dtype):
    model, ids = tiny_model("llama", dtype=dtype), random_text(60)
    sizes = [40] + [1] * 20
    logits = run(model, KVCache(model, "kivi(bits=2, residual=64)"), ids, sizes)
    full = run(model, KVCache(model, "full"), ids, sizes)
    # Without native kernels what is two stretches of entries is added up in two parts.
    off = 0.0 if kernels.backend().name == "native" else 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits, full, atol=off, rtol=0)


def test_tails_follow_the_algorithm_in_every_layer():
    model, ids = tiny_model("llama"), random_text(130)
    cache = KVCache(model, "kivi(bits=2, group=16, residual=32)")
    begin = 0
    for size in (50, 33, *[1] * 47):
        with torch.inference_mode():
            model(ids[:, begin : begin + size], past_key_values=cache)
        begin += size
        for segment in quantized(cache):
            assert segment.key.num_sealed == [begin // 32 * 32] * 2
            assert segment.value.tail.lengths == [min(begin, 32 + begin % 4)] * 2


def test_padded_rows_equal_their_single_runs():
    model = tiny_model("llama")
    texts = [random_text(length + 6, seed=length) for length in (30, 75, 51)]
    ids, mask = left_padded([text[:, :-6] for text in texts])
    policy = "kivi(bits=2, group=8, residual=16)"
    cache = KVCache(model, policy)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        batch = [model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]]
        for step in range(6):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            new = torch.cat([text[:, step - 6, None] for text in texts])
            batch.append(
                model(new, attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1, past_key_values=cache).logits
            )
            cache.check_integrity()
    for b, text in enumerate(texts):
        length = text.shape[1] - 6
        single = run(model, KVCache(model, policy), text, [length] + [1] * 6)[:, length - 1 :]
        torch.testing.assert_close(torch.cat(batch, dim=1)[b : b + 1], single, atol=1e-4, rtol=0)


def test_more_bits_are_closer_to_the_full_cache():
    model, ids = tiny_model("llama"), random_text(200)
    full = run(model, KVCache(model, "full"), ids, [150, 50])
    error = [
        (run(model, KVCache(model, f"kivi(bits={bits}, group=8, residual=16)"), ids, [150, 50]) - full)[:, 150:]
        .square()
        .mean()
        for bits in (8, 4, 3, 2)
    ]
    assert error == sorted(error) and error[0] < 0.05 * error[-1]


@pytest.mark.parametrize(
    ("policy", "size"),
    [("snapkv(window=8)+adakv", 33), ("snapkv(window=8)+adakv", 1), ("streaming_llm", 200), ("h2o", 7)],
)
def test_coded_groups_are_evicted_whole(policy, size):
    model, ids = tiny_model("llama"), random_text(240)
    cache = KVCache(model, f"{policy}+kivi(bits=4, group=8, residual=16)", "30KiB")
    known: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    begin = 0
    for n in chunks(200, size) + [1] * 40:
        with torch.inference_mode():
            model(ids[:, begin : begin + n], past_key_values=cache)
        begin += n
        cache.check_integrity()
        for layer, segment in enumerate(quantized(cache)):
            for r, sealed in enumerate(segment.key.num_sealed):
                position = segment.meta.row("position", r)[:sealed].tolist()
                groups = {tuple(position[i : i + 8]) for i in range(0, sealed, 8)}
                before = known.get((layer, r), set())
                whole = {p for group in before for p in group}
                # What was coded before is there as the same group, or not at all.
                assert all(group in before or not whole & set(group) for group in groups)
                known[layer, r] = groups
    assert cache.enforcer.evictions > 0 and any(known.values())


def test_the_same_bytes_hold_more_entries():
    model, ids = tiny_model("llama", head_dim=64), random_text(600)
    kept = {}
    for policy in ("snapkv(window=16)+adakv", "snapkv(window=16)+adakv+kivi(bits=4, residual=32)"):
        cache = KVCache(model, policy, "200KiB")
        run(model, cache, ids, chunks(560, 128) + [1] * 40)
        kept[policy] = cache.report().kept_entries
        parts = cache.report().parts
        assert sum(parts.values()) == cache.nbytes <= 200 * 1024
    plain, coded = kept.values()
    assert coded > 2.5 * plain


def test_eviction_returns_the_memory_of_codes():
    model, ids = tiny_model("llama", head_dim=64), random_text(900)
    policy = "kivi(bits=4, group=32, residual=32)"
    everything = KVCache(model, policy)
    run(model, everything, ids, [900])
    tenth = KVCache(model, f"snapkv(window=16)+adakv+{policy}", 90)
    run(model, tenth, ids, [900])
    assert tenth.nbytes < 0.3 * everything.nbytes  # the tails, 32 entries of a head, do not shrink
    assert tenth.nbytes < 0.07 * tenth.report().full_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [("kivi(bits=5)", "bits=5"), ("kivi(bits_k=16)", "bits=16"), ("kivi(residual=100)", "residual=128")],
)
def test_impossible_parameters_are_refused(text, message):
    with pytest.raises(PolicyError, match=message):
        KVCache(tiny_model("llama"), text)
