"""policy="auto": rules for what is known beforehand, and measurements for the rest."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from kvbudget.budget import Budget
from kvbudget.costs import entry_cost, overhead_bytes
from kvbudget.errors import PolicyError
from kvbudget.methods import parse, registry
from kvbudget.models import CacheGeometry, fingerprint

QUANTIZED = "kivi(bits=4)"
"""What is tried before anything is evicted: KIVI's authors advise 4 bits for grouped-query models."""


FALLBACK_SHARE = 0.25
"""The share of the text that is assumed to fit where neither its length nor a fraction is known."""


class Choice(NamedTuple):
    """A policy as text, and why it was picked."""

    policy: str
    reason: str


def choose(
    model: PreTrainedModel,
    budget: Budget,
    *,
    length: int | None = None,
    new_tokens: int = 0,
    question_visible: bool | None = None,
    can_prefill: bool = False,
) -> Choice:
    """Picks a policy by the first rule that applies.

    1. No budget, or a budget that holds all ``length + new_tokens`` tokens: the full cache.
    2. Bytes that hold all of them at 4 bits: quantization, since nothing has to leave.
    3. A budget too small for an observation window: sinks and recent tokens.
    4. More tokens to be generated than there is prompt: votes of the newest tokens, which go on while decoding.
    5. Otherwise the policy that lost least where the same was known about the question and the nearest share of the text
       was kept (`table`), among those that this budget and this caller can use.

    In 4 and 5, what stays is quantized too, where bytes then hold more than twice as many entries.

    Args:
        model: the model to be served, for the bytes of an entry and for its calibrations.
        length: prompt tokens of one sequence, where known.
        new_tokens: tokens that will be generated, where known.
        question_visible: whether the compressed text ends with what will be asked (None: not known).
        can_prefill: whether the caller goes through `KVCache.prefill`, which plans need.
    """
    if budget.kind == "none":
        return Choice("full", "no budget, so every entry stays")
    total = None if length is None else length + new_tokens
    room = _entries(model, budget, "full", total)
    if total is not None and room >= total:
        return Choice("full", f"all {total} tokens fit into {budget}")
    if budget.kind == "bytes" and total is not None and _entries(model, budget, QUANTIZED, total) >= total:
        return Choice(QUANTIZED, f"all {total} tokens fit into {budget} at 4 bits, so nothing has to leave")
    share = "" if total is None else f" and {min(1.0, room / total):.0%} of the text fits"
    coded = _entries(model, budget, QUANTIZED, total) if budget.kind == "bytes" else 0.0
    if max(room, coded) < 2 * _window():
        return Choice("streaming_llm", f"room for {int(room)} tokens is too little to observe a window of queries")
    codec, also = (f"+{QUANTIZED}", "; 4 bits hold more than twice as many") if coded > 2 * room else ("", "")
    if length is not None and new_tokens > length:
        return Choice(
            f"snapkv{codec}", f"most tokens are still to be generated{share}: votes go on while decoding{also}"
        )
    known = "nothing is known about the question"
    if question_visible is not None:
        known = "the question is visible" if question_visible else "the question is unknown"
    kept = max(room, coded) if codec else room
    fraction = FALLBACK_SHARE if total is None else min(1.0, kept / total)
    if budget.kind == "fraction":
        fraction = budget.amount
    situation = nearest_situation(fraction, bool(question_visible))
    for policy in situation["policies"]:
        if _usable(model, policy + codec, budget, kept, can_prefill=can_prefill):
            tested = f"measured best of what can run here, at {situation['share']:.0%}"
            return Choice(policy + codec, f"{known}{share}: {tested}{also}")
    return Choice(
        f"snapkv{codec}", f"{known}{share}: the newest tokens vote, as nothing that was measured can run here"
    )


def table() -> list[dict[str, Any]]:
    """What was measured: situations with ``visible``, ``share`` and ``policies`` by name, best first.

    ``kvbudget report --auto`` writes the file from the results of a bench.
    """
    found: list[dict[str, Any]] = _measured()["situations"]
    return found


def divergences() -> dict[str, str]:
    """The mean KL of each method by budget, as text, from the same file."""
    found: dict[str, str] = _measured()["divergences"]
    return found


def at_equal_bytes() -> dict[str, str]:
    """Each method's KL over that of dropping entries at random inside the same bytes, as text, from the same file."""
    found: dict[str, str] = _measured().get("equal_bytes", {})
    return found


@cache
def _measured() -> dict[str, Any]:
    text = resources.files("kvbudget").joinpath("auto_table.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def nearest_situation(share: float, visible: bool) -> dict[str, Any]:
    """The measured situation whose share of the text is nearest by ratio; a question not known to be visible is unknown."""
    rows = [row for row in table() if row["visible"] == visible]
    return min(rows, key=lambda row: abs(math.log(row["share"] / max(share, 1e-6))))


def _usable(model: PreTrainedModel, policy: str, budget: Budget, room: float, *, can_prefill: bool) -> bool:
    """Whether a measured policy can run for this caller inside this budget."""
    try:
        parsed = parse(policy)
        parts = parsed.parts()
    except PolicyError:
        return False
    hard = budget.kind == "bytes"
    if "plan" in parsed.needs and not can_prefill:
        return False
    if (hard and parsed.prefill_peak == "full_prompt") or "driver" in parsed.needs:
        return False
    if "calibration" in parsed.needs and not set(parsed.names) & set(calibrated(model)):
        return False
    return parts.protect.sinks + parts.protect.firm < room


def calibrated(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the methods that need a calibration and have one for this model."""
    kinds = [kind for kind in registry().values() if "calibration" in kind.needs]
    mark = fingerprint(model) if kinds else ""
    found = []
    for kind in kinds:
        try:
            kind().bind(mark)
        except PolicyError:
            continue
        found.append(kind.name)
    return tuple(found)


def _window() -> int:
    """Entries that the observation window protects."""
    return parse("snapkv").parts().protect.recent


def _entries(model: PreTrainedModel, budget: Budget, policy: str, total: int | None) -> float:
    """Entries per layer and KV head of one sequence that ``policy`` can hold inside the budget."""
    if budget.kind == "tokens":
        return budget.amount
    if budget.kind == "fraction":
        return float("inf") if total is None else budget.amount * total
    geometry = CacheGeometry.from_config(model.config)
    cost = entry_cost(geometry, parse(policy).parts(), model.dtype)
    rows = sum(geometry.layers[index].num_kv_heads for index in geometry.budgeted_layers)
    payload = budget.amount - overhead_bytes(model.config, model.dtype)
    return max(0.0, (payload / rows - cost.fixed) / cost.per_entry)
