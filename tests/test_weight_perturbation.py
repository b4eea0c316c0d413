import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from engm.attacks import PGD
from engm.config import RunConfig
from engm.errors import InputError, NonFiniteLossError
from engm.methods import AWP, MART, PGDAT, TRADES, Natural
from engm.optim import ENGM, MSGD, example_weights
from engm.training import fit, train_one_epoch


def problem(norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), *([nn.BatchNorm2d(3)] if norm else []), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(12, 5)).double()
    x, y = torch.rand(7, 1, 4, 4, dtype=torch.float64), torch.randint(5, (7,))
    return model, lambda: functional.cross_entropy(model(x), y, reduction="none")


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(model, kept):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))


def test_weights_move_by_gamma_times_their_length_up_the_gradient_and_come_back():
    model, closure = problem()
    kept = copies(model)
    gradients = torch.autograd.grad(closure().sum() / 7, list(model.parameters()))
    with AWP(0.3)(model, closure):
        for parameter, before, gradient in zip(model.parameters(), kept, gradients, strict=True):
            moved = parameter.detach() - before
            if before.ndim == 1:
                assert not moved.any()
                continue
            length = 0.3 * math.sqrt((before**2).sum()) / math.sqrt((gradient**2).sum())
            torch.testing.assert_close(moved, gradient * length, rtol=1e-9, atol=1e-12)
        assert closure().mean() > 0
    assert equal(model, kept)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["msgd", "clip", "exact", "input", "loop"])
def test_the_step_follows_the_gradient_at_the_perturbed_weights_from_the_old_ones(kind):
    model, _ = problem()
    torch.manual_seed(1)
    x, y = torch.rand(7, 1, 4, 4, dtype=torch.float64), torch.randint(5, (7,))

    def closure():
        return functional.cross_entropy(model(x), y, reduction="none")

    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    if kind in ("msgd", "clip"):
        max_norm = 0.01 if kind == "clip" else None
        optimizer = MSGD(model.parameters(), **settings, max_norm=max_norm)
    else:
        optimizer = ENGM(model, **settings, norms=kind, scale=0.5, floor=0.05)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(3):
        # by hand: perturb, one gradient an example, put back, weigh, step
        old = copies(model)
        ascent = torch.autograd.grad(closure().mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, ascent, strict=True):
                if p.ndim > 1:
                    p += 0.2 * p.norm() * g / g.norm()
        single = [torch.autograd.grad(closure()[i], parameters) for i in range(7)]
        with torch.no_grad():
            for p, before in zip(parameters, old, strict=True):
                p.copy_(before)
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in single])
        if kind == "msgd":
            step = flat.mean(0)
        elif kind == "clip":
            step = flat.mean(0)
            step = step * min(1, 0.01 / step.norm())
        else:
            step = (example_weights(flat.norm(dim=1), 0.5, 0.05)[:, None] * flat).mean(0)
        parts = step.split([p.numel() for p in parameters])
        wanted = []
        for i, (before, part) in enumerate(zip(old, parts, strict=True)):
            velocity[i] = 0.9 * velocity[i] + part.view_as(before) + 0.01 * before
            wanted.append(before - 0.1 * velocity[i])

        optimizer.zero_grad()
        with AWP(0.2)(model, closure):
            optimizer.accumulate(closure, inputs=x)
        assert equal(model, old)
        optimizer.step()
        if kind != "input":  # its norms are estimates between two fits
            for p, value in zip(parameters, wanted, strict=True):
                torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-9)


def test_weights_come_back_bit_for_bit_when_the_step_raises():
    model, closure = problem()
    kept = copies(model)
    optimizer = MSGD(model.parameters(), lr=0.1)
    calls = []

    def breaks():
        calls.append(not equal(model, kept))
        return closure() * math.nan if len(calls) == 2 else closure()

    def step():
        with AWP(0.1)(model, breaks):
            optimizer.accumulate(breaks)

    with pytest.raises(NonFiniteLossError):
        step()
    assert calls == [False, True]
    assert equal(model, kept)
    calls.clear()
    with pytest.raises(ZeroDivisionError), AWP(0.1)(model, breaks):
        1 / 0  # noqa: B018
    assert equal(model, kept)


def test_what_moves_is_what_the_published_code_moves_by_name():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(1, 4, 2, 2)
            self.class_token = nn.Parameter(torch.randn(1, 1, 4))
            self.positions = nn.Parameter(torch.randn(1, 5, 4))
            self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
            self.norm = nn.LayerNorm([5, 4])
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            tokens = self.patch(x).flatten(2).mT
            first = self.class_token.expand(len(x), -1, -1)
            return self.head(
                self.norm(self.block(torch.cat([first, tokens], 1) + self.positions))[:, 0]
            )

    torch.manual_seed(0)
    model, x, y = Vision().double(), torch.rand(7, 1, 4, 4).double(), torch.arange(7) % 5

    def closure():
        return functional.cross_entropy(model(x), y, reduction="none")

    kept = copies(model)
    with AWP(0.1)(model, closure):
        names = zip(model.named_parameters(), kept, strict=True)
        moved = {name for (name, p), before in names if not torch.equal(p, before)}
    # by the rule of csdongxian/AWP, AT_AWP/utils_awp.py, in diff_in_weights
    state = model.state_dict()
    assert moved == {n for n, w in state.items() if len(w.size()) > 1 and "weight" in n}
    assert {"patch.weight", "block.self_attn.in_proj_weight", "norm.weight"} <= moved

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(16, 5).double())

        def forward(self, x):
            return x.flatten(1) @ self.kernel

    model = Bare()
    with (
        pytest.raises(InputError, match=r"'weight' in their name.*'kernel'"),
        AWP(0.1)(model, closure),
    ):
        pass


def test_batchnorm_counts_the_outer_pass_alone():
    model, closure = problem(norm=True)
    norm = model[1]
    awp = AWP(0.1)
    with awp(model, closure):
        before = norm.running_mean.clone(), norm.num_batches_tracked.item()
        closure()
    assert before[1] == 0 and not before[0].any()
    assert norm.num_batches_tracked == 1 and norm.running_mean.any()


def test_a_bad_example_has_no_say_and_a_flat_loss_moves_nothing():
    model, closure = problem()
    kept = copies(model)
    bad = torch.zeros(7, dtype=torch.float64)
    bad[3] = math.inf
    good = [i for i in range(7) if i != 3]
    with AWP(0.1)(model, lambda: closure() + bad):
        moved = copies(model)
    with AWP(0.1)(model, lambda: closure()[good]):
        assert all(torch.allclose(p, q) for p, q in zip(model.parameters(), moved, strict=True))
        assert not equal(model, kept)
    with AWP(0.1)(model, lambda: closure() * 0):
        assert equal(model, kept)
    with AWP(0.1)(model, lambda: closure() * math.nan):
        assert equal(model, kept)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_a_gamma_that_is_none_is_refused(gamma):
    with pytest.raises(InputError, match="gamma must be a number, 0 or more"):
        AWP(gamma)


@pytest.mark.filterwarnings("ignore:at step")
@pytest.mark.parametrize("awp", [None, AWP(0.02)])
@pytest.mark.parametrize("norms", [None, "exact", "input", "loop"])
@pytest.mark.parametrize(
    "method",
    [
        Natural(),
        PGDAT(PGD(eps=0.1, step_size=0.05, num_steps=2)),
        TRADES(PGD(eps=0.1, step_size=0.05, num_steps=2, loss="kl", start_noise=0.001)),
        MART(PGD(eps=0.1, step_size=0.05, num_steps=2)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_method_trains_with_every_optimizer(method, norms, awp):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    x, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    x[torch.arange(12), 0, 0, y] += 1
    x = x.clamp(max=1)
    if norms is None:
        optimizer = MSGD(model.parameters(), lr=0.05)
    else:
        optimizer = ENGM(model, lr=0.05, momentum=0, norms=norms, refresh_every=2)
    losses = [
        train_one_epoch(model, method, optimizer, [(x, y)], awp=awp)["train_loss"]
        for _ in range(20)
    ]
    assert losses[-1] < 0.95 * losses[0]


def test_a_run_perturbs_its_weights_after_the_warm_up(tmp_path, monkeypatch):
    seen = []
    original = AWP.__call__

    def spy(self, model, closure):
        seen.append(self.gamma)
        return original(self, model, closure)

    monkeypatch.setattr(AWP, "__call__", spy)
    config = RunConfig(subset=50, width=2, num_steps=1, epochs=3, awp=0.01, awp_warmup=2)
    fit(config, tmp_path, device="cpu", progress=False)
    assert seen == [0, 0, 0.01]
