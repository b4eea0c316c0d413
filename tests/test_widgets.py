import pytest
import torch
from torch import nn

from engm import plots
from engm.attacks import PGD
from engm.results import Quantity
from engm.widgets import EpsExplorer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def explorer():
    # class 1 where the mean pixel is above one half: eps 0.1 suffices for the first image
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 16))
        model[1].bias.copy_(torch.tensor([8.0, -8.0]))
    x = torch.cat([torch.full((1, 1, 4, 4), 0.55), torch.full((1, 1, 4, 4), 0.95)])
    y = torch.ones(2, dtype=torch.int64)
    attack_of = lambda eps: PGD(eps=eps, step_size=eps)  # noqa: E731
    return EpsExplorer(model, x, y, ["low", "high"], attack_of, largest_eps=0.2)


def test_the_eps_slider_attacks_and_redraws(explorer):
    first = bytes(explorer.picture.value)
    assert explorer.predicted == 1
    assert first.startswith(PNG)
    explorer.eps.value = 0.1
    assert explorer.predicted == 0
    assert bytes(explorer.picture.value) != first
    explorer.eps.value = 0.0
    assert explorer.predicted == 1
    assert bytes(explorer.picture.value) == first


def test_the_image_slider_changes_the_image(explorer):
    explorer.eps.value = 0.1
    explorer.image.value = 1
    assert explorer.predicted == 1  # 0.95 - 0.1 is still high
    assert explorer.image.max == 1


def test_moving_a_slider_leaves_no_figure_open(explorer):
    before = plots.plt.get_fignums()
    explorer.eps.value = 0.2
    assert plots.plt.get_fignums() == before


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def test_best_and_last_draws_the_means_and_deviations_it_is_given():
    rows = {
        "MSGD": {"robust (best)": Quantity(0.5, 0.02, 3), "robust (last)": Quantity(0.4, None, 1)},
        "ENGM": {"robust (best)": Quantity(0.6, 0.01, 3), "robust (last)": Quantity(0.55, 0.03, 3)},
    }
    axes = plots.best_and_last(rows).axes[0]
    assert heights(axes) == pytest.approx([50, 60, 40, 55])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["MSGD", "ENGM"]


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


def test_pulls_are_sorted_and_weighed():
    figure = plots.pulls(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 1.5, 0.75]), scale=1.5)
    msgd, engm, line = figure.axes[0].lines
    assert list(msgd.get_ydata()) == [1, 2, 3]
    assert list(engm.get_ydata()) == [1.5, 1.5, 1.5]
    assert line.get_ydata()[0] == 1.5


def test_the_true_class_is_blue_and_a_wrong_answer_red():
    image = torch.rand(1, 8, 8)
    axes = plots.prediction(image, torch.tensor([0.2, 0.7, 0.1]), 0, list("abc"), "t").axes[1]
    assert heights(axes) == pytest.approx([20, 70, 10])
    assert [plots.COLOURS.index(c) for c in (plots.BLUE, plots.RED)] == [0, 5]
    colours = [bar.get_facecolor()[:3] for bar in axes.patches]
    from matplotlib.colors import to_rgb

    assert colours == [to_rgb(plots.BLUE), to_rgb(plots.RED), to_rgb("#BBBBBB")]


def test_adversarial_examples_show_colour_and_grey_images():
    for channels in (1, 3):
        x = torch.rand(4, channels, 8, 8)
        figure = plots.adversarial_examples(
            x, (x + 0.1).clamp(0, 1), torch.eye(4), torch.eye(4).flip(0), list("abcd")
        )
        titles = [axes.get_title()[0] for axes in figure.axes if axes.get_title()]
        assert titles == list("abcddcba")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plots.plt.close("all")
