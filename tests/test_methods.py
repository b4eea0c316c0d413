import pytest
import torch
from torch import nn

from engm.attacks import PGD
from engm.config import RunConfig
from engm.methods import PGDAT, Natural, build


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    return model, torch.rand(7, 1, 4, 4, dtype=torch.float64), torch.randint(5, (7,))


def cross_entropy_by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = [z.exp()[label] / z.exp().sum() for z, label in zip(model(x), y, strict=True)]
    return -torch.stack(rows).log()


@pytest.mark.parametrize("adversarial", [False, True])
def test_losses_and_their_gradients_are_the_formulas(adversarial):
    model, x, y = problem()
    method = PGDAT(PGD(eps=0.1, step_size=0.05, num_steps=2)) if adversarial else Natural()
    x_adv = method.attack(model, x, y)
    assert (x_adv is x) is not adversarial
    losses = method.losses(model, x, x_adv, y)
    expected = cross_entropy_by_hand(model, x_adv, y)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(losses.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_a_run_gets_the_attack_it_asks_for():
    config = RunConfig(eps=0.2, num_steps=4, norm="l2")
    assert build(config) == PGDAT(PGD(eps=0.2, step_size=0.125, num_steps=4, norm="l2"))
    assert build(RunConfig(method="natural")) == Natural()
