"""The errors that kvbudget raises: every message names the value, the limit and the remedy."""

import difflib
from collections.abc import Iterable


class KVBudgetError(ValueError):
    """Base of every error that a caller can cause; the command line prints it as one line and exits with 2."""


class UnsupportedModel(KVBudgetError):
    """The model's attention or cache cannot be served rightly, so it is refused by name."""


class BudgetError(KVBudgetError):
    """A budget that cannot be parsed, or that is smaller than what the policy must hold."""


class PolicyError(KVBudgetError):
    """A policy text, name or parameter that does not exist, or parts that do not fit together."""


class CacheError(KVBudgetError):
    """A call that the cache cannot carry out (crop after eviction, a changed prefix, a broken cache)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest known name, else the list of all known names.

    >>> nearest("snapkw", ["snapkv", "knorm"])
    "; did you mean 'snapkv'?"
    """
    names = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean '{names[close[0]]}'?" if close else "; known: " + ", ".join(names.values())
