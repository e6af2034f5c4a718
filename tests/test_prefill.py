"""cache.prefill: chunks, continuations, declared lengths, padding, and what is left after a failure."""

import pytest
import torch
from transformers import DynamicCache

from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, KVBudgetError, PolicyError
from kvbudget.policy.base import Plan
from kvbudget.prefill import run
from residency import resident_bytes
from tiny import left_padded, random_text, reference_attention, tiny_model


def stock_logits(name, model, ids):
    model.set_attn_implementation(reference_attention(name))
    with torch.inference_mode():
        return model(ids, past_key_values=DynamicCache(config=model.config)).logits[:, -1]


def progress_log():
    log = []
    return log, lambda done, total: log.append((done, total))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "lfm2"])
@pytest.mark.parametrize("size", [None, 1, 7, 256])
def test_chunks_change_nothing_when_everything_fits(name, size):
    model, ids = tiny_model(name), random_text(70, rows=2)
    expected = stock_logits(name, model, ids)
    cache = KVCache(model, "snapkv(window=8)", 100)
    logits = cache.prefill(model, ids, chunk_size=size)
    cache.check_integrity()
    assert logits.shape == (2, model.config.vocab_size)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_chunks_are_nearly_equal_and_only_the_last_logits_are_computed():
    model, ids = tiny_model("llama"), random_text(103)
    widths = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    log, progress = progress_log()
    KVCache(model, "full").prefill(model, ids, chunk_size=25, progress=progress)
    hook.remove()
    assert log == [(0, 103), (20, 103), (41, 103), (61, 103), (82, 103), (103, 103)]
    assert widths == [1] * 5


def test_a_byte_budget_holds_during_the_prefill():
    """By default in chunks of at most 512 tokens; what stays resident is inside the budget after every forward."""
    model, ids = tiny_model("llama"), random_text(1200)
    cache = KVCache(model, "snapkv", "32KiB")
    sizes = []

    def progress(done, total):
        sizes.append(done)
        cache.check_integrity()
        # The ids of the text, by which a changed prefix is found, are the text and not the cache.
        assert resident_bytes(cache, [cache.prefilled.ids]) == cache.nbytes <= 32 * 1024

    cache.prefill(model, ids, progress=progress)
    assert sizes == [0, 400, 800, 1200]
    per_token = cache.geometry.bytes_per_token(4)
    assert cache.peak_bytes <= 32 * 1024 + 400 * per_token
    assert cache.prefilled.blind, "the last chunk had no say in what left before"
    one_pass = KVCache(model, "snapkv", 60)
    one_pass.prefill(model, ids)
    assert not one_pass.prefilled.blind


@pytest.mark.parametrize("policy", ["snapkv(window=8)", "snapkv(window=8)+adakv", "knorm"])
def test_a_fraction_refers_to_the_whole_prompt_from_the_first_chunk_on(policy):
    model, ids = tiny_model("llama"), random_text(200)
    cache = KVCache(model, policy, "25%")
    kept = []
    cache.prefill(model, ids, chunk_size=25, progress=lambda done, total: kept.append(cache.report().kept_entries))
    assert kept == [0, 25 * 4, *[50 * 4] * 7]
    assert cache.enforcer.declared is None
    with torch.inference_mode():
        model(random_text(40, seed=1), past_key_values=cache)
    assert cache.report().kept_entries == 60 * 4, "afterwards a fraction is one of what has been seen"


def test_max_length_wins_over_the_prompt():
    model = tiny_model("llama")
    cache = KVCache(model, "knorm", "25%", max_length=400)
    cache.prefill(model, random_text(200), chunk_size=50)
    assert cache.report().kept_entries == 100 * 4


def test_after_prefill_acts_once_at_the_end():
    model, ids = tiny_model("llama"), random_text(120)
    cache = KVCache(model, "snapkv(window=8)", 30, when="after_prefill")
    kept = []
    cache.prefill(model, ids, chunk_size=40, progress=lambda done, total: kept.append(cache.report().kept_entries // 4))
    assert kept == [0, 40, 80, 30]
    with torch.inference_mode():
        model(random_text(20, seed=1), past_key_values=cache)
    assert cache.report().kept_entries == 50 * 4


def test_generate_goes_on_from_a_prefill():
    model, ids = tiny_model("llama"), random_text(60)
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache = KVCache(model, "full")
    cache.prefill(model, ids[:, :45])
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False), expected)


def test_turns_feed_only_what_is_new():
    model, ids = tiny_model("llama"), random_text(150)
    cache, log = KVCache(model, "full"), []
    cache.prefill(model, ids[:, :50])
    answered = model.generate(ids[:, :60], past_key_values=cache, max_new_tokens=8, do_sample=False)
    conversation = torch.cat([answered, ids[:, 60:]], dim=1)
    logits = cache.prefill(model, conversation, chunk_size=40, progress=lambda done, total: log.append(total))
    assert log[-1] == 1 + 90, "the last token of the answer and the new message"
    torch.testing.assert_close(logits, KVCache(model, "full").prefill(model, conversation), atol=1e-5, rtol=1e-4)


def test_a_text_that_differs_is_refused_where_it_differs():
    model, ids = tiny_model("llama"), random_text(60, rows=2)
    cache = KVCache(model, "full")
    cache.prefill(model, ids[:, :40])
    changed = ids.clone()
    changed[1, 17] = changed[1, 17] % 100 + 1
    before = cache.nbytes
    with pytest.raises(CacheError, match=r"sequence 1 have token \d+ at position 17"):
        cache.prefill(model, changed)
    with pytest.raises(CacheError, match="nothing is new"):
        cache.prefill(model, ids[:, :40])
    with pytest.raises(CacheError, match="holds 2 sequences, but input_ids hold 1"):
        cache.prefill(model, ids[:1])
    assert cache.seen == [40, 40] and cache.nbytes == before
    fork = cache.fork()
    with pytest.raises(CacheError, match="position 17"):
        fork.prefill(model, changed)
    fork.crop(-30)
    fork.prefill(model, changed)
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.prefill(model, ids[[1, 0]])
    cache.reset()
    cache.prefill(model, changed)


def test_padded_sequences_equal_their_single_runs():
    texts = [random_text(90, seed=1), random_text(31, seed=2), random_text(60, seed=3)]
    ids, mask = left_padded(texts)
    for name in ("llama", "gemma2", "gpt2", "opt", "lfm2"):
        model = tiny_model(name)
        batch = KVCache(model, "snapkv(window=8)", "40%")
        logits = batch.prefill(model, ids, attention_mask=mask)
        turn = torch.cat([ids, random_text(10, rows=3)], dim=1)
        with pytest.raises(CacheError, match="pass the attention_mask"):
            batch.prefill(model, turn)
        longer = torch.cat([mask, torch.ones(3, 10, dtype=torch.long)], dim=1)
        then = batch.prefill(model, turn, attention_mask=longer)
        for b, text in enumerate(texts):
            single = KVCache(model, "snapkv(window=8)", "40%")
            torch.testing.assert_close(logits[b : b + 1], single.prefill(model, text), atol=1e-5, rtol=1e-4)
            alone = single.prefill(model, torch.cat([text, turn[b : b + 1, 90:]], dim=1))
            torch.testing.assert_close(then[b : b + 1], alone, atol=1e-5, rtol=1e-4)


def test_padding_survives_small_chunks():
    """Chunks that are padding only for some sequence; nothing is evicted, so chunk borders do not matter."""
    texts = [random_text(50, seed=1), random_text(9, seed=2)]
    ids, mask = left_padded(texts)
    model = tiny_model("llama")
    logits = KVCache(model, "full").prefill(model, ids, attention_mask=mask, chunk_size=6)
    for b, text in enumerate(texts):
        torch.testing.assert_close(logits[b : b + 1], stock_logits("llama", model, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[1, 1, 1, 0]], "pad on the left"),
        ([[1, 1, 1]], "must have the shape"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    model = tiny_model("llama")
    with pytest.raises(CacheError, match=message):
        KVCache(model, "full").prefill(model, random_text(4), attention_mask=torch.tensor(mask))


def test_a_mask_that_contradicts_what_was_seen_is_refused():
    model, ids = tiny_model("llama"), random_text(20)
    cache = KVCache(model, "full")
    cache.prefill(model, ids[:, :10])
    mask = torch.ones(1, 20)
    mask[0, 3] = 0
    with pytest.raises(CacheError, match="disagrees with the"):
        cache.prefill(model, ids, attention_mask=mask)


def test_bad_arguments_are_refused():
    model, ids = tiny_model("llama"), random_text(20)
    cache = KVCache(model, "snapkv", 100)
    with pytest.raises(PolicyError, match="does not look at question_ids"):
        cache.prefill(model, ids, question_ids=ids)
    with pytest.raises(PolicyError, match="chunk_size=0"):
        cache.prefill(model, ids, chunk_size=0)
    with pytest.raises(KVBudgetError, match="hold no text"):
        cache.prefill(model, ids[:, :0])
    with pytest.raises(KVBudgetError, match="hold no text"):
        cache.prefill(model, ids[0])
    with pytest.raises(KVBudgetError, match="token id 128 is none of the model's, which run from 0 to 127"):
        cache.prefill(model, torch.full_like(ids, 128))
    with pytest.raises(KVBudgetError, match="token id 500"):
        KVCache(model, "kvzip(instruction_ids=(500,))", 10).prefill(model, ids)
    with pytest.raises(PolicyError, match="no way to execute"):
        run(Plan(), None)
    assert cache.prefilled is None and cache.get_seq_length() == 0


def test_an_interrupt_between_chunks_can_be_resumed():
    model, ids = tiny_model("llama"), random_text(120)
    cache, whole = KVCache(model, "snapkv(window=8)", "25%"), KVCache(model, "snapkv(window=8)", "25%")

    def interrupt(done, total):
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prefill(model, ids, chunk_size=30, progress=interrupt)
    assert cache.seen == [60] and cache.broken is None and cache.enforcer.declared is None
    cache.check_integrity()
    logits = cache.prefill(model, ids, chunk_size=30)
    assert torch.equal(logits, whole.prefill(model, ids, chunk_size=30))


def test_a_failure_inside_a_forward_breaks_the_cache():
    model, ids = tiny_model("llama"), random_text(80)
    cache = KVCache(model, "full")

    def fail(module, inputs):
        if cache.get_seq_length() > 20:
            raise MemoryError("no room")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        cache.prefill(model, ids, chunk_size=20)
    hook.remove()
    with pytest.raises(CacheError, match="broken"):
        cache.prefill(model, ids, chunk_size=20)
    cache.reset()
    torch.testing.assert_close(cache.prefill(model, ids, chunk_size=20), stock_logits("llama", model, ids))


@pytest.mark.parametrize("policy", ["snapkv(window=8)+adakv", "kvzip", "snapkv(window=8)+kivi(residual=32)"])
def test_inference_mode_and_plain_calls_mix(policy):
    model, ids = tiny_model("lfm2"), random_text(100)
    answers = []
    for inside in (True, False):
        cache = KVCache(model, policy, "50%")
        with torch.inference_mode(inside), torch.no_grad():
            cache.prefill(model, ids[:, :80])
        with torch.inference_mode(not inside), torch.no_grad():
            answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False))
        cache.check_integrity()
    assert torch.equal(*answers)
