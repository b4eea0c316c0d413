import matplotlib.pyplot as plt
import pytest

from engm import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def drawn(line):
    return list(zip(*line.get_data(), strict=True))


def test_every_seed_is_a_thin_line_and_their_mean_a_thick_one():
    curves = {"NT": [[1.0, 2.0], [3.0, 6.0]], "AT": [[5.0, 7.0]]}
    figure = plots.seed_lines([1, 2], {"norm": curves, "variance": {"NT": [[8.0, 9.0]]}}, "epoch")
    left, right = figure.axes
    assert [drawn(line) for line in left.lines] == [
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
    assert drawn(right.lines[0]) == [(1, 8), (2, 9)]
    assert [axes.get_ylabel() for axes in figure.axes] == ["norm", "variance"]
    assert all(axes.get_xlabel() == "epoch" for axes in figure.axes)
    assert left.get_ylim()[0] == 0


def test_axes_may_be_logarithmic():
    figure = plots.seed_lines([1, 2], {"norm": {"NT": [[1.0, 100.0]]}}, "epoch", log=True)
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim()[0] > 0


def test_norms_stand_over_losses_with_a_mark_of_their_own():
    axes = plots.against_loss({"NT": ([2.0, 1.0], [3.0, 4.0]), "AT": ([2.0], [5.0])}).axes[0]
    assert [drawn(line) for line in axes.lines] == [[(2, 3), (1, 4)], [(2, 5)]]
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert legend(axes) == ["NT", "AT"]
    assert axes.get_xscale() == "log"


def test_each_layer_has_a_bar_of_each_group_beside_each_other_and_the_first_is_on_top():
    groups = {"NT": {"conv1": 1.0, "linear": 2.0}, "AT": {"linear": 4.0, "conv1": 3.0}}
    axes = plots.layer_bars(groups, "norm").axes[0]
    natural, adversarial = axes.containers
    assert [bar.get_width() for bar in natural] == [1, 2]
    assert [bar.get_width() for bar in adversarial] == [3, 4]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "linear"]
    for tick, pair in enumerate(zip(natural, adversarial, strict=True)):
        first, second = pair
        assert first.get_y() + first.get_height() == pytest.approx(second.get_y())
        assert second.get_y() == pytest.approx(tick)
    assert axes.yaxis.get_inverted()
    assert (axes.get_xlabel(), legend(axes)) == ("norm", ["NT", "AT"])


def test_mini_batches_show_the_draws_their_mean_and_the_formula():
    axes = plots.batch_variance([1, 4], [[2.0, 4.0], [1.0, 0.5]], [2.5, 0.6]).axes[0]
    one, four, means, formula = axes.lines
    assert drawn(one) == [(1, 2), (1, 4)]
    assert drawn(four) == [(4, 1), (4, 0.5)]
    assert drawn(means) == [(1, 3), (4, 0.75)]
    assert drawn(formula) == [(1, 2.5), (4, 0.6)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
