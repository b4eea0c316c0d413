from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from engm import models
from engm.attacks import PGD
from engm.config import RunConfig
from engm.data import Split, load
from engm.errors import InputError
from engm.evaluation.accuracy import accuracy_under, attack_of
from engm.models import build_model
from engm.runs import load_tensors

EPS = 0.1


def linear_problem(n: int = 300) -> tuple[nn.Module, Split]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    # pixels far from 0 and 1, so that the ball is never cut
    images = torch.randint(60, 200, (n, 1, 4, 4), dtype=torch.uint8)
    return model, Split(images, torch.randint(2, (n,)))


def exact_robust_accuracy(model: nn.Module, split: Split, eps: float) -> float:
    weight = model[1].weight[1] - model[1].weight[0]
    sign = split.labels * 2 - 1
    margin = sign * (model(split.images / 255) @ torch.tensor([-1.0, 1.0]))
    return float((margin > eps * weight.abs().sum()).float().mean())


ATTACK = PGD(eps=EPS, step_size=EPS, num_steps=3, stop_early=True)


def test_on_a_linear_model_the_accuracies_are_the_closed_form(tmp_path):
    model, split = linear_problem()
    found = accuracy_under(model, split, ATTACK, batch_size=64, save_to=tmp_path / "x.pt")
    assert found.clean_accuracy == pytest.approx(exact_robust_accuracy(model, split, 0))
    assert found.robust_accuracy == pytest.approx(exact_robust_accuracy(model, split, EPS))
    assert 0.1 < found.robust_accuracy < found.clean_accuracy - 0.1
    assert found.num_examples == 300
    assert found.largest_perturbation == pytest.approx(EPS, abs=1e-6)
    kept = load_tensors(tmp_path / "x.pt")["x_adv"]
    assert torch.equal(kept, found.x_adv)
    again = (model(kept).argmax(1) == split.labels).float().mean().item()
    assert again == pytest.approx(found.robust_accuracy)


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone():
    model, split = linear_problem()
    attack = replace(ATTACK, step_size=0.01)
    before = torch.get_rng_state()
    first, second, other = (accuracy_under(model, split, attack, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.x_adv, second.x_adv)
    assert not torch.equal(first.x_adv, other.x_adv)


def test_the_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    _, split = linear_problem()
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.9), nn.Linear(16, 2))
    model.train()
    model[1].eval()
    statistics = model[1].running_mean.clone()
    first, second = (accuracy_under(model, split, ATTACK).clean_accuracy for _ in range(2))
    assert first == second
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, statistics)


@dataclass(frozen=True)
class Cheat:
    """An attack that returns x plus a constant."""

    shift: float
    norm: str = "linf"
    eps: float = EPS

    def __call__(self, model, x, y, generator=None):
        return x + self.shift


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (0.11, "left its budget: a perturbation is 0.11"),
        (0.9, "outside"),
        (-0.9, "outside"),
        (float("nan"), "outside"),
        (torch.zeros(3, 1, 1, 1, 1), "returned shape"),
    ],
)
def test_an_attack_that_breaks_the_rules_is_not_believed(shift, message):
    model, split = linear_problem()
    with pytest.raises(InputError, match=message):
        accuracy_under(model, split, Cheat(shift))
    assert accuracy_under(model, split, Cheat(0.09)).largest_perturbation == pytest.approx(0.09)


def test_the_budget_of_l2_is_the_length_of_the_whole_perturbation():
    model, split = linear_problem()
    # 16 pixels, each moved by s: a length of 4 s
    found = accuracy_under(model, split, Cheat(0.024, norm="l2"))
    assert found.largest_perturbation == pytest.approx(0.096, abs=1e-6)
    with pytest.raises(InputError, match="left its budget: a perturbation is 0.1040"):
        accuracy_under(model, split, Cheat(0.026, norm="l2"))


def test_the_largest_perturbation_is_that_of_any_batch():
    model, split = linear_problem()
    shifts = iter([0.02, 0.09, 0.01])

    class Uneven(Cheat):
        def __call__(self, model, x, y, generator=None):
            return x + next(shifts)

    found = accuracy_under(model, split, Uneven(0.0), batch_size=100)
    assert found.largest_perturbation == pytest.approx(0.09, abs=1e-6)


def test_counting_keeps_no_graph():
    model, split = linear_problem()
    watched = []
    model.register_forward_hook(lambda *_: watched.append(torch.is_grad_enabled()))
    accuracy_under(model, split, ATTACK)
    assert watched[-2:] == [False, False]  # clean and robust, after the attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_run_is_evaluated_with_the_attack_of_its_config(norm):
    config = RunConfig(eps=0.2, norm=norm, num_steps=3, step_size=0.01, eval_steps=10)
    expected = PGD(eps=0.2, step_size=0.05, num_steps=10, norm=norm, stop_early=True)
    assert attack_of(config) == expected
    assert attack_of(config, num_steps=5) == replace(expected, num_steps=5, step_size=0.1)


def test_the_model_of_a_run_has_the_settings_of_its_config_and_the_pixels_of_its_data():
    dataset = load("digits", subset=20)
    config = RunConfig(width=6, model_norm="group", model="preact_resnet18")
    found = build_model(config, dataset)
    expected = models.build(
        "preact_resnet18",
        num_classes=10,
        width=6,
        norm="group",
        in_channels=1,
        mean=dataset.mean,
        std=dataset.std,
    )
    assert str(found) == str(expected)
    expected.load_state_dict(found.state_dict())
    assert found(torch.ones(1, 1, 8, 8)).shape == (1, 10)
    pixels = {name: b.flatten().tolist() for name, b in found.named_buffers() if "pixels" in name}
    assert pixels == {
        "pixels.mean": pytest.approx(dataset.mean),
        "pixels.std": pytest.approx(dataset.std),
    }


def test_nothing_to_evaluate_is_refused():
    model, split = linear_problem()
    with pytest.raises(InputError, match="no example"):
        accuracy_under(model, Split(split.images[:0], split.labels[:0]), ATTACK)
