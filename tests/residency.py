"""Finds every tensor that an object keeps alive, without asking the object."""

import gc
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvbudget.errors import UnsupportedModel
from kvbudget.models import rotations_of
from kvbudget.prefill import Prefilled

# What an object refers to without owning: its class, its module, shared code. And the text, which is not the cache.
_FOREIGN = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType, torch.dtype, torch.device, Prefilled)


def resident_tensors(root: object) -> list[torch.Tensor]:
    """Every tensor that can be reached from ``root`` through attributes, containers, closures and bound methods.

    Arrays count as tensors; the token ids by which a cache knows a changed text again do not count.
    A module on the way is an error: a cache that holds on to the model would keep its weights alive.
    """
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _FOREIGN):
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            raise AssertionError(f"{type(root).__name__} keeps a {type(item).__name__} alive")
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, np.ndarray):
            found.append(torch.from_numpy(item))
        elif isinstance(item, types.FunctionType):
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
            waiting += item.__defaults__ or ()
        else:
            waiting += gc.get_referents(item)
            waiting += list(getattr(item, "__dict__", {}).values())
    return found


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage behind the tensors, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage()}


def resident_bytes(root: object, besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages of `resident_tensors`, each counted once; those of ``besides`` are left out."""
    left_out = storages(besides)
    return sum(size for address, size in storages(resident_tensors(root)).items() if address not in left_out)


def model_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    """What belongs to the model and lives with it: weights, buffers and the frequencies of its rotary embedding."""
    try:
        rotations = [rotation.inv_freq for rotation in rotations_of(model) if rotation is not None]
    except UnsupportedModel:
        rotations = []
    return [*model.parameters(), *model.buffers(), *rotations]
