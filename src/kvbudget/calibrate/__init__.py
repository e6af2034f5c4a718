"""Calibration: what some methods need to know about a model, found once and kept as an artifact."""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.calibrate.base import Calibration, TextCalibration
from kvbudget.calibrate.training import WIDEST, Training
from kvbudget.errors import PolicyError, nearest
from kvbudget.methods import registry as methods
from kvbudget.models import check_supported, fingerprint
from kvbudget.policy.artifact import Artifact, default_path
from kvbudget.policy.policy import checked_values

__all__ = ["Calibration", "TextCalibration", "build", "calibrate", "registry"]

Progress = Callable[[int, int], None]
MAY_BE_NOTHING = ("sinks", "recent", "cue", "steps")
"""Whole numbers that are none, though not by default."""


@cache
def registry() -> dict[str, type[Calibration | TextCalibration]]:
    """All calibrations by the name of their method; every module of this folder may define one.

    >>> "razor_attention" in registry()
    True
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    kinds = [kind for base in (Calibration, TextCalibration) for kind in _subclasses(base) if hasattr(kind, "method")]
    return {kind.method: kind for kind in sorted(kinds, key=lambda kind: kind.method)}


def build(method: str, **parameters: Any) -> Calibration | TextCalibration:
    """The calibration of a method with some of its parameters set.

    Raises:
        PolicyError: unknown method or parameter, with the nearest match.
    """
    if method not in registry():
        fitted = ", ".join(sorted(registry()))
        if method in methods() and "calibration" not in methods()[method].needs:
            raise PolicyError(f"{method} needs no calibration; these have one: {fitted}")
        raise PolicyError(f"there is no calibration for {method!r}{nearest(method, registry())}")
    kind, what = registry()[method], f"the calibration of {method}"
    declared = {field.name: field.default for field in fields(kind)}
    values = checked_values(what, declared, get_type_hints(kind), parameters)
    for name, value in values.items():
        if type(value) is int and value == 0 and declared[name] and name not in MAY_BE_NOTHING:
            raise PolicyError(f"{what}: {name}={value!r} must be at least 1")
    found = kind(**values)
    for name in found.widths if isinstance(found, Training) else ():
        if getattr(found, name) > WIDEST:
            raise PolicyError(f"{what}: {name}={getattr(found, name)} is more than can be trained; give 1 to {WIDEST}")
    sinks = getattr(found, "sinks", 0)
    if isinstance(found, TextCalibration) and sinks >= found.length:
        raise PolicyError(f"{what}: sinks={sinks} leave nothing of texts of {found.length} tokens; give fewer")
    return found


def calibrate(
    method: str,
    model: PreTrainedModel,
    path: str | Path | None = None,
    *,
    texts: Sequence[Tensor] | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Path:
    """Fits a method to a model and writes the artifact; returns where.

    A fit to texts keeps what it has learned beside the artifact after each of them; when it is stopped, the same call goes
    on from there.

    Args:
        method: a method that needs calibration, such as ``"razor_attention"``.
        model: the model that will run under it; its attention implementation is set to ``"kvbudget"``, which behaves like
            sdpa for every other cache.
        path: the file to write; by default the user's cache folder, where `KVCache` looks for it.
        texts: token ids ``[T]`` of the texts of a `TextCalibration`, as many and as long as its parameters say.
        progress: called with texts done and in total.
        parameters: of the calibration, by name.

    Raises:
        PolicyError: unknown method or parameter, with the nearest match; texts that are missing.
        UnsupportedModel: the model cannot be served.
    """
    calibration = build(method, **parameters)
    check_supported(model)
    if path is not None and Path(path).is_dir():
        raise PolicyError(f"{path} is a folder; give a file for the calibration")
    mark, record = fingerprint(model), asdict(calibration)
    if isinstance(calibration, Calibration):
        return Artifact(method, mark, calibration.fit(model), record).save(path)
    if texts is None or len(texts) != calibration.count or any(len(ids) != calibration.length for ids in texts):
        raise PolicyError(
            f"the calibration of {method} fits {calibration.count} texts of {calibration.length} tokens; give them as texts="
        )
    target = default_path(method, mark) if path is None else Path(path)
    unfinished = target.with_name(target.name + ".unfinished")
    record["read"] = _digest(texts)
    state, done = _resumed(method, mark, unfinished, record)
    for number in range(done, len(texts)):
        if progress is not None:
            progress(number, len(texts))
        state = calibration.add(model, texts[number][None].to(model.device), state)
        Artifact(method, mark, state, record | {"done": number + 1}).save(unfinished)
    if progress is not None:
        progress(len(texts), len(texts))
    Artifact(method, mark, calibration.finish(model, state), record).save(target)
    unfinished.unlink(missing_ok=True)
    return target


def _subclasses(kind: Any) -> list[Any]:
    found = []
    for child in kind.__subclasses__():
        found += [child, *_subclasses(child)]
    return found


def _digest(texts: Sequence[Tensor]) -> str:
    """Tells texts apart."""
    return hashlib.sha256(torch.stack(list(texts)).cpu().numpy().tobytes()).hexdigest()[:16]


def _resumed(method: str, mark: str, path: Path, record: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """State and number of texts of an earlier run with the same parameters, texts and model; else empty and 0."""
    try:
        earlier = Artifact.load(method, mark, path)
    except PolicyError:
        return {}, 0
    done = dict(earlier.parameters).pop("done", 0)
    same = {**earlier.parameters, "done": 0} == {**_plain(record), "done": 0}
    return (dict(earlier.tensors), done) if same else ({}, 0)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it comes back from a file."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
