import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from engm.errors import InputError
from engm.report.statistics import (
    Interval,
    bootstrap_interval,
    paired_differences,
    sign_flip_test,
    student_interval,
    wilson,
)

DRAWS = np.random.default_rng(0).normal(3.0, 2.0, size=(20, 9))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_student_is_scipys(level):
    for n in (2, 3, 9):
        x = DRAWS[0, :n]
        wanted = stats.t.interval(level, n - 1, loc=x.mean(), scale=stats.sem(x))
        found = student_interval(list(x), level)
        assert (found.low, found.high) == pytest.approx(wanted)


def coverage(interval, n, repeats=1500):
    samples = np.random.default_rng(n).normal(5.0, 1.0, size=(repeats, n))
    return sum(5.0 in interval(sample) for sample in samples) / repeats


@pytest.mark.parametrize("n", [3, 5, 10])
def test_student_covers_as_often_as_it_says(n):
    # 1500 draws at 95%: standard error 0.6%
    assert coverage(student_interval, n) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 10])
def test_the_bootstrap_covers_as_often_as_the_range_of_the_values_lets_it(n):
    found = coverage(lambda x: bootstrap_interval(x, resamples=1500), n)
    assert min(0.95, 1 - 2.0 ** (1 - n)) - 0.035 < found < 0.97
    if n < 5:  # what the docstring warns of
        assert found == pytest.approx(1 - 2.0 ** (1 - n), abs=0.035)


def test_the_bootstrap_of_three_is_their_range_and_of_many_the_plain_percentiles():
    assert bootstrap_interval([1.0, 2.0, 6.0]) == Interval(1.0, 6.0)
    x = np.random.default_rng(1).exponential(size=400)
    found = bootstrap_interval(x)
    generator = np.random.default_rng(5)
    means = [generator.choice(x, size=400).mean() for _ in range(10_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))
    assert bootstrap_interval(x) == found != bootstrap_interval(x, seed=1)


def test_the_percentiles_are_expanded_for_few_values():
    x = np.array([0.0, 1.0, 1.5, 2.5, 4.0, 7.0])
    every = x[np.array(list(product(range(6), repeat=6)))].mean(axis=1)  # all 6^6 resamples
    # at 95% and n = 6: t = 2.571, times sqrt(6 / 5) = 2.816, and Phi(-2.816) = 0.00243
    low, high = np.quantile(every, [0.00243, 1 - 0.00243])
    found = bootstrap_interval(x, resamples=200_000)
    assert found.low == pytest.approx(low, abs=0.04)
    assert found.high == pytest.approx(high, abs=0.04)


def test_the_sign_flip_test_counts_patterns_and_says_how_small_it_can_be():
    for tenths in [*np.random.default_rng(2).integers(-9, 10, (60, 6)), [5, -3, -4, 7, 4, -9]]:
        sums = [sum(s * int(t) for s, t in zip(p, tenths, strict=True))
                for p in product((1, -1), repeat=6)]  # fmt: skip
        wanted = np.mean([abs(found) >= abs(sum(map(int, tenths))) for found in sums])
        # sums that are equal but for rounding count as equal: 0.1 + 0.2 - 0.3 is not 0
        assert sign_flip_test(np.asarray(tenths) / 10).p == pytest.approx(wanted)
    assert sign_flip_test([1.0, 2.0, 3.0]) == sign_flip_test([0.1, 0.1, 0.1])
    assert vars(sign_flip_test([1.0, 2.0, 3.0])) == {"p": 0.25, "smallest": 0.25}
    assert vars(sign_flip_test([1.0])) == {"p": 1.0, "smallest": 1.0}
    assert sign_flip_test([1.0, -1.0]).p == 1.0
    assert 2 / 2**6 < 0.05 < 2 / 2**5


def test_many_pairs_are_drawn_and_come_close_to_the_normal_approximation():
    x = np.random.default_rng(3).normal(0.3, 1.0, size=60)
    z = x.sum() / math.sqrt((x**2).sum())
    assert sign_flip_test(x).p == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)
    assert sign_flip_test(np.ones(40)).p == pytest.approx(2 / 100_001)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 7), (560, 797)])
def test_wilson_ends_where_what_was_seen_is_z_deviations_away(k, n):
    for level in (0.9, 0.95):
        z = stats.norm.ppf(0.5 + level / 2)
        found = wilson(k, n, level)
        # p with (k / n - p)^2 = z^2 p (1 - p) / n
        roots = np.roots([1 + z * z / n, -(2 * k + z * z) / n, (k / n) ** 2])
        assert (found.low, found.high) == pytest.approx(sorted(roots), abs=1e-12)
        assert 0 <= found.low < found.high <= 1


def test_pairs_are_the_seeds_that_both_have():
    first, second = {2: 0.7, 0: 0.5, 1: 0.6, 9: 0.0}, {0: 0.4, 1: 0.51, 2: 0.58, 7: 1.0}
    found = paired_differences(first, second)
    assert found.seeds == (0, 1, 2)
    assert found.differences == pytest.approx((0.1, 0.09, 0.12))
    assert found.student == student_interval(found.differences)
    assert found.bootstrap == bootstrap_interval(found.differences)
    assert found.outcome == "ahead"
    assert paired_differences(second, first).outcome == "behind"
    assert found.test.p == 0.25
    # the same numbers, paired otherwise, say nothing
    shuffled = {0: 0.7, 1: 0.5, 2: 0.6}
    assert paired_differences(shuffled, second).outcome == "not settled"
    assert paired_differences(first, second, level=0.999).outcome == "not settled"


def test_from_two_pairs_nothing_is_concluded():
    found = paired_differences({0: 0.9, 1: 0.91}, {0: 0.1, 1: 0.1})
    assert (found.student, found.bootstrap) == (None, None)
    assert found.outcome == "fewer than 3 pairs: nothing is concluded"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_differences({0: 1.0}, {1: 1.0}), r"the seeds are \[0\] and \[1\]"),
        (lambda: paired_differences({0: math.nan}, {0: 1.0}), "finite numbers are needed"),
        (lambda: student_interval([1.0]), "at least 2 finite numbers"),
        (lambda: student_interval([1.0, 2.0], 95), "level must be between 0 and 1"),
        (lambda: bootstrap_interval([]), "at least 2 finite numbers"),
        (lambda: sign_flip_test([]), "at least 1 finite"),
    ],
)
def test_what_cannot_be_answered_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
