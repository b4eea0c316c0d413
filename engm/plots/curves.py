"""Curves over what was varied: epochs, steps, eps, noise.

`x` is what was varied, and labels say what is drawn, with its unit. Mappings have the names of the
legend, and under them values as many as `x`; where there are seeds, so many for each.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from engm.norms.inputs import Fit
from engm.plots.style import (
    BLUE,
    COLOURS,
    GREY,
    finish,
    panels,
    percent_axis,
    seeds_and_mean,
    width_of,
)

if TYPE_CHECKING:
    from engm.evaluation.suite import RobustnessReport

_DPI = 80  # keeps notebooks small
_SHORT = 1.5  # inches of a name that fits into a legend inside the axes

Curves = Mapping[str, Sequence[Sequence[float]]]


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Draws one line a name over `x`."""
    figure, [axes] = panels(grid="y")
    for colour, (name, values) in zip(cycle(COLOURS), curves.items(), strict=False):
        axes.plot(x, values, "o-", color=colour, label=name, markersize=4)
    if all(isinstance(value, int) for value in x):
        axes.xaxis.set_major_locator(_whole())
    axes.set(xlabel=x_label, ylabel=y_label)
    return finish(figure, axes)


def accuracy_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Draws `lines` of accuracies, given as fractions, in percent."""
    percent = {name: [100 * value for value in values] for name, values in curves.items()}
    figure = lines(x, percent, x_label, y_label)
    percent_axis(figure.axes[0], y_label)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draws clean and robust validation accuracy over epochs; thin lines are single seeds.

    Args:
        runs: The metrics of each seed's run, as in `metrics.jsonl`.
    """
    # long names stand below, where they have the whole width
    below = width_of(runs) > _SHORT
    size = (max(9, 1 + width_of(runs)), 3.4 + 0.25 * len(runs)) if below else (9, 3.4)
    figure, row = panels(("", ""), size, sharex=True)
    for axes, kind in zip(row, ("clean", "robust"), strict=True):
        key = f"validation_{kind}_accuracy"
        for colour, (name, seeds) in zip(cycle(COLOURS), runs.items(), strict=False):
            values = [[100 * line[key] for line in metrics] for metrics in seeds]
            seeds_and_mean(axes, [line["epoch"] for line in seeds[0]], values, colour, label=name)
        percent_axis(axes, f"{kind} accuracy, validation (%)")
        axes.set_xlabel("epoch")
    if not below:
        return finish(figure, row[0])
    figure.set_layout_engine("constrained")
    figure.legend(*row[0].get_legend_handles_labels(), frameon=False, loc="outside lower left")
    return figure


def seed_lines(
    x: Sequence[float], quantities: Mapping[str, Curves], x_label: str, *, log: bool = False
) -> Figure:
    """Draws quantities side by side; thin lines are single seeds, thick ones their mean.

    Under the label of each panel's y axis stand its curves. The axes are logarithmic with `log`,
    and otherwise start at 0.
    """
    size = (3.3 * len(quantities), 2.7)
    figure, row = panels([""] * len(quantities), size, grid="y", dpi=_DPI)
    for axes, (label, curves) in zip(row, quantities.items(), strict=True):
        for colour, (name, seeds) in zip(cycle(COLOURS), curves.items(), strict=False):
            seeds_and_mean(axes, x, seeds, colour, marker="o", markersize=3, label=name)
        axes.set(xlabel=x_label, ylabel=label)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    return finish(figure, row[0])


def log_curves(
    values: Mapping[str, Mapping[str, Tensor]],
    x: Sequence[float],
    x_label: str,
    y_label: str,
    guides: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draws geometric means over the seeds on two logarithmic axes, and bands from low to high.

    Power laws are straight lines there. Under the title of each panel stand the values of its
    curves, above 0, `[seeds, len(x)]`; a name has the same colour in all panels. `guides` are
    drawn thin and grey in all of them, to compare with.
    """
    names = list(dict.fromkeys(name for curves in values.values() for name in curves))
    styles = zip(cycle(COLOURS), cycle(("-", "--", "-.", ":")), strict=False)
    looks = dict(zip(names, styles, strict=False))
    size = (max(5.0, 2.9 * len(values)), 3.1)
    figure, row = panels(values, size, grid="both", sharey=True)
    for axes, curves in zip(row, values.values(), strict=True):
        for name, seeds in curves.items():
            colour, style = looks[name]
            found = seeds.detach().cpu().double().numpy()
            if len(found) > 1:
                low, high = found.min(0), found.max(0)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            mean = np.exp(np.log(found).mean(0))
            axes.plot(x, mean, style, marker="o", color=colour, label=name, markersize=3)
        for name, guide in (guides or {}).items():
            axes.plot(x, guide, color=GREY, linewidth=1, linestyle=":", label=name)
        axes.set(xscale="log", yscale="log", xlabel=x_label)
        for axis in (axes.xaxis, axes.yaxis):
            _label(axis)
    row[0].set_ylabel(y_label)
    return finish(figure, row[0], fontsize=8)


def fits(runs: Mapping[str, Sequence[Fit]], steps_per_epoch: int) -> Figure:
    """Draws how good each fit of the estimate was, over the steps; the first epoch is grey."""
    figure, row = panels(("", ""), (9, 3.4), grid="y", sharex=True, sharey=True)
    kinds = {"r_squared": "$R^2$ of the line", "rank_correlation": "rank correlation"}
    for axes, (kind, label) in zip(row, kinds.items(), strict=True):
        axes.axvspan(1, steps_per_epoch, color="#EEEEEE")
        for colour, (name, history) in zip(cycle(COLOURS), runs.items(), strict=False):
            steps = [fit.step for fit in history]
            values = [getattr(fit, kind) for fit in history]
            axes.plot(steps, values, "o-", color=colour, label=name, markersize=3, linewidth=1)
        axes.set(xlabel="step", ylabel=label)
        axes.yaxis.set_tick_params(labelleft=True)
    return finish(figure, row[0], loc="lower right")


def robustness_curve(report: "RobustnessReport") -> Figure:
    """Draws what `engm.evaluate` found: PGD over eps with its 95% band, each attack at its eps."""
    figure, [axes] = panels(size=(6, 3.8))
    radii, along = list(report.curve), list(report.curve.values())
    low, high = ([100 * getattr(found.interval, end) for found in along] for end in ("low", "high"))
    axes.fill_between(radii, low, high, color=BLUE, alpha=0.2, linewidth=0)
    percents = [100 * found.fraction for found in along]
    axes.plot(radii, percents, "o-", color=BLUE, markersize=4, label="PGD on the margin")
    # each accuracy has a sign of its own: they are close, and the sign alone tells them apart
    looks = zip(cycle("svD^PXdv<>"), cycle([*COLOURS[1:], BLUE]), report.attacks, strict=False)
    point: dict[str, Any] = dict(linestyle="none")
    for marker, colour, found in looks:
        point |= dict(marker=marker, color=colour, markersize=7, markerfacecolor="none")
        axes.plot([report.eps], [100 * found.accuracy.fraction], label=found.name, **point)
    point |= dict(marker="*", color="black", markersize=11, markerfacecolor="black")
    axes.plot([report.eps], [100 * report.worst.fraction], label="worst case", **point)
    # eps of interest are small, and the last one is many times as large
    axes.set_xscale("symlog", linthresh=report.eps, linscale=1)
    axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii], rotation=45)
    axes.minorticks_off()
    axes.axvline(report.eps, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"eps, {report.norm}, in pixel units")
    percent_axis(axes, "accuracy (%), 95% band")
    return finish(figure, axes, fontsize=8)


def corrupted_steps(
    factors: Sequence[float], steps: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Draws what one example does to the gradient of a batch while its loss is multiplied.

    Args:
        factors: What the loss was multiplied by.
        steps: The lengths of the batch's gradient, and its cosines with what it is without that
            example, both as many as `factors`.
    """
    figure, (left, right) = panels(("", ""), (6.8, 2.6))
    looks = zip(cycle(COLOURS), cycle(("-", "--", "-.")), steps.items(), strict=False)
    for colour, line, (name, (lengths, cosines)) in looks:
        style = dict(color=colour, linestyle=line, linewidth=2, label=name)
        left.loglog(factors, lengths, **style)
        right.semilogx(factors, cosines, **style)
    left.yaxis.set_major_locator(LogLocator(numticks=5))
    left.set_ylabel("norm of the batch's gradient")
    right.set_ylabel("cosine with the others'")
    for axes in (left, right):
        axes.set_xlabel("factor of one loss")
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.minorticks_off()
    return finish(figure, left)


def running_scale(means: Sequence[float], scales: Sequence[float]) -> Figure:
    """Draws the scale c over the steps, and the mean |g_i| of each batch behind it."""
    figure, [axes] = panels(size=(5.4, 2.6))
    steps = range(1, len(means) + 1)
    axes.plot(steps, means, color="#BBBBBB", linewidth=1, label="mean $|g_i|$ of the batch")
    axes.plot(steps, scales, color=BLUE, linewidth=2, label="$c$")
    axes.set(xlabel="step", ylabel="example norm", ylim=(0, None))
    return finish(figure, axes, loc="lower right")


def _whole() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _label(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    few = math.log10(high / low) < 1.7
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
