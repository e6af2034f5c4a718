"""KVzip against brute force, the global threshold, and what the extra passes must not leave behind."""

import statistics
import time

import pytest
import torch
from brute import kept_positions

import kvbudget
from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, PolicyError
from kvbudget.policy.judging import SMALLEST
from residency import resident_bytes
from tiny import left_padded, random_text, tiny_model

SINKS, OVERLAP = 4, 8


def states(cache, layer, b=0):
    """Scores per KV head of sequence b, with the positions that they belong to."""
    store = cache.enforcer.layers[layer]
    rows = range(b * store.num_kv_heads, (b + 1) * store.num_kv_heads)
    return [torch.cat([segment.meta.row("score", r) for segment in store.main]) for r in rows]


def repeated(ids, spans):
    """The ids of each repeating pass without a tokenizer: the overlap and the chunk."""
    return [ids[:, max(0, begin - OVERLAP) : end] for begin, end in spans]


def scores_from_eager(model, ids, spans):
    """Scores ``[L][Hkv, T]`` from the model's own eager attention over the context and each repetition.

    Renormalizing the full softmax over a subset of its columns is the softmax over the subset. GPT-OSS's attention sink,
    whose mass is missing to one, is part of every softmax.
    """
    model.set_attn_implementation("eager")
    length = ids.shape[1]
    found = None
    for (begin, end), extra in zip(spans, repeated(ids, spans), strict=True):
        with torch.inference_mode():
            attentions = model(torch.cat([ids, extra], dim=1), output_attentions=True).attentions
        weights = [a[0, :, length:].double() for a in attentions]
        found = found or [torch.zeros(0).double()] * len(weights)
        columns = sorted({*range(SINKS), *range(begin, end), *range(length, length + extra.shape[1])})
        for layer, w in enumerate(weights):
            subset = w[..., columns].sum(-1)
            if model.config.model_type == "gpt_oss":
                subset = subset + 1 - w.sum(-1)
            score = (w[..., begin:end] / subset[..., None]).amax(1)
            found[layer] = torch.cat([found[layer], score], dim=-1)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "granite", "cohere", "gpt_oss", "gpt2", "smollm3"])
@pytest.mark.parametrize("spans", [[(0, 90)], [(0, 30), (30, 60), (60, 90)]], ids=["one chunk", "three chunks"])
def test_scores_are_the_highest_attention_while_repeating(name, spans):
    model, ids = tiny_model(name), random_text(90)
    for parameter, value in model.named_parameters():
        if parameter.endswith("sinks"):
            value += 8.0  # so large that one minus the other weights is exact enough
    cache = KVCache(model, f"kvzip(chunk={spans[0][1]})", "100%")
    cache.prefill(model, ids)
    expected = scores_from_eager(model, ids, spans)
    for layer, store in enumerate(cache.enforcer.layers):
        by_head = expected[store.layer_idx].unflatten(0, (store.num_kv_heads, -1)).amax(1)
        torch.testing.assert_close(torch.stack(states(cache, layer)).double(), by_head, atol=1e-5, rtol=5e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2", "qwen3_next"])
def test_the_passes_leave_nothing_behind(name):
    model, ids = tiny_model(name), random_text(120)
    cache, plain = KVCache(model, "kvzip(chunk=50)", "100%"), KVCache(model, "full")
    logits, expected = cache.prefill(model, ids), plain.prefill(model, ids)
    assert torch.equal(logits, expected)
    assert cache.get_seq_length() == 120 and cache.seen == [120] and cache.probing is None and cache.broken is None
    bare = KVCache(model, "full")
    bare.prefill(model, ids)
    bare.fork()  # which gives spare room back, as the budget does
    scores = sum(4 * sum(map(len, states(cache, layer))) for layer in range(len(cache.enforcer.layers)))
    held = [t for t in cache.tensors() if not any(t is s.meta.columns["score"] for s in segments(cache))]
    assert all(torch.equal(one, other) for one, other in zip(held, bare.tensors(), strict=True))
    assert resident_bytes(cache) >= cache.nbytes >= bare.nbytes + scores
    steps = [model(ids[:, i : i + 1], past_key_values=c).logits for i in range(3) for c in (cache, plain)]
    assert all(torch.equal(a, b) for a, b in zip(steps[::2], steps[1::2], strict=True))


def segments(cache):
    return [segment for store in cache.enforcer.layers for segment in store.main]


def global_best(scores, total):
    """Kept positions ``[layer][head]`` of the ``total`` best entries of all layers and heads, the sinks among them."""
    flat = torch.stack([torch.stack(rows) for rows in scores]).clone()
    flat[..., :SINKS] = float("inf")
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[flat.flatten().topk(total).indices] = True
    return [[row.nonzero()[:, 0].tolist() for row in layer] for layer in keep.view(flat.shape)]


@pytest.mark.parametrize("budget", ["10%", "33%", 41, 7])
def test_one_threshold_over_layers_and_heads_with_an_exact_total(budget):
    model, ids = tiny_model("llama", num_hidden_layers=4), random_text(200)
    everything = KVCache(model, "kvzip(chunk=70)")
    everything.prefill(model, ids)
    cache = KVCache(model, "kvzip(chunk=70)", budget)
    cache.prefill(model, ids)
    cache.check_integrity()
    mean = budget if isinstance(budget, int) else int(200 * float(budget[:-1]) / 100)
    assert cache.report().kept_entries == mean * 4 * 2
    kept = [kept_positions(cache, layer) for layer in range(4)]
    if mean > 20:  # below, the floor of every layer (its sinks and one entry) already takes part
        assert kept == global_best([states(everything, layer) for layer in range(4)], mean * 4 * 2)
        assert len({len(row) for layer in kept for row in layer}) > 2, "layers and heads must differ here"
    assert all(row[:SINKS] == [0, 1, 2, 3] for layer in kept for row in layer)


def test_uniform_keeps_the_best_of_each_head():
    model, ids = tiny_model("llama"), random_text(150)
    everything = KVCache(model, "kvzip(chunk=64)")
    everything.prefill(model, ids)
    cache = KVCache(model, "kvzip(chunk=64, uniform=True)", 30)
    cache.prefill(model, ids)
    for layer in range(2):
        for scores, kept in zip(states(everything, layer), kept_positions(cache, layer), strict=True):
            scores[:SINKS] = float("inf")
            assert kept == sorted(scores.topk(30).indices.tolist())


def test_bytes_are_freed():
    """Card and peers: at 90% evicted, at most 12% of the full cache's bytes, indices and offsets included."""
    model, ids = tiny_model("llama", head_dim=64), random_text(700)
    cache, full = KVCache(model, "kvzip", "10%"), KVCache(model, "full")
    cache.prefill(model, ids)
    full.prefill(model, ids)
    assert resident_bytes(cache) <= 0.12 * resident_bytes(full)


def test_generated_entries_rank_above_the_context():
    """Every decode step drops the entry with the lowest context score of all layers and heads, and no generated one."""
    model, ids, more = tiny_model("llama"), random_text(150), random_text(25, seed=1)
    everything = KVCache(model, "kvzip(chunk=64)")
    everything.prefill(model, ids)
    scores = [states(everything, layer) for layer in range(2)]
    cache = KVCache(model, "kvzip(chunk=64)", 40, when="every(1)")
    cache.prefill(model, ids)
    for step in range(25):
        with torch.inference_mode():
            model(more[:, step : step + 1], past_key_values=cache)
        cache.check_integrity()
        new = list(range(150, 151 + step))
        expected = global_best(scores, 40 * 4 - len(new) * 4)
        assert [kept_positions(cache, layer) for layer in range(2)] == [
            [row + new for row in rows] for rows in expected
        ]


def test_a_budget_full_of_generated_entries_keeps_the_newest():
    model, ids, more = tiny_model("llama"), random_text(60), random_text(80, seed=1)
    cache = KVCache(model, "kvzip", 20)
    cache.prefill(model, ids)
    for step in range(80):
        with torch.inference_mode():
            model(more[:, step : step + 1], past_key_values=cache)
    for layer in range(2):
        for row in kept_positions(cache, layer):
            assert row[:SINKS] == [0, 1, 2, 3] and row[SINKS:] == list(range(140 - len(row) + SINKS, 140))


@pytest.mark.parametrize("name", ["llama", "lfm2", "gemma2"])
def test_a_padded_sequence_is_judged_as_its_single_run(name):
    model = tiny_model(name)
    texts = [random_text(130, seed=1), random_text(47, seed=2)]
    ids, mask = left_padded(texts)
    batch = KVCache(model, "kvzip(chunk=50)", "30%")
    logits = batch.prefill(model, ids, attention_mask=mask)
    batch.check_integrity()
    for b, text in enumerate(texts):
        single = KVCache(model, "kvzip(chunk=50)", "30%")
        torch.testing.assert_close(logits[b : b + 1], single.prefill(model, text), atol=1e-5, rtol=1e-4)
        for layer in range(len(single.enforcer.layers)):
            assert kept_positions(batch, layer, b) == kept_positions(single, layer)


def test_only_new_text_is_judged_in_a_second_turn():
    model, ids = tiny_model("llama"), random_text(160)
    cache = KVCache(model, "kvzip(chunk=50)", "50%")
    cache.prefill(model, ids[:, :100])
    before = [
        dict(zip(p, s.tolist(), strict=True)) for p, s in zip(kept_positions(cache, 0), states(cache, 0), strict=True)
    ]
    fed = []
    cache.prefill(model, ids, progress=lambda done, total: fed.append((done, total)))
    assert fed[-1] == (60 + 2 * (OVERLAP + 30), 60 + 2 * (OVERLAP + 30))
    after = [
        dict(zip(p, s.tolist(), strict=True)) for p, s in zip(kept_positions(cache, 0), states(cache, 0), strict=True)
    ]
    for old, new in zip(before, after, strict=True):
        assert all(old[position] == score for position, score in new.items() if position < 100)
        assert all(score >= SMALLEST for score in new.values())
    assert cache.report().kept_entries == 80 * 4


def test_codecs_wait_for_the_verdict():
    """Keys are coded in groups after the eviction, so what stays is chosen entry by entry."""
    model, ids = tiny_model("llama"), random_text(200)
    plain, coded = (KVCache(model, f"kvzip(chunk=64){codec}", 90) for codec in ("", "+kivi(bits=8, residual=32)"))
    for cache in (plain, coded):
        cache.prefill(model, ids)
    assert [kept_positions(plain, i) for i in range(2)] == [kept_positions(coded, i) for i in range(2)]
    assert coded.report().parts["codec metadata"] > 0


def test_refusals():
    model, ids = tiny_model("llama"), random_text(50)
    with pytest.raises(PolicyError, match="hold the whole prompt"):
        KVCache(model, "kvzip", "1MiB")
    with pytest.raises(PolicyError, match=r"cache\.prefill"), torch.inference_mode():
        model(ids, past_key_values=KVCache(model, "kvzip", "50%"))
    with pytest.raises(PolicyError, match=r"cache\.prefill"):
        model.generate(ids, past_key_values=KVCache(model, "kvzip", "50%"), max_new_tokens=2)
    with pytest.raises(PolicyError, match="chunk >= 1"):
        KVCache(model, "kvzip(chunk=0)", "50%")


def test_an_interrupted_plan_breaks_the_cache_until_reset():
    model, ids = tiny_model("llama"), random_text(100)
    cache = KVCache(model, "kvzip(chunk=30)", "50%")

    def interrupt(done, total):
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prefill(model, ids, progress=interrupt)
    with pytest.raises(CacheError, match="plan of kvzip"):
        cache.prefill(model, torch.cat([ids, ids], dim=1))
    cache.reset()
    cache.prefill(model, ids)
    assert cache.report().kept_entries == 50 * 4


def test_instruction_ids_take_the_place_of_the_texts():
    model, ids = tiny_model("llama"), random_text(40)
    total = []
    cache = KVCache(model, "kvzip(chunk=20, instruction_ids=(5, 6, 7))", "50%")
    cache.prefill(model, ids, progress=lambda done, whole: total.append(whole))
    assert total[-1] == 40 + (3 + 20) + (3 + OVERLAP + 20)


@pytest.mark.slow
def test_the_extra_time_is_at_most_two_and_a_half_prefills():
    """Three layers of SmolLM2-135M's geometry, 2k tokens, one thread; interleaved medians of processor time."""
    model = tiny_model(
        "llama", num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=1536
    )
    ids = random_text(2048)
    plain, extra = [], []
    for _ in range(3):
        begun = time.process_time()
        KVCache(model, "full").prefill(model, ids)
        middle = time.process_time()
        KVCache(model, "kvzip", "10%").prefill(model, ids)
        plain.append(middle - begun)
        extra.append(time.process_time() - middle)
    ratio = statistics.median(extra) / statistics.median(plain) - 1
    assert ratio <= 2.5, f"kvzip takes {ratio:.2f} prefills on top"


@pytest.mark.slow
@pytest.mark.model
def test_two_questions_after_one_compression_beat_snapkv(shared_data):
    """Card: questions that nobody knew when the context was compressed; the digits' mean log-probability decides."""
    model, tokenizer = kvbudget.load("smollm2-135m")
    words = (shared_data / "books" / "moby_dick.txt").read_text(encoding="utf-8")[20000:].split(" ")
    needles = {"Paris": "48213", "Lagos": "90377"}
    sentences = [f"The special magic number for {city} is {number}." for city, number in needles.items()]
    context = " ".join([*words[:180], sentences[0], *words[180:330], sentences[1], *words[330:520]])
    start = f"<|im_start|>user\n{context}"
    ids = tokenizer(start, return_tensors="pt").input_ids
    scores = {}
    for policy in ("kvzip", "snapkv"):
        base = KVCache(model, policy, "30%")
        base.prefill(model, ids, tokenizer=tokenizer)
        logs = []
        for city, number in needles.items():
            question = (
                f"\n\nWhat is the special magic number for {city}?<|im_end|>\n<|im_start|>assistant\n"
                f"The special magic number for {city} is "
            )
            asked, answer = (tokenizer(text, return_tensors="pt").input_ids for text in (question, number))
            with torch.inference_mode():
                logits = model(torch.cat([asked, answer], dim=1), past_key_values=base.fork()).logits[
                    0, asked.shape[1] - 1 : -1
                ]
            logs.append(logits.log_softmax(-1).gather(1, answer[0][:, None]).mean().item())
        scores[policy] = logs
    assert sum(scores["kvzip"]) > sum(scores["snapkv"]) + 1.0, scores
    assert min(scores["kvzip"]) > -1.0, scores
