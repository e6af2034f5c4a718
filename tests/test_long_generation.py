"""A long answer under a fixed budget: memory stays constant, and steps do not get slower."""

import time
from statistics import median

import pytest
import torch
from transformers import StoppingCriteria

from kvbudget import KVCache
from tiny import random_text, tiny_model

POLICIES = (
    "snapkv(window=16)",
    "h2o",
    "tova",
    "streaming_llm",
    "streaming_llm(positions=cache)",
    "roco",
    "expected_attention",
    "snapkv(window=16)+adakv",
    "streaming_llm+kivi(bits=4, residual=32)",
    "snapkv(window=16)+adakv+kivi(bits=2, residual=32)",
)


class Gauge(StoppingCriteria):
    """Notes the bytes of the cache and the processor time of this thread after every step."""

    def __init__(self, past: KVCache) -> None:
        self.past = past
        self.sizes: list[int] = []
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.sizes.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in self.past.tensors()}.values()))
        self.moments.append(time.thread_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generate(policy: str, budget: object, tokens: int) -> tuple[KVCache, Gauge]:
    model = tiny_model("llama", max_position_embeddings=4096)
    past = KVCache(model, policy, budget)
    gauge = Gauge(past)
    model.generate(
        random_text(400), past_key_values=past, max_new_tokens=tokens, do_sample=False, stopping_criteria=[gauge]
    )
    past.check_integrity()
    assert past.seen == [400 + tokens - 1]
    return past, gauge


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_stays_constant(policy: str):
    gauge = generate(policy, "48KiB", 120)[1]
    assert max(gauge.sizes) <= 48 * 2**10
    # Where evictions and codings meet, a step may need a little more room than all before it.
    assert max(gauge.sizes[60:]) <= 1.02 * max(gauge.sizes[:60])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        ("h2o", 96),
        ("streaming_llm(positions=cache)", "48KiB"),
        ("snapkv(window=16)+adakv", 96),
        ("snapkv(window=16)+adakv+kivi(bits=2, residual=32)", "48KiB"),
    ],
)
def test_two_thousand_tokens_take_constant_memory_and_time_per_step(policy: str, budget: object):
    drifts: list[float] = []
    # What else the machine has to do slows a stretch of steps, too.
    while not drifts or (drifts[-1] > 1.6 and len(drifts) < 3):
        gauge = generate(policy, budget, 2000)[1]
        assert max(gauge.sizes[1500:]) <= max(gauge.sizes[:500])
        steps = [after - before for before, after in zip(gauge.moments, gauge.moments[1:], strict=False)]
        drifts.append(median(steps[-500:]) / median(steps[:500]))
    assert min(drifts) <= 1.6
