import io

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from engm import plots
from engm.norms.inputs import Fit
from engm.plots.style import sharp_png


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


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


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


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


def test_pulls_are_sorted_and_weighted():
    figure = plots.pulls(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 1.5, 0.75]), scale=1.5)
    msgd, engm, line = figure.axes[0].lines
    assert list(msgd.get_ydata()) == [1, 2, 3]
    assert list(engm.get_ydata()) == [1.5, 1.5, 1.5]
    assert line.get_ydata()[0] == 1.5


def test_norms_are_drawn_over_input_gradients_with_the_line_from_end_to_end():
    inputs, norms = torch.tensor([2.0, 1.0, 4.0]), torch.tensor([5.0, 2.0, 9.0])
    figure = plots.norms_from_inputs({"a": (inputs, norms, 2.0, 0.5), "b": (norms, inputs, 0, 1)})
    left, right = figure.axes
    points, line = left.lines
    assert list(zip(*points.get_data(), strict=True)) == [(2, 5), (1, 2), (4, 9)]
    assert list(zip(*line.get_data(), strict=True)) == [(1, 2.5), (4, 8.5)]
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
    axes = plots.prediction(image, torch.tensor([0.2, 0.7, 0.1]), 0, list("abc"), "t").axes[1]
    assert heights(axes) == pytest.approx([20, 70, 10])
    assert [plots.COLOURS.index(c) for c in (plots.BLUE, plots.RED)] == [0, 5]
    colours = [bar.get_facecolor()[:3] for bar in axes.patches]
    assert colours == [to_rgb(plots.BLUE), to_rgb(plots.RED), to_rgb("#BBBBBB")]


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


def test_the_ten_likeliest_classes_are_shown_in_the_order_of_their_labels():
    probabilities = torch.tensor([0.2, 0.0, *[0.05] * 8, 0.35, 0.01])
    names = [f"class {k}" for k in range(12)]
    axes = plots.prediction(torch.rand(3, 8, 8), probabilities, 0, names, "t").axes[1]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == [name for name in names if name not in ("class 1", "class 11")]
    assert heights(axes) == pytest.approx([20, *[5] * 8, 35])


def test_adversarial_examples_show_colour_and_grey_images():
    for channels in (1, 3):
        x = torch.rand(4, channels, 8, 8)
        figure = plots.adversarial_examples(
            x, (x + 0.1).clamp(0, 1), torch.eye(4), torch.eye(4).flip(0), list("abcd")
        )
        titles = [axes.get_title()[0] for axes in figure.axes if axes.get_title()]
        assert titles == list("abcddcba")


def pixels(axes):
    return axes.images[0].get_array().flatten().tolist()


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
    axes = plots.adversarial_examples(x, x, logits, logits, ["a", "b"]).axes
    assert pixels(axes[1]) == pytest.approx([0.5] * 4)


def test_a_png_closes_its_figure():
    figure = plots.lines([1], {"a": [1]}, "x", "y")
    assert plots.to_png(figure).startswith(b"\x89PNG")
    assert figure.number not in plt.get_fignums()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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
