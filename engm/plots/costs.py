"""What a step costs."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from engm.plots.style import BLUE, open_axes


def cost_ratios(panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """Draws what each method costs as a multiple of the first one's cost, bars with whiskers.

    Args:
        panels: Under the title of each panel, for each method the middle, low and high ratio.
    """
    longest = max(len(name) for ratios in panels.values() for name in ratios)
    width = max(3.4, 2 + 0.09 * longest)  # long names leave the bars their place
    figure, row = plt.subplots(1, len(panels), figsize=(width * len(panels), 3.4), squeeze=False)
    for axes, (title, ratios) in zip(row[0], panels.items(), strict=True):
        middles = [middle for middle, _, _ in ratios.values()]
        below = [middle - low for middle, low, _ in ratios.values()]
        above = [high - middle for middle, _, high in ratios.values()]
        bars = axes.barh(list(ratios), middles, xerr=[below, above], capsize=3, color=BLUE)
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"ratio to {next(iter(ratios))}")
        open_axes(axes)
    figure.tight_layout()
    return figure
