import copy

import pytest
import torch
from torch import nn

from engm.attacks import fooled
from engm.errors import InputError
from engm.evaluation.attacks import RandomSearch


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False)).requires_grad_(False)
    x = 0.3 + 0.4 * torch.rand(200, 1, 6, 6)
    return model, x, model(x).argmax(1)


def closed_form(model, x, eps, norm):
    """Which examples no perturbation in the ball, far from 0 and 1, can turn."""
    weight = model[1].weight[0] - model[1].weight[1]
    lead = (x.flatten(1) @ weight).abs()
    return lead > eps * (weight.abs().sum() if norm == "linf" else weight.norm())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_it_finds_most_of_what_can_be_found_and_no_more(linear, norm, eps):
    model, x, y = linear
    attack = RandomSearch(eps=eps, norm=norm, num_queries=500)
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    delta = (x_adv - x).flatten(1)
    assert delta.norm(float("inf") if norm == "linf" else 2, dim=1).max() <= eps + 1e-5
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    broken, possible = fooled(model(x_adv), y), ~closed_form(model, x, eps, norm)
    assert not (broken & ~possible).any()
    assert broken.sum() > 0.6 * possible.sum() > 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.031), ("l2", 0.5)])
def test_images_of_any_type_stay_in_the_ball(linear, dtype, norm, eps):
    model, x, _ = linear
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    x_adv = RandomSearch(eps=eps, norm=norm, num_queries=50)(model, x, model(x).argmax(1))
    assert x_adv.dtype == dtype
    lengths = (x_adv.double() - x.double()).flatten(1)
    lengths = lengths.norm(float("inf") if norm == "linf" else 2, dim=1)
    assert 0.9 * eps < lengths.max() <= eps * (1 + 1e-6)


def test_it_works_where_there_is_no_gradient(linear):
    model, x, y = linear

    class Rounded(nn.Module):
        def forward(self, x):
            return model((x * 20).round() / 20).detach()

    y = Rounded()(x).argmax(1)
    x_adv = RandomSearch(eps=0.2)(Rounded(), x, y)
    assert fooled(Rounded()(x_adv), y).float().mean() > 0.3


@pytest.mark.parametrize("shape", [(30,), (3, 5), (2, 4, 6)])
def test_any_shape_of_images_will_do(shape):
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 3))
    x = torch.rand(50, *shape)
    y = model(x).argmax(1)
    x_adv = RandomSearch(eps=0.5)(model, x, y)
    assert x_adv.shape == x.shape
    assert fooled(model(x_adv), y).float().mean() > 0.3


def test_the_generator_alone_decides_and_the_model_is_left_as_it_was(linear):
    model, x, y = linear
    model.train()
    attack = RandomSearch(eps=0.05, num_queries=5)
    state = torch.get_rng_state()
    first, second, other = (
        attack(model, x, y, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model[1].training
    assert torch.equal(RandomSearch(eps=0.0)(model, x, y), x)


def test_settings_and_images_that_are_out_of_range_are_refused(linear):
    model, x, y = linear
    for wrong, message in [
        (dict(eps=8), "write 8/255, not 8"),
        (dict(eps=0.1, norm="l1"), "unknown norm 'l1'"),
        (dict(eps=0.1, num_queries=0), "num_queries must be a whole number, 1 or more; got 0"),
    ]:
        with pytest.raises(InputError, match=message):
            RandomSearch(**wrong)
    with pytest.raises(InputError, match="pixels are in"):
        RandomSearch(eps=0.1)(model, x * 255, y)
