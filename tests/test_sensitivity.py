import math

import numpy as np
import pytest

from engm.errors import InputError
from engm.report.sensitivity import NearBest, lessens_overfitting, lessens_sensitivity, near_best
from engm.report.verdicts import DOES_NOT_HOLD, HOLDS, NOT_SETTLED

NAN = math.nan
LRS, DECAYS = [0.01, 0.1, 1.0], [1e-4, 1e-2]


def test_a_made_up_grid_has_the_area_that_one_counts_by_hand():
    grid = [[0.30, 0.50, 0.485], [0.47, 0.48, NAN]]
    found = near_best(LRS, DECAYS, grid)

    assert found.best == 0.5
    # 0.48 is exactly two points below
    assert found.inside.tolist() == [[False, True, True], [False, True, False]]
    assert found.fraction == pytest.approx(3 / 6)
    # columns reach 0.5, 1, 0.5 decades, rows 1 and 1
    assert found.decades == pytest.approx(1 * 1 + 0.5 * 1 + 1 * 1)
    assert found.whole == pytest.approx(2 * 2)


def test_a_dome_has_the_area_of_its_disc():
    # accuracy 0.6 - 0.02 r^2 over log10 lr and log10 wd: within two points is the disc r <= 1
    lrs, decays = np.logspace(-4, 0, 201), np.logspace(-5, -2, 151)
    x, y = np.meshgrid(np.log10(lrs) + 2, np.log10(decays) + 3.5)
    found = near_best(lrs, decays, np.clip(0.6 - 0.02 * (x**2 + y**2), 0, 1))

    assert found.decades == pytest.approx(math.pi, rel=0.01)
    assert found.whole == pytest.approx(4 * 3)
    assert found.fraction == pytest.approx(math.pi / 12, rel=0.02)


def test_the_area_does_not_count_a_stretch_twice_that_was_tried_twice_as_densely():
    # the plateau reaches from lr 0.1 up; then its half is tried more densely
    coarse = near_best([0.01, 0.1, 1, 10], DECAYS, [[0.2, 0.5, 0.5, 0.5]] * 2)
    lrs = [0.01, 0.1, 1, 2, 3, 5, 7, 10]
    dense = near_best(lrs, DECAYS, [[0.2] + [0.5] * 7] * 2)

    assert coarse.decades == pytest.approx(dense.decades)
    assert coarse.fraction < dense.fraction


def test_along_a_single_row_the_area_is_a_length():
    found = near_best(LRS, [5e-4], [[0.1, 0.5, 0.49]])
    assert (found.decades, found.whole) == (pytest.approx(1.5), pytest.approx(2))
    found = near_best([0.1], DECAYS, [[0.1], [0.5]])
    assert (found.decades, found.whole) == (pytest.approx(1), pytest.approx(2))


def test_collapsed_runs_are_outside_even_where_all_is_near_the_best():
    found = near_best(LRS, DECAYS, [[0.01, NAN, 0.0], [0.01, 0.01, NAN]])

    assert found.inside.sum() == 4
    assert found.fraction == pytest.approx(4 / 6)
    everything = near_best(LRS, DECAYS, np.full((2, 3), 0.1))
    assert (everything.fraction, everything.decades) == (1.0, pytest.approx(everything.whole))


def test_where_every_run_collapsed_there_is_no_best_and_no_area():
    found = near_best(LRS, DECAYS, np.full((2, 3), NAN))

    assert found.best is None
    assert not found.inside.any()
    assert (found.fraction, found.decades) == (0, 0)
    assert found.whole == pytest.approx(4)


def test_rounding_does_not_put_a_cell_outside():
    assert 0.2 - 0.02 > 0.18  # in floating point
    assert near_best(LRS, [5e-4], [[0.2, 0.18, 0.17]]).inside.tolist() == [[True, True, False]]


def test_the_margin_is_the_one_that_was_asked_for():
    grid = [[0.30, 0.50, 0.485], [0.47, 0.48, NAN]]

    assert near_best(LRS, DECAYS, grid, within=0.0).inside.sum() == 1
    assert near_best(LRS, DECAYS, grid, within=0.03).inside.sum() == 4


@pytest.mark.parametrize(
    ("lrs", "decays", "grid", "message"),
    [
        ([0.1, 0.01], DECAYS, [[0.5] * 2] * 2, "lrs .* rising"),
        ([0.1, 0.1], DECAYS, [[0.5] * 2] * 2, "lrs .* rising"),
        ([], DECAYS, [[], []], "lrs .* rising"),
        (LRS, [0.0, 0.1], [[0.5] * 3] * 2, "weight_decays .* above 0"),
        (LRS, [NAN, 0.1], [[0.5] * 3] * 2, "weight_decays"),
        ([0.1, math.inf], DECAYS, [[0.5] * 2] * 2, "finite"),
        (LRS, DECAYS, [[0.5] * 2] * 3, r"\[3, 2\].*\[2, 3\]"),
        (LRS, DECAYS, [[50.0] * 3] * 2, "fractions"),
        (LRS, DECAYS, [[0.5, math.inf, 0.5]] * 2, "fractions"),
        (LRS, DECAYS, [[0.5, -math.inf, 0.5]] * 2, "fractions"),
    ],
)
def test_what_is_no_grid_is_refused(lrs, decays, grid, message):
    with pytest.raises(InputError, match=message):
        near_best(lrs, decays, grid)


@pytest.mark.parametrize("within", [-0.01, NAN])
def test_a_margin_below_0_is_refused(within):
    with pytest.raises(InputError, match="within"):
        near_best(LRS, DECAYS, [[0.5] * 3] * 2, within=within)


@pytest.mark.parametrize(
    ("msgd", "engm", "outcome"),
    [
        ([0.08, 0.09, 0.10], [0.01, 0.02, 0.03], HOLDS),
        ([0.01, 0.02, 0.03], [0.08, 0.09, 0.10], DOES_NOT_HOLD),
        ([0.08, 0.09, 0.10], [0.01, 0.15, 0.03], NOT_SETTLED),
        # MSGD does not overfit: there is nothing to lessen
        ([0.00, 0.01, -0.01], [-0.08, -0.07, -0.09], NOT_SETTLED),
        ([0.00, 0.00, 0.00], [0.00, 0.00, 0.00], NOT_SETTLED),
        ([0.08, 0.09], [0.01, 0.02], NOT_SETTLED),
    ],
)
def test_overfitting_is_lessened_only_where_there_was_some(msgd, engm, outcome):
    assert lessens_overfitting(msgd, engm) == outcome


def grids(*cases: tuple[float | None, float]) -> list[NearBest]:
    """Grids of which only the best and the area matter."""
    return [NearBest(best, np.zeros((1, 1), bool), 0.0, area, 4.0) for best, area in cases]


@pytest.mark.parametrize(
    ("msgd", "engm", "outcome"),
    [
        ([(0.5, 1.0)] * 3, [(0.5, 2.0)] * 3, HOLDS),
        ([(0.5, 1.0)] * 3, [(0.48, 2.0)] * 3, HOLDS),
        ([(0.5, 2.0)] * 3, [(0.5, 1.0)] * 3, DOES_NOT_HOLD),
        ([(0.5, 1.0)] * 3, [(0.5, 1.0)] * 3, NOT_SETTLED),
        ([(0.5, 1.0)] * 3, [(0.5, 2.0), (0.5, 0.9), (0.5, 1.2)], NOT_SETTLED),
        ([(0.5, 1.0)] * 2, [(0.5, 2.0)] * 2, NOT_SETTLED),
        # a plain at chance level is as wide as can be, and worth nothing
        ([(0.5, 1.0)] * 3, [(0.1, 4.0)] * 3, NOT_SETTLED),
        ([(0.5, 1.0)] * 3, [(0.5, 4.0), (0.5, 4.0), (0.47, 4.0)], NOT_SETTLED),
        ([(0.1, 4.0)] * 3, [(0.5, 1.0)] * 3, NOT_SETTLED),
        # everything collapsed
        ([(0.5, 1.0)] * 3, [(None, 0.0)] * 3, DOES_NOT_HOLD),
        ([(None, 0.0)] * 3, [(0.5, 1.0)] * 3, HOLDS),
    ],
)
def test_a_wider_region_counts_only_where_the_best_keeps_up(msgd, engm, outcome):
    assert lessens_sensitivity(grids(*msgd), grids(*engm)) == outcome
