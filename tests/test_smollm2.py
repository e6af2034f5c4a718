"""The main job on the real model: greedy answers after a long prompt are those of transformers' own cache."""

from importlib import import_module

import pytest
import torch
from transformers import DynamicCache

import kvbudget
from kvbudget import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.eval.replay import record, replay
from kvbudget.eval.texts import passages
from kvbudget.methods import registry

pytestmark = [pytest.mark.model, pytest.mark.slow]
PROMPT, NEW = 2048, 64
STEPS = [1] * 7 + [7] * 8  # new tokens per forward: single steps and short blocks, NEW - 1 in all
# These need an artefact of the model, which `kvbudget calibrate` makes.
LOSSLESS = [name for name, kind in registry().items() if kind.lossless_when_fits and "calibration" not in kind.needs]


@pytest.fixture(scope="module")
def smollm2():
    return kvbudget.load("smollm2-135m")


@pytest.fixture(scope="module")
def prompt(smollm2):
    (ids,) = passages(smollm2[1], PROMPT, 1, seed=0, source="prose")
    return ids[None]


@pytest.fixture(scope="module")
def plain(smollm2, prompt):
    """What the model answers with its own sdpa attention and cache."""
    model, _ = smollm2
    model.set_attn_implementation("sdpa")
    return greedy(model, DynamicCache(config=model.config), prompt)


@pytest.fixture(scope="module")
def recording(smollm2, prompt, plain):
    return record(smollm2[0], prompt)


@torch.inference_mode()
def greedy(model, cache, ids) -> list[int]:
    """The most likely next token, ``NEW`` times, fed one by one."""
    tokens = []
    for _ in range(NEW):
        ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


def test_plain_generate_is_transformers_own(smollm2, prompt, plain):
    model, _ = smollm2
    cache = KVCache(model, "snapkv", "1GiB")
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=NEW, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert out[0, PROMPT:].tolist() == plain
    cache.check_integrity()


@pytest.mark.parametrize("setting", import_module("kvbudget.cli.demo").SETTINGS)
def test_the_demos_budgets_hold_the_longest_text_that_it_may_find(smollm2, setting):
    policy, _, budget = setting.rpartition("@")
    KVCache(smollm2[0], policy, budget).enforcer.admit([4096 + 100])  # the text, the question and the answer


@pytest.mark.parametrize("name", [*LOSSLESS, "razor_attention"])
def test_every_lossless_recipe_answers_as_the_full_cache_while_everything_fits(
    smollm2, prompt, plain, recording, tmp_path, name
):
    """Each token of the full cache's answer is the most likely one here too, so greedy decoding gives the same answer."""
    model, _ = smollm2
    if name == "razor_attention":
        path = calibrate(name, model, tmp_path / "heads.safetensors", block=128, repeats=2)
        name = f"razor_attention(heads={str(path)!r})"
    cache = replay(recording, KVCache(model, name, PROMPT + NEW + 1))
    found = [int(recording.logits.argmax(-1))]
    with torch.inference_mode():
        for tokens in torch.tensor([plain[:-1]]).split(STEPS, dim=1):
            found += model(tokens, past_key_values=cache).logits[0].argmax(-1).tolist()
    assert found == plain
    assert cache.report().evictions == 0
