"""Tasks: seeded examples whose answers are read under teacher forcing; the registry is filled by the folder's files."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from kvbudget.errors import KVBudgetError, PolicyError, nearest
from kvbudget.eval.tasks.base import Task
from kvbudget.policy.policy import parse_terms


@cache
def registry() -> dict[str, type[Task]]:
    """All tasks by name, in alphabetical order.

    >>> registry()["needle"].headline
    'exact'
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    importlib.import_module("kvbudget.eval.external")
    return {kind.name: kind for kind in sorted(_subclasses(Task), key=lambda kind: kind.name)}


def parse(text: str) -> Task:
    """Makes a task from its name, with parameters where they differ from the defaults.

    >>> parse("needle(length=2048, depths=(0.0, 0.5, 1.0))").length
    2048
    >>> parse("niah").name
    'needle'

    Raises:
        KVBudgetError: for an unknown task or parameter, with the nearest match, or a value of the wrong kind.
    """
    try:
        terms = parse_terms(text)
    except PolicyError:
        terms = []
    if len(terms) != 1:
        raise KVBudgetError(f"task {text!r} cannot be read; write one name such as needle or needle(length=2048)")
    name, parameters = terms[0]
    name = next((kind.name for kind in registry().values() if name in kind.aliases), name)
    if name not in registry():
        raise KVBudgetError(f"unknown task {name!r}{nearest(name, registry())}")
    kind = registry()[name]
    declared = {f.name: f for f in fields(kind)}
    for key, value in parameters.items():
        if key not in declared:
            raise KVBudgetError(f"task {name} has no parameter {key!r}{nearest(key, declared)}")
        default = declared[key].default
        if default not in (MISSING, None) and type(value) is not type(default):
            raise KVBudgetError(f"task {name}: {key}={value!r} must be of the kind of the default {default!r}")
        least = 1 if default else 0
        if type(value) is int and value < least:
            raise KVBudgetError(f"task {name}: {key}={value} must be at least {least}")
    return kind(**parameters)


def _subclasses(kind: type[Any]) -> list[type[Task]]:
    return [k for sub in kind.__subclasses__() for k in (sub, *_subclasses(sub)) if hasattr(k, "name")]
