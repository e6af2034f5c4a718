"""Comparisons: one prompt under several budgets, and how far each is from the full cache on the full cache's answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import KVBudgetError
from kvbudget.eval.fidelity import Fidelity, compare_logits, continuation_logits
from kvbudget.generate import Generation, Message, generate
from kvbudget.policy.base import Recipe
from kvbudget.policy.policy import Policy

Setting = tuple[Policy | Recipe | str | Path, Budget | str | float | None]


# Stands for the minus infinity of tokens that generate() rules out, which would make the divergence undefined.
LOWEST = -1e30


@dataclass(frozen=True, eq=False)
class Run:
    """One generation of a comparison.

    ``fidelity`` compares the next-token distributions of this cache with those of the full one, over the tokens of the
    full cache's answer, which is fed to both (None for the full cache itself).
    """

    generation: Generation
    fidelity: Fidelity | None = None


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    settings: Sequence[Setting],
    *,
    begin: Callable[[str, str], None] | None = None,
    **options: Any,
) -> Iterator[Run]:
    """Answers a prompt greedily with the full cache first, then under each ``(policy, budget)`` of ``settings``.

    The full cache's answer is teacher-forced through each budgeted cache, token by token as in decoding, from where the
    prompt has been seen; so the figures do not depend on where two answers part. The budgeted cache answers on its own as
    well. Runs are yielded as they end; one that was interrupted is the last.

    Args:
        begin: called with policy and budget (as text) before each run.
        **options: as for `generate`; sampling is refused, since it would compare chances.

    Raises:
        KVBudgetError: see `generate`.
    """
    if options.get("do_sample"):
        raise KVBudgetError(
            "a comparison needs greedy answers; leave out do_sample (on the command line: --temperature)"
        )
    reference: Tensor | None = None
    answer = torch.empty(1, 0)
    for policy, budget in [("full", None), *settings]:
        if begin is not None:
            begin(str(policy), str(Budget.parse(budget)))
        stood: list[tuple[KVCache, Tensor]] = []

        def keep(cache: KVCache, logits: Tensor, stood: list[tuple[KVCache, Tensor]] = stood) -> None:
            # Not a fork: the run that is being measured would then attend in two pieces and copy on its first write.
            stood.append((copy.deepcopy(cache), logits.clamp_min(LOWEST)))

        generation = generate(model, tokenizer, prompt, policy=policy, budget=budget, ready=keep, **options)
        if generation.interrupted:
            yield Run(generation)
            return
        if reference is None:
            answer = torch.tensor([generation.token_ids], device=model.device)
            reference = continuation_logits(model, *stood[0], answer, step=1)
            yield Run(generation)
        else:
            forced = continuation_logits(model, *stood[0], answer, step=1)
            yield Run(generation, compare_logits(reference, forced, answer[0]))
