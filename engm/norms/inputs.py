"""The estimate of example norms from input gradients: |g_i| ~ alpha |dl_i/dx_i| + beta.

The abstract of arXiv 2209.01199 observes that the norms w.r.t. parameters and w.r.t. inputs go
together, and estimates the first from the second. The straight line, how it is fitted and smoothed,
and when it is given up are decisions of this kit.
"""

import warnings
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# Share of the old coefficients that a new fit leaves.
_SMOOTHING = 0.5
# Below this R^2 a line says next to nothing, and the exact norms are used.
_USEFUL = 0.1


@dataclass(frozen=True)
class Fit:
    """One fit of the line, on one batch.

    Attributes:
        step: The step at which it was made, from 1.
        alpha: Slope after smoothing.
        beta: Intercept after smoothing.
        r_squared: Part of the norms' variance that the line through this batch explains.
        rank_correlation: Spearman's, between the two norms in this batch.
    """

    step: int
    alpha: float
    beta: float
    r_squared: float
    rank_correlation: float


class InputEstimate:
    """The line and its history.

    Attributes:
        fits: Every `Fit`, in order, for plots.
    """

    def __init__(self) -> None:
        self.fits: list[Fit] = []
        self._warned = False

    @property
    def useful(self) -> bool:
        """Whether the last fit explained enough to go by."""
        return bool(self.fits) and self.fits[-1].r_squared >= _USEFUL

    def fit(self, step: int, inputs: Tensor, norms: Tensor) -> None:
        """Fits the line by least squares and smooths it with the one before.

        Args:
            step: Number of the step, for the record.
            inputs: |dl_i/dx_i|, `[n]`; examples that are not finite are left out.
            norms: |g_i|, `[n]`.

        Warns:
            UserWarning: Once, when the line is useless and the exact norms are used instead.
        """
        good = inputs.isfinite() & norms.isfinite()
        u, v = inputs[good].double().cpu(), norms[good].double().cpu()
        if len(u) < 3:
            return  # a line through two points explains nothing
        du, dv = u - u.mean(), v - v.mean()
        slope = _ratio(du @ dv, du @ du)
        intercept = float(v.mean() - slope * u.mean())
        rest = dv - slope * du
        keep = _SMOOTHING if self.useful else 0.0
        before = self.fits[-1] if self.fits else Fit(0, 0.0, 0.0, 0.0, 0.0)
        self.fits.append(
            Fit(
                step=step,
                alpha=keep * before.alpha + (1 - keep) * slope,
                beta=keep * before.beta + (1 - keep) * intercept,
                r_squared=1 - _ratio(rest @ rest, dv @ dv) if dv.any() else 0.0,
                rank_correlation=_rank_correlation(u, v),
            )
        )
        if not self.useful and not self._warned:
            self._warned = True
            warnings.warn(
                f"norms='input': at step {step} the input gradients explain "
                f"{self.fits[-1].r_squared:.0%} of the example norms' variance; exact norms are "
                "used until a later fit is better",
                stacklevel=4,
            )

    def estimate(self, inputs: Tensor) -> Tensor:
        """Returns the norms that the line gives, `[n]`, kept above a hundredth of their mean."""
        line = self.fits[-1].alpha * inputs + self.fits[-1].beta
        good = line.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        lowest = 0.01 * good.mean()
        # an input gradient that is not finite stays so, for the optimizer to see
        return torch.where(inputs.isfinite(), line.clamp(min=lowest), inputs)

    def state(self) -> list[dict[str, float]]:
        """Returns the last fit as plain values, for a `state_dict`."""
        return [asdict(fit) for fit in self.fits[-1:]]

    def load(self, state: list[dict[str, float]]) -> None:
        """Goes on from what `state` returned."""
        self.fits = [Fit(**fit) for fit in state]  # type: ignore[arg-type]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _rank_correlation(u: Tensor, v: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (u, v)]
    du, dv = (r - r.mean() for r in ranks)
    return _ratio(du @ dv, (du @ du).sqrt() * (dv @ dv).sqrt())
