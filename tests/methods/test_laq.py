"""LAQ against brute force, its limits, and a draft that leaves no trace."""

import pytest
import torch
from brute import best, kept_positions
from torch.nn.functional import max_pool1d

import kvbudget
from kvbudget.cache import KVCache
from kvbudget.calibrate.base import watch
from kvbudget.errors import PolicyError
from tiny import left_padded, random_text, tiny_model

TOKENS, FIRST, BUDGET = 6, 16, 40


def drafted(model, ids, budget):
    """Queries ``[Hq, n, D]`` per layer of a greedy answer under SnapKV, as another run of the library gives it."""
    cache = KVCache(model, f"snapkv(window={FIRST}, kernel=7, pooling=max)", budget)
    logits, attend, steps = cache.prefill(model, ids), cache.attend, {}

    def recorded(index, call, *rest):
        steps.setdefault(index, []).append(call.query[0])
        return attend(index, call, *rest)

    cache.attend = recorded
    with torch.inference_mode():
        for _ in range(TOKENS):
            logits = model(logits.argmax(-1)[:, None], past_key_values=cache).logits[:, -1]
    return {index: torch.cat(queries, dim=1).double() for index, queries in steps.items()}


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_the_draft_and_the_end_of_the_prompt_vote(window, heads):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    ids = random_text(120)
    full, calls = KVCache(model, "full"), {}
    attend = full.attend
    full.attend = lambda index, call, *rest: (calls.update({index: call}), attend(index, call, *rest))[1]
    full.prefill(model, ids)
    draft = drafted(model, ids, BUDGET)
    cache = KVCache(model, f"laq(tokens={TOKENS}, window={window}, first={FIRST})", BUDGET)
    cache.prefill(model, ids)
    for index, call in calls.items():
        query, key = call.query[0].double(), call.key[0].double()
        for h, (late, ahead) in enumerate(
            zip(query.split(len(query) // heads[1]), draft[index].split(len(query) // heads[1]), strict=True)
        ):
            rows = torch.cat([late[:, 120 - window :], ahead], dim=1) @ key[h].T * call.scale
            future = (
                torch.arange(120)[None, :]
                > torch.cat([torch.arange(120 - window, 120), torch.full((TOKENS,), 120)])[:, None]
            )
            votes = rows.masked_fill(future, float("-inf")).softmax(-1).sum(1).mean(0)[: 120 - window]
            pooled = max_pool1d(votes[None], 7, stride=1, padding=3)[0]
            expected = sorted([*best(pooled, BUDGET - window).tolist(), *range(120 - window, 120)])
            assert kept_positions(cache, index)[h] == expected


def test_without_a_draft_it_is_snapkv():
    model, ids = tiny_model("llama"), random_text(150)
    laq, snapkv = (
        KVCache(model, "laq(tokens=0, window=16)", 48),
        KVCache(model, "snapkv(window=16, kernel=7, pooling=max)", 48),
    )
    assert torch.equal(laq.prefill(model, ids), snapkv.prefill(model, ids))
    assert [kept_positions(laq, i) for i in range(2)] == [kept_positions(snapkv, i) for i in range(2)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_the_draft_leaves_no_trace(name):
    model, ids = tiny_model(name), random_text(100)
    caches = [KVCache(model, "laq(first=16)", 40) for _ in range(2)]
    logits = [cache.prefill(model, ids) for cache in caches]
    assert torch.equal(logits[0], KVCache(model, "full").prefill(model, ids)) and torch.equal(*logits)
    for cache in caches:
        cache.check_integrity()
        assert cache.seen == [100] and cache.get_seq_length() == 100 and not cache.pending and not cache.recording
        assert max(row[-1] for layer in range(len(cache.enforcer.layers)) for row in kept_positions(cache, layer)) == 99
    fits = KVCache(model, "laq(first=16)", 110)
    steps = [
        model.generate(ids, past_key_values=c, max_new_tokens=8, do_sample=False)
        for c in (KVCache(model), fits)
        if c.prefill(model, ids[:, :-1]) is not None
    ]
    assert torch.equal(*steps)


def test_a_draft_ends_where_the_answer_ends():
    model, ids = tiny_model("llama"), random_text(100)
    token = int(KVCache(model, "full").prefill(model, ids).argmax())
    model.generation_config.eos_token_id = [token]
    done = []
    cache = KVCache(model, "laq(first=16)", 40)
    cache.prefill(model, ids, progress=lambda n, total: done.append((n, total)))
    assert done[-1] == (108, 108) and cache.report().kept == [[[40, 40]]] * 2


def test_padded_sequences_equal_their_single_runs():
    model, texts = tiny_model("llama"), [random_text(100, seed=1), random_text(57, seed=2)]
    ids, mask = left_padded(texts)
    batch = KVCache(model, "laq(first=16)", 36)
    batch.prefill(model, ids, attention_mask=mask)
    for b, text in enumerate(texts):
        single = KVCache(model, "laq(first=16)", 36)
        single.prefill(model, text)
        assert [kept_positions(batch, i, b) for i in range(2)] == [kept_positions(single, i) for i in range(2)]


def test_refusals():
    with pytest.raises(PolicyError, match="hold the whole prompt"):
        KVCache(tiny_model("llama"), "laq", "1MiB")
    with pytest.raises(PolicyError, match="window=0 above 0"):
        KVCache(tiny_model("llama"), "laq(tokens=0, window=0)", 50)


@pytest.mark.slow
@pytest.mark.model
def test_a_drafted_answer_finds_more_than_the_question(shared_data):
    """A needle with the question at the prompt's end, 8% of the cache: what the answer's own queries would look at.

    The share of their attention to the prompt that is kept, and the mean log-probability of the digits.
    """
    model, tokenizer = kvbudget.load("smollm2-135m")
    words = (shared_data / "books" / "moby_dick.txt").read_text(encoding="utf-8")[20000:].split(" ")
    context = " ".join([*words[:200], "The special magic number for Lagos is 90377.", *words[200:600]])
    prompt = (
        f"<|im_start|>user\n{context}\n\nWhat is the special magic number for Lagos?<|im_end|>\n<|im_start|>assistant\n"
        "The special magic number for Lagos is "
    )
    ids, answer = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, "90377"))
    length, paid, logs, kept = ids.shape[1], [], {}, {}

    def look(index, call, lse):
        rows = call.query[0, :, length:].unflatten(0, (call.key.shape[1], -1)) * call.scale
        paid.append((rows @ call.key[0, :, None, :length].mT).softmax(-1).mean((1, 2)))

    watch(model, torch.cat([ids, answer], dim=1), look)
    most = torch.cat(paid).topk(int(0.08 * length)).values.sum(-1).mean()
    for policy in ("snapkv(window=16)", "laq(first=16)"):
        cache = KVCache(model, policy, "8%", max_length=length)
        cache.prefill(model, ids[:, :-1])
        rows = [row for layer in range(len(paid)) for row in kept_positions(cache, layer)]
        kept[policy] = torch.stack([w[row].sum() for w, row in zip(torch.cat(paid), rows, strict=True)]).mean()
        with torch.inference_mode():
            logits = model(torch.cat([ids[:, -1:], answer], dim=1), past_key_values=cache).logits[0, :-1]
        logs[policy] = logits.log_softmax(-1).gather(1, answer[0][:, None]).mean().item()
    assert most > kept["laq(first=16)"] > kept["snapkv(window=16)"] + 0.005, kept
    assert logs["laq(first=16)"] > logs["snapkv(window=16)"] + 0.5, logs
    assert logs["laq(first=16)"] > -0.5, logs
