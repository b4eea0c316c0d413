"""A training run as it goes."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engm.plots.style import BLUE, COLOURS, ORANGE, open_axes, percent_axis


def training_view(
    losses: Sequence[float], accuracies: Mapping[str, Sequence[float]], weights: Tensor
) -> Figure:
    """Draws loss and accuracies over the epochs so far, and how the example weights are spread.

    The figure is not one of pyplot's, which belong to the main thread.

    Args:
        losses: Training loss of each epoch.
        accuracies: Fractions, as many as `losses`, under the names of the legend.
        weights: w_i of the examples of the last epoch, `[n]`.
    """
    figure = Figure(figsize=(9, 2.8))
    left, middle, right = figure.subplots(1, 3)
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, "o-", color=BLUE, markersize=3)
    left.set_ylim(0, 1.1 * max(losses))
    left.set_ylabel("training loss")
    for colour, (name, values) in zip(cycle(COLOURS), accuracies.items(), strict=False):
        percents = [100 * value for value in values]
        middle.plot(epochs, percents, "o-", color=colour, markersize=3, label=name)
    percent_axis(middle, "accuracy, validation (%)")
    middle.legend(frameon=False)
    for axes in (left, middle):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    values = weights.detach().cpu().tolist()
    right.hist(values, bins=20, range=(0, max(2, *values)), color=ORANGE)
    right.set_xlabel("example weight $w_i$, last epoch")
    right.set_ylabel("examples")
    for axes in (left, right):
        open_axes(axes)
    figure.tight_layout()
    return figure
