"""Many runs side by side: best and last, and differences seed by seed."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engm.plots.style import BLUE, ORANGE, open_axes
from engm.report.records import Quantity
from engm.report.statistics import Paired


def best_and_last_rows(rows: Mapping[str, Mapping[str, Quantity]]) -> Figure:
    """Draws robust test accuracy of the best and the last checkpoint, a line for each config.

    Points are means, whiskers one standard deviation over the seeds. The axis does not begin at 0,
    so that configs close to each other are told apart.

    Args:
        rows: For each name the quantities of `engm.report.records.summarise`.
    """
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)))
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
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def difference_intervals(panels: Mapping[str, Mapping[str, Paired]], baseline: str) -> Figure:
    """Draws paired differences: small dots are seeds, large ones means, whiskers their intervals.

    Student's interval is drawn, where there is one; blue where it leaves 0 out.

    Args:
        panels: Under what was compared, such as "robust (best)", the differences of each line.
        baseline: What was subtracted.
    """
    lines = list(next(iter(panels.values())))
    figure, row = plt.subplots(
        1,
        len(panels),
        figsize=(3 + 3.2 * len(panels), 1.4 + 0.27 * len(lines)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes, (title, paired) in zip(row[0], panels.items(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, found in enumerate(paired.values()):
            settled = found.student is not None and 0 not in found.student
            colour = BLUE if settled else "#777777"
            values = [100 * difference for difference in found.differences]
            axes.plot(values, [place] * len(values), "o", color=ORANGE, markersize=3, zorder=4)
            axes.plot(sum(values) / len(values), place, "o", color=colour, markersize=6)
            if found.student is not None:
                ends = [100 * found.student.low, 100 * found.student.high]
                axes.plot(ends, [place] * 2, "|-", color=colour, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"points above {baseline}")
    _name_lines(row[0, 0], lines)
    for axes in row[0, 1:]:
        open_axes(axes)
        axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    return figure


def _name_lines(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first line on top
    axes.grid(axis="y", alpha=0.3)
    open_axes(axes)
