"""What a few numbers say about the many that were not measured.

Three seeds are few. Of three numbers a bootstrap can only make means between the smallest and the
largest of them; for a symmetric law that range covers the true mean in 3 of 4 cases, whatever level
is asked for, and in general in a fraction 1 - 2^(1-n) at most. Student's interval has no such
ceiling. So a decision here rests on Student's interval, and the bootstrap stands beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from engm.errors import InputError

FEWEST = 3  # from fewer pairs nothing is concluded


@dataclass(frozen=True)
class Interval:
    """A range that a true value lies in with a stated probability, if the model is right."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """Both ends, as a table shows them: times 100, with signs."""
        return f"{100 * self.low:+.1f} to {100 * self.high:+.1f}"

    def numbers(self) -> dict[str, float]:
        """Returns both ends, for files that machines read."""
        return {"low": self.low, "high": self.high}


@dataclass(frozen=True)
class SignFlip:
    """A sign-flip test.

    Attributes:
        p: Fraction of the sign patterns whose mean is at least as far from 0 as the observed one.
        smallest: The least that p can be with so many numbers, 2 / 2^n.
    """

    p: float
    smallest: float

    def __str__(self) -> str:
        return f"p {self.p:.3g} (least: {self.smallest:.2g})"

    def numbers(self) -> dict[str, float]:
        """Returns both, for files that machines read."""
        return {"p": self.p, "least p": self.smallest}


@dataclass(frozen=True)
class Paired:
    """Differences between two ways to do the same thing, seed by seed.

    Attributes:
        seeds: The seeds that both have, sorted.
        differences: One a seed, the first minus the second.
        student: Student's interval for the mean difference; `None` below `FEWEST` pairs.
        bootstrap: The bootstrap's, for comparison; likewise.
        test: The sign-flip test of "no difference".
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    student: Interval | None
    bootstrap: Interval | None
    test: SignFlip

    @property
    def outcome(self) -> str:
        """Where Student's interval leaves 0 out "ahead" or "behind", else what is missing."""
        if self.student is None:
            return f"fewer than {FEWEST} pairs: nothing is concluded"
        if 0 in self.student:
            return "not settled"
        return "ahead" if self.student.low > 0 else "behind"


def paired_differences(
    first: Mapping[int, float], second: Mapping[int, float], *, level: float = 0.95
) -> Paired:
    """Compares two sets of numbers, one a seed, over the seeds that they share.

    What a seed does to both (weights to start from, order of batches) is gone from the difference.
    `level` is that of the intervals.

    Raises:
        InputError: If they share no seed, or a number is not finite.
    """
    seeds = tuple(sorted(set(first) & set(second)))
    if not seeds:
        raise InputError(
            f"there is no pair: the seeds are {sorted(first)} and {sorted(second)}; run the same "
            "seeds on both sides"
        )
    differences = tuple(first[seed] - second[seed] for seed in seeds)
    student = bootstrap = None
    if len(seeds) >= FEWEST:
        student = student_interval(differences, level)
        bootstrap = bootstrap_interval(differences, level)
    return Paired(seeds, differences, student, bootstrap, sign_flip_test(differences))


def student_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Returns Student's interval for the mean of two values or more; exact where they are normal.

    Raises:
        InputError: If there are fewer, one is not finite, or `level` is not in (0, 1).
    """
    x, factor = _finite(values, 2), _student_factor(len(values), level)
    half = factor * x.std(ddof=1) / len(x) ** 0.5
    return Interval(float(x.mean() - half), float(x.mean() + half))


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Returns the bootstrap interval for the mean: percentiles, expanded for small n.

    The plain percentile interval is too narrow for few values twice over: it spreads like a normal
    law where Student's belongs, and like the deviation with n in place of n - 1. So the percentiles
    are taken at Phi(±t sqrt(n / (n - 1))), with t Student's factor, which makes up for both as far
    as the values reach (Hesterberg 2015, The American Statistician 69, "expanded percentile").
    Below six values it still covers less than 95%, see above.

    The same values and `seed` always give the same interval; errors are those of
    `student_interval`.
    """
    x, n = _finite(values, 2), len(values)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    tail = NormalDist().cdf(-_student_factor(n, level) * (n / (n - 1)) ** 0.5)
    low, high = np.quantile(x[drawn].mean(axis=1), [tail, 1 - tail])
    return Interval(float(low), float(high))


def sign_flip_test(differences: Sequence[float]) -> SignFlip:
    """Tests "no difference", under which each sign is as likely as its opposite; two-sided.

    With n pairs p is a multiple of 1 / 2^n and at least 2 / 2^n: three seeds cannot say less than
    0.25, and it takes six to get below 0.05. All signs are tried up to n = 16, else 100,000 drawn
    ones with a fixed seed (`scipy.stats.permutation_test`).

    Raises:
        InputError: If there is no difference, or one is not finite.
    """
    x = _finite(differences, 1)
    if len(x) == 1:
        return SignFlip(1.0, 1.0)
    from scipy import stats

    largest = np.abs(x).sum() or 1.0
    found = stats.permutation_test(
        (x,),
        # what is equal but for rounding counts as equal
        lambda v, axis: np.round(v.sum(axis) / largest, 12),
        permutation_type="samples",
        n_resamples=100_000,
        random_state=0,
    )
    return SignFlip(float(found.pvalue), 2 / 2 ** len(x))


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Returns Wilson's interval for a fraction of which `k` of `n` were seen (Wilson 1927).

    It stays in [0, 1] and has a width even where all or none were seen.
    """
    from scipy.stats import binomtest

    found = binomtest(k, n).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))


def _student_factor(n: int, level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, such as 0.95, got {level!r}")
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.5 + level / 2))


def _finite(values: Sequence[float], fewest: int) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < fewest or not np.isfinite(x).all():
        raise InputError(f"at least {fewest} finite numbers are needed, got {list(values)}")
    return x
