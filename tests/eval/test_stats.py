import numpy as np
import pytest

from kvbudget.eval.stats import bootstrap, compare


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        interval = bootstrap(rng.normal(3.0, 1.0, 24), draws=400)
        covered += interval.low <= 3.0 <= interval.high
    assert 175 <= covered <= 198


def test_the_interval_narrows_with_more_values() -> None:
    rng = np.random.default_rng(1)
    few, many = bootstrap(rng.normal(0, 1, 10)), bootstrap(rng.normal(0, 1, 1000))
    assert many.high - many.low < (few.high - few.low) / 4


def test_pairing_sees_what_means_cannot() -> None:
    rng = np.random.default_rng(2)
    texts = rng.normal(0, 10, 16)
    better, worse = texts, texts + 0.5 + rng.normal(0, 0.2, 16)
    assert compare(better, worse)[0] == "lower"
    assert compare(worse, better)[0] == "higher"
    assert compare(better, rng.permutation(worse))[0] == "cannot tell"


def test_the_same_values_cannot_be_told_apart() -> None:
    verdict, difference = compare([1.0, 2.0], [1.0, 2.0])
    assert verdict == "cannot tell"
    assert (difference.low, difference.high) == (0.0, 0.0)


def test_draws_are_seeded() -> None:
    values = [0.0, 1.0, 5.0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap([*values, 2.5, 7.25], seed=1) != bootstrap([*values, 2.5, 7.25], seed=2)


def test_no_values_give_no_number() -> None:
    assert np.isnan(bootstrap([]).mean)


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        compare([1.0, 2.0], [1.0])
