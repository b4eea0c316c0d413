import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pyautoattack
import pytest
import torch
from pyautoattack import checks
from pyautoattack.square import SquareAttack
from torch import nn

from engm import attacks, data, models
from engm.errors import InputError
from engm.evaluation import autoattack
from engm.evaluation.autoattack import AutoAttack
from engm.runs import load_tensors, save_tensors

LOGGER = logging.getLogger("auto-attack")
NORMS = {"linf": "Linf", "l2": "L2"}


class Changed(nn.Module):
    """Calls `change(forward, x)` in place of the model."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model, x)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(model, epochs):
    split = data.load("digits").train
    x, y = split.images[:600].float() / 255, split.labels[:600]
    attack = attacks.PGD(eps=0.1, step_size=0.05, num_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(600).split(50):
            optimizer.zero_grad()
            x_adv = attack(model, x[rows], y[rows])
            nn.functional.cross_entropy(model(x_adv), y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    networks = {"mlp": trained(mlp(), 10)}
    networks["cnn"] = trained(models.small_cnn(10, 8, in_channels=1), 6)
    # sees 6 levels of grey, so that no gradient leads anywhere
    networks["quantised"] = Changed(networks["mlp"], lambda f, x: f((5 * x).round() / 5)).eval()
    return networks


@pytest.fixture(scope="module")
def digits():
    split = data.load("digits").test
    return split.images[:30].float() / 255, split.labels[:30]


@pytest.fixture
def quick(monkeypatch):
    """Fewer steps, for tests of everything but the numbers."""
    standard = pyautoattack.AutoAttack

    def shorter(*args, **settings):
        made = standard(*args, **settings)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 5
        made.square.n_queries = 30
        return made

    monkeypatch.setattr(pyautoattack, "AutoAttack", shorter)


def same(one, other):
    assert torch.equal(one.x_adv, other.x_adv) and torch.equal(one.robust, other.robust)
    assert one.to_dict() == other.to_dict()


# ---- the golden test


@pytest.mark.parametrize(
    ("name", "norm", "eps", "seed", "names"),
    [
        ("mlp", "linf", 0.15, 0, None),
        ("quantised", "linf", 0.25, 1, None),
        ("mlp", "l2", 0.55, 0, None),
        ("cnn", "l2", 1.6, 1, None),
        ("mlp", "linf", 0.15, 2, ("fab-t",)),
    ],
)
def test_as_the_package_called_by_hand(network, digits, caplog, name, norm, eps, seed, names):
    model, x, y = network[name], digits[0][:18], digits[1][:18]
    version = {"version": "custom", "attacks": list(names)} if names else {"version": "standard"}
    oracle = pyautoattack.AutoAttack(model, norm=NORMS[norm], eps=eps, seed=seed, **version)
    oracle.apgd_targeted.n_target_classes = oracle.fab.n_target_classes = 9
    # the package stops where nothing is left
    expected, counts = [], dict.fromkeys(("clean", *(names or autoattack._ATTACKS)), 0)
    for part in (slice(10), slice(10, 18)):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "auto-attack"), torch.random.fork_rng():
            expected.append(oracle.run_standard_evaluation(x[part], y[part], batch_size=10)[0])
        lines = [m.split() for m in caplog.messages if m.startswith(("initial", "robust"))]
        n = len(expected[-1])
        counts["clean"] += round(float(lines[0][-1][:-1]) * n / 100)
        for line in lines[1:-1]:
            counts[line[3][:-1].lower()] += round(float(line[4][:-1]) * n / 100)
    choice = {"attacks": names} if names else {}
    result = AutoAttack(eps=eps, norm=norm, seed=seed, **choice).run(model, x, y, batch_size=10)
    assert torch.equal(result.x_adv, torch.cat(expected))
    assert result.counts == counts and list(result.counts) == list(counts)
    assert counts["clean"] > 10  # something of both chunks was attacked
    assert result.accuracy == list(result.counts.values())[-1] / 18
    if name == "quantised":
        assert result.counts["square"] < result.counts["fab-t"]


def test_the_seed_decides(network, digits):
    attack = partial(AutoAttack, eps=0.15, attacks=("apgd-ce",))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        results.append(attack(seed=seed)(network["mlp"], *digits, generator=torch.Generator()))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    whole = attack().run(network["mlp"], *digits, batch_size=30)
    assert torch.equal(whole.x_adv, results[0])


# ---- everything else is left as it was


@pytest.mark.parametrize("fails_at", [None, 1, 3, 8, 12, 40, 120])
def test_leaves_all_as_it_was(digits, quick, fails_at):
    torch.manual_seed(0)
    model = models.small_cnn(10, 4, "batch", in_channels=1)
    modules, parameters = list(model.modules()), list(model.parameters())
    x = digits[0]
    y = model.eval()(x).argmax(1)  # so that there is something to attack
    model.train()
    modules[2].eval()
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1
        if forwards == fails_at:
            raise KeyError("in the middle")

    model.register_forward_hook(count)
    handler = logging.NullHandler()
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.ERROR)
    LOGGER.propagate = False

    def tracer(*_):
        return None

    def state():
        return (
            [m.training for m in modules],
            [p.requires_grad for p in parameters],
            [None if p.grad is None else p.grad.tolist() for p in parameters],
            {name: tensor.tolist() for name, tensor in model.state_dict().items()},
            torch.get_rng_state().tolist(),
            random.getstate(),
            sys.gettrace(),
            (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate, LOGGER.disabled),
            dict(checks.funcs),
            torch.is_grad_enabled(),
        )

    found, caught = sys.gettrace(), False
    checks.funcs["grad"] = 7
    try:
        sys.settrace(tracer)
        before = state()
        try:
            AutoAttack(eps=0.01).run(model, x, y, batch_size=20)
        except (KeyError, InputError):  # the latter of what is looked at first
            caught = True
        after = state()
    finally:
        sys.settrace(found)
        checks.funcs["grad"] = 0
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.propagate = True
    assert caught == (fails_at is not None) and forwards >= (fails_at or 200)
    assert after == before


def test_in_inference_mode(network, digits, quick):
    plain = AutoAttack(eps=0.2).run(network["cnn"], *digits)
    with torch.inference_mode():
        x, y = digits[0].clone(), digits[1].clone()
        same(AutoAttack(eps=0.2).run(network["cnn"], x, y), plain)


# ---- resume


class Interrupted(Exception):
    pass


def interrupted(model, at):
    """A model with the weights of `model` that raises in its forward number `at`."""
    forwards = 0

    def count(forward, x):
        nonlocal forwards
        forwards += 1
        if forwards == at:
            raise Interrupted
        return forward(x)

    return Changed(model, count), lambda: forwards


def test_resume_after_an_exception(network, digits, quick, tmp_path):
    attack = AutoAttack(eps=0.15)
    # also for a model that draws
    model = Changed(network["mlp"], lambda f, x: f(x + 0.1 * torch.randn_like(x))).eval()
    expected = attack.run(model, *digits, batch_size=8)
    assert any("randomized" in warning for warning in expected.warnings)
    counts = list(expected.counts.values())
    assert counts[0] > counts[1] > counts[-1] > 0
    counted, total = interrupted(model, 0)
    same(attack.run(counted, *digits, batch_size=8, save_to=tmp_path / "whole"), expected)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert len(names) == 4
    kept = []
    for at in (1, 14, total() // 2, total() - 10, total()):
        folder = tmp_path / str(at)
        cut, _ = interrupted(model, at)
        with pytest.raises((Interrupted, InputError)):
            attack.run(cut, *digits, batch_size=8, save_to=folder)
        kept.append(len(list(folder.glob("*"))))
        torch.manual_seed(at)
        again, forwards = interrupted(model, 0)
        same(attack.run(again, *digits, batch_size=8, save_to=folder), expected)
        assert (forwards() < 0.8 * total()) == (kept[-1] > 0)
        assert {path.name for path in folder.iterdir()} == names
    assert kept[:2] == [0, 0] and 0 < kept[2] < 4 and kept[-1] == 4
    done, forwards = interrupted(model, 0)
    same(attack.run(done, *digits, batch_size=8, save_to=str(tmp_path / "whole")), expected)
    assert forwards() < 30  # nothing but predictions


def test_resume_after_a_kill(network, digits, tmp_path):
    (x, y), model, folder = digits, network["mlp"], tmp_path / "chunks [1]"
    save_tensors(tmp_path / "case.pt", {"x": x, "y": y, "model": model.state_dict()})
    code = """
import os, signal, sys, torch
from pathlib import Path
from torch import nn
from engm.evaluation.autoattack import AutoAttack
from engm.runs import load_tensors
folder = Path(sys.argv[1])
case = load_tensors(folder / "case.pt")
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
model.load_state_dict(case["model"])
forwards = 0
def count(*_):
    global forwards
    forwards += 1
    if forwards == 1800:
        os.kill(os.getpid(), signal.SIGKILL)
model.register_forward_hook(count)
attack = AutoAttack(eps=0.15, attacks=("apgd-ce", "apgd-t"))
attack.run(model, case["x"], case["y"], batch_size=10, save_to=folder / "chunks [1]")
"""
    attack = AutoAttack(eps=0.15, attacks=("apgd-ce", "apgd-t"))
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(0))
    expected = attack.run(model, x, y, batch_size=10, save_to=tmp_path / "whole")
    whole = len(passes)
    assert whole > 1800
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ})
    assert ended.returncode == -signal.SIGKILL
    done = {path.name for path in folder.glob("*.pt")}
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert 0 < len(done) < 3 == len(names) and done < names
    leftover = folder / f".{min(names - done)}.0123abcd.tmp"
    leftover.touch()
    passes.clear()
    same(attack.run(model, x, y, batch_size=10, save_to=folder), expected)
    hook.remove()
    assert len(passes) < 0.9 * whole and {path.name for path in folder.iterdir()} == names


def test_chunks_of_another_call_are_not_taken(network, digits, quick, tmp_path):
    (x, y), model = digits, network["mlp"]
    attack = AutoAttack(eps=0.2, attacks=("apgd-ce",))

    def files(model=model, x=x, y=y, batch_size=250, **settings):
        changed = AutoAttack(**(vars(attack) | settings))
        found = changed.run(model, x, y, batch_size=batch_size, save_to=tmp_path)
        same(found, changed.run(model, x, y, batch_size=batch_size))
        return len(list(tmp_path.iterdir()))

    assert files() == 1
    other = mlp().eval()
    other.load_state_dict(model.state_dict())
    assert files(other) == 1  # the same weights in another object
    with torch.no_grad():
        other[1].bias[0] += 1e-6
    wrong_y = y.clone()
    wrong_y[0] = (y[0] + 1) % 10
    for expected, change in enumerate(
        (
            dict(eps=0.21),
            dict(seed=1),
            dict(norm="l2"),
            dict(attacks=("square",)),
            dict(x=x * 0.999),
            dict(y=wrong_y),
            dict(x=x[:20], y=y[:20]),
            dict(model=other),
        ),
        start=2,
    ):
        assert files(**change) == expected, change
    # a chunk stands for itself, whatever else is asked for: the first 20 are there
    assert files(batch_size=20) == 10


def test_chunks_of_other_versions_are_not_taken(network, digits, quick, tmp_path, monkeypatch):
    attack = AutoAttack(eps=0.2, attacks=("apgd-ce",))
    attack.run(network["mlp"], *digits, save_to=tmp_path)
    monkeypatch.setattr(autoattack.metadata, "version", lambda name: "older")
    attack.run(network["mlp"], *digits, save_to=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_models_that_differ_in_a_plain_attribute_do_not_share_chunks(network, digits, tmp_path):
    class Steps(torch.nn.Module):
        def __init__(self, levels):
            super().__init__()
            self.model, self.levels = network["mlp"], levels

        def forward(self, x):
            return self.model((x * self.levels).round() / self.levels)

    attack = AutoAttack(eps=0.15, attacks=("square",))
    x, y = digits[0][:8], digits[1][:8]
    for levels in (2, 64):
        kept = attack.run(Steps(levels), x, y, save_to=tmp_path)
        same(kept, attack.run(Steps(levels), x, y))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "defence",
    [
        lambda x, images: x.detach() + 0 * x,  # hides the gradient alone
        lambda x, images: x + (images - x).detach(),  # leaves clean images as they are
    ],
)
def test_models_that_are_alike_on_clean_images_do_not_share_chunks(
    defence, network, digits, tmp_path
):
    class Defended(torch.nn.Module):
        def __init__(self, on):
            super().__init__()
            self.model, self.on = network["mlp"], on

        def forward(self, images):
            on = self.on and images.shape == x.shape
            return self.model(defence(images, x) if on else images)

    attack = AutoAttack(eps=0.15, attacks=("apgd-ce",))
    x, y = digits[0][:8], digits[1][:8]
    for on in (True, False):
        kept = attack.run(Defended(on), x, y, save_to=tmp_path)
        same(kept, attack.run(Defended(on), x, y))
    assert len(list(tmp_path.iterdir())) == 2


def test_accuracy_is_recomputed_from_x_adv(network, digits, quick, tmp_path):
    model = network["mlp"]
    attack = AutoAttack(eps=0.2, attacks=("apgd-ce",))
    honest = attack.run(model, *digits, save_to=tmp_path)
    assert honest.accuracy < honest.counts["clean"] / 30
    (path,) = tmp_path.iterdir()
    forged = {"broken": torch.ones(30, dtype=torch.bool), "x_adv": digits[0]}
    forged |= {"counts": {"clean": 0, "apgd-ce": 0}}
    save_tensors(path, load_tensors(path) | forged)
    result = attack.run(model, *digits, save_to=tmp_path)
    assert result.robust.tolist() == (model(digits[0]).argmax(1) == digits[1]).tolist()
    assert result.accuracy == honest.counts["clean"] / 30
    assert "examples are answered otherwise now" in result.warnings[-1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("shift", "fools"), [(math.nan, 0), (-0.001, 0), (0.001, 0), (0.3, 0), (0, 1)]
)
def test_images_outside_the_budget_do_not_count(network, digits, monkeypatch, norm, shift, fools):
    x = digits[0]
    y = network["mlp"](x).argmax(1)
    # right on x, wrong on everything else
    model = Changed(network["mlp"], lambda f, here: f(here) if torch.equal(here, x) else -f(here))
    assert x.amin() == 0 and x.amax() == 1
    inside = (0.999 * x).clamp(0.001)
    found = inside if fools else (x * (shift < 0.1) + shift)
    monkeypatch.setattr(SquareAttack, "perturb", lambda self, x, y: found)
    eps = {"linf": 0.05, "l2": 0.5}[norm]
    result = AutoAttack(eps=eps, norm=norm, attacks=("square",)).run(model, x, y)
    if fools:
        assert (
            result.accuracy == 0 and torch.equal(result.x_adv, inside) and not result.warnings[:-1]
        )
    else:
        assert "of an attack, outside [0, 1] or the ball, do not count" in result.warnings[0]
        kept = (result.x_adv == x).flatten(1).all(1)
        reaches = (x.flatten(1).amin(1) + shift < 0) | (x.flatten(1).amax(1) + shift > 1)
        assert kept[reaches].all() and (abs(shift) < 0.1 or kept.all())


# ---- few classes


class Linear(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 36))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_of_a_linear_model_have_a_closed_form(classes, quick):
    torch.manual_seed(classes)
    model, x = Linear(classes), 0.4 + 0.2 * torch.rand(40, 1, 6, 6)
    logits = model(x).detach()
    y = logits.argmax(1)
    with pytest.raises(
        InputError, match=r"'apgd-t' cannot run.* 4 classes.* gives \d logits; choose"
    ):
        AutoAttack(eps=0.02).run(model, x, y)
    # the shortest way to class k: (z_y - z_k) / |w_y - w_k|_1
    across = (model.weight[y][:, None] - model.weight).abs().sum(2).detach()
    gaps = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], math.inf)
    radius = (gaps / across).amin(1)
    eps = radius.sort().values[19:21].mean().item()
    assert eps < 0.2  # the box [0, 1] is out of reach
    result = AutoAttack(eps=eps, attacks=("apgd-ce", "fab-t", "square")).run(model, x, y)
    assert torch.equal(result.robust, radius > eps) and not result.warnings


# ---- warnings


def dynamic(forward, x):
    with torch.enable_grad():
        here = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(forward(here).logsumexp(1).sum(), here)
    return forward(x + 0.01 * gradient.sign())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda forward, x: forward(x + 0.05 * torch.randn_like(x)), "randomized defense!"),
        (lambda forward, x: forward(x).softmax(1), "probability distribution"),
        (dynamic, "dynamic defense"),
        (lambda forward, x: forward((5 * x).round() / 5), "with zero gradient"),
        (lambda forward, x: forward((5 * x).round() / 5), "Square Attack has decreased"),
    ],
)
def test_signs_of_a_model_that_misleads(
    network, digits, quick, caplog, monkeypatch, change, expected
):
    sound = AutoAttack(eps=0.15).run(network["mlp"], *digits)
    broken = Changed(network["mlp"], change)
    attack = AutoAttack(eps=0.25)
    results = [attack.run(broken, *digits, batch_size=15) for _ in range(2)]
    same(*results)  # also of a model that draws
    assert sum(expected in warning for warning in results[0].warnings) == 1
    assert not any("flags_doc" in w or "version=" in w for w in results[0].warnings)
    assert not sound.warnings and not caplog.messages
    # nothing sticks, nor does what others left
    monkeypatch.setitem(checks.funcs, "grad", 3)
    same(AutoAttack(eps=0.15).run(network["mlp"], *digits), sound)
    assert json.loads(json.dumps(results[0].to_dict())) == results[0].to_dict()


def test_of_repeated_warnings_the_largest_stays():
    said = ["there are 9 points", "other", "there are 12 points", "there are 3 points", "other"]
    assert set(autoattack.largest_of_each(said)) == {"other", "there are 12 points"}


def test_versions_and_progress(network, digits, quick, capsys):
    slow = nn.Sequential(network["mlp"])
    slow.register_forward_hook(lambda *_: time.sleep(0.01))  # or no bar would be drawn in between
    result = AutoAttack(eps=0.1, seed=3).run(slow, *digits, progress=True, batch_size=20)
    assert set(result.versions) == {"engm", "torch", "pyautoattack"}
    assert result.versions["pyautoattack"] == "0.2.0" and result.seed == 3
    shown = capsys.readouterr().err
    assert f"robust={result.counts['square']}" in shown and "2/2" in shown
    assert re.search(r"of the model: [1-9]\d*pass", shown)


# ---- dtypes


@pytest.mark.parametrize(
    ("of_x", "of_model"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(network, digits, quick, of_x, of_model):
    model = mlp().eval()
    model.load_state_dict(network["mlp"].state_dict())
    model.to(of_model)
    x, y = (digits[0] * 0.987).to(of_x), digits[1].to(torch.uint8)
    for norm, eps in (("linf", 0.15), ("l2", 0.8)):
        result = AutoAttack(eps=eps, norm=norm).run(model, x, y)
        assert result.x_adv.dtype == of_x and result.robust.dtype == torch.bool
        robust = model(result.x_adv.to(of_model)).argmax(1) == digits[1]
        assert torch.equal(result.robust, robust)
        assert 0 < result.robust.sum() == result.counts["square"] < result.counts["clean"]
        assert not result.warnings
        kept = (result.x_adv == x).flatten(1).all(1)
        assert kept[robust].all() and not kept.all()


# ---- what is refused


def test_wrong_inputs_are_refused(network, digits, monkeypatch):
    (x, y), model, attack = digits, network["mlp"], AutoAttack(eps=0.1)
    constant = Changed(model, lambda forward, x: forward(x.detach()))
    for reason, arguments in (
        ("x goes from 0 to 255", (model, 255 * x, y)),
        ("no gradient flows", (constant, x, y)),
        (r"'square' cannot run on x of shape \[30, 64\]", (model, x.flatten(1), y)),
    ):
        with pytest.raises(InputError, match=reason):
            attack.run(*arguments)
    with pytest.raises(InputError, match="batch_size must be"):
        attack.run(model, x, y, batch_size=0)
    for name in list(sys.modules):
        if name.split(".")[0] == "pyautoattack":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'pip install "engm\[autoattack\]"'):
        attack.run(model, x, y)


def test_square_alone_needs_no_gradient(network, digits, quick):
    blind = Changed(network["mlp"], lambda forward, x: forward(x.detach()))
    only = AutoAttack(eps=0.3, attacks=("square",))
    same(only.run(blind, *digits), only.run(network["mlp"], *digits))


def test_settings_are_checked():
    for reason, settings in (
        ("unknown norm 'L2'", {"norm": "L2"}),
        ("eps is 8, but", {"eps": 8}),
        ("eps must be", {"eps": -0.1}),
        ("seed must be", {"seed": -1}),
        ("seed must be", {"seed": 0.5}),
        ("seed must be", {"seed": 2**63}),
        ("attacks must be", {"attacks": ()}),
        ("attacks must be", {"attacks": "square"}),
        ("attacks must be", {"attacks": ("square", "square")}),
        ("unknown attack 'fab'", {"attacks": ("fab",)}),
    ):
        with pytest.raises(InputError, match=reason):
            AutoAttack(**({"eps": 0.1} | settings))


def test_eps_0_changes_nothing(network, digits):
    result = AutoAttack(eps=0).run(network["mlp"], *digits)
    assert torch.equal(result.x_adv, digits[0])
    assert set(result.counts.values()) == {result.counts["clean"]} and len(result.counts) == 5


def test_sizes_that_square_cannot_start_on():
    attack = SquareAttack(lambda x: torch.eye(2)[[0] * len(x)], "L2", n_queries=0, eps=0.1)
    fits = {}
    for height in range(1, 30):
        for width in (8, 12, 28, 33):
            attack.init_hyperparam(torch.rand(2, 1, height, width))
            try:
                attack.attack_single_run(
                    torch.rand(2, 1, height, width), torch.zeros(2, dtype=torch.int64)
                )
                runs = True
            except (RuntimeError, ZeroDivisionError):
                runs = False
            assert autoattack.tiles_fit(height, width) == runs, (height, width)
            fits[height, width] = runs
    assert fits[8, 8] and fits[28, 28] and not fits[12, 12]
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    x, y = torch.rand(2, 1, 12, 12), torch.tensor([0, 1])
    with pytest.raises(InputError, match="'square' cannot run on x of shape .*12, 12"):
        AutoAttack(eps=0.5, norm="l2").run(model, x, y)
