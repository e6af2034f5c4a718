"""Finds every tensor that an object keeps alive, without asking the object."""

import gc
import types
from typing import Any

import torch

# What an object refers to without owning: its class, its module, shared code.
_FOREIGN = (
    type,
    types.ModuleType,
    types.CodeType,
    types.BuiltinFunctionType,
    types.FrameType,
    torch.dtype,
    torch.device,
)


def resident_tensors(root: object) -> list[torch.Tensor]:
    """Every tensor that can be reached from ``root`` through attributes, containers, closures and bound methods.

    Modules of a model end the walk with an error: a cache that holds on to the model would keep its weights alive.
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
        elif isinstance(item, types.FunctionType):
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
            waiting += item.__defaults__ or ()
        else:
            waiting += gc.get_referents(item)
            # Instances without a dictionary of their own in the collector's eyes (inline values) still have attributes.
            waiting += list(getattr(item, "__dict__", {}).values())
    return found


def resident_bytes(root: object) -> int:
    """Bytes of the storages of `resident_tensors`, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in resident_tensors(root)}.values())
