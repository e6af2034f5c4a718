"""KVCache as a citizen of transformers: everything that generate(), pipelines and bare forwards do with a cache."""

import threading
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, pipeline

from kvbudget import KVCache
from kvbudget.errors import CacheError
from kvbudget.policy.view import View
from tiny import (
    in_chunks,
    left_padded,
    own_model,
    random_text,
    served_model,
    tiny_model,
    tiny_tokenizer,
)

PROMPT = random_text(60, seed=1)
MESSAGE = random_text(25, seed=2)
ROWS = [random_text(length, seed=length) for length in (9, 31, 44)]
BIG = "1GiB"
LOSSLESS = (("full", None), ("snapkv", BIG), ("snapkv+adakv", 1000))
SMALL = (("snapkv(window=8)", 24), ("streaming_llm", "40KiB"), ("snapkv(window=8)+adakv", 24))
READING = (
    "mpcache(size=4)",
    "snapkv(window=8)+neurocache(top=3, window=4, start=0.0)",
    "snapkv(window=8)+kcache(top=3)",
)
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams, several answers": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "in chunks": {"do_sample": False, "prefill_chunk_size": 7},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Watch(StoppingCriteria):
    """Checks the cache after every step of generate()."""

    def __init__(self, past: KVCache) -> None:
        self.past = past
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.past.check_integrity()
        if self.past.budget.kind == "tokens" and not self.past.pending:
            limit = self.past.budget.amount
            assert all(sum(row) <= limit * len(row) for layer in self.past.report().kept for row in layer)
        self.steps += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generate(model, ids: torch.Tensor, past=None, *, new: int = 12, seed: int = 3, **options) -> torch.Tensor:
    """generate() with a fixed seed, which watches a KVCache."""
    torch.manual_seed(seed)
    if isinstance(past, KVCache):
        options["stopping_criteria"] = [Watch(past)]
    return model.generate(ids, past_key_values=past, max_new_tokens=new, **options)


def greedy(model, ids: torch.Tensor, past=None, **options) -> torch.Tensor:
    return generate(model, ids, past, do_sample=False, **options)


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-4) -> None:
    difference = (found - expected).abs().max().item()
    assert difference <= limit, f"largest logit difference {difference:.2e}"


def state_of(past: KVCache) -> list[list[list[int]]]:
    """Positions that each row of each budgeted layer holds."""
    return [
        [[int(p) for segment in store.main for p in segment.meta.row("position", row)] for row in range(store.num_rows)]
        for store in past.enforcer.layers
    ]


# -- generate() at full budget: the same tokens as with transformers' own cache ----------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("policy", "budget"), LOSSLESS)
def test_generate_equals_the_ordinary_cache_at_full_budget(policy: str, budget: object, mode: str):
    model = served_model("llama")
    past = KVCache(model, policy, budget)
    expected = generate(own_model("llama"), PROMPT, **MODES[mode])
    assert torch.equal(generate(model, PROMPT, past, **MODES[mode]), expected)
    assert set(past.seen) == {PROMPT.shape[1] + 11}


@pytest.mark.parametrize("mode", ("greedy", "sampling", "beams", "in chunks"))
def test_left_padded_batches_equal_the_ordinary_cache(mode: str):
    ids, mask = left_padded(ROWS)
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    expected = generate(own_model("llama"), ids, attention_mask=mask, **MODES[mode])
    assert torch.equal(generate(model, ids, past, attention_mask=mask, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("policy", "budget"), SMALL)
def test_generate_holds_a_small_budget_at_every_step(policy: str, budget: object, mode: str):
    options = MODES[mode]
    model = served_model("llama")
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    if isinstance(budget, str):
        budget = f"{rows * 40}KiB"
    past = KVCache(model, policy, budget)
    out = generate(model, PROMPT, past, new=40, **options)
    assert out.shape[1] == PROMPT.shape[1] + 40
    assert past.enforcer.evictions > 2
    past.check_integrity()


def test_a_padded_batch_at_a_small_budget_gives_each_rows_own_answer():
    model = served_model("llama")
    ids, mask = left_padded(ROWS)
    batch = greedy(model, ids, KVCache(model, "streaming_llm", 20), attention_mask=mask, new=30)
    for b, row in enumerate(ROWS):
        single = greedy(model, row, KVCache(model, "streaming_llm", 20), new=30)
        assert torch.equal(batch[b, -30:], single[0, -30:])


# -- several turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt2", "lfm2"))
def test_a_second_turn_with_the_whole_text_feeds_only_what_is_new(name: str):
    model = served_model(name)
    past = KVCache(model, "snapkv", BIG)
    first = greedy(model, PROMPT, past)
    text = torch.cat([first, MESSAGE], dim=1)
    second = greedy(model, text, past)
    assert torch.equal(second, greedy(own_model(name), text))
    assert past.seen == [second.shape[1] - 1]


def test_a_second_turn_with_only_the_new_ids_and_a_mask_over_everything():
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    first = greedy(model, PROMPT, past)
    text = torch.cat([first, MESSAGE], dim=1)
    new = text[:, past.get_seq_length() :]
    second = greedy(model, new, past, attention_mask=torch.ones_like(text))
    assert torch.equal(second[:, new.shape[1] :], greedy(own_model("llama"), text)[:, text.shape[1] :])


def test_a_second_turn_of_a_padded_batch():
    model = served_model("llama")
    ids, mask = left_padded(ROWS)
    past = KVCache(model, "snapkv", BIG)
    first = greedy(model, ids, past, attention_mask=mask)
    text = torch.cat([first, MESSAGE.expand(3, -1)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    second = greedy(model, text, past, attention_mask=mask)
    assert torch.equal(second, greedy(own_model("llama"), text, attention_mask=mask))


@pytest.mark.parametrize(("policy", "budget"), SMALL)
def test_every_turn_is_compressed(policy: str, budget: object):
    model = served_model("llama")
    past = KVCache(model, policy, budget)
    text = PROMPT
    for _ in range(3):
        text = torch.cat([greedy(model, text, past), MESSAGE], dim=1)
        assert past.seen == [text.shape[1] - MESSAGE.shape[1] - 1]
        assert past.report().kept_entries <= 2 * 2 * 24 if budget == 24 else past.nbytes <= 40 * 1024


def test_a_bare_forward_goes_on_at_the_right_position():
    model = served_model("llama")
    text = torch.cat([PROMPT, MESSAGE], dim=1)
    expected = own_model("llama")(text).logits[:, -MESSAGE.shape[1] :]
    past = KVCache(model, "snapkv", BIG)
    model(PROMPT, past_key_values=past)
    close(model(MESSAGE, past_key_values=past).logits, expected)


def test_evicted_entries_leave_positions_as_they_are():
    # With everything but the sinks and a window gone, what remains must look as far away as it is.
    model = served_model("llama")
    past = KVCache(model, "streaming_llm", 12)
    in_chunks(model, PROMPT, past, 20)
    kept = state_of(past)[0][0]
    assert kept[:4] == [0, 1, 2, 3] and kept[4:] == list(range(kept[4], 60))
    mask = torch.zeros(1, 1, 1, 61, dtype=torch.bool)
    mask[..., kept] = mask[..., 60] = True
    # Only the first layer is comparable: later ones have read what was still there.
    one_layer = tiny_model("llama", num_hidden_layers=1)
    full = DynamicCache(config=one_layer.config)
    one_layer(PROMPT, past_key_values=full)
    expected = one_layer(MESSAGE[:, :1], past_key_values=full, attention_mask=mask).logits
    one_past = KVCache(one_layer, "streaming_llm", 12)
    in_chunks(one_layer, PROMPT, one_past, 20)
    assert state_of(one_past)[0][0] == kept
    close(one_layer(MESSAGE[:, :1], past_key_values=one_past).logits, expected)


# -- what would silently duplicate or lose text is refused -------------------------------------------------------------


def test_a_text_that_has_been_seen_to_its_end_is_not_fed_again():
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    model(PROMPT, past_key_values=past)
    with pytest.raises(CacheError, match="start at position 0"):
        greedy(model, PROMPT, past)
    past.check_integrity()
    close(
        model(MESSAGE, past_key_values=past).logits[:, -1],
        own_model("llama")(torch.cat([PROMPT, MESSAGE], 1)).logits[:, -1],
    )


def test_prompt_lookup_on_a_warm_cache_is_refused():
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    first = greedy(model, PROMPT, past)
    with pytest.raises(CacheError, match="start at position 0"):
        greedy(model, torch.cat([first, MESSAGE], dim=1), past, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("length", (5, 25, 70))
def test_new_ids_without_a_mask_never_pass_silently(length: int):
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    model(PROMPT, past_key_values=past)
    new = random_text(length, seed=5)
    if length > PROMPT.shape[1]:  # then transformers takes them for the whole text, and so does everybody
        greedy(model, new, past)
        return
    with pytest.raises((CacheError, RuntimeError)):
        greedy(model, new, past)


def test_beams_on_a_warm_cache_name_the_remedy_and_it_works():
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    first = greedy(model, PROMPT, past)
    text = torch.cat([first, MESSAGE], dim=1)
    with pytest.raises(CacheError, match=r"batch_repeat_interleave"):
        generate(model, text, past, **MODES["beams"])
    past.batch_repeat_interleave(4)
    assert torch.equal(
        generate(model, text, past, **MODES["beams"]), generate(own_model("llama"), text, **MODES["beams"])
    )


def test_a_mask_that_covers_only_the_new_tokens_is_refused():
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    model(PROMPT, past_key_values=past)
    with pytest.raises(CacheError, match="attention_mask covers 25 tokens"):
        model(MESSAGE, past_key_values=past, attention_mask=torch.ones_like(MESSAGE))


def test_four_dimensional_masks_are_refused():
    model = served_model("llama")
    past = KVCache(model, "snapkv", BIG)
    with pytest.raises(CacheError, match="2-D padding mask"):
        model(PROMPT, past_key_values=past, attention_mask=torch.ones(1, 1, 60, 60, dtype=torch.bool).tril())
    close(model(PROMPT, past_key_values=past).logits, own_model("llama")(PROMPT).logits)


def test_training_is_refused():
    model = tiny_model("llama", attention_dropout=0.5)
    past = KVCache(model, "snapkv", BIG)
    model.train()
    with pytest.raises(CacheError, match=r"model\.eval"):
        model(PROMPT, past_key_values=past)
    model.eval()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with torch.enable_grad(), pytest.raises(CacheError, match="inference_mode"):
        model(PROMPT, past_key_values=past)
    assert past.seen == []
    model(PROMPT, past_key_values=past)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_another_attention_implementation_meets_a_teaching_error(implementation: str):
    model = tiny_model("llama")
    past = KVCache(model, "snapkv", BIG)
    model.set_attn_implementation(implementation)
    with pytest.raises(CacheError, match=r"set_attn_implementation\('kvbudget'\)"):
        model(PROMPT, past_key_values=past)
    model.set_attn_implementation("kvbudget")
    close(model(PROMPT, past_key_values=past).logits, own_model("llama")(PROMPT).logits)


def test_inference_mode_and_no_grad_mix():
    for name in ("llama", "lfm2"):
        model = served_model(name)
        expected = greedy(own_model(name), PROMPT)
        past = KVCache(model, "snapkv", BIG)
        with torch.inference_mode():
            in_chunks(model, PROMPT[:, :40], past, 20)
        model(PROMPT[:, 40:50], past_key_values=past)
        assert torch.equal(greedy(model, PROMPT, past), expected)
        with torch.inference_mode():
            past.reset()
            assert torch.equal(greedy(model, PROMPT, past), expected)


# -- crop --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llama", "qwen2-sliding", "gemma2", "gpt_oss"))
@pytest.mark.parametrize(("policy", "budget"), LOSSLESS)
def test_crop_equals_never_having_seen_the_tokens(policy: str, budget: object, name: str):
    model = served_model(name)
    past = KVCache(model, policy, budget)
    model(PROMPT, past_key_values=past)
    model(MESSAGE[:, :3], past_key_values=past)
    past.crop(0)
    assert past.seen == [63]
    past.crop(-3)
    past.check_integrity()
    assert past.seen == [60] and past.get_seq_length() == 60
    text = torch.cat([PROMPT, MESSAGE], dim=1)
    close(model(MESSAGE, past_key_values=past).logits, own_model(name)(text).logits[:, 60:])


def test_crop_that_cannot_be_is_refused_and_changes_nothing():
    model = served_model("llama")
    cases = [
        (KVCache(model, "snapkv(window=8)", 24), -20, "evicted"),
        (KVCache(model, "kivi(bits=4, residual=32)"), -40, "compressed"),
        (KVCache(model, "full"), -90, "only 85 have been seen"),
        (KVCache(model, "full"), 3, r"crop\(-1\)"),
    ]
    for past, tokens, reason in cases:
        in_chunks(model, torch.cat([PROMPT, MESSAGE], dim=1), past, 17)
        before, twin = state_of(past), past.fork()
        with pytest.raises(CacheError, match=reason):
            past.crop(tokens)
        assert state_of(past) == before and past.seen == [85]
        past.check_integrity()
        assert torch.equal(
            model(PROMPT[:, :4], past_key_values=past).logits, model(PROMPT[:, :4], past_key_values=twin).logits
        )


def test_crop_of_recurrent_states_is_refused_outside_of_speculation():
    for name in ("lfm2", "qwen3_next"):
        model = served_model(name)
        past = KVCache(model, "full")
        model(PROMPT, past_key_values=past)
        with pytest.raises(CacheError, match="recurrent state of layer 0"):
            past.crop(-2)
        past.crop(0)
        assert torch.equal(
            greedy(model, torch.cat([PROMPT, MESSAGE], 1), past),
            greedy(own_model(name), torch.cat([PROMPT, MESSAGE], 1)),
        )


# -- speculation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", READING[:2])
@pytest.mark.parametrize("kind", ("prompt lookup", "assistant"))
def test_speculation_that_reads_a_part_equals_greedy_decoding_that_does(kind: str, policy: str):
    model, prompt = served_model("llama"), PROMPT[:, :20].repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 4}
    if kind != "prompt lookup":
        options = {"assistant_model": tiny_model("llama", seed=1)}
    past, plain = KVCache(model, policy, BIG), KVCache(model, policy, BIG)
    assert torch.equal(greedy(model, prompt, past, new=30, **options), greedy(model, prompt, plain, new=30))
    assert state_of(past) == state_of(plain)


@pytest.mark.parametrize("policy", READING)
def test_a_prompt_that_follows_speculation_is_read_as_one(policy: str):
    model, logits = served_model("llama"), []
    for options in ({"prompt_lookup_num_tokens": 4}, {}):
        past = KVCache(model, policy, BIG)
        greedy(model, PROMPT[:, :20].repeat(1, 3), past, new=12, **options)
        logits.append(model(random_text(40, seed=9), past_key_values=past).logits[:, -1])
    close(*logits)


@pytest.mark.parametrize("name", ("llama", "gemma2", "qwen2-sliding", "gpt2", "lfm2"))
@pytest.mark.parametrize("kind", ("prompt lookup", "assistant", "equal assistant"))
def test_speculation_equals_greedy_decoding_at_full_budget(kind: str, name: str):
    model = served_model(name)
    prompt = PROMPT[:, :20].repeat(1, 3)  # a text that prompt lookup finds continuations in
    options = {"prompt_lookup_num_tokens": 4}
    if kind != "prompt lookup":
        options = {"assistant_model": tiny_model("llama", seed=1) if kind == "assistant" else own_model(name)}
    past = KVCache(model, "snapkv", BIG)
    expected = greedy(own_model(name), prompt, new=30)
    assert torch.equal(greedy(model, prompt, past, new=30, **options), expected)
    assert past.seen == [89] and not past.pending


@pytest.mark.parametrize("policy", READING)
def test_drafts_read_and_judge_as_single_tokens_do(policy: str):
    """More drafts than a forward of decoding has otherwise; the prompt repeats tokens, whose values are equal in layer 0."""
    model = served_model("llama")
    text = torch.cat([PROMPT[:, :20].repeat(1, 3), MESSAGE[:, :10]], dim=1)
    past, plain = KVCache(model, policy, BIG), KVCache(model, policy, BIG)
    for cache in (past, plain):
        model(text[:, :60], past_key_values=cache)
    past.activate_past_recording()
    model(text[:, 60:61], past_key_values=past)
    past.crop(0)
    found = model(torch.cat([text[:, 61:], MESSAGE[:, 12:]], dim=1), past_key_values=past).logits[:, :9]
    past.crop(-13)
    expected = torch.cat([model(token, past_key_values=plain).logits for token in text[:, 60:].split(1, 1)], 1)
    close(found, expected[:, 1:])
    assert past.seen == [70]
    if policy.startswith("mpcache"):
        close(View(past.enforcer.layers[1]).state("highest"), View(plain.enforcer.layers[1]).state("highest"), 1e-6)


@pytest.mark.parametrize(("policy", "budget"), (*SMALL, *((policy, 24) for policy in READING[:2])))
@pytest.mark.parametrize("kind", ("prompt lookup", "assistant"))
def test_speculation_under_a_small_budget_leaves_no_trace_of_rejected_tokens(kind: str, policy: str, budget: object):
    """Replays the accepted tokens, forward by forward, through a cache that never saw a rejected one."""
    model = served_model("llama")
    prompt = PROMPT[:, :20].repeat(1, 3)
    options = (
        {"prompt_lookup_num_tokens": 4} if kind == "prompt lookup" else {"assistant_model": tiny_model("llama", seed=1)}
    )
    past, replay = KVCache(model, policy, budget), KVCache(model, policy, budget)
    lengths = []
    crop = past.crop

    def counted(tokens: int) -> None:
        crop(tokens)
        lengths.append(past.get_seq_length())
        past.check_integrity()

    past.crop = counted
    out = greedy(model, prompt, past, new=30, **options)
    seen, answer = 0, []
    for length in lengths:
        logits = model(out[:, seen:length], past_key_values=replay).logits
        answer.append(logits[..., 1:].argmax(-1)[0] + 1)  # generate() suppresses the padding id
        seen = length
    assert lengths[-1] == out.shape[1] - 1 and len(lengths) > 4
    assert torch.equal(torch.cat(answer)[prompt.shape[1] - 1 :], out[0, prompt.shape[1] :])
    assert state_of(past) == state_of(replay)


def test_ordinary_decoding_follows_speculation():
    model = served_model("llama")
    past = KVCache(model, "snapkv(window=8)", 24)
    out = greedy(model, PROMPT, past, prompt_lookup_num_tokens=4)
    greedy(model, torch.cat([out, MESSAGE], dim=1), past)
    model(MESSAGE[:, :1], past_key_values=past)
    assert not past.pending and not past.recording
    assert past.report().kept_entries <= 2 * 2 * 24


def test_transformers_refuses_speculation_where_a_recurrent_state_cannot_go_back():
    model = served_model("qwen3_next")
    with pytest.raises(ValueError, match="stateful"):
        greedy(model, PROMPT, KVCache(model, "full"), prompt_lookup_num_tokens=4)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_text_generation_pipeline_and_its_second_call():
    model, tokenizer = served_model("llama"), tiny_tokenizer()
    say = pipeline("text-generation", model=model, tokenizer=tokenizer)
    own = pipeline("text-generation", model=own_model("llama"), tokenizer=tokenizer)
    past = KVCache(model, "snapkv", BIG)
    options = {"max_new_tokens": 8, "do_sample": False}
    text = tokenizer.decode(PROMPT[0, :6])
    for _ in range(2):
        found = say(text, past_key_values=past, **options)[0]["generated_text"]
        assert found == own(text, **options)[0]["generated_text"]
        text = found + tokenizer.decode(MESSAGE[0, :3])
    assert past.seen == [6 + 8 + 3 + 8 - 1]
    texts = [tokenizer.decode(row[0]) for row in ROWS]
    batch = say(texts, batch_size=3, past_key_values=KVCache(model, "snapkv", BIG), **options)
    assert batch == own(texts, batch_size=3, **options)


# -- several caches, several threads -----------------------------------------------------------------------------------


def test_two_caches_with_different_policies_serve_one_model_in_turns():
    model = served_model("llama")
    kinds = [("snapkv(window=8)", 24), ("streaming_llm", 16), ("full", None), ("snapkv(window=8)+adakv", 30)]
    texts = [random_text(90, seed=seed) for seed in range(len(kinds))]
    alone = [in_chunks(model, text, KVCache(model, *kind), 15) for kind, text in zip(kinds, texts, strict=True)]
    caches = [KVCache(model, *kind) for kind in kinds]
    pieces = [[] for _ in kinds]
    for begin in range(0, 90, 15):
        for i, past in enumerate(caches):
            pieces[i].append(model(texts[i][:, begin : begin + 15], past_key_values=past).logits)
            model(texts[i][:, :5])  # and calls without any of them
    for i, found in enumerate(pieces):
        assert torch.equal(torch.cat(found, dim=1), alone[i])


def test_threads_do_not_disturb_each_other():
    model = served_model("llama")
    texts = [random_text(60, seed=seed) for seed in range(4)]
    alone = [in_chunks(model, text, KVCache(model, "snapkv(window=8)", 24), 5) for text in texts]
    found: list[torch.Tensor | None] = [None] * 4

    def run(i: int) -> None:
        with torch.no_grad():
            found[i] = in_chunks(model, texts[i], KVCache(model, "snapkv(window=8)", 24), 5)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_fork_goes_on_by_itself():
    model = served_model("llama")
    past = KVCache(model, "snapkv(window=8)", 24)
    in_chunks(model, PROMPT, past, 20)
    twin = past.fork()
    expected = [
        in_chunks(model, text, KVCache(model, "snapkv(window=8)", 24), 20)
        for text in (torch.cat([PROMPT, MESSAGE], 1),)
    ]
    found = model(MESSAGE[:, :20], past_key_values=twin).logits
    close(found, expected[0][:, 60:80], 1e-5)
    close(model(MESSAGE[:, :20], past_key_values=past).logits, found, 1e-5)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llama", "gemma2", "lfm2", "qwen3_next"))
def test_rows_can_be_repeated_dropped_and_reordered(name: str):
    model = served_model(name)
    ids, mask = left_padded(ROWS)
    past = KVCache(model, "streaming_llm", 20)
    in_chunks(model, ids, past, 44, mask)
    past.batch_select_indices(torch.tensor([2, 0, 2]))
    past.check_integrity()
    assert past.seen == [44, 9, 44]
    past.batch_repeat_interleave(2)
    assert past.seen == [44, 44, 9, 9, 44, 44]
    past.reorder_cache(torch.tensor([5, 2]))
    mask = mask[[2, 0]]
    mask = torch.nn.functional.pad(mask, (0, 30), value=1)
    new = torch.cat([random_text(30, seed=7), random_text(30, seed=8)])
    found = in_chunks_after(model, new, past, mask)
    for b, row in enumerate((ROWS[2], ROWS[0])):
        single = KVCache(model, "streaming_llm", 20)
        model(row, past_key_values=single)
        close(found[b], in_chunks(model, new[b : b + 1], single, 1)[0])


def in_chunks_after(model, new: torch.Tensor, past: KVCache, mask: torch.Tensor) -> torch.Tensor:
    """Feeds new tokens one by one to a padded batch; the mask covers the whole text."""
    seen, logits = past.get_seq_length(), []
    position = mask.cumsum(1) - 1
    for step in range(new.shape[1]):
        at = slice(seen + step, seen + step + 1)
        out = model(
            new[:, step : step + 1],
            past_key_values=past,
            attention_mask=mask[:, : at.stop],
            position_ids=position[:, at],
        )
        logits.append(out.logits)
        past.check_integrity()
    return torch.cat(logits, dim=1)


# -- failures ----------------------------------------------------------------------------------------------------------


def failing(module: torch.nn.Module, error: BaseException) -> Callable[[], None]:
    """Makes the module's next call raise; returns what ends that."""

    def hook(*args: object) -> None:
        handle.remove()
        raise error

    handle = module.register_forward_pre_hook(hook)
    return handle.remove


@pytest.mark.parametrize("error", (RuntimeError("out of memory"), KeyboardInterrupt()))
@pytest.mark.parametrize("at", (0, 2))
@pytest.mark.parametrize("name", ("llama", "gemma2", "lfm2", "qwen3_next"))
def test_an_interrupted_forward_leaves_a_clearly_broken_cache(name: str, at: int, error: BaseException):
    model = tiny_model(name, num_hidden_layers=4)
    expected = model(PROMPT).logits
    past = KVCache(model, "snapkv(window=8)", 24)
    first = model(PROMPT, past_key_values=past).logits
    spare = past.fork()
    layer = model.model.layers[at]
    failing(layer.mlp if hasattr(layer, "mlp") else layer.feed_forward, error)
    with pytest.raises(type(error)):
        model(MESSAGE, past_key_values=past)
    for use in (
        lambda: model(MESSAGE, past_key_values=past),
        lambda: greedy(model, torch.cat([PROMPT, MESSAGE], 1), past),
        lambda: past.crop(0),
        past.fork,
    ):
        with pytest.raises(CacheError, match=rf"broken.*layer {at} of 4"):
            use()
    past.reset()
    past.check_integrity()
    close(model(PROMPT, past_key_values=past).logits, first, 1e-5)
    again = model(MESSAGE, past_key_values=spare).logits
    close(model(MESSAGE, past_key_values=past).logits, again, 1e-5)
    close(first, expected)


def test_an_exception_after_the_last_attention_leaves_a_usable_cache():
    model = tiny_model("llama")
    past = KVCache(model, "snapkv", BIG)
    model(PROMPT, past_key_values=past)
    failing(model.lm_head, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(MESSAGE, past_key_values=past)
    assert past.seen == [85]
    past.check_integrity()
    text = torch.cat([PROMPT, MESSAGE, ROWS[0]], dim=1)
    close(model(ROWS[0], past_key_values=past).logits, model(text).logits[:, 85:])


def test_a_failure_inside_the_eviction_breaks_the_cache(monkeypatch: pytest.MonkeyPatch):
    model = served_model("llama")
    past = KVCache(model, "snapkv(window=8)", 24)
    with monkeypatch.context() as patch:
        patch.setattr(past.enforcer, "settle", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(PROMPT, past_key_values=past)
    with pytest.raises(CacheError, match="layer 0 of 2"):
        model(PROMPT, past_key_values=past)


@pytest.mark.parametrize("name", ("llama", "gemma2", "lfm2", "qwen3_next", "gpt_oss"))
def test_reset_equals_a_new_cache(name: str):
    model = served_model(name)
    used, fresh = KVCache(model, "streaming_llm", 20), KVCache(model, "streaming_llm", 20)
    ids, mask = left_padded(ROWS)
    greedy(model, ids, used, attention_mask=mask)
    used.reset()
    assert used.seen == [] and used.nbytes == 0 and used.get_seq_length() == 0
    for chunk in (PROMPT, MESSAGE[:, :1]):
        assert torch.equal(model(chunk, past_key_values=used).logits, model(chunk, past_key_values=fresh).logits)


# -- Phi-3's two rotations ---------------------------------------------------------------------------------------------


def phi3(**overrides: object):
    return tiny_model("phi3", original_max_position_embeddings=64, **overrides)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def test_phi3_does_not_drop_the_cache():
    model = phi3()
    past = KVCache(model, "snapkv", BIG)
    for prompt in (PROMPT, torch.cat([PROMPT, MESSAGE], dim=1)):
        past.reset()
        expected = greedy(model, prompt)
        assert torch.equal(greedy(model, prompt, past), expected)
        assert past.seen == [prompt.shape[1] + 11]


def test_phi3_with_longrope_is_exact_on_either_side_of_its_switch_and_refused_across_it():
    model = phi3(rope_parameters=dict(LONGROPE))
    short, long = PROMPT[:, :40], torch.cat([PROMPT, MESSAGE], dim=1)
    for prompt in (short, long):
        past = KVCache(model, "snapkv", BIG)
        assert torch.equal(greedy(model, prompt, past), greedy(model, prompt))
    past = KVCache(model, "snapkv", BIG)
    with pytest.raises(CacheError, match="beyond 64"):
        greedy(model, PROMPT, past)
    with pytest.raises(CacheError, match="no prefill_chunk_size"):
        greedy(model, long, KVCache(model, "snapkv", BIG), prefill_chunk_size=30)
