import copy
import math
from functools import partial

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from engm import attacks, models
from engm.attacks import FGSM, PGD, eval_mode, fooled
from engm.device import AttackedModel
from engm.errors import InputError

LOSSES = {
    "ce": attacks.cross_entropy,
    "margin": attacks.margin,
    "dlr": attacks.dlr,
    "kl": attacks.kl,
}


@pytest.fixture(scope="module")
def trained():
    """A trained model in float64 and 60 of its images, of which some are near the boundary."""
    torch.manual_seed(0)
    y = torch.arange(300) % 5
    x = (0.15 * torch.randn(300, 1, 8, 8) + 0.5 * torch.rand(5, 1, 8, 8)[y] + 0.2).clamp(0, 1)
    model = models.small_cnn(5, 8, in_channels=1, mean=[0.45], std=[0.2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model = model.double().requires_grad_(False)
    assert fooled(model(x.double()), y).float().mean() < 0.1
    return model, x[:60].double(), y[:60]


def length(delta, norm):
    return torch.linalg.vector_norm(delta.flatten(1), math.inf if norm == "linf" else 2, dim=1)


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


# ---- losses


def test_losses_against_loops():
    torch.manual_seed(0)
    logits, clean = 3 * torch.randn(2, 20, 6, dtype=torch.float64)
    y = torch.randint(0, 6, (20,))
    for i, (row, label) in enumerate(zip(logits.tolist(), y.tolist(), strict=True)):
        other = max(z for k, z in enumerate(row) if k != label)
        ranked = sorted(row, reverse=True)
        ce = math.log(sum(math.exp(z) for z in row)) - row[label]
        assert attacks.cross_entropy(logits, y)[i].item() == pytest.approx(ce)
        assert attacks.margin(logits, y)[i].item() == pytest.approx(other - row[label])
        ratio = (other - row[label]) / (ranked[0] - ranked[2])
        assert attacks.dlr(logits, y)[i].item() == pytest.approx(ratio)
    expected = kl_divergence(Categorical(logits=clean), Categorical(logits=logits))
    torch.testing.assert_close(attacks.kl(logits, clean), expected)
    torch.testing.assert_close(attacks.dlr(1e4 * logits - 7, y), attacks.dlr(logits, y))
    assert torch.equal(attacks.margin(logits, y) > 0, fooled(logits, y))


def test_a_nan_is_no_answer():
    logits = torch.tensor([[1.0, 0.0], [math.nan, math.nan], [1.0, math.nan], [0.0, 1.0]])
    assert fooled(logits, torch.zeros(4, dtype=torch.int64)).tolist() == [False, True, True, True]


# ---- the steps


def test_fgsm_equals_foolbox(trained):
    model, x, y = trained
    oracle = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    for attack, reference in (
        (FGSM(eps=0.1), foolbox.attacks.FGSM()),
        (FGSM(eps=0.5, norm="l2"), foolbox.attacks.FGM()),
    ):
        _, expected, _ = reference(oracle, x, y, epsilons=attack.eps)
        torch.testing.assert_close(attack(model, x, y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("norm", "eps", "oracle"),
    [("linf", 0.1, foolbox.attacks.LinfPGD), ("l2", 1.0, foolbox.attacks.L2PGD)],
)
def test_pgd_equals_foolbox_step_by_step(trained, num_steps, norm, eps, oracle):
    model, x, y = trained
    oracle = oracle(abs_stepsize=0.3 * eps, steps=num_steps, random_start=False)
    _, expected, _ = oracle(foolbox.PyTorchModel(model.eval(), bounds=(0, 1)), x, y, epsilons=eps)
    attack = PGD(eps=eps, step_size=0.3 * eps, num_steps=num_steps, norm=norm, random_start=False)
    torch.testing.assert_close(attack(model, x, y), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_classes_of_a_linear_model_have_a_closed_form(loss, norm):
    torch.manual_seed(0)
    model, x = Linear(torch.randn(2, 12).double()), 0.4 + 0.2 * torch.rand(9, 3, 2, 2).double()
    y = model(x).argmax(1)
    across = (model.weight[1 - y] - model.weight[y]).detach()
    # enough steps for a start anywhere in the ball to end at the optimum
    choices = {"step_size": 0.025, "num_steps": 60, "random_start": loss == "kl"}
    attack = PGD(eps=0.05, norm=norm, loss=loss, **choices)
    if loss == "kl":
        # it grows to both sides of x; the start says which side is climbed
        away = start_of(attack, x, 0) - x
        across *= (away.flatten(1) * across).sum(1, keepdim=True).sign()
    unit = across.sign() if norm == "linf" else across / across.norm(dim=1, keepdim=True)
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x_adv, x + 0.05 * unit.view_as(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_on_the_margin_of_a_linear_model_goes_to_the_runner_up(norm):
    torch.manual_seed(0)
    model, x = Linear(torch.randn(5, 12).double()), 0.4 + 0.2 * torch.rand(9, 12).double()
    ranked = model(x).argsort(1, descending=True)
    away = (model.weight[ranked[:, 1]] - model.weight[ranked[:, 0]]).detach()
    away = away.sign() if norm == "linf" else away / away.norm(dim=1, keepdim=True)
    x_adv = FGSM(eps=0.05, norm=norm, loss="margin")(model, x, ranked[:, 0])
    torch.testing.assert_close(x_adv, x + 0.05 * away)


def slow_pgd(attack, model, x, y, start):
    """One example at a time, with numpy for everything but the gradient."""
    result = []
    for i in range(len(x)):
        clean = x[i].numpy()
        here = start[i].numpy()
        target = model(x[i : i + 1]) if attack.loss == "kl" else y[i : i + 1]
        for _ in range(attack.num_steps):
            leaf = torch.tensor(here)[None].requires_grad_()
            logits = model(leaf)
            if attack.stop_early and logits.argmax() != y[i]:
                break
            LOSSES[attack.loss](logits, target).sum().backward()
            gradient = leaf.grad[0].numpy()
            if attack.norm == "linf":
                delta = here + attack.step_size * np.sign(gradient) - clean
                delta = np.minimum(np.maximum(delta, -attack.eps), attack.eps)
            else:
                size = np.sqrt((gradient**2).sum())
                delta = here + attack.step_size * gradient / (size if size > 0 else 1) - clean
                size = np.sqrt((delta**2).sum())
                delta = delta * attack.eps / size if size > attack.eps else delta
            here = np.clip(clean + delta, 0, 1)
        result.append(torch.tensor(here))
    return torch.stack(result)


def start_of(attack, x, seed):
    generator = torch.Generator().manual_seed(seed)
    if attack.norm == "linf":
        start = x + attack.eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
    else:
        radius = torch.rand(len(x), generator=generator, dtype=x.dtype) ** (1 / x[0].numel())
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        scale = attack.eps * radius / length(noise, "l2")
        start = x + noise * scale.view(-1, *[1] * (x.ndim - 1))
    return start.clamp(0, 1)


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.8)])
def test_pgd_equals_a_slow_reference(trained, norm, eps, loss, stop_early):
    model, x, y = trained
    x, y = x[:12], y[:12]
    attack = PGD(
        eps=eps, step_size=0.3 * eps, num_steps=4, norm=norm, loss=loss, stop_early=stop_early
    )
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(3))
    expected = slow_pgd(attack, model, x, y, start_of(attack, x, 3))
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm):
    # steps of 1e-9 and inactive bounds: what comes back is the start
    attack = PGD(eps=0.1, step_size=1e-9, num_steps=1, norm=norm)
    x = torch.full((4000, 4), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(4000, dtype=torch.int64)
    start = (attack(Linear(torch.eye(4).double()), x, y, generator=generator) - x) / 0.1
    # the share of the volume inside each draw is uniform in [0, 1]
    volume = (start + 1) / 2 if norm == "linf" else length(start, "l2") ** 4
    ranked = volume.flatten().sort().values
    uniform = torch.linspace(0, 1, len(ranked), dtype=torch.float64)
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) at a level of 0.01
    assert (ranked - uniform).abs().max() < 1.63 / len(ranked) ** 0.5
    assert start.mean(0).abs().max() < 0.05
    covariance = start.T @ start / 4000
    # the variance of a coordinate is 1 / 3 in the box, 1 / (d + 2) in the ball
    expected = torch.eye(4).double() / (3 if norm == "linf" else 6)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.03)


def test_tiny_and_vanished_gradients():
    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, -4.0, 0.0, 0.0]])
    attack = FGSM(eps=0.1, norm="l2", loss="margin")
    expected = x + torch.tensor([0.06, -0.08, 0, 0])
    # squares of 1e-30 vanish in float32, those of 1e30 overflow
    for scale in (1e-30, 1, 1e30):
        torch.testing.assert_close(attack(Linear(scale * weight), x, y), expected)
    for norm in ("linf", "l2"):
        still = FGSM(eps=0.1, norm=norm)(Linear(0 * weight), x, y)
        assert torch.equal(still, x)


# ---- restarts and early stopping


@pytest.mark.parametrize("loss", LOSSES)
def test_restarts_keep_the_worst_case_of_each_example(trained, loss):
    model, x, y = trained
    choices = {"eps": 0.06, "step_size": 0.04, "num_steps": 2, "loss": loss}
    generator = torch.Generator().manual_seed(5)
    runs = [PGD(**choices)(model, x, y, generator=generator) for _ in range(4)]
    generator = torch.Generator().manual_seed(5)
    x_adv = PGD(**choices, restarts=4)(model, x, y, generator=generator)
    target = model(x) if loss == "kl" else y
    kept = []
    for i in range(len(x)):
        wrong = [model(run[i : i + 1]).argmax().item() != y[i] for run in runs]
        value = [LOSSES[loss](model(run), target)[i].item() for run in runs]
        kept.append(wrong.index(True) if any(wrong) else int(np.argmax(value)))
        assert torch.equal(x_adv[i], runs[kept[-1]][i])
    # the test sees all four runs, and both reasons for keeping one
    assert set(kept) == {0, 1, 2, 3}
    assert 0 < fooled(model(x_adv), y).sum() < len(x)


@pytest.mark.parametrize(("restarts", "random_start"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.5)])
def test_stopping_early_finds_all_that_is_found_without(trained, restarts, norm, eps, random_start):
    model, x, y = trained
    sizes = []
    handle = model.register_forward_hook(lambda m, a, b: sizes.append(len(b)))
    found, work = {}, {}
    for stop_early in (False, True):
        attack = PGD(
            eps=eps,
            step_size=0.3 * eps,
            num_steps=5,
            restarts=restarts,
            norm=norm,
            random_start=random_start,
            stop_early=stop_early,
        )
        sizes.clear()
        x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(1))
        work[stop_early] = sum(sizes)
        found[stop_early] = fooled(model(x_adv), y)
        assert (length(x_adv - x, norm) <= eps + 1e-12).all()
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
    handle.remove()
    assert not (found[False] & ~found[True]).any()
    assert 0 < found[True].sum() < len(x)
    assert work[True] < work[False] - 2 * restarts


def test_an_example_that_is_wrong_already_stays_and_work_ends_when_all_are(trained):
    model, x, _ = trained
    wrong = (model(x).argmax(1) + 1) % 5
    calls = []
    handle = model.register_forward_hook(lambda m, a, b: calls.append(len(b)))
    x_adv = PGD(eps=0.1, step_size=0.1, random_start=False, stop_early=True)(model, x, wrong)
    assert torch.equal(x_adv, x)
    assert calls == [60]
    calls.clear()
    PGD(eps=1e-6, step_size=1e-6, restarts=5, stop_early=True)(model, x, wrong)
    # one step and one look at the result of the first run
    assert calls == [60, 60]
    handle.remove()


def test_without_early_stopping_the_loop_never_waits_for_the_device(trained):
    class Waits(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [a for a in args if isinstance(a, (list, tuple))]
            masks = any(getattr(i, "dtype", None) == torch.bool for t in tensors for i in t)
            waits = ("local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
            if masks or any(w == func._overloadpacket.__name__.strip("_") for w in waits):
                self.seen += (str(func),)
            return func(*args, **(kwargs or {}))

    model, x, y = trained
    for norm, loss in (("linf", "ce"), ("l2", "kl"), ("linf", "dlr")):
        attack = partial(PGD, eps=0.1, step_size=0.1, restarts=2, norm=norm, loss=loss)
        with Waits() as waits:
            attack()(model, x, y)
        assert waits.seen == ()
        with Waits() as waits:
            attack(stop_early=True)(model, x, y)
        assert waits.seen


# ---- what an attack leaves alone


def state_of(model):
    return {
        "values": copy.deepcopy(model.state_dict()),
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
    }


def assert_same(before, after):
    assert before["training"] == after["training"]
    assert before["requires_grad"] == after["requires_grad"]
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for (grad, copied), (grad_after, _) in zip(before["grads"], after["grads"], strict=True):
        assert grad is grad_after
        assert grad is None or torch.equal(grad, copied)


class Stumbles(nn.Module):
    """Raises at the third call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("stumbled")
        return x


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_as_before(raises):
    torch.manual_seed(0)
    model = models.small_cnn(4, 4, "batch")
    model.linear = nn.Sequential(nn.Dropout(0.5), model.linear, Stumbles())
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    model(x).sum().backward()
    # a frozen layer, frozen statistics in a model that trains, and a gradient that is missing
    model.conv1.requires_grad_(False)
    model.norm2.eval()
    model.conv3.weight.grad = None
    model.linear[2].calls = 0 if raises else 100
    x.requires_grad_()
    before, seed = state_of(model), torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    attack = PGD(eps=0.1, step_size=0.1, num_steps=3, restarts=2, loss="kl")
    if raises:
        with pytest.raises(RuntimeError, match="stumbled"):
            attack(model, x, y, generator=generator)
    else:
        x_adv = attack(model, x, y, generator=generator)
        assert not x_adv.requires_grad
        assert not torch.equal(x_adv, x)
    assert_same(before, state_of(model))
    assert model.training
    assert not model.norm2.training
    assert x.grad is None
    assert torch.equal(seed, torch.random.get_rng_state())


def test_eval_mode_puts_each_module_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False]


def test_a_batch_norm_model_is_attacked_with_its_running_statistics():
    torch.manual_seed(0)
    model, x, y = models.small_cnn(4, 4, "batch"), torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    attack = PGD(eps=0.1, step_size=0.05, num_steps=2, random_start=False)
    in_train_mode = attack(model.train(), x, y)
    assert torch.equal(in_train_mode, attack(model.eval(), x, y))


@pytest.mark.parametrize("view", [lambda model: model, AttackedModel])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_in_train_mode_the_batch_gives_the_statistics_and_every_pass_moves_the_running_ones(
    loss, view
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4)).double().eval()
    x, y = torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.arange(6) % 4
    attack = PGD(eps=0.1, step_size=0.04, num_steps=3, loss=loss, mode="train")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attack(view(model), x, y, generator=torch.Generator().manual_seed(3))

    # by hand, with the formula of BatchNorm
    mean, var, passes = torch.zeros(12), torch.ones(12), 0
    mean, var = mean.double(), var.double()

    def logits_of(images):
        nonlocal mean, var, passes
        flat = images.flatten(1)
        centre, spread = flat.mean(0), flat.var(0, correction=0)
        mean = 0.9 * mean + 0.1 * centre.detach()
        var = 0.9 * var + 0.1 * flat.var(0, correction=1).detach()
        passes += 1
        z = (flat - centre) / (spread + 1e-5).sqrt()
        return z @ before["2.weight"].T + before["2.bias"]

    target = logits_of(x) if loss == "kl" else y
    here = start_of(attack, x, 3)
    for _ in range(3):
        here.requires_grad_()
        (gradient,) = torch.autograd.grad(LOSSES[loss](logits_of(here), target).sum(), here)
        here = (here.detach() + 0.04 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(found, here, rtol=0, atol=1e-12)
    assert model[1].num_batches_tracked == passes == (4 if loss == "kl" else 3)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert not any(module.training for module in model.modules())  # as it was
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_starts_follow_the_global_generator_or_the_one_given(trained):
    model, x, y = trained
    attack = PGD(eps=0.1, step_size=0.01, num_steps=1)
    torch.manual_seed(1)
    first, other = attack(model, x, y), attack(model, x, y)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(first, attack(model, x, y))
    seeded = [attack(model, x, y, generator=torch.Generator().manual_seed(s)) for s in (2, 2, 3)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


# ---- callers and dtypes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_grad_and_inference_mode_callers_get_the_same(trained, loss, norm):
    model, x, y = trained
    model = copy.deepcopy(model).requires_grad_()
    # the first layer then keeps the images themselves for its gradient
    model.pixels = nn.Identity()
    attack = PGD(eps=0.1, step_size=0.05, num_steps=2, restarts=2, loss=loss, norm=norm)
    generator = torch.Generator()
    expected = attack(model, x, y, generator=generator.manual_seed(0))
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, generator=generator.manual_seed(0)), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        # tensors made here are those that autograd refuses
        x, y = x.clone(), y.clone()
        assert torch.equal(attack(model, x, y, generator=generator.manual_seed(0)), expected)
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_under_bfloat16_autocast(trained, norm, restarts):
    model, x, y = trained
    model, x = copy.deepcopy(model).float().requires_grad_(), x.float()
    attack = PGD(eps=0.2, step_size=0.1, num_steps=3, norm=norm, restarts=restarts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = attack(model, x, y)
        losses = attacks.cross_entropy(model(x_adv), y)
    assert x_adv.dtype == torch.float32
    assert (length(x_adv - x, norm) <= 0.2 + 1e-6).all()
    assert attacks.margin(model(x_adv), y).mean() > attacks.margin(model(x), y).mean()
    # the weights that autocast keeps from the attack still lead back to the parameters
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_batch(trained, norm, autocast):
    model, x, y = trained
    model, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    attack = PGD(eps=0.5, step_size=0.1, num_steps=3, norm=norm, restarts=2, stop_early=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        x_adv = attack(model, x, y)
    assert x_adv.dtype == torch.bfloat16
    # half a step of bfloat16 below 1 is 2^-9, in every one of 64 pixels
    room = 2**-8 if norm == "linf" else 8 * 2**-9
    assert (length((x_adv - x).double(), norm) <= 0.5 + room).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5)])
@pytest.mark.parametrize("stop_early", [False, True])
def test_halves_use_the_ball_as_float32_does_and_never_leave_it(dtype, norm, eps, stop_early):
    torch.manual_seed(0)
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 5
    weight = torch.randn(5, 192) * 1e-6  # such gradients are below what float16 can divide by
    attack = partial(PGD, eps=eps, step_size=eps / 4, norm=norm, stop_early=stop_early)
    lengths = {}
    for kind in (torch.float64, dtype):
        start = torch.Generator().manual_seed(0)
        x_adv = attack(restarts=2)(Linear(weight.to(kind)), x.to(kind), y, generator=start)
        assert x_adv.dtype == kind and x_adv.min() >= 0 and x_adv.max() <= 1
        lengths[kind] = length(x_adv.double() - x.to(kind).double(), norm)
    assert lengths[dtype].max() <= eps + 1e-7
    assert lengths[dtype].mean() > 0.95 * lengths[torch.float64].mean()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    norm=st.sampled_from(["linf", "l2"]),
    loss=st.sampled_from(list(LOSSES)),
    eps=st.floats(1e-4, 1),
    step=st.floats(1e-3, 1),
    restarts=st.integers(1, 2),
    stop_early=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_x_adv_is_in_the_ball_and_in_range(
    shape, norm, loss, eps, step, restarts, stop_early, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=dtype)
    # many pixels on the bounds
    x = (2 * x - 0.5).clamp(0, 1)
    y = torch.randint(0, 4, shape[:1], generator=generator)
    model = Linear(torch.randn(4, x[0].numel(), generator=generator, dtype=dtype))
    attack = PGD(
        eps=eps,
        step_size=step,
        num_steps=3,
        restarts=restarts,
        norm=norm,
        loss=loss,
        stop_early=stop_early,
    )
    kept = x.clone()
    x_adv = attack(model, x, y, generator=generator)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    assert torch.equal(x, kept)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    # the documented rounding of each pixel
    room = (1e-7 if dtype == torch.float32 else 1e-15) * (
        x[0].numel() ** 0.5 if norm == "l2" else 1
    )
    assert (length(x_adv.double() - x.double(), norm) <= eps + room).all()


def test_nans_keep_the_ball_and_count_as_fooled():
    class Breaks(nn.Module):
        def forward(self, x):
            logits = x.flatten(1)[:, :3] * 1.0
            return torch.where(logits[:, :1] > 0.5, logits * math.nan, logits)

    x, y = torch.full((4, 6), 0.4), torch.zeros(4, dtype=torch.int64)
    x[:, 0] = torch.tensor([0.9, 0.48, 0.45, 0.1])
    for norm in ("linf", "l2"):
        for stop_early in (False, True):
            attack = PGD(eps=0.1, step_size=0.05, norm=norm, restarts=3, stop_early=stop_early)
            x_adv = attack(Breaks(), x, y)
            assert (length(x_adv - x, norm) <= 0.1 + 1e-6).all()
            assert fooled(Breaks()(x_adv), y)[0]


def test_nothing_to_do_and_no_model_is_run(trained):
    _, x, y = trained
    for norm in ("linf", "l2"):
        for attack in (FGSM(eps=0, norm=norm), PGD(eps=0, step_size=0.1, norm=norm)):
            assert torch.equal(attack(None, x, y), x)
            assert attack(None, x, y) is not x
        attack = PGD(eps=0.1, step_size=0.1, restarts=2, norm=norm, stop_early=True)
        assert attack(None, x[:0], y[:0]).shape == (0, 1, 8, 8)


def test_integers_are_good_numbers_and_equal_attacks_are_equal():
    assert PGD(eps=1, step_size=1) == PGD(eps=1.0, step_size=1.0)
    assert hash(FGSM(eps=0.1)) == hash(FGSM(eps=0.1))
    assert PGD(eps=20, step_size=5, norm="l2").eps == 20


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(eps=eps) for eps in (8, -0.1, math.nan, math.inf, "8/255", True, torch.tensor(0.1))),
        dict(eps=math.inf, norm="l2"),
        *(dict(step_size=step_size) for step_size in (2, 0, -1, None)),
        *(dict(num_steps=num_steps) for num_steps in (0, 2.5, True)),
        dict(restarts=0),
        dict(restarts=2, random_start=False),
        dict(start_noise=0.1, random_start=False),
        dict(mode="training"),
        dict(mode="train", stop_early=True),
        dict(norm="l1"),
        dict(loss="mse"),
        dict(loss="kl", random_start=False),
    ],
)
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(InputError, match="|".join(wrong)):
        PGD(**{"eps": 0.1, "step_size": 0.1, **wrong})


@pytest.mark.parametrize("attack", [PGD, partial(FGSM)])
def test_numbers_of_numpy_are_good_numbers(attack):
    steps = {"step_size": np.float32(0.25), "num_steps": np.int64(3)} if attack is PGD else {}
    made = attack(eps=np.float32(0.5), **steps)
    plain = attack(eps=0.5, **{name: value.item() for name, value in steps.items()})
    assert repr(made) == repr(plain)  # reports keep what an attack calls itself


def test_a_function_is_a_model(trained):
    model, x, y = trained
    found = FGSM(eps=0.1)(lambda images: model(images), x, y)
    assert torch.equal(found, FGSM(eps=0.1)(model, x, y))


def test_a_model_made_in_inference_mode_is_refused_with_a_way_out():
    with torch.inference_mode():
        model = models.small_cnn(4, 2, in_channels=1)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    with pytest.raises(InputError, match="deepcopy"):
        FGSM(eps=0.1)(model, x, y)
    assert not torch.equal(FGSM(eps=0.1)(copy.deepcopy(model), x, y), x)


def test_fgsm_checks_its_settings_when_it_is_made():
    for wrong in (dict(eps=8), dict(eps=0.1, norm="l1"), dict(eps=0.1, loss="kl")):
        with pytest.raises(InputError):
            FGSM(**wrong)
    FGSM(eps=0.1, loss="kl", random_start=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: ((255 * x).to(torch.uint8), y), "x is torch.uint8"),
        (lambda x, y: (x.tolist(), y), "x is a list; give a tensor"),
        (lambda x, y: (x, y.numpy()), "y is a ndarray; give a tensor"),
        (lambda x, y: (x[0, 0, 0], y[:8]), r"x is .*shape \[8\]"),
        (lambda x, y: (2 * x - 1, y), "normalise inside"),
        (lambda x, y: (x * 255, y), "divide by 255"),
        (lambda x, y: (16 * x.round(), y), "divide by 16"),  # the digits as scikit-learn has them
        (lambda x, y: (x * math.nan, y), "x goes from nan"),
        (lambda x, y: (x, y.int()), "y is torch.int32"),
        (lambda x, y: (x, y.double()), "y is torch.float64"),
        (lambda x, y: (x, y[:-1]), r"y is .*shape \[59\]"),
        (lambda x, y: (x, nn.functional.one_hot(y)), r"y is .*shape \[60, 5\]"),
        (lambda x, y: (x[0], y[0]), r"a batch of one: x\[None\], y\[None\]"),
        (lambda x, y: (x, y - 1), "class -1"),
        (lambda x, y: (x, y + 1), "5 logits, but classes go up to 5"),
        (lambda x, y: (x, y.to("meta")), "y on meta"),
    ],
)
def test_wrong_batches(trained, change, words):
    model, x, y = trained
    x, y = change(x, y)
    with pytest.raises(InputError, match=words):
        FGSM(eps=0.1)(model, x, y)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda x: x, r"shape \[4, K\]"),
        (lambda x: (x.flatten(1), x), "gave tuple"),
        (lambda x: x.flatten(1)[:2], r"gave \[2, 9\]"),
        (lambda x: x.flatten(1)[:, :1], "1 logits"),
        (lambda x: x.detach().flatten(1), "no gradient flows"),
        (lambda x: x.flatten(1).argmax(1)[:, None].expand(4, 3), "no gradient flows"),
        (lambda x: torch.ones(4, 3, requires_grad=True), "no gradient flows"),
    ],
)
def test_wrong_models(forward, words):
    class Model(nn.Module):
        def forward(self, x):
            return forward(x)

    with pytest.raises(InputError, match=words):
        FGSM(eps=0.1)(Model(), torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64))


def test_dlr_needs_three_classes():
    x, y = torch.rand(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match="'margin'"):
        FGSM(eps=0.1, loss="dlr")(Linear(torch.randn(2, 5)), x, y)


def test_with_decay_the_steps_follow_a_quarter_of_a_cosine_wave():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
    x, y = torch.full((1, 1), 0.1, dtype=torch.float64), torch.tensor([0])
    for num_steps in range(1, 5):
        attack = PGD(eps=0.8, step_size=0.2, num_steps=num_steps, random_start=False, decay=True)
        lengths = [0.2 * math.cos(math.pi * k / (2 * num_steps)) for k in range(num_steps)]
        wanted = 0.1 + sum(lengths)  # every step goes up
        assert attack(model, x, y).item() == pytest.approx(wanted, rel=1e-12)
