"""Accuracies over eps, steps, epochs."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engm.plots.style import COLOURS, open_axes, percent_axis


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
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for colour, (name, values) in zip(cycle(COLOURS), curves.items(), strict=False):
        axes.plot(x, values, "o-", color=colour, label=name, markersize=4)
    if all(isinstance(value, int) for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    open_axes(axes)
    figure.tight_layout()
    return figure


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
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for axes, kind in zip(panels, ("clean", "robust"), strict=True):
        key = f"validation_{kind}_accuracy"
        for colour, (name, seeds) in zip(cycle(COLOURS), runs.items(), strict=False):
            lines = [[100 * line[key] for line in metrics] for metrics in seeds]
            epochs = [line["epoch"] for line in seeds[0]]
            for line in lines if len(lines) > 1 else []:
                axes.plot(epochs, line, color=colour, linewidth=0.8, alpha=0.5)
            mean = [sum(column) / len(column) for column in zip(*lines, strict=True)]
            axes.plot(epochs, mean, color=colour, linewidth=2, label=name)
        percent_axis(axes, f"{kind} accuracy, validation (%)")
        axes.set_xlabel("epoch")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    return figure
