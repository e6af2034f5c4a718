"""RetroAttention: pages and answers against plain sets and sums; all pages is exact; the driver feeds what the paper feeds."""

import math

import pytest
import torch
from torch import Tensor

from kvbudget import KVCache, generate
from kvbudget.driver import revising
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.policy.selectors.pages import Pages
from kvbudget.segments import retrospective
from tiny import left_padded, random_text, tiny_model, tiny_tokenizer

HEADS, GROUP, DIM, PAGE, SHARE = 2, 2, 8, 4, 0.3


def best_pages(query: Tensor, keys: Tensor) -> set[int]:
    """Quest for one KV head: ``query [G, D]``, ``keys [T, D]``; the newest page always."""
    pages = keys.split(PAGE)
    bounds = [max(float(torch.maximum(q * page.amin(0), q * page.amax(0)).sum()) for q in query) for page in pages]
    bounds[-1] = math.inf
    count = math.ceil(SHARE * len(pages))
    return set(sorted(range(len(pages)), key=lambda p: -bounds[p])[:count])


@pytest.mark.parametrize("window", [1, 2, 4])
def test_answers_are_attention_over_everything_that_was_read(window):
    """Every token comes up to ``window`` times, with other vectors each time, as deeper layers see it."""
    torch.manual_seed(window)
    layer = LayerCache(0, HEADS, states=("loaded",), reads=Pages(window, PAGE, SHARE, 0))
    prompt = AttentionCall(
        torch.randn(1, HEADS * GROUP, 21, DIM), torch.randn(1, HEADS, 21, DIM), torch.randn(1, HEADS, 21, DIM), 0.5
    )
    layer.forward(prompt)
    keys, values = prompt.key[0].clone(), prompt.value[0].clone()
    answers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # sums of exp(logit) * value and of exp(logit)
    read: dict[tuple[int, int], set[int]] = {}
    for step in range(14):
        again = min(window - 1, step)
        n, first = again + 1, 21 + step - again
        call = AttentionCall(
            torch.randn(1, HEADS * GROUP, n, DIM), torch.randn(1, HEADS, n, DIM), torch.randn(1, HEADS, n, DIM), 0.5
        )
        keys = torch.cat([keys[:, :first], call.key[0]], dim=1)
        values = torch.cat([values[:, :first], call.value[0]], dim=1)
        if again:
            retrospective.take_back(layer, again)
        out, lse = layer.forward(call)
        layer.check_integrity()
        query = call.query[0].unflatten(0, (HEADS, GROUP))
        for h in range(HEADS):
            chosen = {
                p for page in best_pages(query[h, :, -1], keys[h]) for p in range(page * PAGE, page * PAGE + PAGE)
            }
            for i in range(n):
                position = first + i
                new = {p for p in chosen if p <= position} - read.get((h, position), set())
                read[h, position] = read.get((h, position), set()) | new
                at = sorted(new)
                weights = (query[h, :, i] @ keys[h, at].T * 0.5).exp()
                old = answers.get((h, position), (0.0, 0.0))
                answers[h, position] = (old[0] + weights @ values[h, at], old[1] + weights.sum(-1))
                total, norm = answers[h, position]
                rows = slice(h * GROUP, (h + 1) * GROUP)
                torch.testing.assert_close(out[0, rows, i], total / norm[:, None], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(lse[0, rows, i], norm.log(), atol=1e-5, rtol=1e-4)
    assert any(len(read[h, p]) < p + 1 for h, p in read), "something was left unread"


def decoded(model, policy, ids, steps, mask=None):
    cache = KVCache(model, policy)
    with torch.inference_mode(), revising(model, cache):
        options = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        logits = [model(ids, past_key_values=cache, **options).logits[:, -1:]]
        for step in range(steps):
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            token = random_text(1, seed=step).expand(len(ids), 1)
            logits.append(model(token, past_key_values=cache, **options).logits[:, -1:])
            cache.check_integrity()
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("window", [1, 3])
def test_all_pages_are_the_full_cache(window):
    model, ids = tiny_model("llama"), random_text(60)
    found, cache = decoded(model, f"retro_attention(window={window}, share=1.0, dense=0)", ids, 12)
    torch.testing.assert_close(found, decoded(model, "full", ids, 12)[0], atol=1e-4, rtol=0)
    assert cache.seen == [72] and cache.report().kept_entries == 72 * 4


def test_the_driver_feeds_the_window_again_and_deeper_keys_change():
    model, ids = tiny_model("llama"), random_text(90)
    policy = "retro_attention(window=3, share=0.1, page=4, dense=0)"
    cache, twin = KVCache(model, policy), KVCache(model, policy)
    sizes = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    with torch.inference_mode(), revising(model, cache):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        before = [layer.store.main[-1].keys()[:, 90].clone() for layer in cache.layers]
        logits = model(ids[:, 1:2], past_key_values=cache).logits
        after = [layer.store.main[-1].keys()[:, 90] for layer in cache.layers]
        model(ids[:, 2:3], past_key_values=cache)
        last = model(ids[:, 3:4], past_key_values=cache).logits
    hook.remove()
    assert sizes == [90, 1, 2, 3, 3] and logits.shape[1] == 2 and not model._forward_pre_hooks
    assert torch.allclose(before[0], after[0], atol=1e-5) and not torch.allclose(before[1], after[1], atol=1e-2)
    with torch.inference_mode():  # the same by hand, and what each token alone would get
        model(ids, past_key_values=twin)
        quest = twin.fork()
        for end in range(1, 5):
            again = min(2, end - 1)
            assert not again or twin.revisit(again)
            expected = model(ids[:, end - again - 1 : end], past_key_values=twin).logits
            plain = model(ids[:, end - 1 : end], past_key_values=quest).logits
    torch.testing.assert_close(last, expected)
    assert not torch.allclose(last[:, -1], plain[:, -1], atol=1e-3)


def test_padded_rows_equal_their_single_runs_and_sequences_are_chosen():
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=2)
    texts = [random_text(n, seed=n) for n in (40, 90, 71)]
    policy = "retro_attention(window=2, share=0.2, page=4, dense=0)"
    found, cache = decoded(model, policy, *left_padded(texts)[:1], 6, left_padded(texts)[1])
    for b, text in enumerate(texts):
        torch.testing.assert_close(found[b : b + 1], decoded(model, policy, text, 6)[0], atol=1e-4, rtol=0)
    fork = cache.fork()
    cache.batch_select_indices(torch.tensor([2, 0]))
    with torch.inference_mode():
        one = model(random_text(1).expand(2, 1), past_key_values=cache, attention_mask=None).logits
        other = model(random_text(1).expand(3, 1), past_key_values=fork).logits
    torch.testing.assert_close(one, other[[2, 0]], atol=1e-5, rtol=0)


def test_generation_runs_under_the_driver_and_bytes_count_the_answers():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = tokenizer.decode(random_text(80)[0])
    policy = "retro_attention(window=4, share=0.2, page=4, dense=0)"
    answer = generate(model, tokenizer, prompt, policy=policy, budget="64KiB", max_new_tokens=12)
    cache = KVCache(model, policy)
    cache.prefill(model, random_text(80)[:, :79])
    with revising(model, cache):
        ids = model.generate(random_text(80), past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert list(answer.token_ids) == ids[0, 80:].tolist() and answer.cache.seen == [91]
    assert retrospective.OUTPUTS in answer.cache.layers[0].store.statistics and not model._forward_pre_hooks
    held = KVCache(model, policy, "1KiB")
    with pytest.raises(BudgetError, match="give at least") as refused, torch.inference_mode():
        model(random_text(80), past_key_values=held)
    need = int(str(refused.value).split("give at least ")[1].split("B")[0])
    exact, _ = decoded(model, policy, random_text(74), 6)
    bounded = KVCache(model, policy, f"{need}B")
    with torch.inference_mode(), revising(model, bounded):
        model(random_text(74), past_key_values=bounded)
        for step in range(6):
            last = model(random_text(1, seed=step), past_key_values=bounded).logits[:, -1:]
            bounded.check_integrity()
    torch.testing.assert_close(last, exact[:, -1:], atol=1e-5, rtol=0)


def test_what_evicts_or_codes_is_refused():
    model = tiny_model("llama")
    for policy in ("snapkv+retro_attention", "kivi+retro_attention"):
        with pytest.raises(PolicyError, match="use it alone"):
            KVCache(model, policy, 64)
    with pytest.raises(PolicyError, match="window=0"):
        KVCache(model, "retro_attention(window=0)")
