"""Gradient norm and variance: over training, against the loss, by layer, in mini-batches."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from engm.plots.style import BLUE, COLOURS, ORANGE, SKY, open_axes

_DPI = 80  # keeps notebooks small

Curves = Mapping[str, Sequence[Sequence[float]]]


def seed_lines(
    x: Sequence[float], panels: Mapping[str, Curves], x_label: str, *, log: bool = False
) -> Figure:
    """Draws quantities side by side; thin lines are single seeds, thick ones their mean.

    Args:
        x: What was varied, such as the epochs.
        panels: Under the label of each panel's y axis the curves; under the names of the legend a
            curve for each seed, as long as `x`.
        x_label: What `x` is, with its unit.
        log: Whether the y axes are logarithmic; otherwise they start at 0.
    """
    size = (3.3 * len(panels), 2.7)
    figure, row = plt.subplots(1, len(panels), figsize=size, squeeze=False, dpi=_DPI)
    for axes, (label, curves) in zip(row[0], panels.items(), strict=True):
        for colour, (name, seeds) in zip(cycle(COLOURS), curves.items(), strict=False):
            for values in seeds if len(seeds) > 1 else []:
                axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.5)
            mean = [sum(column) / len(column) for column in zip(*seeds, strict=True)]
            axes.plot(x, mean, "o-", color=colour, linewidth=2, markersize=3, label=name)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        open_axes(axes)
    row[0, 0].legend(frameon=False)
    figure.tight_layout()
    return figure


def against_loss(points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draws mean example norms over mean losses, one point a moment of training.

    Args:
        points: Under the names of the legend the losses and the norms.
    """
    figure, axes = plt.subplots(figsize=(6, 3.2), dpi=_DPI)
    markers = zip(cycle(COLOURS), cycle("os^Dv"), points.items(), strict=False)
    for colour, marker, (name, (losses, norms)) in markers:
        axes.plot(losses, norms, marker, color=colour, markersize=5, alpha=0.7, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("mean loss (log scale; training goes to the left)")
    axes.set_ylabel("mean example norm")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    open_axes(axes)
    figure.tight_layout()
    return figure


def layer_bars(groups: Mapping[str, Mapping[str, float]], x_label: str) -> Figure:
    """Draws one bar a layer and group, first layer on top.

    Args:
        groups: Under the names of the legend the value of each layer; all have the same layers.
        x_label: What the values are, with their unit.
    """
    layers = list(next(iter(groups.values())))
    thick = 0.8 / len(groups)
    height = 1.2 + 0.2 * len(layers) * len(groups) ** 0.5
    figure, axes = plt.subplots(figsize=(6, height), dpi=_DPI)
    for index, (colour, (name, values)) in enumerate(
        zip(cycle(COLOURS), groups.items(), strict=False)
    ):
        places = [place + (index - (len(groups) - 1) / 2) * thick for place in range(len(layers))]
        axes.barh(places, [values[layer] for layer in layers], thick, color=colour, label=name)
    axes.set_yticks(range(len(layers)), layers, fontsize=10 if len(layers) < 15 else 7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(x_label)
    axes.legend(frameon=False)
    open_axes(axes)
    figure.tight_layout()
    return figure


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
    figure, axes = plt.subplots(figsize=(6, 3.2), dpi=_DPI)
    for size, squares in zip(sizes, measured, strict=True):
        axes.plot([size] * len(squares), squares, ".", color=SKY, markersize=3)
    means = [sum(squares) / len(squares) for squares in measured]
    axes.plot(sizes, means, "o", color=ORANGE, markersize=7, label="measured: mean of the draws")
    axes.plot(sizes, predicted, color=BLUE, label="formula: variance / $n$")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.set_xlabel("examples in a mini-batch, $n$")
    axes.set_ylabel("squared distance from\nthe full gradient")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    open_axes(axes)
    figure.tight_layout()
    return figure
