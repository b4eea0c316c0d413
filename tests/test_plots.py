import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from engm import plots
from engm.norms.inputs import Fit
from engm.plots import sharp_png
from engm.report.records import Quantity
from engm.report.statistics import paired_differences

LRS, DECAYS = [0.01, 0.1, 1.0], [1e-4, 1e-2]
GRID = np.array([[0.30, 0.50, 0.485], [0.47, 0.48, math.nan]])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def points(line):
    return list(zip(*line.get_data(), strict=True))


def texts(found):
    return [text.get_text() for text in found]


def legend(axes):
    return texts(axes.get_legend().get_texts())


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def pixels(axes):
    return axes.images[0].get_array().flatten().tolist()


# --- over epochs, steps, eps


def test_learning_curves_draw_each_seed_and_their_mean():
    def metrics(values):
        return [
            {"epoch": i + 1, "validation_clean_accuracy": v, "validation_robust_accuracy": v / 2}
            for i, v in enumerate(values)
        ]

    figure = plots.learning_curves({"AT": [metrics([0.2, 0.4]), metrics([0.4, 0.8])]})
    clean, robust = figure.axes
    assert [list(line.get_ydata()) for line in clean.lines] == [
        pytest.approx([20, 40]),
        pytest.approx([40, 80]),
        pytest.approx([30, 60]),
    ]
    assert list(robust.lines[-1].get_ydata()) == pytest.approx([15, 30])
    assert list(clean.lines[0].get_xdata()) == [1, 2]
    alone = plots.learning_curves({str(i): [metrics([0.2, 0.4])] for i in range(7)})
    assert [len(axes.lines) for axes in alone.axes] == [7, 7]


def test_every_curve_is_drawn_and_accuracies_are_percent():
    curves = {str(i): [0.1 * i, 0.05] for i in range(7)}
    axes = plots.lines([1, 2], curves, "eps", "loss").axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == list(curves.values())
    assert legend(axes) == list(curves)
    axes = plots.accuracy_curves([1, 2], curves, "eps", "accuracy (%)").axes[0]
    for line, values in zip(axes.lines, curves.values(), strict=True):
        assert list(line.get_ydata()) == pytest.approx([100 * value for value in values])
    assert axes.get_ylim() == (0, 102)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("eps", "accuracy (%)")


@pytest.mark.parametrize(("x", "whole"), [([1, 2, 3], True), ([0.0, 0.5, 2.0], False)])
def test_ticks_are_whole_where_x_is(x, whole):
    axes = plots.lines(x, {"a": [1, 2, 3]}, "x", "y").axes[0]
    assert all(tick == round(tick) for tick in axes.get_xticks()) is whole


def test_pulls_are_sorted_and_weighed():
    figure = plots.pulls(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 1.5, 0.75]), scale=1.5)
    msgd, engm, line = figure.axes[0].lines
    assert list(msgd.get_ydata()) == [1, 2, 3]
    assert list(engm.get_ydata()) == [1.5, 1.5, 1.5]
    assert line.get_ydata()[0] == 1.5


def test_norms_are_drawn_over_input_gradients_with_the_line_from_end_to_end():
    inputs, norms = torch.tensor([2.0, 1.0, 4.0]), torch.tensor([5.0, 2.0, 9.0])
    figure = plots.norms_from_inputs({"a": (inputs, norms, 2.0, 0.5), "b": (norms, inputs, 0, 1)})
    left, right = figure.axes
    dots, line = left.lines
    assert points(dots) == [(2, 5), (1, 2), (4, 9)]
    assert points(line) == [(1, 2.5), (4, 8.5)]
    assert list(right.lines[1].get_data()[1]) == [1, 1]
    assert (left.get_title(), right.get_title(), left.get_ylim()[0]) == ("a", "b", 0)


def test_every_fit_of_every_run_is_drawn_in_both_panels():
    runs = {
        str(i): [Fit(1, 1.0, 0.0, 0.1 * i, 0.2), Fit(21, 1.0, 0.0, 0.5, 0.1 * i)] for i in range(7)
    }
    left, right = plots.fits(runs, steps_per_epoch=16).axes
    for i in range(7):
        assert list(left.lines[i].get_data()[0]) == [1, 21]
        assert list(left.lines[i].get_data()[1]) == [0.1 * i, 0.5]
        assert list(right.lines[i].get_data()[1]) == [0.2, 0.1 * i]
    assert legend(left) == list(runs)
    assert all(axes.patches[0].get_bbox().x1 == 16 for axes in (left, right))


def test_the_true_class_is_blue_and_a_wrong_answer_red():
    image = torch.rand(1, 8, 8)
    found = torch.tensor([0.2, 0.7, 0.1])
    axes = plots.prediction(image, found, 0, list("abc"), "t", image).axes[3]
    assert heights(axes) == pytest.approx([20, 70, 10])
    assert [plots.COLOURS.index(c) for c in (plots.BLUE, plots.RED)] == [0, 5]
    colours = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert colours == [to_rgb(plots.BLUE), to_rgb(plots.RED), to_rgb("#BBBBBB")]


def test_the_ten_likeliest_classes_are_shown_in_the_order_of_their_labels():
    probabilities = torch.tensor([0.2, 0.0, *[0.05] * 8, 0.35, 0.01])
    names = [f"class {k}" for k in range(12)]
    image = torch.rand(3, 8, 8)
    axes = plots.prediction(image, probabilities, 0, names, "t", image).axes[3]
    shown = texts(axes.get_xticklabels())
    assert shown == [name for name in names if name not in ("class 1", "class 11")]
    assert heights(axes) == pytest.approx([20, *[5] * 8, 35])


def test_the_change_is_grey_where_there_is_none_and_full_where_it_is_largest():
    x = torch.full((1, 1, 2, 2), 0.5)
    x_adv = x + torch.tensor([[0.1, -0.05], [0.0, 0.0]])
    logits = torch.tensor([[2.0, 0.0]])
    for adversarial, colour in ((logits, "black"), (logits.flip(1), plots.RED)):
        axes = plots.adversarial_examples(x, x_adv, logits, adversarial, ["a", "b"]).axes
        shown = [pixels(panel) for panel in axes]
        assert shown[0] == pytest.approx([0.5] * 4)
        assert shown[1] == pytest.approx([1, 0.25, 0.5, 0.5])
        assert shown[2] == pytest.approx([0.6, 0.45, 0.5, 0.5])
        assert axes[2].title.get_color() == colour
        assert axes[0].get_title() == "a (88%)"  # 1 / (1 + exp(-2))
        assert "0.1" in axes[1].get_ylabel()
    colour = x.expand(1, 3, 2, 2)
    axes = plots.adversarial_examples(colour, colour, logits, logits, ["a", "b"]).axes
    assert pixels(axes[1]) == pytest.approx([0.5] * 12)


def test_long_names_are_not_cut_and_leave_the_points_their_place():
    long = (
        "Digits (JPEG), mart, beta 5, awp_warmup 10, precision bfloat16, engm, scale mean, lr 0.0"
    )
    names = [f"{long}{i}, floor 0.05, eval_steps 20" for i in range(6)]
    quantities = {"robust (best)": Quantity(0.5, 0.1, 3), "robust (last)": Quantity(0.4, 0.1, 3)}
    paired = paired_differences({0: 0.5, 1: 0.6, 2: 0.8}, {0: 0.4, 1: 0.2, 2: 0.3})
    epochs = [
        {"epoch": i, "validation_clean_accuracy": 0.9, "validation_robust_accuracy": 0.5}
        for i in range(3)
    ]
    differences = {kind: dict.fromkeys(names, paired) for kind in quantities}
    for figure in (
        plots.best_and_last_rows(dict.fromkeys(names, quantities)),
        plots.difference_intervals(differences, "msgd"),
        plots.learning_curves({name: [epochs, epochs] for name in names}),
    ):
        figure.canvas.draw()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height
        for axes in figure.axes:
            assert axes.get_window_extent().width / figure.dpi > 2.3
        shown = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        assert names in (shown, texts(figure.axes[0].get_yticklabels()))


def test_a_png_closes_its_figure():
    figure = plots.lines([1], {"a": [1]}, "x", "y")
    assert plots.to_png(figure).startswith(b"\x89PNG")
    assert figure.number not in plt.get_fignums()


# --- gradient norm and variance


def test_every_seed_is_a_thin_line_and_their_mean_a_thick_one():
    curves = {"NT": [[1.0, 2.0], [3.0, 6.0]], "AT": [[5.0, 7.0]]}
    figure = plots.seed_lines([1, 2], {"norm": curves, "variance": {"NT": [[8.0, 9.0]]}}, "epoch")
    left, right = figure.axes
    assert [points(line) for line in left.lines] == [
        [(1, 1), (2, 2)],
        [(1, 3), (2, 6)],
        [(1, 2), (2, 4)],
        [(1, 5), (2, 7)],
    ]
    thin, _, thick, alone = left.lines
    assert thin.get_linewidth() < thick.get_linewidth() == alone.get_linewidth()
    assert thin.get_color() == thick.get_color() == plots.BLUE
    assert alone.get_color() == plots.ORANGE
    assert legend(left) == ["NT", "AT"]
    assert points(right.lines[0]) == [(1, 8), (2, 9)]
    assert [axes.get_ylabel() for axes in figure.axes] == ["norm", "variance"]
    assert all(axes.get_xlabel() == "epoch" for axes in figure.axes)
    assert left.get_ylim()[0] == 0


def test_axes_may_be_logarithmic():
    figure = plots.seed_lines([1, 2], {"norm": {"NT": [[1.0, 100.0]]}}, "epoch", log=True)
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim()[0] > 0


# --- example weights


@pytest.mark.parametrize(
    ("pulls", "share"),
    [
        ([1.0] * 20, 0.1),
        ([0.0] * 9 + [5.0], 1.0),
        ([6.0, *[1.0] * 18, 2.0], 8 / 26),
        ([3.0, 1.0], 0.75),  # at least one example
    ],
)
def test_the_share_of_the_strongest(pulls, share):
    assert plots.strongest_share(torch.tensor(pulls)) == pytest.approx(share)


def test_who_pulls_adds_up_the_hardest_first():
    curve, alike = plots.who_pulls(torch.tensor([1.0, 6.0, 3.0, 0.0])).axes[0].lines
    assert curve.get_xdata() == pytest.approx([0, 25, 50, 75, 100])
    assert curve.get_ydata() == pytest.approx([0, 60, 90, 100, 100])
    assert list(alike.get_ydata()) == [0, 100]


def test_the_hardest_and_the_least_are_shown_with_their_answers():
    n = 10
    x = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 2, 2) / 20
    norms = torch.tensor([0.5, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    y = torch.zeros(n, dtype=torch.int64)
    logits = torch.tensor([[50.0, 0.0]]).repeat(n, 1)
    logits[1] = torch.tensor([0.0, 50.0])  # the hardest is answered wrongly
    figure = plots.strongest_and_weakest(
        x, x + 0.25, y, logits, norms, ["a", "a very long name of a class"]
    )
    axes = [figure.axes[4 * row : 4 * row + 4] for row in range(4)]
    drawn = [[float(a.images[0].get_array().max()) for a in row] for row in axes]
    hardest, least = [1, 3, 5, 7], [6, 4, 2, 0]
    assert drawn[0] == pytest.approx([i / 20 for i in hardest])
    assert drawn[1] == pytest.approx([i / 20 + 0.25 for i in hardest])
    assert drawn[2] == pytest.approx([i / 20 for i in least])
    assert drawn[3] == pytest.approx([i / 20 + 0.25 for i in least])
    assert [a.get_xlabel() for a in axes[1] + axes[3]] == [*"9876", *"321", "0.5"]
    assert axes[1][0].get_title() == "a very lon… (100%)"
    assert to_rgb(axes[1][0].title.get_color()) == to_rgb(plots.RED)
    assert all(to_rgb(a.title.get_color()) == (0, 0, 0) for a in axes[1][1:] + axes[3])
    assert {a.get_title() for a in axes[0] + axes[2]} == {"a"}


def test_weight_and_pull_over_the_length():
    left, right = plots.weight_function(torch.tensor([0.0, 1.0, 10.0]), 2.0, 0.5).axes
    lengths, weights = left.lines[0].get_data()
    assert (lengths[0], lengths[-1]) == (0, 10)
    assert weights[0] == pytest.approx(2)  # 1 / f
    assert weights[-1] == pytest.approx(0.2)  # c / |g|
    pulls = right.lines[0].get_ydata()
    assert pulls == pytest.approx(weights * lengths)
    assert max(pulls) <= 2 + 1e-9
    msgd_weights, msgd_pulls = left.lines[1].get_ydata(), right.lines[1].get_ydata()
    assert set(msgd_weights) == {1.0}
    assert msgd_pulls == pytest.approx(lengths)
    assert list(right.lines[3].get_xdata()) == [0, 1, 10]


def test_a_panel_for_each_setting_of_the_weights():
    figure = plots.weighted_pulls(torch.tensor([4.0, 0.4, 7.6]), [(1.0, 1.0), (0.5, 0.4)])
    before = [0.1, 1.0, 1.9]  # in units of the mean
    for axes, after, scale in zip(
        figure.axes, ([0.1, 1.0, 1.0], [0.25, 0.5, 0.5]), (1.0, 0.5), strict=True
    ):
        assert axes.lines[0].get_ydata() == pytest.approx(before)
        assert axes.lines[1].get_ydata() == pytest.approx(after)
        assert axes.lines[2].get_ydata()[0] == scale
    assert titles(figure) == [
        "scale 1, floor 1\ntenth: 63% → 48%",
        "scale 0.5, floor 0.4\ntenth: 63% → 40%",
    ]


def test_gram_matrices_and_the_sum_of_their_product():
    a, b = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([[9.0, -3.0], [-3.0, 1.0]])
    figure = plots.gram_matrices(a, b)
    for axes, expected in zip(figure.axes, (a, b, a * b), strict=True):
        drawn = axes.images[0]
        assert drawn.get_array().tolist() == expected.tolist()
        assert drawn.norm.vmin == -drawn.norm.vmax  # white is 0
    assert titles(figure)[2].endswith("sum: 1")  # 9 - 6 - 6 + 4
    dark = plots.gram_matrices(torch.zeros(2, 2), b).axes[0].images[0]
    assert dark.norm.vmax > 0


def test_the_running_scale_and_the_batches():
    means, scale = plots.running_scale([3.0, 5.0], [3.0, 3.5]).axes[0].lines
    assert list(means.get_xdata()) == list(scale.get_xdata()) == [1, 2]
    assert list(means.get_ydata()) == [3.0, 5.0]
    assert list(scale.get_ydata()) == [3.0, 3.5]


def test_weights_over_epochs_are_stacked_to_the_whole():
    first = torch.tensor([0.1, 0.7, 1.0, 1.5, 3.0, 30.0, 30.0, 30.0])
    axes = plots.weights_over_epochs([first, torch.ones(4)]).axes[0]
    names = legend(axes)
    assert names == ["above 10", "2 to 10", "1 to 2", "1/2 to 1", "below 1/2"]
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert bars == {
        "above 10": [37.5, 0],
        "2 to 10": [12.5, 0],
        "1 to 2": [25, 100],
        "1/2 to 1": [12.5, 0],
        "below 1/2": [12.5, 0],
    }
    assert max(bar.get_y() + bar.get_height() for bar in axes.patches) == pytest.approx(100)
    tops = [bars[0].get_y() + bars[0].get_height() for bars in axes.containers]
    assert tops == sorted(tops, reverse=True)  # drawn as listed in the legend
    bottom = axes.containers[-1][0]
    assert bottom.get_y() == 0


def test_lengths_and_cosines_of_corrupted_steps():
    steps = {"one": ([1.0, 10.0], [0.9, 0.1]), "two": ([1.0, 1.0], [0.9, 0.8])}
    left, right = plots.corrupted_steps([1.0, 100.0], steps).axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (right.get_xscale(), right.get_yscale()) == ("log", "linear")
    for k, (lengths, cosines) in enumerate(steps.values()):
        assert list(left.lines[k].get_xdata()) == [1, 100]
        assert list(left.lines[k].get_ydata()) == lengths
        assert list(right.lines[k].get_ydata()) == cosines
    assert legend(left) == list(steps)


# --- many runs


def test_best_and_last_rows_draw_means_and_deviations():
    rows = {
        "a": {"robust (best)": Quantity(0.5, 0.02, 3), "robust (last)": Quantity(0.4, None, 1)},
        "b": {"robust (best)": Quantity(0.6, 0.01, 3), "robust (last)": Quantity(0.55, 0.03, 3)},
    }
    axes = plots.best_and_last_rows(rows).axes[0]
    best, last = axes.containers
    assert list(best.lines[0].get_xdata()) == pytest.approx([50, 60])
    assert list(last.lines[0].get_xdata()) == pytest.approx([40, 55])
    lengths = [
        part[1][0] - part[0][0] for c in (best, last) for part in c.lines[2][0].get_segments()
    ]
    assert lengths == pytest.approx([4, 2, 0, 6])
    assert legend(axes) == ["best", "last"]


def test_difference_intervals_draw_seeds_means_and_what_is_settled():
    first = {0: 0.5, 1: 0.52, 2: 0.54}
    settled = paired_differences(first, {0: 0.4, 1: 0.41, 2: 0.45})
    open_ = paired_differences(first, {0: 0.6, 1: 0.4, 2: 0.55})
    two = paired_differences({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.4})
    panel = {"a": settled, "b": open_, "c": two}
    left, right = plots.difference_intervals({"best": panel, "last": panel}, "msgd").axes
    assert (left.get_title(), right.get_title()) == ("best", "last")
    assert texts(left.get_yticklabels()) == ["a", "b", "c"]
    assert left.get_xlabel() == "points above msgd"
    lines = [line for line in left.lines if line.get_linestyle() == "-"][1:]
    ends = [list(line.get_xdata()) for line in lines]
    assert ends == [pytest.approx([100 * p.student.low, 100 * p.student.high])
                    for p in (settled, open_)]  # fmt: skip
    assert [line.get_color() for line in lines] == [plots.BLUE, "#777777"]
    seeds = [line for line in left.lines if len(line.get_xdata()) == 3]
    assert list(seeds[0].get_xdata()) == pytest.approx([10, 11, 9])
    means = [line for line in left.lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in means] == pytest.approx([10, 1 / 3, 15])
    low, high = left.get_ylim()
    assert low > high  # the first line on top


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
    assert texts(left.get_xticklabels()) == ["best", "last"]
    assert (left.get_title(), right.get_title()) == ("MSGD", "ENGM")
    assert left.get_ylabel() == "robust accuracy (%)"


def test_a_heat_map_has_its_numbers_a_cross_and_a_line_round_the_best():
    figure = plots.accuracy_heat_maps({"MSGD": GRID, "ENGM": GRID / 2}, LRS, DECAYS)
    left, right, bar = figure.axes

    assert texts(left.texts) == ["30", "50", "48", "47", "48"]
    assert [text.get_position() for text in left.texts] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    [cross] = [line for line in left.lines if line.get_marker() == "x"]
    assert points(cross) == [(2, 1)]
    assert {line.get_color() for line in left.lines} == {plots.RED, "black"}
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
    assert texts(left.get_xticklabels()) == ["0.01", "0.1", "1"]
    assert texts(left.get_yticklabels()) == ["0.0001", "0.01"]
    assert (left.get_xlabel(), left.get_ylabel()) == ("learning rate", "weight decay")
    # small weight decay at the bottom, and the same colours in both panels
    assert left.get_ylim() == (-0.5, 1.5)
    assert left.images[0].get_clim() == right.images[0].get_clim() == pytest.approx((15, 50))
    assert bar.get_ylabel() == "robust accuracy (%)"


def test_the_line_keeps_to_the_margin():
    figure = plots.accuracy_heat_maps({"MSGD": GRID}, LRS, DECAYS, within=0.0)
    sides = [line for line in figure.axes[0].lines if line.get_marker() != "x"]
    assert len(sides) == 4


def test_the_clean_image_and_the_change_stand_beside_the_attacked_one():
    clean = torch.full((1, 2, 2), 0.5)
    attacked = clean + torch.tensor([[0.1, -0.1], [0.0, 0.05]])
    figure = plots.prediction(attacked, torch.tensor([0.2, 0.8]), 0, ["cat", "dog"], "dog", clean)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["clean: cat", "change, at most 0.100", "dog", ""]
    shown = [axes.images[0].get_array().tolist() for axes in figure.axes[:3]]
    change = torch.tensor([[1.0, 0.0], [0.5, 0.75]])  # stretched: grey is no change
    for pixels, expected in zip(shown, (clean[0], change, attacked[0]), strict=True):
        assert torch.allclose(torch.tensor(pixels), expected, atol=1e-6)


def test_a_sharp_figure_has_twice_the_pixels_few_colours_and_keeps_the_rare_ones():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    figure = plots.adversarial_examples(x, x**2, logits, logits.flip(1), ["a", "b"])
    one = figure.get_size_inches() * figure.dpi
    png, size = sharp_png(figure)
    with Image.open(io.BytesIO(png)) as picture:
        assert (size["width"], size["height"]) == (picture.width // 2, picture.height // 2)
        colours = [colour for _, colour in picture.convert("RGB").getcolors()]
    assert size["width"] == pytest.approx(one[0], rel=0.05)  # the margin is cut off
    red, white = (tuple(round(255 * part) for part in to_rgb(c)) for c in (plots.RED, "white"))
    for wanted in (red, white):
        assert min(max(abs(a - b) for a, b in zip(c, wanted, strict=True)) for c in colours) <= 4


def test_a_fixed_axis_is_the_same_for_all_settings():
    axes = [
        plots.weighted_pulls(torch.tensor([4.0, 0.4, 7.6]), [setting], True).axes[0].get_ylim()
        for setting in ((10.0, 0.01), (0.1, 1.0))
    ]
    assert axes[0] == axes[1]
