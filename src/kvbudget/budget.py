"""Budgets as values, and the one solver that turns weights, floors and caps into integers with an exact total."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from heapq import heapify, heappop, heapreplace
from numbers import Integral, Real
from operator import index
from typing import Literal

import torch

from kvbudget.errors import BudgetError, nearest

_BINARY_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTE_UNITS = _BINARY_UNITS | {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_OF_UNIT = {unit.lower(): size for unit, size in _BYTE_UNITS.items()}
_NUMBER_AND_UNIT = re.compile(r"([+-]?(?:[0-9]{1,30}(?:\.[0-9]{1,400})?|\.[0-9]{1,400}))\s*([^\s0-9.].*)?")


@dataclass(frozen=True)
class Budget:
    """How much a cache may hold: a value that prints as text and parses back.

    Attributes:
        kind: ``bytes`` (of the whole batch, everything that stays resident), ``tokens`` (entries per row and KV head),
            ``fraction`` (of the declared or seen length, per row and KV head) or ``none`` (no limit).
        amount: an int from 1 to 2**63 - 1 for bytes and tokens, a float in (0, 1] for a fraction, ``inf`` for no limit.

    Raises:
        BudgetError: if the kind does not exist or the amount does not suit it.

    >>> Budget.parse("16MiB")
    Budget(kind='bytes', amount=16777216)
    >>> [str(Budget.parse(value)) for value in (1024, 0.25, "0.5%", "4 GB", None)]
    ['1024 tokens', '25%', '0.5%', '4GB', 'full']
    """

    kind: Literal["bytes", "tokens", "fraction", "none"]
    amount: float = math.inf

    def __post_init__(self) -> None:
        amount, is_int = self.amount, isinstance(self.amount, int) and not isinstance(self.amount, bool)
        if self.kind in ("bytes", "tokens"):
            if not (is_int and 1 <= amount < 2**63):
                raise BudgetError(f"{amount!r} {self.kind}: must be a whole number, at least 1 and below 2**63")
        elif self.kind == "fraction":
            if not (isinstance(amount, float) and 0 < amount <= 1):
                raise BudgetError(f"{amount!r}: a fraction must be above 0 and at most 1 (100%)")
        elif self.kind != "none":
            raise BudgetError(f"budget kind {self.kind!r}{nearest(self.kind, ('bytes', 'tokens', 'fraction', 'none'))}")
        elif amount != math.inf:
            raise BudgetError(f"{amount!r}: a budget without a limit has no amount")

    @classmethod
    def parse(cls, value: "Budget | str | float | None") -> "Budget":
        """Reads what a user may write as a budget.

        Args:
            value: a Budget, an int (tokens), a float (fraction), None or ``"full"`` (no limit), or a text. A number
                alone in a text means what that number means; a unit may follow it: ``tokens``, ``tok``, ``%`` or bytes
                (MiB = 2**20, MB = 10**6; case is ignored, a part of a byte is rounded down).

        Raises:
            BudgetError: names the value, what is wrong with it and what would parse.

        >>> Budget.parse("1024 tok") == Budget.parse("1024") == Budget.parse(1024)
        True
        >>> Budget.parse("16 mibs")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        kvbudget.errors.BudgetError: cannot read the budget '16 mibs': unknown unit 'mibs'; did you mean 'MiB'?; ...
        """
        try:
            if isinstance(value, Budget):
                return value
            if value is None:
                return cls("none")
            if isinstance(value, str):
                return cls._from_text(value.strip())
            if isinstance(value, Real) and not isinstance(value, bool):
                return cls("tokens", int(value)) if isinstance(value, Integral) else cls("fraction", float(value))
            raise BudgetError(f"a {type(value).__name__} is not a budget")
        except BudgetError as error:
            forms = "tokens per KV head (1024), bytes ('16MiB', '4GB'), a fraction (0.25, '25%') or 'full'"
            raise BudgetError(f"cannot read the budget {value!r}: {error}; write {forms}") from None

    @classmethod
    def _from_text(cls, text: str) -> "Budget":
        if text.lower() == "full":
            return cls("none")
        match = _NUMBER_AND_UNIT.fullmatch(text)
        if match is None:
            raise BudgetError("not a number, with or without a unit")
        number, unit = Fraction(match[1]), (match[2] or "").lower()
        if unit == "%" or (not unit and "." in match[1]):
            return cls("fraction", float(number / 100 if unit else number))
        if unit in ("", "tok", "token", "tokens"):
            return cls("tokens", int(number) if number.denominator == 1 else float(number))
        if unit not in _SIZE_OF_UNIT:
            raise BudgetError(f"unknown unit {match[2]!r}{nearest(unit.capitalize(), (*_BYTE_UNITS, 'tokens', '%'))}")
        return cls("bytes", math.floor(number * _SIZE_OF_UNIT[unit]))

    def __str__(self) -> str:
        if self.kind == "none":
            return "full"
        if self.kind == "fraction":
            return f"{Decimal(repr(self.amount)).scaleb(2):f}%"  # decimal, because 100 * 0.07 is 7.000000000000001
        if self.kind == "tokens":
            return f"{self.amount} token{'s' * (self.amount != 1)}"
        count, unit = min((self.amount // size, unit) for unit, size in _BYTE_UNITS.items() if self.amount % size == 0)
        return f"{count}{unit}"


def format_bytes(n: int) -> str:
    """Writes a number of bytes for people, in binary units; a budget's own ``str`` is exact instead.

    >>> [format_bytes(n) for n in (512, 2**24, 2**20 - 1, 5 * 2**40)]
    ['512 B', '16.0 MiB', '1.0 MiB', '5.0 TiB']
    """
    if abs(n) < 1024:
        return f"{n} B"
    sizes = [(unit, n / size) for unit, size in _BINARY_UNITS.items()]
    unit, size = next((pair for pair in sizes if abs(round(pair[1], 1)) < 1024), sizes[-1])
    return f"{size:.1f} {unit}"


def solve(
    total: int,
    weights: Sequence[float] | torch.Tensor,
    floors: int | Sequence[int] | torch.Tensor = 0,
    caps: int | Sequence[int] | torch.Tensor | None = None,
) -> list[int]:
    """Splits a total into J integers in proportion to weights, each between its floor and its cap.

    Real-valued water-filling, ``b_j = clip(level * w_j, floor_j, cap_j)``, minimizes ``sum(b_j**2 / w_j)``; the result
    is the integer table that minimizes the same sum. It is Webster's divisor method (Sainte-Lague): the same formula
    with ``round(level * w_j)``, at the level that makes the sum exact. Largest remainders are not used, because with
    them a larger total can lower an entry (the Alabama paradox). Here no entry falls when the total grows, and none
    grows when another entry joins at the same total, so layers that are evicted again while later ones arrive only
    shrink. In exchange, an entry can be more than one unit away from its real-valued share where many others earn about
    one unit or less.

    Args:
        total: units to hand out; what exceeds the sum of the caps is left over.
        weights: [J] finite and >= 0; only their ratios matter. A zero weight (or one below about 1e-200 of the largest)
            receives its floor until all others are at their caps; then all such entries share equally.
        floors: [J] integers >= 0, or one for all.
        caps: [J] integers >= floors, or one for all; None for no caps.

    Returns:
        [J] integers with sum ``min(total, sum(caps))``. Ties go to the lower index.

    Raises:
        BudgetError: if the floors exceed the total or a cap, or a weight is negative or not finite.

    Source: Balinski and Young, Fair Representation, 1982 (divisor methods and their monotonicity).

    >>> solve(100, [3.0, 2.0, 1.0, 0.0], floors=4, caps=40)
    [40, 37, 19, 4]
    """
    shares = weights.tolist() if isinstance(weights, torch.Tensor) else [float(w) for w in weights]
    lows = _integers("floors", floors, len(shares))
    highs = _integers("caps", max(total, sum(lows)) if caps is None else caps, len(shares))
    for j, (share, low, high) in enumerate(zip(shares, lows, highs, strict=True)):
        if not 0 <= share < math.inf:
            raise BudgetError(f"weight {share} of entry {j} must be finite and at least 0")
        if not 0 <= low <= high:
            raise BudgetError(f"floor {low} of entry {j} must be at least 0 and at most its cap {high}")
    if sum(lows) > total:
        raise BudgetError(f"floors that sum to {sum(lows)} exceed the total of {total}; raise the budget or lower them")
    total = min(total, sum(highs))
    if total == sum(lows):
        return lows
    exponent = math.frexp(max(shares))[1]
    scaled = [math.ldexp(share, -exponent) for share in shares]  # by a power of two, which keeps ties exact
    # A weight this far below all others, caps below 2**63 included, ranks behind their last units.
    return _webster(total, [share if share >= 1e-200 else 1e-250 for share in scaled], lows, highs)


def _integers(name: str, values: int | Sequence[int] | torch.Tensor, length: int) -> list[int]:
    """Returns ``length`` Python ints, from one for all or from one each."""
    numbers = values.tolist() if isinstance(values, torch.Tensor) else values
    table = [numbers] * length if isinstance(numbers, int) else [index(n) for n in numbers]
    if len(table) != length:
        raise BudgetError(f"{len(table)} {name} for {length} weights; give one for all or one each")
    return table


def _webster(total: int, weights: list[float], floors: list[int], caps: list[int]) -> list[int]:
    """Grants units in falling order of ``w_j / (k - 1/2)`` (the k-th unit of entry j), ties to the lower index."""
    # Start from exactly the units that rank above 1 / level: at most about J grants or returns remain, for any total.
    threshold = 1 / _water_level(total, weights, floors, caps)
    counts = []
    for w, floor, cap in zip(weights, floors, caps, strict=True):
        count = max(floor, int(min(cap, w / threshold + 0.5)))
        while count < cap and 2 * w / (2 * count + 1) > threshold:
            count += 1
        while count > floor and 2 * w / (2 * count - 1) <= threshold:
            count -= 1
        counts.append(count)

    missing = total - sum(counts)
    step, ends = (1, caps) if missing > 0 else (-1, floors)

    def rank(j: int) -> tuple[float, int]:
        k = counts[j] + (step > 0)
        return -step * 2 * weights[j] / (2 * k - 1), step * j

    queue = [rank(j) for j in range(len(counts)) if counts[j] != ends[j]]
    heapify(queue)
    for _ in range(abs(missing)):
        j = abs(queue[0][1])
        counts[j] += step
        if counts[j] != ends[j]:
            heapreplace(queue, rank(j))
        else:
            heappop(queue)
    return counts


def _water_level(total: int, weights: list[float], floors: list[int], caps: list[int]) -> float:
    """Returns the level at which ``clip(level * w_j, floor_j, cap_j)`` sums to the total (Bitran and Hax, 1981)."""
    free = list(zip(weights, floors, caps, strict=True))
    while True:
        level = total / sum([w for w, _, _ in free])
        excess = sum([low if (x := level * w) < low else high if x > high else x for w, low, high in free]) - total
        if excess > 0:  # the level sought is lower, so whoever is at the floor here is at the floor there
            fixed = [low for w, low, _ in free if level * w < low]
            others = [entry for entry in free if level * entry[0] >= entry[1]]
        else:
            fixed = [high for w, _, high in free if level * w > high]
            others = [entry for entry in free if level * entry[0] <= entry[2]]
        total -= sum(fixed)
        if not fixed or not others or total <= 0:  # the last two by rounding only
            return level
        free = others
