"""The estimate of example norms from proxies: |g_i| ~ alpha |dl_i/dx_i| + beta.

The abstract of arXiv 2209.01199 observes that the norms w.r.t. parameters and w.r.t. inputs go
together, and estimates the first from the second. The straight line, how it is fitted and smoothed,
and when it is given up are decisions of this kit. In place of the inputs x_i the model's outputs
may be taken, whose gradient is there after the forward pass (for cross-entropy p - y); that it says
much about the norm is known from importance sampling (Katharopoulos and Fleuret 2018, arXiv
1803.00942). With both, the line becomes a plane.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engm.errors import warn

# Share of the old coefficients that a new fit leaves.
_SMOOTHING = 0.5
# Below this R^2 a line says next to nothing, and the exact norms are used.
_USEFUL = 0.1


@dataclass(frozen=True)
class Fit:
    """One fit of the line, on one batch.

    Attributes:
        step: The step at which it was made, from 1.
        alpha: Slope after smoothing; with two proxies one for each.
        beta: Intercept after smoothing.
        r_squared: Part of the norms' variance that the line through this batch explains.
        rank_correlation: Spearman's, between the two norms in this batch.
    """

    step: int
    alpha: float | tuple[float, ...]
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
            inputs: |dl_i/dx_i|, `[n]`, or several proxies, `[n, k]`; examples that are not finite
                are left out.
            norms: |g_i|, `[n]`.

        Warns:
            UserWarning: Once, when the line is useless and the exact norms are used instead.
        """
        proxies = inputs if inputs.dim() == 2 else inputs[:, None]
        good = proxies.isfinite().all(1) & norms.isfinite()
        u, v = proxies[good].double().cpu(), norms[good].double().cpu()
        if len(u) < 3:
            return  # a line through two points explains nothing
        du, dv = u - u.mean(0), v - v.mean()
        if du.shape[1] == 1:
            slope = _ratio(du[:, 0] @ dv, du[:, 0] @ du[:, 0])
            slopes = torch.tensor([slope], dtype=torch.float64)
        else:
            slopes = torch.linalg.lstsq(du, dv[:, None], driver="gelsd").solution[:, 0]
        intercept = float(v.mean() - slopes @ u.mean(0))
        rest = dv - du @ slopes
        keep = _SMOOTHING if self.useful else 0.0
        before = self.fits[-1] if self.fits else Fit(0, 0.0, 0.0, 0.0, 0.0)
        smoothed = keep * torch.tensor(before.alpha, dtype=torch.float64) + (1 - keep) * slopes
        single = len(slopes) == 1
        self.fits.append(
            Fit(
                step=step,
                alpha=float(smoothed) if single else tuple(smoothed.tolist()),
                beta=keep * before.beta + (1 - keep) * intercept,
                r_squared=1 - _ratio(rest @ rest, dv @ dv) if dv.any() else 0.0,
                rank_correlation=_rank_correlation(u[:, 0] if single else u @ slopes, v),
            )
        )
        if not self.useful and not self._warned:
            self._warned = True
            warn(
                f"at step {step} the line of the estimate explains "
                f"{self.fits[-1].r_squared:.0%} of the example norms' variance; exact norms are "
                "used until a later fit is better"
            )

    def estimate(self, inputs: Tensor) -> Tensor:
        """Returns the norms that the line gives, `[n]`, kept above a hundredth of their mean."""
        proxies = inputs if inputs.dim() == 2 else inputs[:, None]
        slopes = torch.tensor(self.fits[-1].alpha, dtype=torch.float64).to(proxies).reshape(-1)
        line = (proxies * slopes).sum(1) + self.fits[-1].beta
        good = line.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        lowest = 0.01 * good.mean()
        # a gradient that is not finite stays so, for the optimizer to see
        finite = proxies.isfinite().all(1)
        return torch.where(finite, line.clamp(min=lowest), torch.nan)

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
