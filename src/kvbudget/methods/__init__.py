"""The registry of methods: every module of this folder that defines a recipe is listed under its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe
from kvbudget.policy.policy import Policy, build, parse_terms, read_yaml


@cache
def registry() -> dict[str, type[Recipe]]:
    """All recipes by name, in alphabetical order.

    >>> registry()["snapkv"].paper
    'SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469, 2024'
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {kind.name: kind for kind in sorted(_subclasses(Recipe), key=lambda kind: kind.name)}


def parse(policy: Policy | Recipe | str | Path) -> Policy:
    """Makes a policy from a policy, a recipe, a text such as ``"snapkv(window=64)+adakv"`` or a ``.yaml`` file.

    >>> str(parse("knorm"))
    'knorm'
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Recipe):
        return Policy((policy,))
    if isinstance(policy, Path) or str(policy).endswith((".yaml", ".yml")):
        terms = read_yaml(policy)
    elif isinstance(policy, str):
        terms = parse_terms(policy)
    else:
        raise PolicyError(f"policy {policy!r} is neither a Policy, a recipe, a text nor a YAML file")
    result = Policy(tuple(build(registry(), name, parameters) for name, parameters in terms))
    result.parts()
    return result


def _subclasses(kind: type[Recipe]) -> list[type[Recipe]]:
    return [k for sub in kind.__subclasses__() for k in (sub, *_subclasses(sub)) if hasattr(k, "name")]
