"""Fidelity without labels: how far a compressed cache's next-token distributions are from the full cache's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.layer import AttentionCall

# Rounding alone gives about this much in float32; below it a logarithm would compare noise.
KL_FLOOR = 1e-7


@dataclass(frozen=True)
class Fidelity:
    """Differences over the tokens of one teacher-forced continuation.

    ``kl_mean``, ``kl_p95``: KL(full || compressed) in nats, mean and 95th percentile over tokens; ``agreement``: share of
    tokens with the same most likely next token; ``nll_rise``: rise of the mean negative log-likelihood of the text in
    nats (its exponential is the perplexity ratio).
    """

    kl_mean: float
    kl_p95: float
    agreement: float
    nll_rise: float
    tokens: int

    @property
    def log_kl(self) -> float:
        """Natural logarithm of ``kl_mean``, not below that of `KL_FLOOR`; its mean over texts compares methods best."""
        return math.log(max(self.kl_mean, KL_FLOOR))

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the continuation relative to the full cache's."""
        return math.exp(self.nll_rise)


def compare_logits(full: Tensor, compressed: Tensor, targets: Tensor) -> Fidelity:
    """Compares next-token logits ``[n, V]`` position by position; ``targets [n]`` are the text's next tokens.

    >>> same = torch.randn(3, 5)
    >>> compare_logits(same, same, torch.tensor([0, 1, 2])).agreement
    1.0
    """
    p, q = full.float().log_softmax(-1), compressed.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
    nll = -q.gather(-1, targets[:, None]) + p.gather(-1, targets[:, None])
    return Fidelity(
        kl_mean=float(kl.mean()),
        kl_p95=float(kl.quantile(0.95)),
        agreement=float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        nll_rise=float(nll.mean()),
        tokens=int(targets.numel()),
    )


@torch.inference_mode()
def continuation_logits(
    model: PreTrainedModel, cache: KVCache, last_logits: Tensor, continuation: Tensor, *, step: int | None = None
) -> Tensor:
    """Next-token logits ``[n, V]`` for the n tokens of ``continuation [1, n]`` after a filled cache.

    Row i predicts token i: row 0 is ``last_logits [1, V]`` of the context's last token. The cache is left as it was (the
    tokens go through a fork). ``step`` feeds that many tokens per forward (None: all at once), for policies that act
    while decoding.
    """
    fork = cache.fork()
    rows = [last_logits.float()]
    count = continuation.shape[1] - 1
    width = step or max(count, 1)
    for begin in range(0, count, width):
        out = model(continuation[:, begin : min(begin + width, count)], past_key_values=fork).logits[0]
        rows.append(out.float())
    return torch.cat(rows)


@torch.inference_mode()
def attention_calls(model: PreTrainedModel, full: KVCache, continuation: Tensor) -> dict[int, AttentionCall]:
    """What each attention layer is asked while ``continuation [1, n]`` follows a full cache, which is left as it was."""
    calls: dict[int, AttentionCall] = {}

    def keep(index: int, call: AttentionCall, lse: Tensor, own: Tensor) -> None:
        calls[index] = call

    watched = full.fork()
    watched.probing = keep
    model(continuation, past_key_values=watched, logits_to_keep=1)
    return calls


@torch.inference_mode()
def attention_errors(calls: dict[int, AttentionCall], full: KVCache, compressed: KVCache) -> list[float]:
    """Relative error ``|out - out_full| / |out_full|`` of each attention layer's output for the queries of ``calls``.

    Every layer gets the queries that it would get with the full cache, so errors do not add up over layers. A diagnostic
    of where a policy loses; across methods it does not order quality. Both caches must stand after the same context and
    are left as they were.
    """
    exact, close = _answers(calls, full), _answers(calls, compressed)
    return [float((other - one).norm() / one.norm()) for one, other in zip(exact, close, strict=True)]


def _answers(calls: dict[int, AttentionCall], cache: KVCache) -> list[Tensor]:
    """What a cache answers to calls, layer by layer as in a forward: layers may share, project or predict one another."""
    fork = cache.fork()
    fork.probing = lambda *_: None
    return [fork.attend(index, replace(call), None, None).float() for index, call in calls.items()]
