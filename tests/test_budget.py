"""Budgets parse, print and refuse; the solver is exact, bounded, monotone and optimal."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvbudget.budget import Budget, format_bytes, solve
from kvbudget.errors import BudgetError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Budget("none")),
        (" Full ", Budget("none")),
        (1, Budget("tokens", 1)),
        (1024, Budget("tokens", 1024)),
        ("1024", Budget("tokens", 1024)),
        ("1024 tokens", Budget("tokens", 1024)),
        ("1024tok", Budget("tokens", 1024)),
        ("1 token", Budget("tokens", 1)),
        ("16MiB", Budget("bytes", 16 * 2**20)),
        ("16 mib", Budget("bytes", 16 * 2**20)),
        ("16MB", Budget("bytes", 16 * 10**6)),
        ("4 GB", Budget("bytes", 4 * 10**9)),
        ("512KiB", Budget("bytes", 512 * 2**10)),
        ("100000B", Budget("bytes", 100000)),
        ("1.5 GiB", Budget("bytes", 3 * 2**29)),
        ("0.1KiB", Budget("bytes", 102)),
        (1.0, Budget("fraction", 1.0)),
        ("1.0", Budget("fraction", 1.0)),
        (0.25, Budget("fraction", 0.25)),
        (".25", Budget("fraction", 0.25)),
        ("25%", Budget("fraction", 0.25)),
        ("12.5 %", Budget("fraction", 0.125)),
        ("7%", Budget("fraction", 0.07)),
        ("100%", Budget("fraction", 1.0)),
    ],
)
def test_what_parses(value, expected):
    assert Budget.parse(value) == expected
    assert Budget.parse(expected) is expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "a bool is not a budget"),
        (False, "a bool is not a budget"),
        ([1024], "a list is not a budget"),
        (0, "at least 1"),
        (-3, "at least 1"),
        (2**63, "below 2**63"),
        (0.0, "above 0"),
        (-0.5, "above 0"),
        (1.5, "at most 1 (100%)"),
        (1024.0, "at most 1 (100%)"),
        (math.nan, "above 0"),
        (math.inf, "at most 1"),
        ("", "not a number"),
        ("MiB", "not a number"),
        ("nan", "not a number"),
        ("inf", "not a number"),
        ("1.2.3", "not a number"),
        ("1024\ntokens\n1", "not a number"),
        ("0", "at least 1"),
        ("0%", "above 0"),
        ("101%", "at most 1 (100%)"),
        ("-16MiB", "at least 1"),
        ("0.5B", "at least 1"),
        ("10.5 tokens", "must be a whole number"),
        ("16 MiBs", "unknown unit 'MiBs'; did you mean 'MiB'?"),
        ("16mibs", "unknown unit 'mibs'; did you mean 'MiB'?"),
        ("4G", "unknown unit 'G'; did you mean 'GB'?"),
        ("1024 toks", "unknown unit 'toks'; did you mean 'tokens'?"),
        ("3 parsecs", "unknown unit 'parsecs'; known: "),
        ("1e6", "unknown unit 'e6'"),
        ("9" * 5000, "not a number"),
    ],
)
def test_what_is_refused_names_the_value_and_what_would_parse(value, reason):
    with pytest.raises(BudgetError) as refused:
        Budget.parse(value)
    text = str(refused.value)
    assert repr(value) in text and reason in text
    assert "1024" in text and "'16MiB'" in text and "'25%'" in text


@pytest.mark.parametrize(
    "arguments", [("bytes", 0), ("bytes", 1.0), ("tokens", True), ("fraction", 1), ("none", 3), ("gigabytes", 3)]
)
def test_a_budget_cannot_be_built_wrong(arguments):
    with pytest.raises(BudgetError, match=repr(arguments[0] if arguments[0] == "gigabytes" else arguments[1])):
        Budget(*arguments)


sizes = st.integers(1, 2**63 - 1)
budgets = st.one_of(
    st.builds(Budget, st.sampled_from(["bytes", "tokens"]), sizes | st.integers(1, 2**20).map(lambda n: n * 1000)),
    st.builds(Budget, st.just("fraction"), st.floats(0, 1, exclude_min=True)),
    st.just(Budget("none")),
)


@given(budgets)
def test_print_and_parse_round_trip(budget):
    again = Budget.parse(str(budget))
    assert again == budget and hash(again) == hash(budget)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(16 * 2**20, "16MiB"), (4 * 10**9, "4GB"), (1500, "1500B"), (1000, "1KB"), (1024, "1KiB"), (3 * 2**29, "1536MiB")],
)
def test_bytes_print_exactly_in_the_largest_unit_that_divides_them(amount, text):
    assert str(Budget("bytes", amount)) == text


@given(st.integers(0, 2**50))
def test_format_bytes_is_within_its_last_digit(n):
    number, unit = format_bytes(n).split()
    size = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert abs(float(number) * size - n) <= 0.0501 * size
    assert float(number) < 1024 or unit == "TiB"


# Exact in binary, so that sums of fractions decide ties as the solver must.
exact_weights = st.builds(lambda n, e: math.ldexp(n, e), st.integers(1, 40), st.sampled_from([0, 0, 0, -3, 100, -100]))
wild_weights = st.floats(1e-30, 1e30) | st.sampled_from([1e-30, 1.0, 1e30])
any_weights = st.just(0.0) | exact_weights | wild_weights


@st.composite
def problems(draw, weights=any_weights, max_entries=12, max_room=60):
    """(total, weights, floors, caps) with floors that fit and a total that sometimes exceeds the caps."""
    entries = draw(
        st.lists(st.tuples(weights, st.integers(0, 5), st.integers(0, max_room)), min_size=1, max_size=max_entries)
    )
    floors = [low for _, low, _ in entries]
    caps = [low + room for _, low, room in entries]
    return draw(st.integers(sum(floors), sum(caps) + 3)), [w for w, _, _ in entries], floors, caps


def unevenness(table, weights):
    """The sum that water-filling minimizes; entries without weight only count after all others, so they come first."""
    rest = sum(b * b for b, w in zip(table, weights, strict=True) if w == 0)
    weightless = sum(b for b, w in zip(table, weights, strict=True) if w == 0)
    return weightless, sum(Fraction(b * b) / Fraction(w) for b, w in zip(table, weights, strict=True) if w), rest


@given(problems())
def test_total_is_exact_and_bounds_hold(problem):
    total, _, floors, caps = problem
    table = solve(*problem)
    assert sum(table) == min(total, sum(caps))
    assert all(low <= b <= high for b, low, high in zip(table, floors, caps, strict=True))
    assert all(type(b) is int for b in table)


@given(problems(st.just(0.0) | exact_weights, max_entries=4, max_room=5))
def test_no_integer_table_is_more_even(problem):
    total, weights, floors, caps = problem
    total = min(total, sum(caps))
    tables = product(*(range(low, high + 1) for low, high in zip(floors, caps, strict=True)))
    best = min(unevenness(table, weights) for table in tables if sum(table) == total)
    assert unevenness(solve(total, weights, floors, caps), weights) == best


@given(problems())
def test_monotone_in_the_total(problem):
    total, weights, floors, caps = problem
    assert all(a <= b for a, b in zip(solve(*problem), solve(total + 1, weights, floors, caps), strict=True))


@given(problems(max_room=10))
def test_every_larger_total_adds_its_units_one_by_one(problem):
    _, weights, floors, caps = problem
    table = list(floors)
    for total in range(sum(floors), sum(caps)):
        larger = solve(total + 1, weights, floors, caps)
        assert sorted(b - a for a, b in zip(table, larger, strict=True)) == [0] * (len(table) - 1) + [1]
        table = larger


@given(problems(), any_weights, st.integers(0, 60))
def test_no_entry_grows_when_another_joins(problem, weight, cap):
    total, weights, floors, caps = problem
    joined = solve(total, [*weights, weight], [*floors, 0], [*caps, cap])
    assert all(after <= before for after, before in zip(joined, solve(*problem), strict=False))


@given(problems(), st.integers(-40, 40))
def test_scale_of_the_weights_does_not_matter(problem, exponent):
    total, weights, floors, caps = problem
    assert solve(total, [math.ldexp(w, exponent) for w in weights], floors, caps) == solve(*problem)


@given(problems(st.integers(0, 1000).map(float)), st.integers(1, 1000))
def test_scale_by_any_factor_keeps_ties(problem, factor):
    total, weights, floors, caps = problem
    assert solve(total, [w * factor for w in weights], floors, caps) == solve(*problem)


@given(problems(), st.randoms())
def test_order_matters_only_for_ties(problem, random):
    total, weights, floors, caps = problem
    order = random.sample(range(len(weights)), len(weights))
    shuffled = solve(total, *([column[j] for j in order] for column in (weights, floors, caps)))
    plain = solve(*problem)
    assert all(abs(b - plain[j]) <= 1 for j, b in zip(order, shuffled, strict=True))
    primes = [math.sqrt(p) for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)][: len(weights)]  # never in a tie
    plain = solve(total, primes, floors, caps)
    assert solve(total, *([column[j] for j in order] for column in (primes, floors, caps))) == [plain[j] for j in order]


@given(st.lists(wild_weights, min_size=1, max_size=128), st.integers(0, 10**12), st.integers(0, 10**9), st.data())
def test_large_totals_round_one_common_level(weights, total, floor, data):
    """Would not end if the work grew with the total."""
    cap = data.draw(st.integers(floor, 10**12))
    assume(floor * len(weights) <= total)
    table = solve(total, weights, floor, cap)
    assert sum(table) == min(total, cap * len(weights))
    above = max((b - 0.5) / w for b, w in zip(table, weights, strict=True) if b > floor) if max(table) > floor else 0.0
    below = [(b + 0.5) / w for b, w in zip(table, weights, strict=True) if b < cap]
    assert not below or above <= min(below) * (1 + 1e-9)


def largest_remainders(total, weights):
    shares = [Fraction(total) * w / sum(weights) for w in weights]
    table = [math.floor(share) for share in shares]
    for j in sorted(range(len(table)), key=lambda j: table[j] - shares[j])[: total - sum(table)]:
        table[j] += 1
    return table


def test_the_alabama_paradox_of_largest_remainders_does_not_happen():
    weights = [8, 6, 1]
    assert (largest_remainders(8, weights), largest_remainders(9, weights)) == ([4, 3, 1], [5, 4, 0])
    assert (solve(8, weights), solve(9, weights)) == ([4, 3, 1], [5, 3, 1])


@pytest.mark.parametrize(
    ("total", "weights", "floors", "caps", "expected"),
    [
        (0, [1.0, 2.0], 0, 9, [0, 0]),
        (0, [], 0, 9, []),
        (5, [], 0, None, []),
        (7, [0.3], 2, None, [7]),
        (7, [0.3], 2, 5, [5]),
        (7, [0.0], 0, None, [7]),
        (8, [0.0, 0.0, 0.0], 0, 9, [3, 3, 2]),
        (8, [0.0, 0.0, 0.0], 0, [1, 9, 9], [1, 4, 3]),
        (10, [0.0, 1.0, 0.0], 1, [9, 6, 9], [2, 6, 2]),
        (10, [0.0, 1.0, 0.0], 1, 9, [1, 8, 1]),
        (9, [1e-30, 1e30, 1.0], 0, [9, 4, 3], [2, 4, 3]),
        (10, [1.0, 1e300, 5e-324], 0, [4, 4, 4], [3, 4, 3]),
        (10, [5e-324, 0.0], 0, [4, 9], [4, 6]),
        (12, [1.7e308, 1.7e308, 1.7e308], 0, None, [4, 4, 4]),
        (7, (1, 1), (0, 6), (9, 9), [1, 6]),
    ],
)
def test_edges(total, weights, floors, caps, expected):
    assert solve(total, weights, floors, caps) == expected


def test_tensors_are_read_like_lists_and_arguments_stay_as_they_were():
    weights, floors, caps = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1, 2, 3]), [20, 20, 20]
    assert solve(16, weights, floors, caps) == [8, 4, 4]
    assert solve(6, weights, floors, caps) == [1, 2, 3]
    assert floors.tolist() == [1, 2, 3] and caps == [20, 20, 20]
    low = [1, 2, 3]
    assert solve(6, weights, low, caps) is not low


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, [1.0, 1.0], [4, 3], 9), ["7", "5"]),
        ((-1, [1.0], 0, None), ["0", "-1"]),
        ((5, [1.0, math.nan]), ["nan", "entry 1"]),
        ((5, [math.inf, 1.0]), ["inf", "entry 0"]),
        ((5, [1.0, -2.0]), ["-2.0", "entry 1"]),
        ((5, [1.0, 1.0], [0, 4], [9, 3]), ["floor 4", "entry 1", "cap 3"]),
        ((5, [1.0, 1.0], -1, 9), ["floor -1", "entry 0"]),
        ((5, [1.0, 1.0], [0, 0, 0], 9), ["3 floors", "2 weights"]),
        ((5, [1.0, 1.0], 0, [9]), ["1 caps", "2 weights"]),
    ],
)
def test_bad_problems_are_refused_by_value(arguments, words):
    with pytest.raises(BudgetError) as refused:
        solve(*arguments)
    assert all(word in str(refused.value) for word in words), str(refused.value)
