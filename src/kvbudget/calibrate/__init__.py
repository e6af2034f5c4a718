"""Calibration: what some methods need to know about a model, found once and kept as an artifact."""

import importlib
import pkgutil
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvbudget.calibrate.base import Calibration
from kvbudget.errors import PolicyError, nearest
from kvbudget.models import check_supported, fingerprint
from kvbudget.policy.artifact import Artifact

__all__ = ["Calibration", "calibrate", "registry"]


@cache
def registry() -> dict[str, type[Calibration]]:
    """All calibrations by the name of their method; every module of this folder may define one.

    >>> "razor_attention" in registry()
    True
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    kinds = sorted(Calibration.__subclasses__(), key=lambda kind: kind.method)
    return {kind.method: kind for kind in kinds}


def calibrate(method: str, model: PreTrainedModel, path: str | Path | None = None, **parameters: Any) -> Path:
    """Fits a method to a model and writes the artifact; returns where.

    Args:
        method: a method that needs calibration, such as ``"razor_attention"``.
        model: the model that will run under it; its attention implementation is set to ``"kvbudget"``, which behaves like
            sdpa for every other cache.
        path: the file to write; by default the user's cache folder, where `KVCache` looks for it.
        parameters: of the calibration, by name.

    Raises:
        PolicyError: unknown method or parameter, with the nearest match.
        UnsupportedModel: the model cannot be served.
    """
    if method not in registry():
        raise PolicyError(f"there is no calibration for {method!r}{nearest(method, registry())}")
    kind = registry()[method]
    known = [field.name for field in fields(kind)]
    for name in parameters:
        if name not in known:
            raise PolicyError(f"the calibration of {method} has no parameter {name!r}{nearest(name, known)}")
    check_supported(model)
    calibration = kind(**parameters)
    tensors = calibration.fit(model)
    return Artifact(method, fingerprint(model), tensors, asdict(calibration)).save(path)
