"""Policy: a composition of recipes as a value that prints as one line, parses back, compares and hashes."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from kvbudget.errors import PolicyError, nearest
from kvbudget.policy.base import Parts, Protect, Recipe
from kvbudget.policy.clusters import HeadClusters
from kvbudget.policy.plans import Lookahead
from kvbudget.policy.refinements.shared import SharedLook
from kvbudget.policy.scorers.shared import Following, Shared
from kvbudget.policy.scorers.staged import Staged

ELSEWHERE = {
    "fairkv": "it places heads on devices, and is no policy of a cache; "
    "run kvbudget plan --tensor-parallel 2 --context 2048 --budget 25%",
    "kvtc": "it codes saved caches, and is no policy of one; call cache.save(path, codec='kvtc')",
}
"""Published methods that are not policies, and what to do instead."""
MOST = 2**31 - 1
"""The largest number that a parameter may be, since entries, channels and tokens are counted in 32 bits."""


@dataclass(frozen=True)
class Policy:
    """Recipes joined by ``+``; each role is filled by at most one of them.

    >>> from kvbudget.methods import parse
    >>> policy = parse("snapkv(window=16) + pyramid + kivi(bits=2)")
    >>> str(policy)
    'snapkv(window=16)+pyramidkv+kivi(bits=2)'
    >>> parse(str(policy)) == policy
    True
    """

    recipes: tuple[Recipe, ...]

    def __post_init__(self) -> None:
        for recipe in self.recipes:
            checked(type(recipe), {name: getattr(recipe, name) for name in recipe.parameters()})

    def __str__(self) -> str:
        return "+".join(map(str, self.recipes))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(recipe.name for recipe in self.recipes)

    @property
    def lossless_when_fits(self) -> bool:
        """Whether nothing is lost while everything fits into the budget."""
        return all(recipe.lossless_when_fits for recipe in self.recipes)

    @property
    def prefill_peak(self) -> str:
        """``full_prompt`` when one of the recipes must hold the whole prompt before anything can leave."""
        return "full_prompt" if any(r.prefill_peak == "full_prompt" for r in self.recipes) else "bounded"

    @property
    def prefix_reusable(self) -> bool:
        """Whether the compressed context does not depend on the question; a default scorer that watches queries does."""
        if not all(recipe.prefix_reusable for recipe in self.recipes):
            return False
        decided = any("scorer" in recipe.parts() for recipe in self.recipes)
        scorer = self.parts().scorer
        return decided or scorer is None or not scorer.states

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(sorted({need for recipe in self.recipes for need in recipe.needs}))

    def parts(self) -> Parts:
        """Resolves the recipes into one part per role.

        Raises:
            PolicyError: when two recipes fill the same role, naming both.
        """
        filled: dict[str, Any] = {}
        by: dict[str, str] = {}
        protect = Protect()
        for recipe in self.recipes:
            for role, part in recipe.parts().items():
                if role == "protect":
                    protect = _both(protect, part)
                elif role in filled:
                    raise PolicyError(f"{by[role]} and {recipe.name} both decide the {role}; use one of them")
                else:
                    filled[role], by[role] = part, recipe.name
        for recipe in self.recipes:
            defaults = recipe.defaults()
            # A default scorer brings its own protection along, and shares made of its states, and only if it is used.
            if "scorer" in filled and "scorer" in defaults:
                defaults = {
                    role: part for role, part in defaults.items() if role not in ("scorer", "protect", "layers")
                }
            for role, part in defaults.items():
                if role == "protect":
                    protect = _both(protect, part)
                else:
                    if role not in filled:
                        filled[role], by[role] = part, recipe.name
        thinned = "thinning" in filled
        if "heads" in filled and "scorer" in filled and (thinned or filled["scorer"].aligned):
            raise PolicyError(
                f"{by['thinning' if thinned else 'scorer']} keeps the same entries in all heads of a layer, so {by['heads']} has "
                "nothing to share out; use one of them"
            )
        if "stages" in filled and "scorer" in filled:
            filled["scorer"] = Staged(filled["scorer"], filled["stages"].answer)
        # Where an allocator over heads goes with heads that are coded together, the heads vote.
        alike = thinned or ("sharing" in filled and filled["sharing"].aligned and "heads" not in filled)
        if alike and "scorer" in filled:
            filled |= together(filled)
        clusters = filled.get("projection")
        if "scorer" in filled and isinstance(clusters, HeadClusters):
            filled["scorer"] = Following(filled["scorer"], clusters.owners)
        if "selector" in filled and filled.get("position_mode") == "cache":
            raise PolicyError(
                f"{by['selector']} reads entries by their logits, which {by['position_mode']} shifts with positions inside the "
                'cache; use positions="original"'
            )
        return Parts(**filled, protect=protect)

    def to_yaml(self, path: str | Path) -> None:
        """Writes the policy as YAML: a list of recipe names, with parameters where they differ from the defaults."""
        items = [{r.name: changed} if (changed := r.changed()) else r.name for r in self.recipes]
        try:
            Path(path).write_text(yaml.safe_dump({"policy": items}, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise PolicyError(
                f"policy file {str(path)!r} cannot be written: {error.strerror}; give another path"
            ) from error


def parse_terms(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Splits ``"a(x=1)+b"`` into names and parameters.

    >>> parse_terms("snapkv(window=64, pooling=max)+adakv")
    [('snapkv', {'window': 64, 'pooling': 'max'}), ('adakv', {})]
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return [_term(node) for node in _summands(tree)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise PolicyError(
            f"policy {shown!r} cannot be read; write methods joined by +, with named parameters in parentheses, "
            "such as snapkv(window=64)+adakv+kivi(bits=4)"
        ) from error


def build(registry: Mapping[str, type[Recipe]], name: str, parameters: Mapping[str, Any]) -> Recipe:
    """Makes a recipe from its name (or an alias) and parameters; refuses unknown ones with the nearest match."""
    kind = named(registry, name)
    return kind(**checked(kind, parameters))


def named(registry: Mapping[str, type[Recipe]], name: str) -> type[Recipe]:
    """The recipe with this name or alias; PolicyError with the nearest match where there is none."""
    known = {alias: kind for kind in registry.values() for alias in (kind.name, *kind.aliases)}
    if name in known:
        return known[name]
    remedy = f": {ELSEWHERE[name]}" if name in ELSEWHERE else nearest(name, known)
    raise PolicyError(f"unknown method {name!r}{remedy}")


def checked(kind: type[Recipe], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the types that the recipe declares (lists as tuples, whole numbers as floats where it has floats).

    Raises:
        PolicyError: for a name that the recipe does not have, a value of another type, a word that is none of its
            choices, and numbers that are negative, not finite or above `MOST`.
    """
    return checked_values(kind.name, kind.parameters(), get_type_hints(kind), parameters)


def checked_values(
    what: str, declared: Mapping[str, Any], hints: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """As `checked`, for whatever has these parameters with defaults and annotations."""
    values = {}
    for key, value in parameters.items():
        if key not in declared:
            if not declared:
                raise PolicyError(f"{what} takes no parameters, got {key}={value!r}")
            raise PolicyError(f"{what} has no parameter {key!r}{nearest(key, declared)}")
        default = declared[key]
        value = _hashable(value, f"{what}: {key}={value!r}")
        if default is not MISSING and default is not None and not _fits(value, default):
            raise PolicyError(
                f"{what}: {key}={value!r} must be {_article(type(default).__name__)} like the default {default!r}"
            )
        optional = [kind for kind in get_args(hints.get(key)) if kind in (int, float, str)] if default is None else []
        if optional and value is not None and not any(_fits(value, kind()) for kind in optional):
            raise PolicyError(f"{what}: {key}={value!r} must be {_article(optional[0].__name__)}, or None")
        if hints.get(key) == tuple[int, ...] and not all(type(item) is int for item in value):
            raise PolicyError(f"{what}: {key}={value!r} must be a list of whole numbers")
        choices = get_args(hints.get(key)) if get_origin(hints.get(key)) is Literal else None
        if choices is not None and value not in choices:
            raise PolicyError(f"{what}: {key}={value!r} is not one of its values{nearest(str(value), choices)}")
        values[key] = float(value) if isinstance(default, float) else value
    return values


def read_yaml(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads names and parameters from a YAML file that `Policy.to_yaml` wrote (or ``policy: "text"``)."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise PolicyError(f"policy file {str(path)!r} cannot be read: {reason}") from error
    unknown = [key for key in content if key != "policy"] if isinstance(content, dict) else []
    if unknown:
        raise PolicyError(
            f"policy file {str(path)!r} has no field {unknown[0]!r}; the only one is policy, a list of methods"
        )
    items = content.get("policy") if isinstance(content, dict) else None
    if isinstance(items, str):
        return parse_terms(items)
    if not isinstance(items, list) or not items:
        raise PolicyError(
            f"policy file {str(path)!r} has no list under 'policy:'; write one, such as policy: [snapkv: {{window: 64}}, adakv]"
        )
    terms: list[tuple[str, dict[str, Any]]] = []
    for item in items:
        name, parameters = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if (
            not isinstance(name, str)
            or not isinstance(parameters, dict)
            or not all(isinstance(k, str) for k in parameters)
        ):
            raise PolicyError(f"policy file {str(path)!r}: {item!r} is neither a name nor one name with parameters")
        terms.append((name, parameters))
    return terms


def _summands(node: ast.expr) -> list[ast.expr]:
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def _term(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        names = [keyword.arg for keyword in node.keywords]
        if None not in names and len(set(names)) == len(names):
            return node.func.id, {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    raise ValueError("not a method")


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _hashable(value: Any, what: str) -> Any:
    """The value with lists as tuples; refuses what cannot be printed and read back."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item, what) for item in value)
    if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise PolicyError(f"{what} must be a number from 0 on")
    if isinstance(value, (int, float)) and value > MOST:
        raise PolicyError(f"{what} is more than can be counted; give at most {MOST}")
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise PolicyError(f"{what} must be a number, a word, True, False or a list of these")
    return value


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _article(name: str) -> str:
    return {"int": "a whole number", "float": "a number", "str": "a word", "bool": "True or False"}.get(name, name)


def together(filled: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever of these parts chooses entries head by head, so that it chooses the same ones in all heads of a layer."""
    found = {"scorer": filled["scorer"] if filled["scorer"].aligned else Shared(filled["scorer"])}
    if "refinement" in filled:
        found["refinement"] = SharedLook(filled["refinement"])
    if isinstance(filled.get("plan"), Lookahead):
        found["plan"] = replace(filled["plan"], draft=Shared(filled["plan"].draft))
    return found


def _both(one: Protect, other: Protect) -> Protect:
    return replace(
        one,
        sinks=max(one.sinks, other.sinks),
        recent=max(one.recent, other.recent),
        recent_share=max(one.recent_share, other.recent_share),
        most=min(one.most, other.most),
    )
