"""Curves over what was varied: epochs, steps, eps, noise."""

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
    ORANGE,
    SKY,
    finish,
    open_axes,
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
    """Draws one line a name over `x`.

    Args:
        x: What was varied: eps, steps, epochs.
        curves: Values, as many as `x`, under the names of the legend.
        x_label: What `x` is, with its unit.
        y_label: What the values are, with their unit.
    """
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
        runs: The metrics of each seed's run, as in `metrics.jsonl`, under the names of the legend.
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


def training_view(
    losses: Sequence[float],
    accuracies: Mapping[str, Sequence[float]],
    weights: Tensor,
    earlier: Sequence[tuple[Sequence[float], Mapping[str, Sequence[float]]]] = (),
) -> Figure:
    """Draws loss and accuracies over the epochs so far, and how the example weights are spread.

    The figure is not one of pyplot's, which belong to the main thread.

    Args:
        losses: Training loss of each epoch.
        accuracies: Fractions, as many as `losses`, under the names of the legend.
        weights: w_i of the examples of the last epoch, `[n]`.
        earlier: Losses and accuracies of earlier runs, which are drawn as faint lines.
    """
    figure = Figure(figsize=(9, 2.8))
    left, middle, right = figure.subplots(1, 3)
    for before, others in earlier:
        left.plot(range(1, len(before) + 1), before, color="lightgrey", linewidth=1)
        for values in others.values():
            percents = [100 * value for value in values]
            middle.plot(range(1, len(values) + 1), percents, color="lightgrey", linewidth=1)
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, "o-", color=BLUE, markersize=3)
    highest = max(max(each) for each in (losses, *(before for before, _ in earlier)))
    left.set(ylim=(0, 1.1 * highest), ylabel="training loss")
    for colour, (name, values) in zip(cycle(COLOURS), accuracies.items(), strict=False):
        percents = [100 * value for value in values]
        middle.plot(epochs, percents, "o-", color=colour, markersize=3, label=name)
    percent_axis(middle, "accuracy, validation (%)")
    for axes in (left, middle):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(_whole())
    found = weights.detach().cpu().tolist()
    right.hist(found, bins=20, range=(0, max(2, *found)), color=ORANGE)
    right.set(xlabel="example weight $w_i$, last epoch", ylabel="examples")
    for axes in (left, right):
        open_axes(axes)
    return finish(figure, middle)


def seed_lines(
    x: Sequence[float], quantities: Mapping[str, Curves], x_label: str, *, log: bool = False
) -> Figure:
    """Draws quantities side by side; thin lines are single seeds, thick ones their mean.

    Args:
        x: What was varied, such as the epochs.
        quantities: Under the label of each panel's y axis the curves; under the names of the legend
            a curve for each seed, as long as `x`.
        x_label: What `x` is, with its unit.
        log: Whether the y axes are logarithmic; otherwise they start at 0.
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


def against_loss(points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draws mean example norms over mean losses, one point a moment of training.

    Args:
        points: Under the names of the legend the losses and the norms.
    """
    figure, [axes] = panels(size=(6, 3.2), grid="y", dpi=_DPI)
    looks = zip(cycle(COLOURS), cycle("os^Dv"), points.items(), strict=False)
    for colour, marker, (name, (losses, norms)) in looks:
        axes.plot(losses, norms, marker, color=colour, markersize=5, alpha=0.7, label=name)
    x_label = "mean loss (log scale; training goes to the left)"
    axes.set(xscale="log", ylim=(0, None), xlabel=x_label, ylabel="mean example norm")
    return finish(figure, axes)


def batch_variance(
    sizes: Sequence[int], measured: Sequence[Sequence[float]], predicted: Sequence[float]
) -> Figure:
    """Draws the variance of mini-batch gradients over the size of the mini-batch, on log axes.

    Args:
        sizes: Examples in a mini-batch.
        measured: For each size the squared distances of single mini-batch gradients from the full
            gradient; their mean is the variance.
        predicted: For each size what the formula says.
    """
    figure, [axes] = panels(size=(6, 3.2), grid="both", dpi=_DPI)
    for size, squares in zip(sizes, measured, strict=True):
        axes.plot([size] * len(squares), squares, ".", color=SKY, markersize=3)
    means = [np.mean(squares) for squares in measured]
    axes.plot(sizes, means, "o", color=ORANGE, markersize=7, label="measured: mean of the draws")
    axes.plot(sizes, predicted, color=BLUE, label="formula: variance / $n$")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.set_xlabel("examples in a mini-batch, $n$")
    axes.set_ylabel("squared distance from\nthe full gradient")
    return finish(figure, axes)


def log_curves(
    values: Mapping[str, Mapping[str, Tensor]],
    x: Sequence[float],
    x_label: str,
    y_label: str,
    guides: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draws geometric means over the seeds on two logarithmic axes, and bands from low to high.

    Power laws are straight lines there.

    Args:
        values: Under the title of each panel the values of its curves, above 0, `[seeds, len(x)]`,
            under the names of the legend. A name has the same colour in all panels.
        x: Above 0.
        x_label: What `x` is.
        y_label: What the values are.
        guides: Values to compare with, as many as `x`, drawn thin and grey in all panels.
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
    """Draws how good each fit of the estimate was, over the steps; the first epoch is grey.

    Args:
        runs: The fits of each run under the names of the legend.
        steps_per_epoch: How many steps the first epoch had.
    """
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
    """Draws accuracy under PGD over eps with its 95% band, and what each attack left at its eps.

    Args:
        report: What `engm.evaluate` returned.
    """
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
        steps: Under the names of the legend the lengths of the batch's gradient, and its cosines
            with what it is without that example, both as many as `factors`.
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
    """Draws the scale c over the steps, and the mean |g_i| of each batch behind it.

    Args:
        means: Mean |g_i| of the batch of each step.
        scales: c of each step.
    """
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
