"""Many runs side by side: best and last, differences seed by seed, grids of settings, costs."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engm.plots.style import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    ORANGE,
    RED,
    finish,
    panels,
    percent_axis,
    seeds_and_mean,
    width_of,
)
from engm.report.records import Quantity
from engm.report.sensitivity import near_best
from engm.report.statistics import Paired


def best_and_last_rows(rows: Mapping[str, Mapping[str, Quantity]]) -> Figure:
    """Draws robust test accuracy of the best and the last checkpoint, a line for each config.

    Points are means, whiskers one standard deviation over the seeds. The axis does not begin at 0,
    so that configs close to each other are told apart.

    Args:
        rows: For each name the quantities of `engm.report.records.summarise`.
    """
    width = max(7, 4.5 + width_of(rows))  # the names leave the points their place
    figure, [axes] = panels(size=(width, 1.2 + 0.3 * len(rows)), grid="y")
    for shift, which, colour, marker in ((-0.15, "best", BLUE, "o"), (0.15, "last", ORANGE, "s")):
        found = [row[f"robust ({which})"] for row in rows.values()]
        axes.errorbar(
            [100 * quantity.mean for quantity in found],
            [place + shift for place in range(len(found))],
            xerr=[100 * (quantity.deviation or 0.0) for quantity in found],
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2,
            linewidth=1.2,
            label=which,
        )
    axes.set_xlabel("robust accuracy, test (%), ± one standard deviation")
    _name_lines(axes, list(rows))
    # above the axes: there is no free corner in a full one
    return finish(figure, axes, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def difference_intervals(quantities: Mapping[str, Mapping[str, Paired]], baseline: str) -> Figure:
    """Draws paired differences: small dots are seeds, large ones means, whiskers their intervals.

    Student's interval is drawn, where there is one; blue where it leaves 0 out.

    Args:
        quantities: Under what was compared, such as "robust (best)", the differences of each line.
        baseline: What was subtracted.
    """
    names = list(next(iter(quantities.values())))
    width = max(3.0, 1 + width_of(names)) + 3.2 * len(quantities)
    size = (width, 1.4 + 0.27 * len(names))
    figure, row = panels(quantities, size, grid="y", sharex=True, sharey=True)
    for axes, paired in zip(row, quantities.values(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, found in enumerate(paired.values()):
            settled = found.student is not None and 0 not in found.student
            colour = BLUE if settled else GREY
            values = [100 * difference for difference in found.differences]
            axes.plot(values, [place] * len(values), "o", color=ORANGE, markersize=3, zorder=4)
            axes.plot(sum(values) / len(values), place, "o", color=colour, markersize=6)
            if found.student is not None:
                ends = [100 * found.student.low, 100 * found.student.high]
                axes.plot(ends, [place] * 2, "|-", color=colour, linewidth=1.2)
        axes.set_xlabel(f"points above {baseline}")
    _name_lines(row[0], names)
    return finish(figure)


def best_to_last(optimizers: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """Draws robust accuracy at the best and at the last checkpoint, joined by a line.

    Thin lines are single seeds, thick ones their mean.

    Args:
        optimizers: Under the title of each panel and the name of each set of images, for each seed
            the two accuracies, fractions.
    """
    figure, row = panels(optimizers, (1.5 + 2.4 * len(optimizers), 3.4), sharey=True)
    for axes, sets in zip(row, optimizers.values(), strict=True):
        looks = zip(cycle(COLOURS), cycle(MARKERS), sets.items(), strict=False)
        for colour, marker, (name, seeds) in looks:
            values = (100 * np.asarray(seeds)).tolist()
            seeds_and_mean(axes, [0, 1], values, colour, marker=marker, label=name)
        axes.set_xticks([0, 1], ["best", "last"])
        axes.set_xlim(-0.2, 1.2)
        percent_axis(axes, "robust accuracy (%)" if axes is row[0] else "")
    return finish(figure, row[-1], loc="center left", bbox_to_anchor=(1, 0.5))


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
    figure, row = panels(grids, size, sharey=True, layout="constrained")
    for axes, grid in zip(row, every, strict=True):
        drawn = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
        axes.spines[:].set_visible(True)
        for (i, j), value in np.ndenumerate(grid):
            if np.isnan(value):
                axes.plot(j, i, "x", color="black", markersize=8)
            else:
                tone = "black" if value > (low + high) / 2 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=tone, fontsize=9)
        _frame(axes, near_best(lrs, weight_decays, grid / 100, within=within).inside)
        axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        axes.set_yticks(range(len(weight_decays)), [f"{decay:g}" for decay in weight_decays])
        axes.set_xlabel("learning rate")
    row[0].set_ylabel("weight decay")
    figure.colorbar(drawn, ax=row, label="robust accuracy (%)")
    return figure


def cost_ratios(measures: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """Draws what each method costs as a multiple of the first one's cost, bars with whiskers.

    Args:
        measures: Under the title of each panel, for each method the middle, low and high ratio.
    """
    longest = max(len(name) for ratios in measures.values() for name in ratios)
    width = max(3.4, 2 + 0.09 * longest)  # long names leave the bars their place
    figure, row = panels(measures, (width * len(measures), 3.4))
    for axes, ratios in zip(row, measures.values(), strict=True):
        middles, lows, highs = np.array(list(ratios.values())).T
        whiskers = [middles - lows, highs - middles]
        bars = axes.barh(list(ratios), middles, xerr=whiskers, capsize=3, color=BLUE)
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(f"ratio to {next(iter(ratios))}")
    return finish(figure)


def _name_lines(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first line on top


def _frame(axes: Axes, inside: np.ndarray) -> None:
    padded = np.pad(inside, 1)
    for i, j in np.argwhere(inside):
        # the side of a cell is drawn where its neighbour there is outside
        for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if not padded[i + 1 + di, j + 1 + dj]:
                x = [j + dj / 2] * 2 if dj else [j - 0.5, j + 0.5]
                y = [i + di / 2] * 2 if di else [i - 0.5, i + 0.5]
                axes.plot(x, y, color=RED, linewidth=2.5, solid_capstyle="round", clip_on=False)
