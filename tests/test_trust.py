"""Evaluations in strangers' hands: what is refused by name, what is taken as it is."""

import copy
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_preconditions import Around
from torch import nn

import engm
from engm.attacks import FGSM, PGD, fooled
from engm.data import Split
from engm.errors import InputError
from engm.evaluation import suite
from engm.evaluation.accuracy import accuracy_under, correct, run_attack
from engm.evaluation.attacks import TargetedPGD, Transfer
from engm.evaluation.checks import unit_of
from engm.plots import robustness_curve

EPS = 0.1
ONE = {"FGSM": FGSM(eps=EPS)}


def problem(classes=5, n=60, flat=False):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)
    x = 0.3 + 0.4 * torch.rand(n, 64 if flat else 1, *() if flat else (8, 8))
    return model.eval(), x, model(x).argmax(1)


@dataclass(frozen=True)
class Mine:
    """An attack of one's own, made of a function of x and y."""

    of: object
    eps: float = EPS
    norm: str = "linf"

    def __call__(self, model, x, y, *, generator=None):
        return self.of(x, y)


def names(report):
    return {check.name for check in report.flags}


# ---- an evaluation does not contradict itself


def test_the_attack_of_the_curve_counts_and_says_that_those_given_are_weak(tmp_path):
    model, x, y = problem()
    report = engm.evaluate(
        model, (x, y), eps=EPS, attacks={"none": Mine(lambda x, y: x)}, save_to=tmp_path
    )
    assert report.worst == report.curve[EPS] and report.worst.fraction < 0.5
    assert {"attacks strong", "budget used"} <= names(report)
    always = report.attacks[-1]
    assert (tmp_path / always.file).exists() and always.accuracy == report.worst
    # where it is among the attacks, nothing is added
    usual = engm.evaluate(model, (x, y), eps=EPS)
    assert "attacks strong" not in {check.name for check in usual.checks}
    assert not [r.name for r in usual.attacks if "always" in r.name]


def test_an_attack_that_leaves_more_than_clean_is_flagged():
    model, x, y = problem()
    wrong = torch.where(torch.arange(60) % 2 == 0, y, (y + 1) % 5)
    step = model[1].weight.view(5, 1, 8, 8)
    helps = Mine(lambda x, y: (x + EPS * (step[y] - step.mean(0)).sign()).clamp(0, 1))
    report = engm.evaluate(model, (x, wrong), eps=EPS, attacks={"helps": helps})
    assert "below clean" in names(report)
    assert "below clean" not in names(engm.evaluate(model, (x, wrong), eps=EPS))
    few = y.clone()
    few[(wrong != y).nonzero()[:3]] = wrong[(wrong != y).nonzero()[:3]]
    report = engm.evaluate(model, (x, few), eps=EPS, attacks={"helps": helps, **ONE})
    assert "below clean" in names(report)


def test_what_a_smaller_ball_holds_counts_in_the_larger_one(monkeypatch):
    model, x, y = problem()

    def fails_at_eps(eps, norm, num_steps):
        return Mine(lambda x, y: x if eps == EPS else FGSM(eps=eps)(model, x, y), eps)

    monkeypatch.setattr(suite, "on_margin", fails_at_eps)
    nothing = Mine(lambda x, y: x)
    report = engm.evaluate(model, (x, y), eps=EPS, attacks={"nothing": nothing})
    assert [found.accuracy.count for found in report.attacks] == [60, 60]
    assert report.worst == report.curve[EPS / 2] and report.worst.count < 60


def test_eps_below_half_a_grey_level_is_flagged():
    assert unit_of(0.5 / 255, "linf").passed and not unit_of(0.49 / 255, "linf").passed
    meant = unit_of(8 / 255, "l2")
    assert not meant.passed and "was it meant for linf?" in meant.meaning
    assert unit_of(0.05, "l2").passed


def test_checks_that_saw_few_examples_say_so():
    model, x, y = problem()
    for n in (20, 60):
        report = engm.evaluate(model, (x[:n], y[:n]), eps=EPS)
        said = {c.name for c in report.checks if f"with {n} examples" in c.meaning}
        assert said >= {"more steps", "success rises with eps", "losses agree"}
    nothing = engm.evaluate(model, (x, (y + 1) % 5), eps=EPS)
    assert "No image is classified rightly" in str(nothing) and not nothing.gradient_masking


def test_weights_that_are_nan_are_not_said_to_change():
    _, x, y = problem()
    broken = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5))
    broken[1].weight.data[0] = torch.nan
    report = engm.evaluate(broken, (x, y), eps=EPS)
    flags = {check.name for check in report.flags}
    assert "logits" in flags and "test-time training" not in flags


def test_a_lack_of_memory_is_not_taken_for_a_lack_of_gradients():
    model, x, y = problem()

    def full(z):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return z

    with pytest.raises(torch.OutOfMemoryError):
        engm.evaluate(Around(model, full), (x, y), eps=EPS)

    def too_large(z):
        return z + torch.empty(10**16) if torch.is_grad_enabled() else z

    with pytest.raises(RuntimeError, match="allocate memory"):
        engm.evaluate(Around(model, too_large), (x, y), eps=EPS)

    def pinned(z):
        if torch.is_grad_enabled():
            raise RuntimeError("cannot pin memory of this tensor")
        return z

    report = engm.evaluate(Around(model, pinned), (x, y), eps=EPS)
    assert "no gradient" in {check.name for check in report.flags}


# ---- in place


def from_the_third(x):
    x[2:].sub_(0.1)
    return x


def test_what_works_in_place_is_refused_by_name_and_the_images_stay():
    model, x, y = problem()
    before = x.clone()
    twice = Mine(lambda x, y: x.add_(EPS).clamp_(0, 1))
    for call in (
        lambda: engm.evaluate(model, (x, y), eps=EPS, attacks={"twice": twice}),
        lambda: run_attack(model, x, y, twice),
    ):
        with pytest.raises(InputError, match="Mine.*changed the images that it was given"):
            call()
    with pytest.raises(InputError, match=r"\(Around\) changes its images in place.*x = x - mean"):
        engm.evaluate(Around(model, lambda x: x.sub_(0.1)), (x, y), eps=EPS)
    with pytest.raises(InputError, match="changes its images in place"):
        engm.evaluate(Around(model, from_the_third), (x, y), eps=EPS)
    correct(Around(model, lambda x: x.sub_(0.1)), x, y)
    assert torch.equal(x, before)
    # an attack that hands on its input unchanged does nothing wrong
    assert run_attack(model, x, y, Mine(lambda x, y: x)).correct.all()
    with pytest.raises(InputError, match=r"returned shape tuple for \[60, 1, 8, 8\]"):
        run_attack(model, x, y, Mine(lambda x, y: (x, y)))


class Touching:
    """An attack that does something to the model first."""

    eps, norm = EPS, "linf"

    def __init__(self, touch):
        self.touch = touch

    def __call__(self, model, x, y, *, generator=None):
        self.touch(model, x, y)
        return ONE["FGSM"](model, x, y)

    def __repr__(self):
        return "Touching"


def with_norm():
    model, x, _ = problem()
    model = nn.Sequential(nn.BatchNorm2d(1), *model).eval()
    return model.requires_grad_(True), x, model(x).argmax(1)


@pytest.mark.parametrize(
    ("touch", "message"),
    [
        (lambda model, x, y: model.train()(x), r"Touching changed the model \(0.running_mean\)"),
        (lambda model, x, y: model[2].weight.data.mul_(2), r"changed the model \(2.weight\)"),
        (lambda model, x, y: setattr(model[0], "eps", 1.0), "after Touching the model answers"),
    ],
)
def test_an_attack_that_changes_the_model_is_refused_by_name(touch, message):
    model, x, y = with_norm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        engm.evaluate(model, (x, y), eps=EPS, attacks={"mine": Touching(touch)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_an_attack_does_to_gradients_of_weights_does_not_last():
    model, x, y = with_norm()
    model[2].bias.grad = torch.ones(5)

    def touch(model, x, y):
        model(x).sum().backward()
        model.requires_grad_(False)

    engm.evaluate(model, (x, y), eps=EPS, attacks={"mine": Touching(touch)})
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[2].weight.grad is None and torch.equal(model[2].bias.grad, torch.ones(5))


# ---- no dead ends


@pytest.mark.parametrize(
    ("classes", "flat", "left"),
    [(2, False, {"apgd-t"}), (3, False, {"apgd-t"}), (5, True, {"square"}),
     (2, True, {"apgd-t", "square"})],
)  # fmt: skip
def test_autoattack_runs_what_it_can_and_says_what_it_cannot(classes, flat, left):
    model, x, y = problem(classes, 12, flat)
    report = engm.evaluate(model, (x, y), eps=EPS, attacks=ONE, autoattack=True)
    said = {name for name in report.skipped if name.startswith("AutoAttack")}
    assert said == {f"AutoAttack {name}" for name in left}
    assert (
        set(report.autoattack["counts"]) == {"clean", "apgd-ce", "apgd-t", "fab-t", "square"} - left
    )
    assert [r.settings[:6] for r in report.attacks if r.name == "AutoAttack"] == ["a part"]
    # the way that the attack itself advises ends well
    with pytest.raises(InputError, match="choose attacks=") as caught:
        suite.AutoAttack(eps=EPS).run(model, x, y)
    advised = eval(str(caught.value).split("choose attacks=")[1])
    assert suite.AutoAttack(eps=EPS, attacks=advised).run(model, x, y).accuracy <= 1


def test_a_defence_without_gradients_is_attacked_by_its_answers_or_through_a_surrogate():
    model, x, y = problem(n=40)
    steps = Around(model, lambda x: torch.from_numpy((x.numpy() * 50).round() / 50))
    how = dict(eps=0.03, autoattack=True)
    blind = engm.evaluate(steps, (x, y), **how)
    assert [r.name for r in blind.attacks] == ["random search", "AutoAttack"]
    assert "Accuracy over eps (random search): " in str(blind)
    assert robustness_curve(blind).axes[0].lines[0].get_label() == "random search"
    assert "The accuracy under AutoAttack is recomputed from" in str(blind)
    assert list(blind.autoattack["counts"]) == ["clean", "square"]
    assert "no gradient" in names(blind) and "no gradient" in blind.gradient_masking
    assert "numpy" in next(c.meaning for c in blind.flags if c.name == "no gradient")
    alone = engm.evaluate(steps, (x, y), eps=0.03, attacks={"PGD": PGD(eps=0.03, step_size=0.01)})
    assert set(alone.skipped) == {"PGD"} and alone.worst == alone.attacks[0].accuracy
    seen = engm.evaluate(steps, (x, y), surrogate=model, **how)
    # rounding to 1/50 hides little from who goes through it
    assert abs(seen.worst.count - engm.evaluate(model, (x, y), eps=0.03).worst.count) <= 4
    assert seen.skipped == {} and seen.clean == blind.clean
    assert seen.worst.count < engm.evaluate(steps, (x, y), eps=0.03).worst.count


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x, y: (lambda images: m(images), (x, y), EPS),
        lambda m, x, y: (m, (x.numpy(), y.numpy()), EPS),
        lambda m, x, y: (m, (x.double().numpy(), y.int().numpy()), np.float64(EPS)),
        lambda m, x, y: (m, (x.tolist(), y.tolist()), "0.1"),
        lambda m, x, y: (m, [x, y.short()], "1/10"),
        lambda m, x, y: (m, (x, y), np.float32(EPS)),
        lambda m, x, y: (m, (x, y), torch.tensor(EPS)),
        lambda m, x, y: (m.double(), (x, y), EPS),
    ],
)
def test_what_is_meant_is_taken(change):
    model, x, y = problem()
    expected = engm.evaluate(model, (x, y), eps=EPS, attacks=ONE)
    model, data, eps = change(model, x, y)
    report = engm.evaluate(model, data, eps=eps, attacks=ONE)
    assert report.clean == expected.clean and report.worst == expected.worst
    assert type(report.eps) is float


def test_inference_mode_is_no_matter():
    model, x, y = problem()
    expected = engm.evaluate(model, (x, y), eps=EPS).to_dict()
    with torch.inference_mode():
        made, x_there, y_there = copy.deepcopy(model), x.clone(), y.clone()
        assert engm.evaluate(made, (x_there, y_there), eps=EPS).to_dict() == expected
    assert engm.evaluate(made, (x_there, y_there), eps=EPS).to_dict() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_the_ball(dtype):
    model, x, y = problem()
    report = engm.evaluate(model.to(dtype), (x.to(dtype), y), eps=EPS, attacks=ONE)
    assert all(result.largest_perturbation <= EPS + 1e-6 for result in report.attacks)
    assert "model state" in names(report)  # logits are not float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="net"), "model must be a module or a function.*got 'net'"),
        (dict(model=nn.Flatten), "got the class Flatten"),
        (dict(eps="eight"), "eps must be above 0, got 'eight'"),
        (dict(eps=None), "eps must be above 0, got None"),
        (dict(eps=True), "eps must be above 0, got True"),
        (dict(seed="a"), "seed must be a whole number, 0 or more; got 'a'"),
        (
            dict(surrogate=lambda x: x.flatten(1)[:, :7]),
            "surrogate gives 7 logits, and the model 5",
        ),
        (dict(surrogate=lambda x: x.mul_(0).flatten(1)), "surrogate does not fit: .*in place"),
        (dict(attacks=[FGSM(eps=EPS)]), "attacks must be a mapping of names"),
        (dict(attacks={"f": lambda *a: a[1]}), "f must have eps and norm, and be called as"),
        (dict(data=[1, 2, 3]), "a DataLoader gives them by x, y = "),
        (dict(data=("a", 1)), r"a Split or a pair \(x, y\) of numbers"),
        (dict(data=(-3e-8 + torch.zeros(2, 1, 8, 8), torch.zeros(2).long())), r"x.clamp\(0, 1\)"),
    ],
)
def test_what_cannot_be_taken_is_said_in_a_sentence(change, message):
    model, x, y = problem()
    how = dict(model=model, data=(x, y), eps=EPS, attacks=ONE) | change
    with pytest.raises(InputError, match=message):
        engm.evaluate(how.pop("model"), how.pop("data"), **how)


# ---- targeted, transfer


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.2)])
def test_targeted_pgd_finds_the_closed_form_of_linear_models(norm, eps):
    model, x, y = problem(4, 200)
    weight, logits = model[1].weight, model(x)
    across = (weight[y][:, None] - weight).norm(1 if norm == "linf" else 2, dim=2)
    gaps = (logits.gather(1, y[:, None]) - logits) / across
    robust = gaps.scatter(1, y[:, None], torch.inf).amin(1) > eps
    assert 20 < robust.sum() < 180
    attack = TargetedPGD(eps=eps, norm=norm, targets=9)  # of 4 classes, there are 3
    start = model.training, torch.get_rng_state()
    x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(~fooled(model(x_adv), y), robust)
    assert (model.training, model[1].training) == (start[0], False)
    assert torch.equal(torch.get_rng_state(), start[1])
    for wrong in (dict(targets=0), dict(num_steps=0), dict(norm="l1"), dict(eps=-1)):
        with pytest.raises(InputError):
            TargetedPGD(**{"eps": eps} | wrong)


def test_the_likeliest_class_is_not_always_the_nearest():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 0, 1]).view(3, 1).expand(3, 64))
        model[1].bias.copy_(torch.tensor([1, 0.9, -31.5]))  # at x: 1, 0.9, 0.5
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 0])
    for targets, expected in ((1, False), (2, True)):
        x_adv = TargetedPGD(eps=0.05, targets=targets)(model, x, y)
        assert fooled(model(x_adv), y).tolist() == [expected] * 2


def test_probabilities_are_not_said_to_have_a_wrong_gradient():
    model, x, y = problem()
    sharp = Around(model, lambda x: x, lambda z: (100 * z).softmax(1))
    found = names(engm.evaluate(sharp, (x, y), eps=EPS))
    assert "logits" in found
    assert "gradient direction" not in found


def test_transfer_from_a_second_model_is_a_black_box():
    model, x, y = problem(n=120)
    pgd = PGD(eps=EPS, step_size=EPS / 2, num_steps=5)
    turned = Around(model, lambda x: 2 * x.detach() - x)
    attacks = {"PGD": pgd, "transfer": Transfer(pgd, model)}
    report = engm.evaluate(turned, (x, y), eps=EPS, attacks=attacks)
    by = {result.name: result for result in report.attacks}
    assert by["transfer"].accuracy.fraction < 0.5 < by["PGD"].accuracy.fraction
    assert by["transfer"].settings.endswith("on another model")
    assert {"black box below white box", "gradient direction"} <= set(report.gradient_masking)
    assert "Gradient masking (" in str(report)
    with pytest.raises(InputError, match="Transfer takes the attack first, then the model"):
        Transfer(model, pgd)
    plain = engm.evaluate(model, (x, y), eps=EPS)
    assert plain.gradient_masking == () and "Gradient masking" not in str(plain)


# ---- after a kill


def test_finished_batches_are_kept_and_the_end_is_the_same(tmp_path):
    model, x, y = problem(n=50)
    split = Split((255 * x).byte(), y)
    attack = PGD(eps=EPS, step_size=EPS / 4, num_steps=3, restarts=2)
    how = dict(batch_size=10, seed=3, save_to=tmp_path / "adversarial.pt")
    expected = accuracy_under(model, split, attack, batch_size=10, seed=3)
    passes, limit = [], 40

    def count(*_):
        passes.append(0)
        if len(passes) == limit:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        accuracy_under(model, split, attack, **how)
    kept = {path.name for path in (tmp_path / "adversarial.parts").iterdir()}
    assert 0 < len(kept) < 5
    other = replace(attack, num_steps=2)  # does not take what is there
    shutil.copytree(tmp_path / "adversarial.parts", tmp_path / "other.parts")
    passes.clear()
    limit = 0
    changed = accuracy_under(model, split, other, **how | {"save_to": tmp_path / "other.pt"})
    assert torch.equal(
        changed.x_adv, accuracy_under(model, split, other, batch_size=10, seed=3).x_adv
    )
    passes.clear()
    found = accuracy_under(model, split, attack, **how)
    hook.remove()
    assert torch.equal(found.x_adv, expected.x_adv) and not torch.equal(changed.x_adv, found.x_adv)
    assert len(passes) < 60
    assert [path.name for path in tmp_path.glob("adv*")] == ["adversarial.pt"]
