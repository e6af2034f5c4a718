"""Ways in which other cache compressors fail or are silently wrong; here each one passes or is refused in so many words."""

import socket
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvbudget
from kvbudget import KVCache
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.methods import parse
from tiny import in_chunks, left_padded, own_model, random_text, served_model, tiny_model

TEXT = random_text(300, seed=11)
MORE = random_text(300, seed=12)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def kept(past: KVCache) -> list[list[list[int]]]:
    """Positions held, per budgeted layer and KV head of the first sequence."""
    return [
        [
            [int(p) for segment in store.main for p in segment.meta.row("position", head)]
            for head in range(store.num_kv_heads)
        ]
        for store in past.enforcer.layers
    ]


def decode(model, past: KVCache, steps: int, seed: int = 13) -> None:
    in_chunks(model, random_text(steps, seed=seed), past, 1)


def test_the_installed_transformers_is_one_that_is_supported():
    """A compressor built on hook arguments stops working when a release of transformers drops one of them."""
    (needed,) = [r for r in map(Requirement, requires("kvbudget")) if r.name == "transformers"]
    assert needed.specifier.contains(version("transformers"))
    assert not list(needed.specifier.filter(["4.57.0", "5.2.0", "6.0.0"])), "only tested releases may be claimed"


@pytest.mark.parametrize("policy", ("snapkv(window=16)", "snapkv(window=16)+adakv", "streaming_llm", "knorm"))
def test_left_padded_batch(policy: str):
    """In a padded batch the short row's answer differs from the answer that it gets alone, without an error."""
    model, rows = served_model("llama"), [TEXT[:, :75], MORE[:, :200]]
    ids, mask = left_padded(rows)
    options = {"max_new_tokens": 16, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, past_key_values=KVCache(model, policy, "50%"), **options)
    for b, row in enumerate(rows):
        single = model.generate(row, past_key_values=KVCache(model, policy, "50%"), **options)
        assert torch.equal(batch[b, -16:], single[0, -16:])


def test_sinks_survive_decoding():
    """StreamingLLM in decode loses its sinks and a part of the window, since ties shuffle the entries."""
    model = served_model("llama")
    past = KVCache(model, "streaming_llm(sinks=4)", 64)
    model(TEXT[:, :50], past_key_values=past)
    decode(model, past, 150)
    for layer in kept(past):
        for positions in layer:
            assert positions[:4] == [0, 1, 2, 3]
            assert positions[4:] == list(range(200 - len(positions) + 4, 200))
            assert 64 - 16 < len(positions) <= 64


def test_ragged_decoding_is_bounded():
    """With budgets per head the decoding cache grows by every token."""
    model = served_model("llama")
    past = KVCache(model, "knorm+adakv", 64)
    model(TEXT[:, :100], past_key_values=past)
    for _ in range(12):
        decode(model, past, 8)
        assert all(sum(map(len, layer)) <= 64 * len(layer) for layer in kept(past))
    assert any(len({len(row) for row in layer}) > 1 for layer in kept(past)), "heads were meant to differ"


def test_short_turns_are_compressed_too():
    """A decoding compressor whose counter starts over with every short turn never acts."""
    model = served_model("llama")
    past = KVCache(model, "snapkv(window=16)", 64)
    model(TEXT[:, :100], past_key_values=past)
    for turn in range(10):
        model(MORE[:, 10 * turn : 10 * turn + 10], past_key_values=past)
        assert all(len(row) <= 64 for layer in kept(past) for row in layer)
    assert past.seen == [200]


def test_the_second_turn_is_compressed():
    """The tokens of a second turn are all kept, since only a first forward counts as a prompt."""
    model = served_model("llama")
    past = KVCache(model, "snapkv", "50%")
    model(TEXT, past_key_values=past)
    assert {len(row) for layer in kept(past) for row in layer} == {150}
    model(MORE, past_key_values=past)
    assert {len(row) for layer in kept(past) for row in layer} == {300}
    past = KVCache(model, "snapkv", 150)
    for text in (TEXT, MORE):
        model(text, past_key_values=past)
        assert {len(row) for layer in kept(past) for row in layer} == {150}


def test_generate_with_the_whole_conversation_feeds_only_the_new_tokens():
    """After compression the cache looks shorter than the text, so generate() feeds most of the text again."""
    model = tiny_model("llama")
    past = KVCache(model, "snapkv", 100)
    fed = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    first = model.generate(TEXT[:, :250], past_key_values=past, max_new_tokens=10, do_sample=False)
    fed.clear()
    model.generate(torch.cat([first, MORE[:, :50]], 1), past_key_values=past, max_new_tokens=2, do_sample=False)
    assert fed == [51, 1]  # the last answer token, which has not been fed yet, and the new message


def test_a_bare_forward_after_eviction_gets_the_next_position():
    """After compressing 300 tokens to 150 the next token is rotated as if it were token 150."""
    model = tiny_model("llama")
    past = KVCache(model, "snapkv", "50%")
    model(TEXT, past_key_values=past)
    positions = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    model(MORE[:, :1], past_key_values=past)
    model(MORE[:, 1:3], past_key_values=past)
    assert positions == [[[300]], [[301, 302]]]


def test_chunked_prefill_compresses_every_chunk():
    """With prefill_chunk_size only the first chunk is compressed, so half of 300 tokens becomes 251."""
    model = served_model("llama")
    past = KVCache(model, "snapkv", "50%")
    model.generate(TEXT, past_key_values=past, max_new_tokens=1, do_sample=False, prefill_chunk_size=100)
    assert {len(row) for layer in kept(past) for row in layer} == {150}


def test_prompt_lookup_speculation():
    """Prompt lookup agrees with plain greedy decoding on 5 tokens of 24 (see test_transformers for small budgets)."""
    model = served_model("llama")
    prompt = TEXT[:, :40].repeat(1, 4)
    plain = own_model("llama").generate(prompt, max_new_tokens=24, do_sample=False)
    past = KVCache(model, "snapkv", "1GiB")
    found = model.generate(prompt, past_key_values=past, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=5)
    assert torch.equal(found, plain)


def test_two_sessions_with_head_budgets():
    """Marks that are kept on the modules of the model let an unrelated prefill undo the compression of the first."""
    model = served_model("llama")
    policy = ("snapkv(window=16)+adakv", "30%")
    alone = KVCache(model, *policy)
    model(TEXT, past_key_values=alone)
    expected = model(MORE[:, :8], past_key_values=alone).logits
    for other_first in (False, True):
        one, other = KVCache(model, *policy), KVCache(model, *policy)
        for past, text in ((other, MORE), (one, TEXT)) if other_first else ((one, TEXT), (other, MORE)):
            model(text, past_key_values=past)
        assert torch.equal(model(MORE[:, :8], past_key_values=one).logits, expected)


def test_static_caches_stay_ordinary():
    """Compressing an ordinary static cache runs out of its bounds; here ordinary caches are left alone."""
    model = served_model("llama")
    ids = TEXT[:, :60]
    model(TEXT, past_key_values=KVCache(model, "snapkv", "50%"))
    options = {"max_new_tokens": 12, "do_sample": False}
    static = StaticCache(config=model.config, max_cache_len=80)
    found = model.generate(ids, past_key_values=static, disable_compile=True, **options)
    assert torch.equal(found, own_model("llama").generate(ids, **options))


def test_other_attention_functions_are_untouched():
    """Importing a compressor wraps every registered attention function, and flex attention breaks."""
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        modules = {name: registry[name].__module__ for name in registry.valid_keys()}
        assert modules.pop("kvbudget") == "kvbudget.attention"
        assert all(module.startswith("transformers.") for module in modules.values())
    attention = type(served_model("llama").model.layers[0].self_attn)
    assert attention.forward.__module__ == "transformers.models.llama.modeling_llama"


def test_a_quantized_cache_in_one_line():
    """The documented line that makes a 4-bit cache raises a TypeError."""
    model = served_model("llama")
    past = KVCache(model, "kivi(bits=4, residual=32)")
    out = model.generate(TEXT, past_key_values=past, max_new_tokens=40, do_sample=False)
    past.check_integrity()
    assert out.shape[1] == 340
    assert past.nbytes < past.report().full_bytes / 3


def test_a_prompt_that_is_shorter_than_the_window():
    """A 40-token prompt fails an assertion of a method whose window is 64 tokens long."""
    model = served_model("llama")
    past = KVCache(model, "snapkv(window=64)", 100)
    found = model.generate(TEXT[:, :40], past_key_values=past, max_new_tokens=24, do_sample=False)
    assert torch.equal(found, own_model("llama").generate(TEXT[:, :40], max_new_tokens=24, do_sample=False))
    assert {len(row) for layer in kept(past) for row in layer} == {63}
    with pytest.raises(BudgetError, match="give at least 65 tokens or lower window="):
        KVCache(model, "snapkv(window=64)", 40)


@pytest.mark.parametrize(
    "policy", ("snapkv+adakv+kivi(residual=32)", "snapkv+pyramidkv+adakv", "h2o+adakv", "kvzip+kivi")
)
def test_policies_compose(policy: str):
    """Compositions with budgets per head, or with reconstruction, fail an assertion."""
    model = served_model("llama")
    past = KVCache(model, policy, 100)
    past.prefill(model, TEXT)
    past.check_integrity()
    decode(model, past, 20)
    past.check_integrity()
    assert past.report().kept_entries <= 2 * 2 * (100 + 20)


def test_policies_that_contradict_each_other_are_refused():
    """Two scorers wrapped around each other are taken without a word."""
    with pytest.raises(PolicyError, match="snapkv and knorm both decide the scorer"):
        KVCache(served_model("llama"), "snapkv+knorm", 100)


def test_head_budgets_on_a_model_that_was_loaded_with_eager_attention():
    """Budgets per head refuse a model whose attention implementation is eager."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    past = KVCache(model, "snapkv+adakv", "50%")
    other = KVCache(served_model("llama"), "snapkv+adakv", "50%")
    assert torch.equal(
        model(TEXT, past_key_values=past).logits, served_model("llama")(TEXT, past_key_values=other).logits
    )
    assert kept(past) == kept(other)


def test_kvzip_with_two_sequences():
    """Reconstruction works for one sequence at a time only."""
    model, rows = served_model("llama"), [TEXT[:, :90], MORE[:, :140]]
    ids, mask = left_padded(rows)
    batch = KVCache(model, "kvzip", "40%")
    batch.prefill(model, ids, attention_mask=mask)
    for b, row in enumerate(rows):
        single = KVCache(model, "kvzip", "40%")
        single.prefill(model, row)
        assert [layer[b] for layer in batch.report().kept] == [layer[0] for layer in single.report().kept]


def test_kvzip_inside_generate_names_the_remedy():
    """Inside generate() reconstruction compresses only when the answer is complete."""
    model = served_model("llama")
    past = KVCache(model, "kvzip", "40%")
    with pytest.raises(PolicyError, match=r"cache\.prefill"):
        model.generate(TEXT, past_key_values=past, max_new_tokens=4)
    past.prefill(model, TEXT[:, :-1])
    assert past.report().kept_entries <= 0.4 * 2 * 2 * 300
    assert model.generate(TEXT, past_key_values=past, max_new_tokens=4, do_sample=False).shape[1] == 304


@pytest.mark.model
def test_kvzip_on_a_model_from_a_gguf_file(tmp_path: Path):
    """Reconstruction loads the tokenizer again, by a path that is none for a model from a GGUF file."""
    model, tokenizer = kvbudget.load("smollm2-135m")
    ids = tokenizer("The ferry to the island leaves at nine. " * 12, return_tensors="pt").input_ids
    past = KVCache(model, "kvzip", "40%")
    past.prefill(model, ids[:, :-1], tokenizer=tokenizer)
    past.check_integrity()
    out = model.generate(ids, past_key_values=past, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 4


def test_no_method_downloads_anything(monkeypatch: pytest.MonkeyPatch):
    """Methods that need files from the hub fail somewhere inside when these are not there."""

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = served_model("llama")
    for name, recipe in kvbudget.methods().items():
        if "calibration" in recipe.needs:
            with pytest.raises(PolicyError):
                KVCache(model, name, 200)
            continue
        parts = parse(name).parts()
        evicts = parts.scorer is not None or parts.plan is not None
        past = KVCache(model, name, 280 if evicts else None)
        past.prefill(model, TEXT)
        past.check_integrity()


ODD = "qwen3 qwen3_moe olmo2 cohere granite glm4 stablelm phi gpt_neox opt gpt2 smollm3 phi3"


@pytest.mark.parametrize("name", ODD.split())
def test_scores_are_those_of_the_models_real_attention(name: str):
    """Queries that are recomputed from hidden states miss query norms, interleaved rotations and odd scales."""
    window, budget = 16, 60
    own = tiny_model(name)
    own.set_attn_implementation("eager")
    weights = own(TEXT, output_attentions=True).attentions
    model = served_model(name)
    past = KVCache(model, f"snapkv(window={window}, kernel=5)", budget)
    model(TEXT, past_key_values=past)
    for found, weight in zip(kept(past), weights, strict=True):
        votes = weight[0, :, -window:].sum(1).unflatten(0, (len(found), -1)).mean(1)[:, :-window]
        pooled = torch.nn.functional.avg_pool1d(votes[:, None], 5, stride=1, padding=2)[:, 0]
        for head, positions in enumerate(found):
            best = pooled[head].topk(budget - window).indices.sort().values.tolist()
            assert positions == best + list(range(300 - window, 300))
