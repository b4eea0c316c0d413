"""Moments of the gradients against a loop over single examples in float64, and closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engm.attacks import PGD
from engm.errors import InputError, NonFiniteLossError
from engm.lab.diagnostics import Moments, c1_verdict, gradient_statistics
from engm.methods import PGDAT, Natural
from engm.models import preact_resnet18, small_cnn
from engm.report.verdicts import DOES_NOT_HOLD, HOLDS, NOT_SETTLED

N = 7
FIELDS = ("mean_norm", "mean_square", "gradient_square", "variance", "signal_to_noise")


def images(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(N, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(5, (N,), generator=generator)


def network(norm="batch", dtype=torch.float64):
    torch.manual_seed(0)
    model = small_cnn(5, width=4, norm=norm).to(dtype)
    model(images(seed=1, dtype=dtype)[0])  # moves BatchNorm's running statistics
    return model


def single_gradients(model, x, y):
    """The gradient of each example's loss, `[n]` by parameter, by itself and in eval mode."""
    training = model.training
    model.eval()
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    model.train(training)
    names = [name for name, _ in model.named_parameters()]
    columns = zip(*rows, strict=True)
    return {name: torch.stack(part) for name, part in zip(names, columns, strict=True)}


def assert_moments(found, gradients, rtol=1e-9):
    """`found` against the definitions; the variance as the mean square around the mean."""
    g = torch.cat([part.flatten(1) for part in gradients], dim=1)
    norms, mean = g.norm(dim=1), g.mean(0)
    variance = (g - mean).square().sum(1).mean()
    expected = {
        "mean_norm": norms.mean(),
        "mean_square": norms.square().mean(),
        "gradient_square": mean @ mean,
        "gradient_norm": mean.norm(),
        "variance": variance,
        "signal_to_noise": mean @ mean / variance,
        "norm_variation": norms.std(correction=0) / norms.mean(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value.item(), rel=rtol), name


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_the_moments_are_those_of_single_gradients(norm):
    model, (x, y) = network(norm), images()
    gradients = single_gradients(model, x, y)
    found = gradient_statistics(model, Natural(), [(x, y)])
    assert found.count == N
    model.eval()
    assert found.mean_loss == pytest.approx(F.cross_entropy(model(x), y).item())
    assert_moments(found, gradients.values())


def test_layers_have_the_moments_of_their_own_part_and_add_up():
    model, (x, y) = network(), images()
    gradients = single_gradients(model, x, y)
    found = gradient_statistics(model, Natural(), [(x, y)])
    assert list(found.layers) == ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "linear"]
    for layer, moments in found.layers.items():
        own = [g for name, g in gradients.items() if name.rpartition(".")[0] == layer]
        assert len(own) == (1 if layer.startswith("conv") else 2)
        assert_moments(moments, own)
    for name in ("mean_square", "gradient_square", "variance"):
        total = sum(getattr(moments, name) for moments in found.layers.values())
        assert total == pytest.approx(getattr(found, name))


def test_how_the_set_is_cut_into_batches_makes_no_difference():
    model, (x, y) = network("batch"), images()
    whole = gradient_statistics(model, Natural(), [(x, y)])
    parts = zip(x.split([1, 4, 2]), y.split([1, 4, 2]), strict=True)
    cut = gradient_statistics(model, Natural(), parts)
    assert cut.count == N
    for name in (*FIELDS, "mean_loss"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-10), name
    assert cut.layers["conv2"].variance == pytest.approx(whole.layers["conv2"].variance)


def test_in_float32_the_moments_are_close_to_those_in_float64():
    model, (x, y) = preact_resnet18(5, width=4), images()
    model.double()(images(seed=1)[0])
    gradients = single_gradients(model, x, y)
    found = gradient_statistics(model.float(), Natural(), [(x.float(), y)])
    assert_moments(found, gradients.values(), rtol=1e-3)


class Squares:
    """l_i = (w . x_i - y_i)^2 / 2, whose gradient is (w . x_i - y_i) x_i."""

    @staticmethod
    def attack(model, x, y):
        return x

    @staticmethod
    def losses(model, x, x_adv, y):
        return (model(x)[:, 0] - y).square() / 2


def linear(*weights):
    model = nn.Linear(len(weights), 1, bias=False)
    model.weight.data = torch.tensor([weights])
    return model


def test_a_linear_model_by_hand():
    # residuals -1, 2, -3; gradients (-1, 0), (0, 4), (-3, -3)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([2.0, 0.0, 5.0])
    found = gradient_statistics(linear(1.0, 1.0), Squares, [(x, y)])
    assert found.mean_loss == pytest.approx((1 + 4 + 9) / 6)
    assert found.mean_norm == pytest.approx((1 + 4 + 18**0.5) / 3)
    assert found.mean_square == pytest.approx((1 + 16 + 18) / 3)
    assert found.gradient_square == pytest.approx((-4 / 3) ** 2 + (1 / 3) ** 2)
    assert found.gradient_norm == pytest.approx(17**0.5 / 3)
    assert found.variance == pytest.approx(35 / 3 - 17 / 9)
    assert found.signal_to_noise == pytest.approx((17 / 9) / (35 / 3 - 17 / 9))
    assert list(found.layers) == ["model"]


def test_examples_that_agree_have_no_variance_and_no_gradient_is_no_ratio():
    x, y = torch.tensor([[1.0, 2.0]] * 3), torch.tensor([1.0] * 3)
    same = gradient_statistics(linear(1.0, 1.0), Squares, [(x, y)])
    assert same.variance == pytest.approx(0, abs=1e-4)
    assert Moments(2.0, 4.0, 4.0).signal_to_noise == math.inf
    assert Moments(2.0, 4.0, 4.0 + 1e-9).variance == 0  # rounding
    assert Moments(2.0, 4.0 - 1e-9, 4.0).norm_variation == 0
    none = gradient_statistics(linear(1.0, 1.0), Squares, [(x, y + 2)])
    assert none.mean_norm == none.variance == 0
    assert math.isnan(none.signal_to_noise) and math.isnan(none.norm_variation)


def test_gradients_are_those_on_the_attacked_images():
    model, (x, y) = network(), images()
    attack = PGD(eps=0.1, step_size=0.05, num_steps=3, random_start=False)
    found = gradient_statistics(model, PGDAT(attack), [(x, y)])
    assert_moments(found, single_gradients(model, attack(model, x, y), y).values())


def test_random_starts_follow_the_seed_and_nothing_is_left_changed():
    model, (x, y) = network().train(), images()
    method = PGDAT(PGD(eps=0.3, step_size=0.1, num_steps=1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        gradient_statistics(model, method, [(x, y)], seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert one == same
    assert one.mean_square != other.mean_square
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_frozen_and_unused_parameters():
    model, (x, y) = network("none"), images()
    expected = single_gradients(model, x, y)
    model.conv1.requires_grad_(False)
    rest = [g for name, g in expected.items() if not name.startswith("conv1")]
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda pixels: nn.Sequential(*list(model)[:-1])(pixels)
    found = gradient_statistics(model, Natural(), [(x, y)])
    assert_moments(found, rest)
    assert list(found.layers) == ["conv2", "conv3", "linear", "unused"]
    assert found.layers["unused"].mean_square == 0


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x.flatten(1)[:, :5]


def test_a_layer_without_a_formula():
    model, (x, y) = Odd(), images()
    found = gradient_statistics(model, Natural(), [(x, y)])
    assert_moments(found, single_gradients(model, x, y).values())


def test_bad_input_is_refused():
    model, (x, y) = network(), images()
    with pytest.raises(InputError, match="no examples"):
        gradient_statistics(model, Natural(), [])
    with pytest.raises(NonFiniteLossError):
        gradient_statistics(model, Natural(), [(x * math.nan, y)])
    frozen = network().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter"):
        gradient_statistics(frozen, Natural(), [(x, y)])


def verdict(natural, adversarial):
    """The verdict on runs that have the (norm, variance) of each moment."""
    return c1_verdict(*(
        [[Moments(norm, variance + 1.0, 1.0) for norm, variance in run] for run in runs]
        for runs in (natural, adversarial)
    ))  # fmt: skip


LOW = [[(2.0, 4.0), (1.0, 2.0)], [(3.0, 5.0), (1.0, 1.0)], [(2.0, 2.0), (2.0, 2.0)]]
HIGH = [[(3.0, 8.0), (3.0, 4.0)], [(4.0, 6.0), (2.0, 6.0)], [(3.0, 3.0), (3.0, 3.0)]]


def test_the_claim_holds_where_norm_and_variance_are_higher_in_every_seed():
    found = verdict(LOW, HIGH)
    assert found.outcome == HOLDS
    assert found.norm_ratios == pytest.approx([6 / 3, 6 / 4, 6 / 4])
    assert found.variance_ratios == pytest.approx([12 / 6, 12 / 6, 6 / 4])


def mixed(norms, variances):
    return [
        [(norm, variance) for (norm, _), (_, variance) in zip(*pair, strict=True)]
        for pair in zip(norms, variances, strict=True)
    ]


@pytest.mark.parametrize(
    ("natural", "adversarial", "outcome"),
    [
        (HIGH, LOW, DOES_NOT_HOLD),
        (LOW, LOW, DOES_NOT_HOLD),  # equal is not higher
        (LOW, mixed(HIGH, LOW), DOES_NOT_HOLD),  # norm and variance both count
        (LOW, mixed(LOW, HIGH), DOES_NOT_HOLD),
        ([*LOW[:2], HIGH[2]], [*HIGH[:2], LOW[2]], NOT_SETTLED),  # seeds that disagree
        ([HIGH[0], *LOW[1:]], [LOW[0], *HIGH[1:]], NOT_SETTLED),
        (LOW[:2], HIGH[:2], NOT_SETTLED),  # too few
    ],
)
def test_other_data_other_verdicts(natural, adversarial, outcome):
    assert verdict(natural, adversarial).outcome == outcome


def test_a_verdict_that_depends_on_when_training_stops_settles_nothing():
    low = [(1.0, 1.0)] * 9
    late = [(0.5, 0.5)] * 5 + [(0.9, 0.9), (2.0, 2.0), (9.0, 9.0), (9.0, 9.0)]
    found = verdict([low] * 3, [late] * 3)
    assert found.horizons == [DOES_NOT_HOLD, HOLDS, HOLDS]  # after 7, 8 and all 9 moments
    assert found.outcome == NOT_SETTLED
    assert found.norm_ratios == pytest.approx([23.4 / 9] * 3)
    early = [(9.0, 9.0)] * 2 + late[2:]
    assert verdict([low] * 3, [early] * 3).outcome == HOLDS


@pytest.mark.parametrize(
    ("natural", "adversarial"),
    [(LOW, LOW[:2]), (LOW, [run[:1] for run in HIGH]), ([[]] * 3, [[]] * 3), ([], [])],
)
def test_runs_that_do_not_match_are_refused(natural, adversarial):
    with pytest.raises(InputError):
        verdict(natural, adversarial)
