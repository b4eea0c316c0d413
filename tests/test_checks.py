import pytest
import torch

from engm.attacks import FGSM, PGD
from engm.evaluation import checks
from engm.evaluation.accuracy import Attacked
from engm.evaluation.checks import clearly_more


def standing(count, n=200):
    return torch.arange(n) < count


@pytest.mark.parametrize(
    ("gained", "lost", "n", "points", "expected"),
    [
        (10, 0, 200, 0.01, True),
        (9, 0, 200, 0.01, False),  # not above three roots of 9
        (60, 25, 200, 0.01, True),  # 35 against 3 sqrt(85) = 27.7
        (60, 35, 200, 0.01, False),  # 25 against 29.2
        (30, 0, 10000, 0.01, False),  # clear, but no whole point
        (30, 0, 10000, 0.001, True),
        (0, 50, 200, 0.01, False),
    ],
)
def test_more_is_judged_on_the_examples_that_differ(gained, lost, n, points, expected):
    rows = torch.arange(n)
    more = rows < gained
    fewer = (rows >= n - lost) & (rows < n)
    agreed = (rows >= gained) & (rows < n - lost) & (rows % 2 == 0)
    assert clearly_more(more | agreed, fewer | agreed, points) is expected


def attacked(correct, claimed=None):
    nothing = torch.empty(0)
    return Attacked(correct, correct if claimed is None else claimed, 0.1, nothing, nothing)


def test_answers_that_change_when_they_are_recomputed_are_flagged():
    same = {"a": attacked(standing(50)), "b": attacked(standing(20))}
    found = checks.kept_results(same, 0.1)
    assert found.passed and "at most 0.1 long (eps 0.1)" in found.meaning
    found = checks.kept_results(same | {"c": attacked(standing(50), standing(47))}, 0.1)
    assert not found.passed and "3 answers of c differ" in found.meaning


WEAK = dict(eps=0.1, step_size=0.02)


def test_more_steps_must_not_be_weaker():
    suite = {"one": FGSM(eps=0.1), "many": PGD(**WEAK, num_steps=20)}
    found = checks.more_steps(suite, {"one": standing(60), "many": standing(50)})
    assert found.passed and "(1 compared)" in found.meaning
    found = checks.more_steps(suite, {"one": standing(60), "many": standing(90)})
    assert not found.passed
    assert "many leaves 45.0% standing, one only 30.0%" in found.meaning
    # within noise, another loss, another kind of attack: nothing to say
    assert checks.more_steps(suite, {"one": standing(60), "many": standing(65)}).passed
    other = {"one": FGSM(eps=0.1), "many": PGD(**WEAK, num_steps=20, loss="margin"), "x": None}
    kept = {"one": standing(60), "many": standing(90), "x": standing(199)}
    found = checks.more_steps(other, kept)
    assert found.passed and "No two attacks differ in the number of steps alone" in found.meaning
    restarts = {"a": PGD(**WEAK, num_steps=5), "b": PGD(**WEAK, num_steps=5, restarts=3)}
    assert not checks.more_steps(restarts, {"a": standing(60), "b": standing(90)}).passed
    assert checks.more_steps(restarts, {"a": standing(90), "b": standing(60)}).passed


def test_success_rises_with_eps():
    assert checks.success_rises({0.0: standing(150), 0.1: standing(80), 0.2: standing(82)}).passed
    # each step down is within noise, the whole way is not
    found = checks.success_rises({0.1: standing(80), 0.2: standing(87), 0.3: standing(94)})
    assert not found.passed
    assert "At eps 0.3 47.0% stand, at 0.1 only 40.0%" in found.meaning


def test_nothing_stands_at_a_large_eps():
    assert checks.full_range(1.0, standing(10)).passed
    found = checks.full_range(1.0, standing(11))
    assert not found.passed and "At eps 1, enough for any image, 5.5% stand" in found.meaning


def test_an_attack_without_gradients_finds_little_of_its_own():
    white = {"a": standing(100), "b": standing(150).flip(0)}  # 50 to 99 stand under both
    assert checks.black_box("search", standing(98), white).passed
    found = checks.black_box("search", standing(97), white)
    assert not found.passed and "search alone fools 3 of 200" in found.meaning
    # what the others fool as well says nothing
    assert checks.black_box("search", standing(200) & ~standing(50), white).passed


def test_losses_agree_within_ten_points():
    pgd = PGD(**WEAK)
    suite = {
        "FGSM": FGSM(eps=0.1, loss="margin"),
        "ce": pgd,
        "margin": PGD(**WEAK, loss="margin"),
        "dlr": PGD(**WEAK, loss="dlr"),
    }
    kept = dict(FGSM=standing(0), ce=standing(100), margin=standing(95), dlr=standing(80))
    assert checks.losses_agree(suite, kept).passed
    found = checks.losses_agree(suite, kept | {"dlr": standing(79)})
    assert not found.passed
    assert "ce leaves 50.0%, dlr 39.5%" in found.meaning
    found = checks.losses_agree(suite, kept | {"dlr": standing(130)})
    assert not found.passed and "dlr leaves 65.0%, margin 47.5%" in found.meaning
    assert checks.losses_agree({"ce": pgd}, kept) is None
    longer = PGD(**WEAK | {"num_steps": 50}, loss="margin")  # may be ahead for its steps
    assert checks.losses_agree({"ce": pgd, "margin": longer}, kept) is None


def test_autoattack_is_near_the_other_attacks():
    assert checks.autoattack_gap(standing(90), standing(100)).passed
    found = checks.autoattack_gap(standing(89), standing(100))
    assert not found.passed and "AutoAttack leaves 44.5%" in found.meaning
    assert checks.autoattack_gap(standing(100), standing(50)).passed
