"""Accuracy over the size of the perturbation."""

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from engm.plots.style import BLUE, COLOURS, percent_axis

if TYPE_CHECKING:
    from engm.evaluation.suite import RobustnessReport


def robustness_curve(report: "RobustnessReport") -> Figure:
    """Draws accuracy under PGD over eps with its 95% band, and what each attack left at its eps.

    Args:
        report: What `engm.evaluate` returned.
    """
    figure, axes = plt.subplots(figsize=(6, 3.8))
    radii = list(report.curve)
    intervals = [found.interval for found in report.curve.values()]
    low, high = zip(*((i.low, i.high) for i in intervals), strict=True)
    axes.fill_between(radii, _percent(low), _percent(high), color=BLUE, alpha=0.2, linewidth=0)
    fractions = [found.fraction for found in report.curve.values()]
    axes.plot(radii, _percent(fractions), "o-", color=BLUE, markersize=4, label="PGD on the margin")
    # side by side in the order of their accuracy, which is close: the sign alone tells them apart
    for index, found in enumerate([*report.attacks, None]):
        name, accuracy = (found.name, found.accuracy) if found else ("worst case", report.worst)
        axes.plot(
            [report.eps],
            [100 * accuracy.fraction],
            "svD^PXdv<>"[index % 10] if found else "*",
            color=COLOURS[(index + 1) % len(COLOURS)] if found else "black",
            markersize=7 if found else 11,
            markerfacecolor="none" if found else "black",
            linestyle="none",
            label=name,
        )
    # eps of interest are small, and the last one is many times as large
    axes.set_xscale("symlog", linthresh=report.eps, linscale=1)
    axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii], rotation=45)
    axes.minorticks_off()
    axes.axvline(report.eps, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"eps, {report.norm}, in pixel units")
    percent_axis(axes, "accuracy (%), 95% band")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _percent(fractions: "list[float] | tuple[float, ...]") -> list[float]:
    return [100 * fraction for fraction in fractions]
