"""Capacity planning: what a budget buys for a model and a length of text, from its configuration alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvbudget.assembly import laid_out
from kvbudget.budget import Budget
from kvbudget.costs import entry_cost, overhead_bytes
from kvbudget.enforcer import Enforcer
from kvbudget.errors import BudgetError, PolicyError
from kvbudget.layer import LayerCache
from kvbudget.methods import parse
from kvbudget.models import CacheGeometry, check_supported
from kvbudget.policy.policy import MOST, Policy

LADDER = ("100%", "50%", "25%", "12%", "6%")
CODECS = {"none": "", "8 bits": "kivi(bits=8)", "4 bits": "kivi(bits=4)", "2 bits": "kivi(bits=2)"}


@dataclass(frozen=True)
class Purchase:
    """What one budget buys under one codec.

    ``entries`` per layer and KV head of each sequence (on average, where a policy shares them out), at most the context;
    ``nbytes`` of the whole batch that these entries take with everything that is stored beside them; ``fits`` says
    whether they fit into the memory that was named (None: none was). ``problem`` is why the budget cannot work.
    """

    budget: str
    codec: str
    policy: str
    entries: int
    share: float
    nbytes: int
    fits: bool | None
    problem: str | None = None


@dataclass(frozen=True)
class CapacityPlan:
    """A model's cache at a context length, and what budgets buy.

    ``full_bytes`` are the keys and values of an unbudgeted cache of ``batch`` sequences of ``context`` tokens;
    ``floor_bytes`` is what no budget can shrink (sliding windows, convolution and recurrent states).
    """

    model_type: str
    context: int
    batch: int
    dtype: str
    budgeted_layers: int
    other_layers: int
    num_kv_heads: int
    max_positions: int | None
    full_bytes: int
    floor_bytes: int
    memory: int | None
    purchases: list[Purchase]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def plan(
    config: PreTrainedConfig,
    context: int,
    *,
    memory: Budget | str | None = None,
    budgets: Sequence[Budget | str | float] = LADDER,
    policy: Policy | str = "snapkv",
    dtype: torch.dtype | None = None,
    batch: int = 1,
) -> CapacityPlan:
    """Prices ``context`` tokens of ``batch`` sequences under each of ``budgets`` and each codec.

    Args:
        config: of a model that kvbudget serves; no weights are needed.
        memory: bytes that the cache may take; it is priced as a budget too, and every purchase says whether it fits.
        policy: the evicting method, whose running scores cost bytes too.
        dtype: of keys and values (None: the one that the checkpoint declares).

    Raises:
        BudgetError, PolicyError, UnsupportedModel: in one line.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    >>> table = plan(config, 1000, budgets=["25%"])
    >>> table.full_bytes  # 2 layers, 2 KV heads, 8 + 8 elements of 4 bytes
    256000
    >>> [(p.codec, p.entries, p.nbytes) for p in table.purchases][:1]  # a position and a vote beside each entry
    [('none', 250, 72000)]
    """
    check_supported(config)
    if not (1 <= context <= MOST and 1 <= batch <= MOST):
        raise BudgetError(f"context {context} and batch {batch} must be from 1 to {MOST}")
    geometry = CacheGeometry.from_config(config)
    dtype = dtype or geometry.dtype
    limit = None if memory is None else Budget.parse(memory)
    if limit is not None and limit.kind != "bytes":
        raise BudgetError(f"memory {memory!r} must be bytes, such as '2GiB'")
    wanted = [Budget.parse(value) for value in budgets] + ([] if limit is None else [limit])
    if policy == "auto":
        raise PolicyError("policy auto chooses for a prompt; plan with an evicting method, such as snapkv")
    chosen = parse(policy)
    if any(recipe.calibrated for recipe in chosen.recipes):
        raise PolicyError(f"what {chosen} keeps depends on a calibration of the model; plan with another method")
    full_bytes = batch * geometry.cache_bytes(context, dtype.itemsize)
    geometry = laid_out(geometry, chosen.parts())
    overhead = overhead_bytes(config, dtype, geometry)
    purchases = []
    for budget in wanted:
        for codec, text in CODECS.items() if chosen.parts().codec is None else [("its own", "")]:
            priced = parse(f"{chosen}+{text}") if text else chosen
            enforcer = _enforcer(geometry, priced, budget, context, dtype, overhead, batch)
            if budget.kind == "bytes" and priced.prefill_peak == "full_prompt":
                problem = (
                    f"{priced} must hold the whole prompt first, so it cannot keep {budget}; give a fraction or tokens"
                )
                purchases.append(Purchase(str(budget), codec, str(priced), 0, 0.0, 0, None, problem))
                continue
            purchases.append(_purchase(enforcer, codec, context, batch, None if limit is None else int(limit.amount)))
    return CapacityPlan(
        model_type=config.model_type,
        context=context,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        budgeted_layers=len(geometry.budgeted_layers),
        other_layers=geometry.num_layers - len(geometry.budgeted_layers),
        num_kv_heads=geometry.layers[geometry.budgeted_layers[0]].num_kv_heads,
        max_positions=geometry.max_positions,
        full_bytes=full_bytes,
        floor_bytes=batch * overhead,
        memory=None if limit is None else int(limit.amount),
        purchases=purchases,
    )


def _enforcer(
    geometry: CacheGeometry,
    policy: Policy,
    budget: Budget,
    context: int,
    dtype: torch.dtype,
    overhead: int,
    batch: int,
) -> Enforcer:
    """The enforcer that a cache with this budget would have, over empty layers."""
    parts = policy.parts()
    if parts.scorer is None:
        raise PolicyError(
            f"{policy} keeps every entry, so a budget buys nothing; add an evicting method, such as snapkv"
        )
    layers = [LayerCache(index, geometry.layers[index].num_kv_heads) for index in geometry.budgeted_layers]
    for layer in layers:
        layer.start(batch)
    return Enforcer(str(policy), parts, budget, layers, entry_cost(geometry, parts, dtype), overhead, context)


def _purchase(enforcer: Enforcer, codec: str, context: int, batch: int, limit: int | None) -> Purchase:
    budget, policy = enforcer.budget, enforcer.text
    try:
        enforcer.check(batch)
    except BudgetError as error:
        return Purchase(str(budget), codec, policy, 0, 0.0, 0, None if limit is None else False, str(error))
    entries = min(context, int(enforcer.mean_entries(context)))
    nbytes = _smallest_bytes(enforcer, entries, context, batch)
    fits = None if limit is None else nbytes <= limit
    return Purchase(str(budget), codec, policy, entries, entries / context, nbytes, fits)


def _smallest_bytes(enforcer: Enforcer, entries: int, context: int, batch: int) -> int:
    """The smallest byte budget that buys so many entries, by the rule that the cache itself follows."""
    rows = batch * sum(layer.num_kv_heads for layer in enforcer.layers)
    upper = int(rows * (enforcer.cost.fixed + (entries + 1) * enforcer.cost.per_entry)) + batch * enforcer.overhead + 1

    def bought(nbytes: int) -> int:
        enforcer.budget = Budget("bytes", nbytes)
        return int(enforcer.mean_entries(context))

    while bought(upper) < entries:
        upper *= 2
    return max(1, bisect_left(range(upper), entries, lo=1, key=bought))
