"""How much of a grid of settings is nearly as good as its best, and what that says of a claim.

The claim (arXiv 2209.01199, abstract): ENGM lessens robust overfitting and the sensitivity to
hyperparameters. The measures and the rules are this kit's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engm.errors import InputError
from engm.report import verdicts

_ROUNDING = 1e-9  # 0.5 - 0.48 is above 0.02 in floating point


@dataclass(frozen=True)
class NearBest:
    """The part of a grid that is nearly as good as the best of it.

    Attributes:
        best: The highest accuracy, a fraction; `None` where every run collapsed.
        inside: Whether a cell is near the best, bool, `[rows, columns]`.
        fraction: Share of the cells that are.
        decades: Their area with both axes in units of log10; see `near_best`.
        whole: The area of the whole grid.
    """

    best: float | None
    inside: np.ndarray
    fraction: float
    decades: float
    whole: float


def near_best(
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    accuracies: Sequence[Sequence[float]] | np.ndarray,
    *,
    within: float = 0.02,
) -> NearBest:
    """Finds the cells whose accuracy is within a margin of the highest; source: this kit.

    A cell reaches half way to its neighbours on the log axes, and no further than the ends of the
    grid. So `decades` does not depend on how densely a stretch of the grid was tried, as `fraction`
    does. An axis of a single value counts as 1; then `decades` is a length along the other.

    Args:
        lrs: The columns, rising, above 0.
        weight_decays: The rows, likewise.
        accuracies: Fractions, `[rows, columns]`; nan for a run that collapsed, which is outside.
        within: The margin, a fraction: 0.02 is two points.

    Raises:
        InputError: If one of these is not as above.
    """
    found = np.asarray(accuracies, dtype=np.float64)
    widths, heights = _lengths("lrs", lrs), _lengths("weight_decays", weight_decays)
    if found.shape != (len(heights), len(widths)):
        raise InputError(
            f"accuracies are {list(found.shape)}; {len(heights)} weight decays (rows) and "
            f"{len(widths)} learning rates (columns) need [{len(heights)}, {len(widths)}]"
        )
    if not (np.isnan(found) | ((found >= 0) & (found <= 1))).all():
        raise InputError("accuracies must be fractions in [0, 1], or nan for a run that collapsed")
    if not within >= 0:
        raise InputError(f"within must be 0 or more, such as 0.02 for two points, got {within}")
    areas = np.outer(heights, widths)
    best = None if np.isnan(found).all() else float(np.nanmax(found))
    inside = found >= (np.inf if best is None else best - within - _ROUNDING)  # a nan is not
    return NearBest(
        best, inside, float(inside.mean()), float(areas[inside].sum()), float(areas.sum())
    )


def lessens_overfitting(msgd_gaps: Sequence[float], engm_gaps: Sequence[float]) -> str:
    """Decides whether ENGM's robust overfitting gap is smaller than MSGD's; source: this kit.

    Gaps are best minus last, one a seed. What decides is Student's interval for their differences.
    The claim holds only if MSGD overfits to begin with: if the interval for its own gap is above 0.
    """
    outcome = verdicts.from_differences([m - e for m, e in zip(msgd_gaps, engm_gaps, strict=True)])
    if outcome == verdicts.HOLDS and verdicts.from_differences(msgd_gaps) != verdicts.HOLDS:
        return verdicts.NOT_SETTLED
    return outcome


def lessens_sensitivity(
    msgd: Sequence[NearBest], engm: Sequence[NearBest], *, within: float = 0.02
) -> str:
    """Decides whether more of the grid is near the best under ENGM; source: this kit.

    That is Student's interval for the differences of `decades`, seed by seed. Collapsed runs make
    the smallest area there is; a grid that is equally bad everywhere, the largest. So the claim
    holds only if in no seed the best of ENGM falls behind that of MSGD by more than `within`, and
    fails only if in none the best of MSGD falls behind that of ENGM.

    Both have a grid a seed, for the same seeds and settings; `within` is that of `near_best`.
    """
    pairs = list(zip(msgd, engm, strict=True))
    outcome = verdicts.from_differences([e.decades - m.decades for m, e in pairs])
    ahead = [(e.best or 0.0) - (m.best or 0.0) for m, e in pairs]
    margin = within + _ROUNDING
    if outcome == verdicts.HOLDS and min(ahead) < -margin:
        return verdicts.NOT_SETTLED
    if outcome == verdicts.DOES_NOT_HOLD and max(ahead) > margin:
        return verdicts.NOT_SETTLED
    return outcome


def _lengths(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    # a nan fails both comparisons
    if len(x) < 1 or not (x > 0).all() or not (np.diff(x) > 0).all() or np.isinf(x).any():
        raise InputError(f"{name} must be rising, finite numbers above 0, got {list(values)}")
    if len(x) == 1:
        return np.ones(1)
    log = np.log10(x)
    edges = np.concatenate([log[:1], (log[1:] + log[:-1]) / 2, log[-1:]])
    return np.diff(edges)
