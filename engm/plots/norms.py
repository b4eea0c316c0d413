"""Example norms: who pulls how hard, and whether input gradients tell."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from engm.norms.inputs import Fit
from engm.plots.style import BLUE, COLOURS, ORANGE, RED, open_axes


def pulls(norms: Tensor, weights: Tensor, scale: float) -> Figure:
    """Draws how hard each example pulls under MSGD, |g_i|, and under ENGM, w_i |g_i|, sorted.

    Args:
        norms: |g_i|, `[n]`.
        weights: w_i, `[n]`.
        scale: c, drawn as a line.
    """
    lengths, order = (values.numpy() for values in norms.detach().cpu().sort())
    weighted = lengths * weights.detach().cpu().numpy()[order]
    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(lengths, "o", color=ORANGE, markersize=4, label="MSGD: $|g_i|$")
    axes.plot(weighted, "o", color=BLUE, markersize=4, label="ENGM: $w_i|g_i|$")
    axes.axhline(scale, color="#555555", linewidth=1, linestyle="--", label="$c$")
    axes.set_xlabel("examples of the batch, by their norm")
    axes.set_ylabel("pull on the weights")
    axes.legend(frameon=False)
    open_axes(axes)
    figure.tight_layout()
    return figure


def norms_from_inputs(panels: Mapping[str, tuple[Tensor, Tensor, float, float]]) -> Figure:
    """Draws each example's norm over that of its input gradient, with the line between them.

    Args:
        panels: Under the title of each panel |dl_i/dx_i| and |g_i|, both `[n]`, and the slope and
            intercept of the line.
    """
    figure, row = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), squeeze=False)
    for axes, (title, (inputs, norms, slope, intercept)) in zip(
        row[0], panels.items(), strict=True
    ):
        x, y = (values.detach().cpu().tolist() for values in (inputs, norms))
        axes.plot(x, y, "o", color=BLUE, markersize=4, alpha=0.6)
        ends = [min(x), max(x)]
        axes.plot(ends, [slope * end + intercept for end in ends], color=RED)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(r"input gradient $|\partial\ell_i/\partial x_i|$")
        axes.set_ylim(bottom=0)
        open_axes(axes)
    row[0, 0].set_ylabel("example norm $|g_i|$")
    figure.tight_layout()
    return figure


def fits(runs: Mapping[str, Sequence[Fit]], steps_per_epoch: int) -> Figure:
    """Draws how good each fit of the estimate was, over the steps; the first epoch is grey.

    Args:
        runs: The fits of each run under the names of the legend.
        steps_per_epoch: How many steps the first epoch had.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
    kinds = {"r_squared": "$R^2$ of the line", "rank_correlation": "rank correlation"}
    for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
        axes.axvspan(1, steps_per_epoch, color="#EEEEEE")
        for colour, (name, history) in zip(cycle(COLOURS), runs.items(), strict=False):
            steps = [fit.step for fit in history]
            values = [getattr(fit, kind) for fit in history]
            axes.plot(steps, values, "o-", color=colour, label=name, markersize=3, linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.yaxis.set_tick_params(labelleft=True)
        axes.grid(axis="y", alpha=0.3)
        open_axes(axes)
    panels[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    return figure
