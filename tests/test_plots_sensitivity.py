import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from engm import plots

LRS, DECAYS = [0.01, 0.1, 1.0], [1e-4, 1e-2]
GRID = np.array([[0.30, 0.50, 0.485], [0.47, 0.48, math.nan]])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def points(line):
    return list(zip(*line.get_data(), strict=True))


def test_best_to_last_draws_each_seed_and_their_mean_in_percent():
    sets = {"training": [(0.9, 1.0), (0.7, 0.8)], "test": [(0.5, 0.4)]}
    figure = plots.best_to_last({"MSGD": sets, "ENGM": {"training": [(0.6, 0.6)]}})
    left, right = figure.axes

    heights = [[y for _, y in points(line)] for line in left.lines]
    assert heights == [pytest.approx(pair) for pair in ([90, 100], [70, 80], [80, 90], [50, 40])]
    first, _, mean, alone = left.lines
    assert first.get_linewidth() < mean.get_linewidth() == alone.get_linewidth()
    assert (mean.get_label(), alone.get_label()) == ("training", "test")
    assert mean.get_color() != alone.get_color()
    assert mean.get_marker() != alone.get_marker()
    assert [text.get_text() for text in left.get_xticklabels()] == ["best", "last"]
    assert (left.get_title(), right.get_title()) == ("MSGD", "ENGM")
    assert left.get_ylabel() == "robust accuracy (%)"


def test_a_heat_map_has_its_numbers_a_cross_and_a_line_round_the_best():
    figure = plots.accuracy_heat_maps({"MSGD": GRID, "ENGM": GRID / 2}, LRS, DECAYS)
    left, right, bar = figure.axes

    assert [text.get_text() for text in left.texts] == ["30", "50", "48", "47", "48"]
    assert [text.get_position() for text in left.texts] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    [cross] = [line for line in left.lines if line.get_marker() == "x"]
    assert points(cross) == [(2, 1)]
    # inside are (row 0, columns 1 and 2) and (row 1, column 1): eight sides, none between them
    sides = {tuple(sorted(points(line))) for line in left.lines if line.get_marker() != "x"}
    assert sides == {
        ((0.5, -0.5), (1.5, -0.5)),
        ((1.5, -0.5), (2.5, -0.5)),
        ((2.5, -0.5), (2.5, 0.5)),
        ((1.5, 0.5), (2.5, 0.5)),
        ((1.5, 0.5), (1.5, 1.5)),
        ((0.5, 1.5), (1.5, 1.5)),
        ((0.5, 0.5), (0.5, 1.5)),
        ((0.5, -0.5), (0.5, 0.5)),
    }
    assert [text.get_text() for text in left.get_xticklabels()] == ["0.01", "0.1", "1"]
    assert [text.get_text() for text in left.get_yticklabels()] == ["0.0001", "0.01"]
    assert (left.get_xlabel(), left.get_ylabel()) == ("learning rate", "weight decay")
    # small weight decay at the bottom, and the same colours in both panels
    assert left.get_ylim() == (-0.5, 1.5)
    assert left.images[0].get_clim() == right.images[0].get_clim() == pytest.approx((15, 50))
    assert bar.get_ylabel() == "robust accuracy (%)"


def test_the_line_keeps_to_the_margin():
    figure = plots.accuracy_heat_maps({"MSGD": GRID}, LRS, DECAYS, within=0.0)
    sides = [line for line in figure.axes[0].lines if line.get_marker() != "x"]
    assert len(sides) == 4


def test_a_grid_of_which_nothing_is_left_is_drawn_too():
    nothing = np.full((2, 3), math.nan)
    axes = plots.accuracy_heat_maps({"MSGD": nothing}, LRS, DECAYS).axes[0]
    assert [line.get_marker() for line in axes.lines] == ["x"] * 6


def test_the_line_round_the_best_is_red():
    axes = plots.accuracy_heat_maps({"MSGD": GRID}, LRS, DECAYS).axes[0]
    sides = [line for line in axes.lines if line.get_marker() != "x"]
    assert {to_rgb(line.get_color()) for line in sides} == {to_rgb(plots.RED)}
