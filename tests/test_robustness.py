import json
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import nn
from torch.nn import functional as F

import engm
from engm import models, plots
from engm.attacks import FGSM, PGD
from engm.data import Split, batches, load, stratified_order, to_float
from engm.errors import InputError
from engm.evaluation import accuracy as evaluation
from engm.evaluation import suite as robustness
from engm.evaluation.accuracy import correct
from engm.evaluation.attacks import RandomSearch
from engm.evaluation.autoattack import AutoAttack, AutoAttackResult
from engm.evaluation.suite import evaluate_checkpoint, standard_attacks
from engm.report.statistics import wilson
from engm.runs import load_tensors, save_tensors, write_config

EPS = 0.15


def digits_model(seed=0, *, adversarial, norm="none", epochs=20):
    """A small network, trained on 300 digits in a few seconds."""
    dataset = load("digits", subset=300)
    torch.manual_seed(seed)
    pixels = dict(mean=dataset.mean, std=dataset.std)
    model = models.small_cnn(10, 8, norm, in_channels=1, **pixels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
    attack = PGD(eps=EPS, step_size=0.1, num_steps=3)
    for epoch in range(epochs):
        for x, y in batches(dataset.train, 50, seed=seed, epoch=epoch):
            x = attack(model, x, y) if adversarial else x
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return {
        "adversarially": digits_model(adversarial=True),
        "naturally": digits_model(adversarial=False),
        "naturally, batch norm": digits_model(adversarial=False, norm="batch"),
    }


@pytest.fixture(scope="module")
def digits():
    test = load("digits").test
    return test.take(stratified_order(test.labels.numpy(), 0)[:100])


def names(report):
    return {check.name for check in report.flags}


# ---- the suite's PGD against APGD


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.5)])
def test_pgd_is_at_most_two_points_weaker_than_apgd_at_equal_steps(trained, norm, eps):
    test = load("digits").test
    x, y = to_float(test.images), test.labels
    attack = standard_attacks(eps, norm)["PGD-20 cross-entropy"]
    for model in trained.values():
        ours, theirs = [], []
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            ours.append(correct(model, attack(model, x, y, generator=generator), y))
            name = {"linf": "Linf", "l2": "L2"}[norm]
            apgd = APGDAttack(model, n_iter=20, norm=name, eps=eps, seed=seed, device="cpu")
            with torch.random.fork_rng():
                theirs.append(correct(model, apgd.perturb(x, y), y))
        ours, theirs = (torch.stack(found).float().mean().item() for found in (ours, theirs))
        assert ours <= theirs + 0.02
        assert ours < 0.7


# ---- sound models pass; test_flawed_evaluations.py has those that do not


@pytest.mark.parametrize("name", ["adversarially", "naturally", "naturally, batch norm"])
def test_sound_models_raise_no_flag(trained, digits, name):
    report = engm.evaluate(trained[name], digits, eps=EPS)
    assert report.flags == ()
    assert len(report.checks) == 17
    assert report.clean.fraction > 0.85
    assert (report.worst.fraction > 0.3) == (name == "adversarially")


def test_sound_models_raise_no_flag_under_l2(trained, digits):
    report = engm.evaluate(trained["adversarially"], digits, eps=0.5, norm="l2")
    assert report.flags == ()
    assert max(report.curve) == 8  # the diagonal of 64 pixels


# ---- the report


def linear_problem(classes=2, n=240):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    images = torch.randint(60, 200, (n, 1, 4, 4), dtype=torch.uint8)
    y = model(images / 255).argmax(1)
    return model, Split(images, torch.where(torch.arange(n) % 10 == 0, (y + 1) % classes, y))


@dataclass(frozen=True)
class Fixed:
    """An attack that adds `shift` to the pixels of the examples it is given."""

    rows: tuple
    shift: float = -0.1
    eps: float = 0.1
    norm: str = "linf"

    def __call__(self, model, x, y, generator=None):
        x = x.clone()
        x[list(self.rows)] += self.shift
        return x


class Threshold(nn.Module):
    """Class 1 where the mean of the pixels is above a half; its gradient may point backwards."""

    def __init__(self, way=1):
        super().__init__()
        self.way = way

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        mean = mean.detach() + self.way * (mean - mean.detach())
        return 50 * torch.stack([0.5 - mean, mean - 0.5], 1)


def test_the_worst_case_is_that_of_each_example():
    x = torch.full((10, 1, 8, 8), 0.55)  # on so many pixels random starts cancel
    y = torch.ones(10, dtype=torch.long)
    y[9] = 0  # wrong without an attack
    attacks = {"a": Fixed((0, 1, 2, 9)), "b": Fixed((2, 3, 9)), "c": Fixed((9,))}
    # backwards, so that the attack that always counts finds nothing
    report = engm.evaluate(Threshold(-1), (x, y), eps=0.1, attacks=attacks)
    found = {result.name: result.accuracy.count for result in report.attacks}
    # all move example 9 over to its class, and are not thanked for it
    assert found == {"a": 7, "b": 8, "c": 10, "PGD-20 margin (always)": 9}
    assert report.clean.count == 9
    assert report.worst.count == 5  # 0, 1, 2, 3 broken by some attack, 9 without
    assert [result.largest_perturbation for result in report.attacks] == [pytest.approx(0.1)] * 4
    assert report.worst.interval == wilson(5, 10)


def test_accuracies_are_those_of_the_closed_form():
    model, split = linear_problem()
    report = engm.evaluate(model, split, eps=0.05, batch_size=70)
    weight = model[1].weight[1] - model[1].weight[0]
    lead = (split.labels * 2 - 1) * (model(split.images / 255) @ torch.tensor([-1.0, 1.0]))

    def robust(eps):
        return int((lead > eps * weight.abs().sum()).sum())

    assert report.clean.count == robust(0) == 216
    assert 30 < robust(0.05) < 180
    assert report.worst.count == robust(0.05)
    assert {r.name: r.accuracy.count for r in report.attacks if r.name != "random search"} == {
        name: robust(0.05)
        for name in (
            "FGSM",
            "PGD-20 cross-entropy",
            "PGD-20 margin",
            "PGD-20 margin, 5 starts",
            "PGD-20 targeted",
        )
    }
    # pixels are 0.235 to 0.784, so that larger balls are cut
    inside = {eps: a.count for eps, a in report.curve.items() if eps <= 0.2}
    assert inside == {eps: robust(eps) for eps in (0.0, 0.0125, 0.025, 0.05, 0.1, 0.2)}
    assert list(report.curve)[-1] == 1.0
    assert report.skipped == {"PGD-20 DLR": "DLR needs 3 classes, here are 2"}


def test_it_can_be_read_by_people_and_programs():
    model, split = linear_problem(4)
    report = engm.evaluate(model, split, eps=0.05, seed=5)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["eps"], values["norm"], values["seed"]) == (0.05, "linf", 5)
    assert values["num_examples"] == 240
    interval = wilson(report.worst.count, 240)
    assert values["worst"] == {
        "accuracy": report.worst.count / 240,
        "count": report.worst.count,
        "interval": [interval.low, interval.high],
    }
    assert set(values["attacks"]) == set(standard_attacks(0.05))
    assert values["attacks"]["PGD-20 DLR"]["settings"] == (
        "20 steps from 0.1 down to 0, 1 random start"
    )
    assert [check["passed"] for check in values["checks"]] == [c.passed for c in report.checks]
    assert values["environment"]["packages"]["torch"] == torch.__version__
    lines = str(report).splitlines()
    assert lines[0] == "240 examples, linf eps 0.05, seed 5"
    low, high = report.worst.interval.low, report.worst.interval.high
    row = f"| **worst case** | {report.worst.fraction:.1%} | {low:.1%} to {high:.1%} |"
    assert any(line.startswith(row) for line in lines)
    *others, last = (replace(check, passed=True) for check in report.checks)
    sound = replace(report, checks=(*others, last))
    assert f"All {len(report.checks)} checks pass:" in str(sound).splitlines()
    flagged = replace(report, checks=(*others, replace(last, passed=False)))
    told = f"1 of {len(report.checks)} checks raise a flag:\n\n- FLAG **{last.name}**"  # first
    assert told in str(flagged)


def test_the_figure_shows_the_curve_its_band_and_every_attack():
    model, split = linear_problem(4)
    report = engm.evaluate(model, split, eps=0.05)
    figure = plots.robustness_curve(report)
    (axes,) = figure.axes
    curve, *points = axes.lines[: 2 + len(report.attacks)]
    assert list(curve.get_xdata()) == list(report.curve)
    assert list(curve.get_ydata()) == [100 * a.fraction for a in report.curve.values()]
    band = axes.collections[0].get_paths()[0].vertices
    low, high = report.curve[0.05].interval.low, report.curve[0.05].interval.high
    at = band[abs(band[:, 0] - 0.05) < 1e-9][:, 1]
    assert (at.min(), at.max()) == pytest.approx((100 * low, 100 * high))
    expected = [r.accuracy.fraction for r in report.attacks] + [report.worst.fraction]
    assert [point.get_ydata()[0] for point in points] == [100 * value for value in expected]
    assert axes.get_legend().get_texts()[-1].get_text() == "worst case"
    plt.close(figure)


def test_the_seed_alone_decides_and_nothing_else_moves():
    model, split = linear_problem(4)
    model.train()
    state = torch.get_rng_state()
    attacks = {"PGD": PGD(eps=0.05, step_size=0.01, num_steps=2)}
    first, second = (
        engm.evaluate(model, split, eps=0.05, attacks=attacks, seed=1).to_dict() for _ in range(2)
    )
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model[1].training
    assert all(p.grad is None for p in model.parameters())
    floats = (to_float(split.images), split.labels)
    assert engm.evaluate(model, floats, eps=0.05, attacks=attacks, seed=1).to_dict() == first


def test_what_counts_is_what_the_files_hold(tmp_path, monkeypatch):
    model, split = linear_problem(4)
    report = engm.evaluate(model, split, eps=0.05, save_to=tmp_path)
    x = to_float(split.images)
    for result in report.attacks:
        x_adv = load_tensors(tmp_path / result.file)["x_adv"]
        assert int(correct(model, x_adv, split.labels).sum()) == result.accuracy.count
        length = (x_adv - x).abs().max().item()
        assert length == pytest.approx(result.largest_perturbation)
    assert len(list(tmp_path.iterdir())) == len(report.attacks) == 7
    assert engm.evaluate(model, split, eps=0.05).attacks[0].file is None
    alike = {name: FGSM(eps=0.05) for name in ("A b", "a/b", "a-b")}
    more = engm.evaluate(model, split, eps=0.05, attacks=alike, save_to=tmp_path / "more")
    assert [r.file for r in more.attacks[:3]] == ["a-b.pt", "a-b-again.pt", "a-b-again-again.pt"]

    written = evaluation.save_tensors
    monkeypatch.setattr(evaluation, "save_tensors", lambda p, _: written(p, {"x_adv": x}))
    tampered = engm.evaluate(model, split, eps=0.05, save_to=tmp_path)
    assert names(tampered) - names(report) == {"recomputed", "budget used"}
    assert tampered.worst == tampered.clean
    monkeypatch.setattr(evaluation, "save_tensors", lambda p, _: written(p, {"x_adv": x + 0.06}))
    with pytest.raises(InputError, match="left its budget"):
        engm.evaluate(model, split, eps=0.05, save_to=tmp_path)


def test_a_crippled_attack_is_flagged(trained, digits):
    weak = PGD(eps=EPS, step_size=1e-6, num_steps=20, random_start=False)
    attacks = {"FGSM": FGSM(eps=EPS), "PGD": weak}
    report = engm.evaluate(trained["adversarially"], digits, eps=EPS, attacks=attacks)
    assert names(report) == {"more steps", "budget used"}
    attacks = {"PGD": weak, "search": RandomSearch(eps=EPS)}
    report = engm.evaluate(trained["adversarially"], digits, eps=EPS, attacks=attacks)
    assert names(report) == {"black box below white box", "budget used"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=0), "eps must be above 0, got 0"),
        (dict(eps=8), "eps is 8, but pixels are in .0, 1.: write 8/255, not 8"),
        (dict(norm="l1"), "unknown norm 'l1'"),
        (dict(batch_size=0), "batch_size must be a whole number, 1 or more; got 0"),
        (dict(attacks={}), "there is no attack to run"),
        (dict(attacks={"PGD": PGD(eps=0.2, step_size=0.1)}), "PGD has linf eps 0.2, not linf eps"),
    ],
)
def test_options_that_are_out_of_range_are_refused(change, message):
    model, split = linear_problem(4)
    with pytest.raises(InputError, match=message):
        engm.evaluate(model, split, **{"eps": 0.05} | change)


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}])
def test_images_and_classes_in_two_arguments_are_refused_with_the_right_call(options):
    model, split = linear_problem(4)
    with pytest.raises(InputError, match=r"evaluate\(model, \(x, y\), eps=8 / 255\)"):
        engm.evaluate(model, split.images, split.labels, **options)
    with pytest.raises(TypeError, match="eps"):
        engm.evaluate(model, (split.images, split.labels))


# ---- AutoAttack, runs


def test_autoattack_counts_as_one_more_attack(trained, digits, tmp_path, monkeypatch):
    few = digits.take(range(30))
    monkeypatch.setattr(robustness, "AutoAttack", lambda **k: AutoAttack(**k, attacks=("apgd-ce",)))
    model = trained["adversarially"]
    how = dict(eps=EPS, attacks={"FGSM": FGSM(eps=EPS)}, autoattack=True, seed=2)
    report = engm.evaluate(model, few, **how, save_to=tmp_path)
    alone = AutoAttack(eps=EPS, seed=2, attacks=("apgd-ce",))
    expected = alone.run(model, to_float(few.images), few.labels, batch_size=500)
    fgsm, _, found = report.attacks
    assert found.name == "AutoAttack"
    assert found.accuracy.count == int(expected.robust.sum()) >= report.worst.count
    assert found.accuracy.count < fgsm.accuracy.count
    assert torch.equal(load_tensors(tmp_path / found.file)["x_adv"], expected.x_adv)
    assert report.to_dict()["autoattack"] == expected.to_dict()
    # the second time all is read from the files of the first
    monkeypatch.setattr(APGDAttack, "perturb", lambda *_: 1 / 0)
    again = engm.evaluate(model, few, **how, save_to=tmp_path)
    assert again.attacks == report.attacks
    with pytest.raises(ZeroDivisionError):
        engm.evaluate(model, few, **how)


class Stub:
    """AutoAttack, from afar: breaks every example below `count`, and says so or lies."""

    count, claims = 40, 40

    def __init__(self, eps, norm, seed):
        self.eps, self.norm, self.attacks = eps, norm, ("stub",)

    def unfit(self, x, classes, blind):
        return {}

    def run(self, model, x, y, *, batch_size, save_to, progress):
        x_adv = x.clone()
        x_adv[: self.count] = 0.45
        robust = torch.arange(len(x)) >= self.claims
        counts = {"clean": len(x), "stub": int(robust.sum())}
        return AutoAttackResult(x_adv, robust, counts, 0, {}, ("there is a warning",))


def test_autoattack_far_ahead_or_wrong_is_flagged(monkeypatch, tmp_path):
    monkeypatch.setattr(robustness, "AutoAttack", Stub)
    x, y = torch.full((100, 1, 8, 8), 0.55), torch.ones(100, dtype=torch.long)
    x[:, 0, 0, 0] = 0.6  # so that the pixels span something
    x[0, 0, 0, 1], x[1, 0, 0, 1] = 0.5, 0.62
    y[99], x[99] = 0, 0.4
    attacks = {"a": Fixed((0, 1, 2), eps=0.2)}
    how = dict(eps=0.2, attacks=attacks, autoattack=True, save_to=tmp_path)
    report = engm.evaluate(Threshold(-1), (x, y), **how)
    assert report.attacks[2].accuracy.count == report.worst.count == 60
    said = {check.name: check.meaning for check in report.flags}
    assert "AutoAttack near PGD" in said and "AutoAttack near PGD" in report.gradient_masking
    assert said["warnings of AutoAttack"] == "there is a warning"
    assert "- FLAG **warnings of AutoAttack**: there is a warning" in str(report)
    monkeypatch.setattr(Stub, "claims", 45)
    report = engm.evaluate(Threshold(-1), (x, y), **how)
    assert report.worst.count == 60
    assert "5 answers of AutoAttack differ" in str(report)


def test_a_checkpoint_is_evaluated_with_the_settings_of_its_run(tmp_path, monkeypatch):
    dataset = load("digits")
    by_class = dataset.test.take(dataset.test.labels.argsort())
    dataset = replace(dataset, test=by_class)
    seen = []

    def evaluate(model, split, **options):
        seen.append((split, options))
        return engm_evaluate(model, split, **options | {"attacks": {"FGSM": FGSM(eps=0.2)}})

    engm_evaluate = robustness.evaluate
    monkeypatch.setattr(robustness, "evaluate", evaluate)
    monkeypatch.setattr(robustness, "AutoAttack", Stub)
    config = engm.RunConfig(eps=0.2, eval_steps=7, norm="linf", seed=4, width=4).resolved()
    write_config(tmp_path, config, torch.device("cpu"))
    torch.manual_seed(0)
    state = {"epoch": 7, "model": evaluation.build_model(config, dataset).state_dict()}
    save_tensors(tmp_path / "checkpoint-best.pt", state)
    found = evaluate_checkpoint(tmp_path, "best", dataset, images=50)
    split, options = seen[0]
    assert options == {
        **dict(eps=0.2, norm="linf", seed=4, autoattack=False, progress=False),
        "attacks": standard_attacks(0.2, "linf", 7),
        "save_to": tmp_path / "evaluation-best",
    }
    assert split.labels.bincount().tolist() == [5] * 10
    kept = json.loads((tmp_path / "evaluation-best.json").read_text())
    weights = kept.pop("weights_sha256")
    assert len(weights) == 32
    what = {"checkpoint": "best", "epoch": 7, "data_sha256": dataset.digest}
    assert kept == what | json.loads(json.dumps(found.to_dict()))
    assert (tmp_path / "robustness-best.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="eps must be above 0, got 0"):
        evaluate_checkpoint(tmp_path, "best", dataset, eps=0)
    with pytest.raises(InputError, match="images must be a whole number, 1 to 797; got 798"):
        evaluate_checkpoint(tmp_path, "best", dataset, images=798)
    with pytest.raises(InputError, match="there is no file"):
        evaluate_checkpoint(tmp_path, "last", dataset)
    monkeypatch.setattr(robustness, "evaluate", lambda *a, **k: seen.append(k) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_checkpoint(tmp_path, "best", dataset, eps=0.1, num_steps=3, autoattack=True)
    assert seen[-1]["attacks"] == standard_attacks(0.1, "linf", 3)
    assert seen[-1]["autoattack"] is True


def test_a_quick_evaluation_does_not_replace_one_that_has_more(tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "AutoAttack", Stub)
    monkeypatch.setattr(Stub, "count", 0)
    dataset = load("digits")
    config = engm.RunConfig(eps=0.2, eval_steps=2, width=4).resolved()
    write_config(tmp_path, config, torch.device("cpu"), dataset.digest)
    state = {"epoch": 7, "model": evaluation.build_model(config, dataset).state_dict()}
    save_tensors(tmp_path / "checkpoint-best.pt", state)

    def files_after(before=1, **how):
        report = evaluate_checkpoint(tmp_path, "best", dataset, **{"images": 60} | how)
        found = {p.name: p.read_bytes() for p in sorted(tmp_path.glob("evaluation-*.json"))}
        names = [name[11:-5] for name in found]
        assert ("it stays, and `engm report` reads it" in str(report)) == (len(names) > before)
        assert all((tmp_path / f"evaluation-{name}").is_dir() for name in names)
        return names, found["evaluation-best.json"]

    names, first = files_after(autoattack=True)
    assert names == ["best"]
    strong = dict(autoattack=True)
    for less in (
        dict(images=50),
        {},
        strong | {"images": 50},
        {"eps": 0.1},
        strong | {"num_steps": 1},
    ):
        names, kept = files_after(**less)
        assert kept == first and len(names) > 1
    names, kept = files_after(99, autoattack=True, images=70)  # more of all replaces it
    assert json.loads(kept)["num_examples"] == 70 and kept != first
    (tmp_path / "evaluation-best.json").write_text("[]")  # no evaluation at all
    assert json.loads(files_after(99)[1])["num_examples"] == 60
    save_tensors(tmp_path / "checkpoint-best.pt", state | {"epoch": 9})  # the run has gone on
    assert json.loads(files_after(99, images=50)[1])["epoch"] == 9
    # trained again, for as long
    torch.manual_seed(1)
    state["model"] = evaluation.build_model(config, dataset).state_dict()
    save_tensors(tmp_path / "checkpoint-best.pt", state | {"epoch": 9})
    assert json.loads(files_after(99, images=40)[1])["num_examples"] == 40
