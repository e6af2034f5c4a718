"""Every architecture: exact while everything fits, inside the budget when it does not, rows as if they were alone."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvbudget import KVCache
from kvbudget.errors import UnsupportedModel
from tiny import (
    HYBRID,
    REFUSED,
    SUPPORTED,
    in_chunks,
    left_padded,
    own_model,
    random_text,
    served_model,
    tiny_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXT = random_text(300)
# Lengths of a batch: shorter than the sliding window, longer than it, and longer than every small budget.
ROWS = [random_text(length, seed=length) for length in (23, 90, 120)]
BIG = "1GiB"
TOKENS = 48
SMALL = (("tokens", TOKENS), ("bytes", "96KiB"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cache
def own_logits(name: str) -> torch.Tensor:
    """The model's own attention and cache, in one pass over the text."""
    model = own_model(name)
    with torch.no_grad():
        return model(TEXT, past_key_values=DynamicCache(config=model.config)).logits


def own_chunked(name: str, text: torch.Tensor, chunk: int) -> torch.Tensor:
    """The same in chunks, where a recurrent state makes chunks differ from one pass by more than rounding."""
    if name != "qwen3_next" or chunk >= text.shape[1]:
        return own_logits(name)[:, : text.shape[1]]
    model = own_model(name)
    return in_chunks(model, text, DynamicCache(config=model.config), chunk)


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-4) -> None:
    difference = (found - expected).abs().max().item()
    assert difference <= limit, f"largest logit difference {difference:.2e}"


@pytest.mark.parametrize("chunk", (300, 256, 7, 1))
@pytest.mark.parametrize("name", SUPPORTED)
def test_full_budget_equals_the_models_own_attention(name: str, chunk: int):
    # A policy that could evict runs all of the code that the full cache runs, so it takes the slowest chunks alone.
    # Single steps are slow; 120 of them leave the sliding windows, and slide them. One model takes them all.
    text = TEXT[:, :120] if chunk == 1 and name != "gemma2" else TEXT
    length = text.shape[1]
    for policy in ("full", "snapkv") if chunk > 7 else ("snapkv",):
        model = served_model(name)
        past = KVCache(model, policy, BIG)
        close(in_chunks(model, text, past, chunk), own_chunked(name, text, chunk))
        past.check_integrity()
        assert past.seen == [length] and past.get_seq_length() == length
        assert all(kept == [[length] * len(kept[0])] for kept in past.report().kept)


@pytest.mark.parametrize("name", SUPPORTED)
def test_greedy_decoding_is_the_same_at_full_budget(name: str):
    own, model, prompt = own_model(name), served_model(name), TEXT[:, :60]
    expected = own.generate(prompt, past_key_values=DynamicCache(config=own.config), max_new_tokens=8, do_sample=False)
    for policy in ("full", "snapkv"):
        past = KVCache(model, policy, BIG)
        found = model.generate(prompt, past_key_values=past, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, expected)
        assert past.seen == [67]


@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_of_a_padded_batch_equal_their_single_runs_at_full_budget(name: str):
    model = served_model(name)
    ids, mask = left_padded(ROWS)
    batch = KVCache(model, "snapkv", BIG)
    found = model.generate(
        ids, attention_mask=mask, past_key_values=batch, max_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert batch.seen == [row.shape[1] + 3 for row in ROWS]
    for b, row in enumerate(ROWS):
        single = own_model(name).generate(
            row, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(found.sequences[b, -4:], single.sequences[0, -4:])
        close(torch.stack(found.logits)[:, b], torch.stack(single.logits)[:, 0])


@pytest.mark.parametrize("name", SUPPORTED)
def test_other_caches_behave_as_under_the_models_own_attention(name: str):
    own, model = own_model(name), served_model(name)
    close(model(TEXT, use_cache=False).logits, own_logits(name), 1e-6)
    close(model(TEXT, past_key_values=DynamicCache(config=model.config)).logits, own_logits(name), 1e-6)
    ids, mask = left_padded(ROWS)
    expected = own.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), expected)
    if name not in HYBRID:
        static = [
            it.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, disable_compile=True,
                past_key_values=StaticCache(config=it.config, max_cache_len=128),
            )
            for it in (own, model)
        ]  # fmt: skip
        assert torch.equal(*static)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_served_are_refused_by_name(name: str):
    model = tiny_model(name)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        KVCache(model, "snapkv", 64)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 4), (9, 3), (8, 1)))
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_oss"))
def test_every_gqa_ratio(name: str, heads: int, kv_heads: int):
    model = tiny_model(name, num_attention_heads=heads, num_key_value_heads=kv_heads)
    expected = model(TEXT).logits
    for chunk in (300, 64, 7):
        close(in_chunks(model, TEXT, KVCache(model, "snapkv", BIG), chunk), expected)
    past = KVCache(model, "snapkv(window=8)", TOKENS)
    in_chunks(model, TEXT, past, 64)
    past.check_integrity()
    assert len(past.report().kept[0][0]) == kv_heads


@pytest.mark.parametrize("name", SUPPORTED)
def test_bfloat16(name: str):
    model = tiny_model(name, dtype=torch.bfloat16)
    ids = TEXT[:, :80]
    expected = model(ids).logits.float()
    past = KVCache(model, "snapkv(window=8)", BIG)
    found = in_chunks(model, ids, past, 40)
    assert found.dtype == torch.bfloat16
    # Both round to 8 bits after every operation: alike on the whole, not in every logit.
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.1, f"relative error {error:.3f}"
    small = KVCache(model, "snapkv(window=8)", TOKENS)
    in_chunks(model, TEXT, small, 100)
    in_chunks(model, TEXT[:, :4], small, 1)
    small.check_integrity()
    assert small.seen == [304]


def small_budget(name: str, policy: str, kind: str, rows: int = 1) -> int | str:
    """48 entries per head, or the bytes that hold what is protected and 16 KiB per row."""
    if kind == "tokens":
        return TOKENS
    return f"{KVCache(served_model(name), policy, BIG).enforcer.smallest_bytes(rows) + rows * 2**14}B"


def within(past: KVCache) -> None:
    past.check_integrity()
    if past.budget.kind == "tokens":
        assert all(n <= past.budget.amount for layer in past.report().kept for row in layer for n in row)


@pytest.mark.parametrize("kind", ("tokens", "bytes"))
@pytest.mark.parametrize("name", SUPPORTED)
def test_small_budgets_hold_after_every_forward(name: str, kind: str):
    model, policy = served_model(name), "snapkv(window=8)"
    for chunk in (300, 50):
        past = KVCache(model, policy, small_budget(name, policy, kind))
        for begin in range(0, 300, chunk):
            assert model(TEXT[:, begin : begin + chunk], past_key_values=past).logits.isfinite().all()
            within(past)
        for step in range(20):
            model(TEXT[:, step : step + 1], past_key_values=past)
            within(past)
        assert past.seen == [320]
        assert not past.enforcer.layers or past.enforcer.evictions >= 2


@pytest.mark.parametrize("kind", ("tokens", "bytes"))
@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_of_a_padded_batch_equal_their_single_runs_at_a_small_budget(name: str, kind: str):
    # StreamingLLM keeps the same entries whatever rounding says, so rows must agree to the last token.
    model, policy = served_model(name), "streaming_llm"
    ids, mask = left_padded(ROWS)
    batch = KVCache(model, policy, small_budget(name, policy, kind, rows=3))
    logits = [in_chunks(model, ids, batch, 40, mask)[:, -1]]
    for step in range(13):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        position = mask.sum(1, keepdim=True) - 1
        logits.append(
            model(TEXT[:, step].expand(3, 1), attention_mask=mask, position_ids=position, past_key_values=batch).logits[
                :, -1
            ]
        )
        within(batch)
    for b, row in enumerate(ROWS):
        single = KVCache(model, policy, small_budget(name, policy, kind))
        # The chunks of a batch end at the same columns for all rows, so a row's first chunk may be a short one.
        first = row.shape[1] % 40 or 40
        pieces = [row[:, :first], *row[:, first:].split(40, dim=1)]
        found = [model(piece, past_key_values=single).logits for piece in pieces if piece.shape[1]]
        close(logits[0][b], found[-1][0, -1])
        for step in range(13):
            close(logits[1 + step][b], model(TEXT[:, step : step + 1], past_key_values=single).logits[0, -1])
        assert [layer[0] for layer in single.report().kept] == [layer[b] for layer in batch.report().kept]
