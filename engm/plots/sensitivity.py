"""Robust overfitting, and how accuracy depends on learning rate and weight decay."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engm.plots.style import COLOURS, RED, percent_axis
from engm.report.sensitivity import near_best

_MARKERS = ("o", "s", "^", "D", "v", "P")


def best_to_last(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """Draws robust accuracy at the best and at the last checkpoint, joined by a line.

    Thin lines are single seeds, thick ones their mean.

    Args:
        panels: Under the title of each panel and the name of each set of images, for each seed the
            two accuracies, fractions.
    """
    figure, row = plt.subplots(
        1, len(panels), figsize=(1.5 + 2.4 * len(panels), 3.4), sharey=True, squeeze=False
    )
    for axes, (title, sets) in zip(row[0], panels.items(), strict=True):
        styles = zip(cycle(COLOURS), cycle(_MARKERS), sets.items(), strict=False)
        for colour, marker, (name, seeds) in styles:
            values = 100 * np.asarray(seeds)
            for pair in values if len(values) > 1 else []:
                axes.plot([0, 1], pair, color=colour, linewidth=0.8, alpha=0.5)
            mean = values.mean(axis=0)
            axes.plot([0, 1], mean, color=colour, linewidth=2, marker=marker, label=name)
        axes.set_xticks([0, 1], ["best", "last"])
        axes.set_xlim(-0.2, 1.2)
        axes.set_title(title, fontsize=10)
        percent_axis(axes, "robust accuracy (%)" if axes is row[0, 0] else "")
    row[0, -1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def accuracy_heat_maps(
    grids: Mapping[str, np.ndarray],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    *,
    within: float = 0.02,
) -> Figure:
    """Draws a grid of accuracies for each optimizer, all in the same colours.

    A red line goes round what is within a margin of the grid's best; a cross is a collapsed run.

    Args:
        grids: Fractions, `[weight decays, learning rates]`, nan for a collapsed run.
        lrs: The columns, rising.
        weight_decays: The rows, rising.
        within: The margin, as for `engm.report.sensitivity.near_best`.
    """
    every = np.stack([100 * np.asarray(grid, dtype=float) for grid in grids.values()])
    some = np.isfinite(every).any()
    low, high = (float(np.nanmin(every)), float(np.nanmax(every))) if some else (0.0, 100.0)
    colours = mpl.colormaps["cividis"].with_extremes(bad="white")
    size = (1.2 + (0.8 + 0.62 * len(lrs)) * len(grids), 1.5 + 0.5 * len(weight_decays))
    figure, row = plt.subplots(
        1, len(grids), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, name, grid in zip(row[0], grids, every, strict=True):
        drawn = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if np.isnan(value):
                axes.plot(j, i, "x", color="black", markersize=8)
            else:
                tone = "black" if value > (low + high) / 2 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=tone, fontsize=9)
        _frame(axes, near_best(lrs, weight_decays, grid / 100, within=within).inside)
        axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        axes.set_yticks(range(len(weight_decays)), [f"{decay:g}" for decay in weight_decays])
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("learning rate")
    row[0, 0].set_ylabel("weight decay")
    figure.colorbar(drawn, ax=row[0].tolist(), label="robust accuracy (%)")
    return figure


def _frame(axes: Axes, inside: np.ndarray) -> None:
    padded = np.pad(inside, 1)
    for i, j in np.argwhere(inside):
        # the side of a cell is drawn where its neighbour there is outside
        for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if not padded[i + 1 + di, j + 1 + dj]:
                x = [j + dj / 2] * 2 if dj else [j - 0.5, j + 0.5]
                y = [i + di / 2] * 2 if di else [i - 0.5, i + 0.5]
                axes.plot(x, y, color=RED, linewidth=2.5, solid_capstyle="round", clip_on=False)
