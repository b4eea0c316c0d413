"""How a notebook that tests a claim comes to its verdict. Fewer than three seeds decide nothing."""

from collections.abc import Sequence

import numpy as np

from engm.errors import InputError
from engm.report.statistics import FEWEST, Interval, student_interval

HOLDS = "the claim holds here"
DOES_NOT_HOLD = "the claim does not hold here"
NOT_SETTLED = "not settled at this scale"
FEWEST_SEEDS = FEWEST


def from_seeds(holds: Sequence[bool]) -> str:
    """Returns the outcome where a rule says yes or no in each seed.

    All yes: holds. All no: does not hold. Both, or fewer than three seeds: not settled.
    """
    if len(holds) < FEWEST_SEEDS:
        return NOT_SETTLED
    if all(holds):
        return HOLDS
    return NOT_SETTLED if any(holds) else DOES_NOT_HOLD


def from_differences(differences: Sequence[float], level: float = 0.95) -> str:
    """Returns the outcome of the claim that a difference is above 0.

    Settled where Student's interval for the mean difference is all above 0, or all below.
    Differences are one a seed: what the claim calls larger minus what it calls smaller.
    """
    if len(differences) < FEWEST_SEEDS:
        return NOT_SETTLED
    interval = student_interval(differences, level)
    if interval.low > 0:
        return HOLDS
    return DOES_NOT_HOLD if interval.high < 0 else NOT_SETTLED


def from_interval(interval: Interval, allowed: tuple[float, float], num_seeds: int) -> str:
    """Returns the outcome of the claim that a quantity lies in a range.

    All of its interval in the range: holds. None of it: does not hold. A part: not settled.

    Args:
        interval: Where the quantity lies, as far as `num_seeds` seeds can tell.
        allowed: The lowest and highest value that the claim allows; inf is no limit.
        num_seeds: Fewer than three settle nothing.

    Raises:
        InputError: If an end of the interval is nan.
    """
    low, high = interval.low, interval.high
    if np.isnan([low, high]).any():
        raise InputError(f"the interval from {low} to {high} has no ends; a run may have failed")
    if num_seeds < FEWEST_SEEDS:
        return NOT_SETTLED
    if allowed[0] <= low and high <= allowed[1]:
        return HOLDS
    return DOES_NOT_HOLD if high < allowed[0] or low > allowed[1] else NOT_SETTLED


def of_all(outcomes: Sequence[str]) -> str:
    """Returns the outcome of a claim that stands only if each of its parts does.

    One part that does not hold is enough against it; all must hold for it.
    """
    if DOES_NOT_HOLD in outcomes:
        return DOES_NOT_HOLD
    return HOLDS if outcomes and all(outcome == HOLDS for outcome in outcomes) else NOT_SETTLED


def named_in(verdict: str) -> str | None:
    """Returns the outcome that the text of a verdict ends with; it may judge parts before that."""
    outcome = max((HOLDS, DOES_NOT_HOLD, NOT_SETTLED), key=verdict.rfind)
    return outcome if outcome in verdict else None
