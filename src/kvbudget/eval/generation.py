"""Generation: a greedy answer from a filled cache, for tasks whose answers are graded as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.cache import KVCache


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KVCache,
    question: Tensor,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> str:
    """Greedy answer to ``question [n]`` after what a filled cache has seen; the cache is left as it was (a fork answers).

    Ends at an end-of-text token, at ``max_new_tokens``, or at the first of the ``stop`` texts, which is cut off.
    """
    fork = cache.fork()
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends, tokenizer.eos_token_id}
    feed = question[None].to(model.device)
    answer: list[int] = []
    text = ""
    for _ in range(max_new_tokens):
        token = int(model(feed, past_key_values=fork, logits_to_keep=1).logits[0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        if found := [text.index(mark) for mark in stop if mark in text]:
            return text[: min(found)]
        feed = torch.tensor([[token]], device=model.device)
    return text
