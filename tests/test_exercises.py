import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engm.lab.exercises import check, defences


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (None, 3, "not answered yet"),
        (3, 3, "right"),
        (3.0002, 3, "right"),
        (3.01, 3, "not yet: count"),
        (float("nan"), 3, "not yet: count"),
        (0.79, 0.7897, "not yet: nearly; is it rounded, or in percent?"),
        (78.97, 0.7897, "not yet: nearly; is it rounded, or in percent?"),
        (0.7, 0.7897, "not yet: count"),
        ([1, 2], [1, 2], "right"),
        ([1, 2, 3], [1, 2], "not yet: count"),
        (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0]), "right"),
        ("linf", "linf", "right"),
        ("l2", "linf", "not yet: count"),
        (True, True, "right"),
        (1, True, "not yet: count"),
        (lambda x: x + 1, lambda f: f(1) == 2, "right"),
        (lambda x: x, lambda f: f(1) == 2, "not yet: count"),
    ],
)
def test_an_answer_gets_its_verdict(answer, expected, said, capsys):
    check(answer, expected, hint="count")
    assert capsys.readouterr().out == said + "\n"


@pytest.mark.parametrize("answer", ["three", {"a": 1}, lambda: 0])
def test_an_answer_of_a_wrong_kind_is_told_so_and_nothing_is_raised(answer, capsys):
    check(answer, 3, hint="count")
    said = capsys.readouterr().out
    assert said.startswith("not yet: count (your answer gave ")


def test_three_of_the_defences_have_the_flaws_that_the_exercise_names():
    torch.manual_seed(0)
    fragile, robust = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    x = torch.rand(30, 1, 8, 8)
    y = fragile(x).argmax(1)

    def slope(model, loss=F.cross_entropy):
        pixels = x.clone().requires_grad_()
        return torch.autograd.grad(loss(model(pixels), y), pixels)[0]

    def margin(logits, y):
        return (logits.topk(2).values[:, 1] - logits.amax(1)).sum()

    found = defences(fragile, robust)
    assert found["B"] is robust
    assert torch.equal(found["A"](x), fragile(x)) and torch.equal(
        slope(found["A"]), -slope(fragile)
    )
    assert not slope(found["C"]).any() and not slope(found["C"], margin).any()
    assert (found["C"](x).argmax(1) == y).float().mean() > 0.5
    assert torch.equal(found["D"](x).argmax(1), y)
    assert (slope(found["D"]) == 0).flatten(1).all(1).float().mean() > 0.5
    assert slope(found["D"], margin).flatten(1).any(1).all()
    assert all(torch.equal(model(x), model(x)) for model in found.values())  # none is random
