"""kvbudget.speculate: greedy decoding whose drafts read a part of the cache's bits (QuantSpec, arXiv 2502.10424)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.codecs.nested import Refined
from kvbudget.errors import PolicyError
from kvbudget.segments.quantized import QuantizedSegment


@dataclass(frozen=True)
class Speculation:
    """New tokens, and how many of those that were drafted the whole cache agreed to."""

    token_ids: tuple[int, ...]
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted (0 without any)."""
        return self.accepted / self.drafted if self.drafted else 0.0


@torch.inference_mode()
def speculate(
    model: PreTrainedModel, cache: KVCache, input_ids: Tensor, max_new_tokens: int = 64, draft_tokens: int = 4
) -> Speculation:
    """Continues ``input_ids [1, T]`` greedily: drafts from the upper bits of the cache, verified by all of them.

    Each turn drafts ``draft_tokens`` tokens on a fork that reads the upper four bits alone, feeds them to the cache in one
    forward and keeps the longest beginning on which both agree, and the cache's own next token. The answer is what the
    cache would give without drafts, but that tokens of one turn are coded together. An end-of-text token ends it.

    Args:
        cache: of a policy with nested codes (``quantspec``); it may have seen a beginning of ``input_ids``.

    Raises:
        PolicyError: when nothing of the cache's policy can be read in fewer bits.
        CacheError: as for ``generate`` and `KVCache.crop`.
    """
    if not any(isinstance(codec, Refined) for codec in cache.parts.codec or ()):
        raise PolicyError(f"{cache.policy} has no codes that a draft could read a part of; use quantspec")
    numbers = (max_new_tokens, draft_tokens)
    if len(input_ids) != 1 or not all(type(number) is int and number > 0 for number in numbers):
        raise PolicyError(
            f"{len(input_ids)} sequences, max_new_tokens={max_new_tokens}, draft_tokens={draft_tokens}: give one sequence at "
            "a time, and whole numbers from 1 on"
        )
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    token = int(cache.prefill(model, input_ids)[0].argmax())
    new, drafted, accepted = [token], 0, 0
    while len(new) < max_new_tokens and new[-1] not in stops:
        draft = _drafts(model, drafting(cache), new[-1], min(draft_tokens, max_new_tokens - len(new) - 1))
        cache.activate_past_recording()
        fed = torch.tensor([[new[-1], *draft]], device=input_ids.device)
        verdict = model(fed, past_key_values=cache).logits[0].argmax(-1).tolist()
        pairs = enumerate(zip(draft, verdict, strict=False))
        agreed = next((i for i, (mine, its) in pairs if mine != its or mine in stops), len(draft))
        cache.crop(agreed - len(draft))
        cache._record(False)
        drafted, accepted = drafted + len(draft), accepted + agreed
        new += [*draft[:agreed], verdict[agreed]]
    return Speculation(tuple(new), drafted, accepted)


def drafting(cache: KVCache) -> KVCache:
    """A fork that reads the upper bits of nested codes alone; it shares their memory."""
    fork = cache.fork()
    for layer in fork.enforcer.layers:
        for segment in layer.segments:
            if isinstance(segment, QuantizedSegment):
                for store in (segment.key, segment.value):
                    if isinstance(store.codec, Refined):
                        store.codec = replace(store.codec, draft=True)
    return fork


def _drafts(model: PreTrainedModel, fork: KVCache, token: int, count: int) -> list[int]:
    tokens = [token]
    for _ in range(count):
        fed = torch.tensor([tokens[-1:]], device=model.device)
        tokens.append(int(model(fed, past_key_values=fork).logits[0, -1].argmax()))
    return tokens[1:]
