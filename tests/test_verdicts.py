import math

import pytest

from engm.errors import InputError
from engm.report import verdicts
from engm.report.statistics import Interval
from engm.report.verdicts import DOES_NOT_HOLD, HOLDS, NOT_SETTLED


@pytest.mark.parametrize(
    ("holds", "outcome"),
    [
        ([True] * 3, HOLDS),
        ([False] * 3, DOES_NOT_HOLD),
        ([True, True, False], NOT_SETTLED),
        ([False, False, True], NOT_SETTLED),
        ([True] * 2, NOT_SETTLED),
        ([False] * 2, NOT_SETTLED),
        ([], NOT_SETTLED),
    ],
)
def test_a_rule_must_hold_in_every_seed_or_in_none(holds, outcome):
    assert verdicts.from_seeds(holds) == outcome


def test_differences_settle_a_claim_where_students_interval_excludes_zero():
    # 1, 2, 3: mean 2, deviation 1, Student's factor for two degrees of freedom 4.3027,
    # so the interval is 2 +- 4.3027 / sqrt(3) = -0.484 to 4.484
    assert verdicts.from_differences([1, 2, 3]) == NOT_SETTLED
    assert verdicts.from_differences([1.5, 2.5, 3.5]) == HOLDS
    assert verdicts.from_differences([-1.5, -2.5, -3.5]) == DOES_NOT_HOLD
    # with factor 2.92 the same three reach: 2 +- 1.686
    assert verdicts.from_differences([1, 2, 3], level=0.9) == HOLDS
    assert verdicts.from_differences([-1, -2, -3], level=0.9) == DOES_NOT_HOLD


def test_two_seeds_never_decide():
    assert verdicts.from_differences([5.0, 5.0]) == NOT_SETTLED
    assert verdicts.from_differences([-5.0]) == NOT_SETTLED
    assert verdicts.from_interval(Interval(0.0, 0.1), (-1, 1), num_seeds=2) == NOT_SETTLED
    assert verdicts.from_interval(Interval(2.0, 2.1), (-1, 1), num_seeds=2) == NOT_SETTLED


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.05, 0.05, HOLDS),
        (-0.1, 0.1, HOLDS),
        (0.05, 0.2, NOT_SETTLED),
        (-0.2, 0.05, NOT_SETTLED),
        (-0.2, 0.2, NOT_SETTLED),
        (0.11, 0.2, DOES_NOT_HOLD),
        (-0.3, -0.2, DOES_NOT_HOLD),
    ],
)
def test_an_interval_is_held_against_the_range_that_the_claim_allows(low, high, outcome):
    assert verdicts.from_interval(Interval(low, high), (-0.1, 0.1), num_seeds=3) == outcome


def test_a_range_may_be_open():
    assert verdicts.from_interval(Interval(0.5, 9.0), (0.1, math.inf), 3) == HOLDS
    assert verdicts.from_interval(Interval(0.0, 0.05), (0.1, math.inf), 3) == DOES_NOT_HOLD


def test_an_interval_without_ends_is_refused():
    with pytest.raises(InputError, match="nan"):
        verdicts.from_interval(Interval(math.nan, math.nan), (-0.1, 0.1), 3)


def test_one_part_that_fails_is_enough_against_a_whole():
    assert verdicts.of_all([HOLDS, HOLDS]) == HOLDS
    assert verdicts.of_all([HOLDS, NOT_SETTLED]) == NOT_SETTLED
    assert verdicts.of_all([HOLDS, NOT_SETTLED, DOES_NOT_HOLD]) == DOES_NOT_HOLD
    assert verdicts.of_all([]) == NOT_SETTLED
