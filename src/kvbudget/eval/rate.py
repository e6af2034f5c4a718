"""Rate and distortion of codecs: true bits per element, from what is stored, against the distance from the full cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.attending import AttentionLayer
from kvbudget.cache import KVCache
from kvbudget.codecs.base import Codec, Stage
from kvbudget.codecs.joint import JointCodec
from kvbudget.errors import KVBudgetError, PolicyError
from kvbudget.eval.fidelity import Fidelity, compare_logits, continuation_logits
from kvbudget.eval.replay import Recording, replay
from kvbudget.methods import parse, registry
from kvbudget.segments.base import Segment
from kvbudget.segments.joint import JointSegment
from kvbudget.segments.quantized import QuantizedSegment
from kvbudget.segments.ragged import RaggedTable

WIDTHS = (4, 3, 2, 1)


def true_bits(cache: KVCache, plain: int = 0) -> float:
    """Stored bits per element of the held keys and values: codes, scales, row states and full-precision entries.

    Positions, score states and room for entries to come are left out. Elements in full precision count ``plain`` bits (0: as
    they are stored), for models that run in another format than they were trained in.
    """
    bits, elements = 0.0, 0
    for layer in cache.layers:
        if isinstance(layer, AttentionLayer):
            for segment in layer.store.segments:
                if segment.longest:
                    bits += 8 * stored_bytes(segment, plain)
                    elements += sum(segment.lengths) * _width(segment)
    return bits / max(elements, 1)


def stored_bytes(segment: Segment, plain: int = 0) -> float:
    """Bytes of keys and values in a segment, without spare room; ``plain`` as in `true_bits`."""
    if not isinstance(segment, (QuantizedSegment, JointSegment)):
        return sum(_cells(segment.meta, (name,), plain) for name in ("key", "value"))
    full = [segment.first, segment.tail] if isinstance(segment, JointSegment) else []
    states: list[Tensor] = []
    if isinstance(segment, QuantizedSegment):
        states = [*segment.key.state.values(), *segment.value.state.values()]
        states += [] if segment.balance is None else [segment.balance]
        full = [table for store in (segment.key, segment.value) for table in (store.first, store.tail)]
    known: float = sum(state.numel() * state.element_size() for state in states)
    coded = [table for table in segment.tables() if table is not segment.meta and not any(table is x for x in full)]
    known += sum(_cells(table, tuple(table.columns)) for table in coded)
    return known + sum(_cells(table, tuple(table.columns), plain) for table in full)


def expected_bits(codec: Codec, width: int, entries: int, itemsize: int) -> float:
    """What a row of ``entries`` should store per element, by the codec's own formula, its tail and first entries included.

    For a text that came in one forward.
    """
    over = entries - codec.sinks - (0 if codec.cyclic else codec.residual)
    coded = max(0, over) // codec.lump * codec.lump
    stored = coded * codec.bytes_per_entry(width) + (entries - coded) * width * itemsize
    return 8 * (stored + (codec.state_bytes(width) if coded else 0)) / (entries * width)


def measure(
    model: PreTrainedModel,
    recording: Recording,
    policy: str,
    continuation: Tensor,
    full: Tensor,
    budget: int | str | None = None,
) -> tuple[float, Fidelity]:
    """True bits after the recorded context under a policy, and how its next-token logits differ from ``full [n, V]``.

    Elements in full precision count 16 bits at most, as checkpoints have them.
    """
    cache = replay(recording, KVCache(model, policy, budget))
    logits = continuation_logits(model, cache, recording.logits, continuation)
    return true_bits(cache, min(16, 8 * model.dtype.itemsize)), compare_logits(full, logits, continuation[0])


def codecs(model: PreTrainedModel) -> list[str]:
    """Every registered method that only codes, in each of `WIDTHS` that it takes; those without a calibration are left out."""
    found = []
    for name, kind in registry().items():
        if kind.role != "codec" or "scorer" in kind().defaults():
            continue
        texts = [f"{name}(bits={bits})" for bits in WIDTHS] if "bits" in kind.parameters() else [name]
        for text in texts:
            try:
                policy = str(parse(text))
                KVCache(model, policy)
            except (PolicyError, KVBudgetError):
                continue
            found.append(policy)
    return list(dict.fromkeys(found))


def _width(segment: Segment) -> int:
    """Channels of a key and a value, of all layers that are held together."""
    if isinstance(segment, JointSegment):
        return sum(segment.tail.columns[name].shape[-1] for name in ("key", "value"))
    if isinstance(segment, QuantizedSegment):
        return sum(store.tail.columns["data"].shape[-1] for store in (segment.key, segment.value))
    return sum(segment.meta.columns[name].shape[-1] for name in ("key", "value"))


def _cells(table: RaggedTable, names: tuple[str, ...], bits: int = 0) -> float:
    sizes = (table.columns[name][:1] for name in names)
    return table.total * sum(torch.numel(cell) * (bits / 8 or cell.element_size()) for cell in sizes)


def declared(width: int = 128) -> list[str]:
    """What each codec of the registry says of itself, a Markdown row each.

    Whether keys are coded before RoPE, the granules of keys and values (entries), their full-precision windows, what is
    coded by itself, the calibration, and bits per coded element of keys and values at this head dimension (a dash where
    these follow from the calibration).
    """
    rows = []
    for name, kind in registry().items():
        if kind.role != "codec":
            continue
        parts = kind().parts()
        codec = parts["codec"] if "codec" in parts else 2 * (parts["sharing"].codec,)
        bits = [f"{8 * side.bytes_per_entry(width) / width:.3g}" if isinstance(side, Codec) else "-" for side in codec]
        phase = "before" if codec[0].before_rope else "after"
        granules, windows = (" / ".join(str(getattr(side, what)) for side in codec) for what in ("unit", "residual"))
        needs = next((found for side in codec if (found := _innermost(side).calibrated)), "none")
        rows.append(
            f"| `{name}` | {phase} | {granules} | {windows} | {codec[0].scope} | {needs} | {' / '.join(bits)} |"
        )
    return rows


def _innermost(codec: Codec | JointCodec) -> Codec | JointCodec:
    """The codec inside of all stages."""
    while isinstance(codec, Stage):
        codec = codec.base
    return codec
