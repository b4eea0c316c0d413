"""Convergence: power laws, which are straight lines where both axes are logarithmic."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from engm.plots.style import COLOURS, open_axes

_STYLES = ("-", "--", "-.", ":")


def log_curves(
    panels: Mapping[str, Mapping[str, Tensor]],
    x: Sequence[float],
    x_label: str,
    y_label: str,
    guides: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draws geometric means over the seeds on two logarithmic axes, and bands from low to high.

    Args:
        panels: Under the title of each panel the values of its curves, above 0, `[seeds, len(x)]`,
            under the names of the legend. A name has the same colour in all panels.
        x: Above 0.
        x_label: What `x` is.
        y_label: What the values are.
        guides: Values to compare with, as many as `x`, drawn thin and grey in all panels.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    looks = dict(zip(names, zip(cycle(COLOURS), cycle(_STYLES), strict=False), strict=False))
    size = (max(5.0, 2.9 * len(panels)), 3.1)
    figure, row = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, (title, curves) in zip(row[0], panels.items(), strict=True):
        for name, values in curves.items():
            colour, style = looks[name]
            found = values.detach().cpu().double()
            low, high = found.min(0).values.tolist(), found.max(0).values.tolist()
            if len(found) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            mean = found.log().mean(0).exp().tolist()
            axes.plot(x, mean, style, marker="o", color=colour, label=name, markersize=3)
        for name, guide in (guides or {}).items():
            axes.plot(x, guide, color="#777777", linewidth=1, linestyle=":", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
        open_axes(axes)
        for axis in (axes.xaxis, axes.yaxis):
            _label(axis)
    row[0, 0].set_ylabel(y_label)
    row[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _label(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    few = math.log10(high / low) < 1.7
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
