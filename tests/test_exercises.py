import pytest
import torch

from engm.lab.exercises import check


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (None, 3, "not answered yet"),
        (3, 3, "right"),
        (3.0002, 3, "right"),
        (3.01, 3, "not yet: count"),
        (float("nan"), 3, "not yet: count"),
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
