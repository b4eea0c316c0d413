"""The checks of the exercises refuse answers that are plausible and wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from engm import MART, PGD
from engm.lab.exercises import check

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def rival(logits, y):
    return logits.softmax(1).scatter(1, y[:, None], 0.0).amax(1)


WRONG = {
    ("01_attacks", 2): [
        lambda survived: survived.float().mean(),
        lambda survived: survived.any(0).float().mean(),
        lambda survived: survived.float().mean(1).min(),
        lambda survived: 1 - (~survived).sum() / survived.shape[1],
        lambda survived: survived.float().prod(1).mean(),
    ],
    ("01_attacks", 3): [
        lambda d, radius: d * (radius / d.norm(dim=-1, keepdim=True).clamp(min=radius)),
        lambda d, radius: d / d.flatten(1).norm(dim=1).clamp(min=1).reshape(-1, 1, 1, 1),
        lambda d, radius: radius * d / d.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1),
        lambda d, radius: d * (radius / d.norm().clamp(min=radius)),
        lambda d, radius: d.clamp(-radius, radius),
    ],
    ("06_cifar", 1): [
        lambda logits, y: -torch.log(1 - logits.softmax(1).amax(1)),
        lambda logits, y: -torch.log(1 - logits.softmax(1).gather(1, y[:, None])[:, 0]),
        lambda logits, y: -torch.log(rival(logits, y)),
        lambda logits, y: -torch.log(1 - rival(logits, y)).mean(),
    ],
    ("08_overfitting_and_sensitivity", 1): [
        lambda validation, test: test[1] - test[-1],
        lambda validation, test: max(test) - test[-1],
        lambda validation, test: max(validation) - test[-1],
        lambda validation, test: max(validation) - validation[-1],
        lambda validation, test: test[0] - test[-1],
        lambda validation, test: test[-1] - test[validation.index(max(validation))],
    ],
}


def told(notebook, number, answer, capsys):
    """What the check cell of an exercise says to an answer; to the solution, where it is None."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    at = next(i for i, s in enumerate(sources) if s.startswith(f"exercise_{number} = None"))
    attack = PGD(eps=0.1, step_size=0.02, num_steps=2)
    names = {"torch": torch, "F": F, "MART": MART, "attack": attack, "check": check}
    names[f"exercise_{number}"] = answer
    if answer is None:
        exec(re.search(r"```python\n(.*?)```", sources[at + 2], re.S).group(1), names)
    exec(sources[at + 1], names)
    return capsys.readouterr().out


@pytest.mark.parametrize(("notebook", "number"), WRONG, ids=str)
def test_plausible_wrong_answers_are_refused_and_the_solution_is_right(notebook, number, capsys):
    assert told(notebook, number, None, capsys) == "right\n"
    for index, answer in enumerate(WRONG[notebook, number]):
        assert told(notebook, number, answer, capsys).startswith("not yet"), index
