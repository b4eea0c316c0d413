import pytest
import torch
from matplotlib.colors import to_rgb

from engm import plots


def text_of(figure):
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize(
    ("pulls", "part", "share"),
    [
        ([1.0] * 20, 0.1, 0.1),
        ([0.0] * 9 + [5.0], 0.1, 1.0),
        ([6.0, 1.0, 2.0, 1.0], 0.5, 0.8),
        ([3.0, 1.0], 0.1, 0.75),  # at least one example
    ],
)
def test_the_share_of_the_strongest(pulls, part, share):
    assert plots.strongest_share(torch.tensor(pulls), part) == pytest.approx(share)


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
    assert text_of(figure) == [
        "scale 1, floor 1\ntenth: 63% → 48%",
        "scale 0.5, floor 0.4\ntenth: 63% → 40%",
    ]
    axes = [
        plots.weighted_pulls(torch.tensor([4.0, 0.4, 7.6]), [setting], True).axes[0].get_ylim()
        for setting in ((10.0, 0.01), (0.1, 1.0))
    ]
    assert axes[0] == axes[1]


def test_gram_matrices_and_the_sum_of_their_product():
    a, b = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([[9.0, -3.0], [-3.0, 1.0]])
    figure = plots.gram_matrices(a, b)
    for axes, expected in zip(figure.axes, (a, b, a * b), strict=True):
        drawn = axes.images[0]
        assert drawn.get_array().tolist() == expected.tolist()
        assert drawn.norm.vmin == -drawn.norm.vmax  # white is 0
    assert text_of(figure)[2].endswith("sum: 1")  # 9 - 6 - 6 + 4
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
    names = [text.get_text() for text in axes.get_legend().get_texts()]
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
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(steps)
