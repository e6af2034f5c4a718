"""cache.save and KVCache.load: which policy, budget and model a file is for, and which codec it was written with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvbudget.assembly import with_trigger
from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import CacheError, nearest
from kvbudget.models import fingerprint
from kvbudget.storage import coded, container
from kvbudget.storage.state import pack, unpack

CODECS = ("raw", "kvtc")


@dataclass(frozen=True)
class Saved:
    """A file that a cache was saved to.

    ``nbytes`` of the file stand for ``cache_bytes`` of resident tensors. Of these ``coded_bytes`` were transform-coded into
    ``stream_bytes`` (0 for a raw file); the rest is stored as it is.
    """

    path: Path
    nbytes: int
    cache_bytes: int
    coded_bytes: int = 0
    stream_bytes: int = 0

    @property
    def coded_ratio(self) -> float:
        """Bytes of the coded keys and values over those of their stream (0 where nothing was coded)."""
        return self.coded_bytes / self.stream_bytes if self.stream_bytes else 0.0


def save(cache: KVCache, path: str | Path, codec: str = "raw", **options: Any) -> Saved:
    """Writes a cache to a file, from which `load` goes on; the cache itself stays as it is.

    ``raw`` keeps every bit, in any state and under any policy. ``kvtc`` (KV cache transform coding, arXiv 2511.01815) codes the
    keys and values that all layers and heads hold in full precision, but for the first and the newest tokens; it needs
    ``kvbudget calibrate kvtc`` once per model and the package constriction. What else the cache holds stays exact.

    Args:
        codec: ``raw`` or ``kvtc``.
        ratio: of kvtc: how many times smaller the coded keys and values shall be than in the cache (default 20).
        sinks, recent: of kvtc: first and newest tokens that stay exact (paper: 4 and 128).
        calibration: of kvtc: the artifact, if it is not where ``kvbudget calibrate`` puts it.

    Raises:
        CacheError: for a broken cache, a speculation under way, an unknown codec, nothing to code, or a file that cannot be
            written.
        PolicyError: when kvtc has not been calibrated for the model.
    """
    if codec not in CODECS:
        raise CacheError(f"codec {codec!r} is not known{nearest(codec, CODECS)}")
    if codec == "raw" and options:
        raise CacheError(f"codec raw takes no options, got {', '.join(options)}; they belong to kvtc")
    cache._usable()
    if cache.pending or cache.recording:
        raise CacheError("a speculation is under way; say with cache.crop() what stays before the cache is saved")
    state, tensors = pack(cache)
    header: dict[str, Any] = {
        "policy": str(cache.policy),
        "budget": asdict(cache.budget) if cache.budget.kind != "none" else None,
        "max_length": cache.enforcer.max_length,
        "protect": cache.enforcer.spans,
        "when": _when(cache),
        "reason": cache.reason,
        "model": type(cache.model).__name__,
        "fingerprint": fingerprint(cache.model),
        "dtype": str(cache.dtype).removeprefix("torch."),
        "codec": codec,
        "state": state,
    }
    held, stream = 0, 0
    if codec == "kvtc":
        header["coded"], held, stream = coded.encode(cache, state, tensors, coded.Options.of(options))
    nbytes = container.write(Path(path), header, tensors)
    return Saved(Path(path), nbytes, cache.nbytes, held, stream)


def load(path: str | Path, model: PreTrainedModel, *, calibration: str | Path | None = None) -> KVCache:
    """A cache that goes on where the saved one stood, with its policy and its budget.

    ``calibration`` is the artifact that a kvtc file was saved with, if it is not where ``kvbudget calibrate`` puts it.

    Raises:
        CacheError: when the file is no saved cache, is damaged, or holds the entries of another model or number format.
    """
    header, tensors = container.read(Path(path))
    if header["fingerprint"] != fingerprint(model):
        raise CacheError(
            f"{path} holds a cache of another model ({header['model']}, fingerprint {header['fingerprint']}); load that model"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if header["dtype"] != dtype:
        raise CacheError(
            f"{path} holds {header['dtype']} entries, the model runs in {dtype}; load it in {header['dtype']}"
        )
    cache = KVCache(
        model,
        header["policy"],
        None if header["budget"] is None else Budget(**header["budget"]),
        max_length=header["max_length"],
        protect=[(start, end) for start, end in header["protect"]],
        when=header["when"],
    )
    cache.reason = header["reason"]
    tensors = {name: x.to(model.device) for name, x in tensors.items()}
    if header["codec"] == "kvtc":
        coded.decode(cache, header["state"], header["coded"], tensors, calibration)
    unpack(cache, header["state"], tensors)
    return cache


def _when(cache: KVCache) -> str | None:
    """What `KVCache` was given as ``when``."""
    trigger = cache.parts.trigger
    for when in (None, "after_prefill", f"every({trigger.every})"):
        if with_trigger(cache.policy.parts(), when).trigger == trigger:
            return when
    raise AssertionError(f"no name for {trigger}")
