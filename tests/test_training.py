import itertools
import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from engm import data, methods, runs, training
from engm.attacks import PGD
from engm.config import RunConfig
from engm.device import pick_device
from engm.errors import InputError, NonFiniteLossError
from engm.evaluation import accuracy
from engm.evaluation.accuracy import accuracy_under, evaluate_run
from engm.methods import Natural
from engm.models import small_cnn
from engm.optim import ENGM, MSGD
from engm.runs import load_tensors, read_metrics
from engm.training import build_scheduler, fit, train_one_epoch

TINY = RunConfig(
    subset=40, width=4, num_steps=2, eval_steps=2, epochs=3, batch_size=16, momentum=0.5, lr=0.05
)


def weights(run_folder, which="last"):
    return load_tensors(run_folder / f"checkpoint-{which}.pt")["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def fit_quietly(config, out, **kw):
    return fit(config, out, device="cpu", progress=False, **kw)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fit_quietly(TINY, tmp_path_factory.mktemp("runs"))


def test_a_run_leaves_everything_behind_that_the_contract_names(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "result.json", "checkpoint-last.pt"),
        *("checkpoint-best.pt", "adversarial-last.pt", "adversarial-best.pt"),
    }
    config = json.loads((finished.folder / "config.json").read_text())
    assert {**TINY.resolved().to_dict()}.items() <= config.items()
    assert config["environment"]["packages"]["torch"] == torch.__version__
    assert [line["epoch"] for line in finished.metrics] == [1, 2, 3]
    assert finished.result["data"] == "Digits"
    assert finished.result["last"]["num_examples"] == 797


def test_the_recorded_accuracies_can_be_had_again_from_the_files(finished):
    dataset = data.load("digits", subset=40)
    for which in ("last", "best"):
        again = evaluate_run(finished.folder, which, dataset).to_dict()
        assert again == finished.result[which]
        kept = load_tensors(finished.folder / f"adversarial-{which}.pt")["x_adv"]
        assert kept.shape == dataset.test.images.shape


def test_best_is_the_first_epoch_of_highest_validation_robust_accuracy(finished):
    robust = [line["validation_robust_accuracy"] for line in finished.metrics]
    best = load_tensors(finished.folder / "checkpoint-best.pt")
    assert best["epoch"] == robust.index(max(robust)) + 1


def test_a_seed_fixes_the_weights_and_another_one_changes_them(finished, tmp_path):
    state = torch.get_rng_state()
    assert same(weights(fit_quietly(TINY, tmp_path).folder), weights(finished.folder))
    assert torch.equal(torch.get_rng_state(), state)
    other = fit_quietly(replace(TINY, seed=1), tmp_path)
    assert not same(weights(other.folder), weights(finished.folder))


def test_the_test_set_has_no_part_in_training_or_selection(finished, tmp_path, monkeypatch):
    load = data.load

    def with_wrong_test_labels(*args, **kwargs):
        dataset = load(*args, **kwargs)
        wrong = data.Split(dataset.test.images, (dataset.test.labels + 1) % 10)
        return replace(dataset, test=wrong)

    monkeypatch.setattr(data, "load", with_wrong_test_labels)
    run = fit_quietly(TINY, tmp_path)
    assert run.result["last"]["clean_accuracy"] != finished.result["last"]["clean_accuracy"]
    for which in ("last", "best"):
        assert same(weights(run.folder, which), weights(finished.folder, which))


def test_a_complete_run_is_not_repeated(finished, monkeypatch):
    monkeypatch.setattr(training, "train_one_epoch", None)
    again = fit_quietly(TINY, finished.folder.parent)
    assert (again.result, again.metrics) == (finished.result, finished.metrics)


@dataclass(frozen=True)
class Shifted:
    """A method whose attack is known, and which models saw it is kept."""

    seen: list

    def attack(self, model, x, y):
        self.seen.append(model)
        return x + 0.1

    def losses(self, model, x, x_adv, y):
        self.seen.append(model)
        return F.cross_entropy(model(x_adv), y, reduction="none")


def small_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    sizes = (5, 5, 2)
    batches = [(torch.rand(n, 6, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]
    return model.eval(), batches


def test_an_epoch_is_the_plain_loop():
    model, batches = small_problem()
    reference, attacked, method = deepcopy(model), deepcopy(model), Shifted([])
    optimizer = MSGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    found = train_one_epoch(
        model, method, optimizer, batches, scheduler=scheduler, attacked=attacked
    )
    assert [m is attacked for m in method.seen] == [True, False] * 3
    assert model.training

    reference.train()
    plain, total = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9), 0.0
    for step, (x, y) in enumerate(batches):
        plain.param_groups[0]["lr"] = 0.5 * 0.5**step
        plain.zero_grad()
        loss = F.cross_entropy(reference(x + 0.1), y)
        loss.backward()
        plain.step()
        total += loss.item() * len(y)
    assert found == {"train_loss": pytest.approx(total / 12)}
    for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_example_norm_of_an_epoch_is_the_mean_over_its_examples():
    model, batches = small_problem()
    model[1] = nn.Identity()
    norms = []
    for x, y in batches:
        for i in range(len(y)):
            loss = F.cross_entropy(model(x[i : i + 1] + 0.1), y[i : i + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norms.append(sum(float((g**2).sum()) for g in gradients) ** 0.5)
    optimizer = ENGM(model, lr=0.0)  # the weights stay
    found = train_one_epoch(model, Shifted([]), optimizer, batches)
    assert found["example_norm"] == pytest.approx(sum(norms) / 12, rel=1e-6)


def test_a_step_that_fails_is_counted_from_one():
    model, batches = small_problem()
    batches[1][0][0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="^step 2: "):
        train_one_epoch(model, Shifted([]), MSGD(model.parameters(), lr=0.1), batches)


def test_an_epoch_without_a_batch_is_refused():
    model, _ = small_problem()
    with pytest.raises(InputError, match="there is no batch"):
        train_one_epoch(model, Shifted([]), MSGD(model.parameters(), lr=0.1), [])


@pytest.mark.parametrize("augment", [False, True])
def test_each_epoch_has_its_own_batches_and_is_validated_on_the_validation_split(
    augment, tmp_path, monkeypatch
):
    batches, validated, cut = [], [], data.batches
    monkeypatch.setitem(data.SPECS, "digits", replace(data.SPECS["digits"], augment=augment))
    monkeypatch.setattr(data, "batches", lambda *a, **k: batches.append((a, k)) or cut(*a, **k))
    attack = training.accuracy_under

    def evaluate(model, split, pgd):
        validated.append((split, pgd))
        return attack(model, split, pgd)

    monkeypatch.setattr(training, "accuracy_under", evaluate)
    config = replace(TINY, seed=5, num_steps=3, step_size=0.01, epochs=4)
    run = fit_quietly(config, tmp_path)
    dataset = data.load("digits", subset=40)
    for epoch, ((split, size), how) in enumerate(batches, start=1):
        assert torch.equal(split.images, dataset.train.images)
        assert (size, how) == (16, {"seed": 5, "epoch": epoch, "augment": augment})
    expected = PGD(eps=0.15, step_size=2.5 * 0.15 / 3, num_steps=3, stop_early=True)
    for split, pgd in validated:
        assert torch.equal(split.images, dataset.validation.images)
        assert pgd == expected
    assert len(batches) == len(validated) == 4
    rates = [line["lr"] for line in run.metrics]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005])
    gap = run.result["best"]["robust_accuracy"] - run.result["last"]["robust_accuracy"]
    assert run.result["robust_overfitting_gap"] == gap


@pytest.mark.parametrize("augment", ["none", "crop-and-mirror", "reflect-crop-and-mirror"])
def test_a_run_uses_as_many_images_and_spoils_as_many_labels_as_it_says(
    augment, tmp_path, monkeypatch
):
    batches, cut = [], data.batches
    monkeypatch.setattr(data, "batches", lambda *a, **k: batches.append((a, k)) or cut(*a, **k))
    images = {"validation_images": 30, "test_images": 50}
    config = replace(TINY, epochs=1, label_noise=0.25, augment=augment, seed=5, **images)
    run = fit_quietly(config, tmp_path)
    clean = data.load("digits", subset=40, validation=30)
    ((split, _), how), *_ = batches
    in_words = {"none": False, "crop-and-mirror": True, "reflect-crop-and-mirror": "reflect"}
    assert how["augment"] == in_words[augment]
    assert torch.equal(split.images, clean.train.images)
    assert int((split.labels != clean.train.labels).sum()) == 10
    spoiled = data.with_wrong_labels(clean.train, 0.25, 10, seed=5)
    assert torch.equal(split.labels, spoiled.labels)
    saved = load_tensors(run.folder / "adversarial-last.pt")
    assert {len(tensor) for tensor in saved.values()} == {50}
    validated = 30 * run.metrics[0]["validation_clean_accuracy"]
    assert validated == pytest.approx(round(validated))


def test_published_schedules():
    def rates(name, epochs):
        config = RunConfig(schedule=name, epochs=epochs, lr=0.2)
        optimizer = MSGD([torch.zeros(1, requires_grad=True)], lr=0.2, momentum=0.9)
        scheduler, found = build_scheduler(config, optimizer, 3), []
        for _ in range(3 * epochs):
            group = optimizer.param_groups[0]
            found.append((group["lr"], group["momentum"]))
            optimizer.step(lambda: optimizer.param_groups[0]["params"][0] * 1)
            scheduler.step()
        return found

    # YisenWang/MART, adjust_learning_rate; epochs count from 1
    def adjusted(epoch):
        return 0.2 * (0.001 if epoch >= 100 else 0.01 if epoch >= 90 else 0.1 if epoch >= 75 else 1)

    wanted = [(adjusted(1 + step // 3), 0.9) for step in range(3 * 101)]
    assert np.array(rates("trades", 101)) == pytest.approx(np.array(wanted))
    # fast_adversarial: CyclicLR from 0 over half of the steps, momentum as torch has it by default
    up = [min(step, 15 - step) / 7.5 for step in range(15)]
    wanted = [(0.2 * u, 0.9 - 0.1 * u) for u in up]
    assert np.array(rates("cyclic", 5)) == pytest.approx(np.array(wanted))


def test_the_bar_counts_steps_and_says_the_epoch_and_changes_nothing(tmp_path, capsys):
    quiet = fit_quietly(TINY, tmp_path / "quiet")
    assert "epoch" not in capsys.readouterr().err
    shown = fit(TINY, tmp_path / "shown", device="cpu")
    said = capsys.readouterr().err
    steps = TINY.epochs * -(-40 // 16)
    assert f"epoch 1 of {TINY.epochs}: " in said and f" {steps}/{steps} " in said
    assert f"epoch {TINY.epochs} of {TINY.epochs}, validation" in said
    weights = [load_tensors(run.folder / "checkpoint-last.pt")["model"] for run in (quiet, shown)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_of_equal_epochs_the_first_is_best(tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.5, 0.5])
    found = lambda *_: SimpleNamespace(clean_accuracy=1.0, robust_accuracy=next(accuracies))  # noqa: E731
    monkeypatch.setattr(training, "accuracy_under", found)
    run = fit_quietly(TINY, tmp_path, save_adversarial=False)
    assert load_tensors(run.folder / "checkpoint-best.pt")["epoch"] == 2


def test_the_seed_draws_the_first_weights_and_streams_do_not_meet(tmp_path):
    still = replace(TINY, lr=1e-9, weight_decay=0.0, epochs=1)
    first, second = (
        weights(fit_quietly(replace(still, seed=seed), tmp_path).folder)["linear.weight"]
        for seed in (0, 1)
    )
    assert (first - second).abs().mean() > 1e-2
    drawn = set()
    for seed, epoch in itertools.product(range(4), range(4)):
        with training._stream(seed, epoch, torch.device("cpu")):
            drawn.add(float(torch.rand(())))
    assert len(drawn) == 16


LONG = replace(TINY, epochs=6, optimizer="engm", model_norm="batch", schedule="one-cycle")


@pytest.mark.parametrize("lines", [1, 3])
def test_killed_and_called_again_ends_with_bitwise_the_same_weights(lines, tmp_path):
    whole = fit_quietly(LONG, tmp_path / "whole")
    code = (
        "from engm.training import fit; from engm.config import RunConfig; import torch; "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        f"fit(RunConfig(**{LONG.to_dict()!r}), {str(tmp_path / 'cut')!r}, device='cpu')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "cut" / LONG.name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (metrics.parent / "result.json").exists()

    resumed = fit_quietly(LONG, tmp_path / "cut")
    assert same(weights(resumed.folder), weights(whole.folder))
    assert same(weights(resumed.folder, "best"), weights(whole.folder, "best"))
    forget_time = [{**line, "seconds": 0} for line in resumed.metrics]
    assert forget_time == [{**line, "seconds": 0} for line in whole.metrics]
    del resumed.result["environment"], whole.result["environment"]
    assert resumed.result == whole.result
    assert not list(resumed.folder.glob("*.tmp")) + list(resumed.folder.glob(".*"))


@pytest.mark.parametrize("stage", ["before best", "before last", "in the line"])
def test_a_cut_between_two_writes_is_mended(stage, finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    saved = runs.save_tensors
    calls = []

    def save(path, state):
        calls.append(path.name)
        of_kind = [name for name in calls if (stage == "before best") == ("best" in name)]
        if len(of_kind) == (1 if stage == "before best" else 2) and of_kind[-1] == path.name:
            raise Killed
        saved(path, state)

    monkeypatch.setattr(runs, "save_tensors", save)
    with pytest.raises(Killed):
        fit_quietly(TINY, tmp_path)
    monkeypatch.undo()
    metrics = tmp_path / TINY.name / "metrics.jsonl"
    assert metrics.read_text().count("\n") == (1 if stage == "before best" else 2)
    if stage == "in the line":
        metrics.write_bytes(metrics.read_bytes()[:-20])
    resumed = fit_quietly(TINY, tmp_path)
    assert [line["epoch"] for line in resumed.metrics] == [1, 2, 3]
    assert same(weights(resumed.folder), weights(finished.folder))
    assert same(weights(resumed.folder, "best"), weights(finished.folder, "best"))


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_a_checkpoint(tmp_path):
    config = replace(TINY, lr=1e20, schedule="constant")
    with pytest.raises(NonFiniteLossError, match=r"epoch \d, step \d: .* lr may help") as caught:
        fit_quietly(config, tmp_path)
    folder = tmp_path / config.name
    assert str(folder / "checkpoint-failed.pt") in str(caught.value)
    assert "model" in load_tensors(folder / "checkpoint-failed.pt")
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 8),
        ("piecewise", [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [0.5 * (1 + torch.tensor(torch.pi * t / 8).cos().item()) for t in range(8)]),
    ],
)
def test_schedules_are_their_formulas(schedule, expected):
    assert rates(schedule) == pytest.approx([0.4 * e for e in expected], abs=1e-7)


def rates(schedule):
    config = RunConfig(lr=0.4, epochs=4, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=2)
    found = []
    for _ in range(8):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_one_cycle_rises_to_the_lr_and_falls_to_about_nothing():
    found = rates("one-cycle")
    assert found[0] == pytest.approx(0.04)
    assert max(found) <= 0.4
    top = found.index(max(found))
    assert 1 <= top <= 3
    assert found[top:] == sorted(found[top:], reverse=True)
    assert found[-1] < 0.001


@pytest.mark.parametrize("schedule", ["constant", "piecewise", "cosine", "one-cycle"])
def test_a_single_step_is_taken_at_about_the_full_rate(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    build_scheduler(RunConfig(lr=0.4, epochs=1, schedule=schedule), optimizer, steps_per_epoch=1)
    assert 0.3 < optimizer.param_groups[0]["lr"] <= 0.4
    assert schedule == "one-cycle" or optimizer.param_groups[0]["lr"] == 0.4


def test_the_options_for_gpus_run_on_the_cpu_too(finished, tmp_path, monkeypatch):
    compiled = []

    def compile_without_a_compiler(model, **options):
        compiled.append(model)
        return real_compile(model, backend="eager", **options)

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_a_compiler)
    options = dict(precision="bfloat16", channels_last=True, compile=True)
    run = fit_quietly(replace(TINY, **options), tmp_path)
    assert len(compiled) == 1
    losses = [line["train_loss"] for line in run.metrics]
    full = [line["train_loss"] for line in finished.metrics]
    assert losses == pytest.approx(full, rel=0.05)
    assert losses != full  # bfloat16 was really used


def test_engm_and_both_baselines_learn_the_digits(tmp_path):
    for optimizer in ("msgd", "msgd-clip", "engm"):
        config = replace(TINY, optimizer=optimizer, subset=100, width=8, epochs=6, lr=0.1)
        run = fit_quietly(replace(config, method="natural"), tmp_path, save_adversarial=False)
        assert run.result["last"]["clean_accuracy"] > 0.4
        assert not (run.folder / "adversarial-last.pt").exists()
        assert ("example_norm" in run.metrics[0]) is (optimizer == "engm")


@pytest.mark.parametrize("awp", [0.0, 0.01])
@pytest.mark.parametrize("method", ["natural", "pgd_at", "trades", "mart", "fast_at"])
def test_the_time_that_is_said_at_the_start_is_that_of_the_passes_that_are_taken(
    method, awp, monkeypatch
):
    few = dict(validation_images=20, test_images=30, num_steps=None if method == "fast_at" else 2)
    config = replace(TINY, method=method, awp=awp, eval_steps=5, **few).resolved()
    dataset = training.load_data(config)
    model, taken = training.build_model(config, dataset), []

    def count(part, given):
        if part is model and torch.is_grad_enabled():
            taken.append(len(given[0]))

    x, y = dataset.train.images.float() / 255, dataset.train.labels
    optimizer = MSGD(model.parameters(), lr=0.1)
    with register_module_forward_pre_hook(count):
        train_one_epoch(model, methods.build(config), optimizer, [(x, y)], awp=methods.AWP(awp))
    clock = itertools.count(0, 4)  # a pass over 2 images takes 4 s
    monkeypatch.setattr(training, "perf_counter", lambda: next(clock))
    watching = 20 * (5 if method == "fast_at" else 2)
    expected = 2 * (7 * (sum(taken) + watching) + 2 * 30 * 5)
    assert training.expected_seconds(config, dataset, epochs=7) == expected


@pytest.mark.parametrize("sizes", [{"subset": 1}, {"subset": 17}, {"subset": 4, "batch_size": 1}])
def test_a_last_batch_of_which_batchnorm_has_one_value_is_refused_before_training(sizes, tmp_path):
    config = replace(TINY, model="preact_resnet18", epochs=1, **sizes)
    with pytest.raises(InputError, match=f"{config.subset} training images.*model_norm=group"):
        fit_quietly(config, tmp_path)
    dataset = training.load_data(config)
    assert training.expected_seconds(config, dataset, epochs=1) > 0  # is said before that
    training.Trainer(replace(config, model_norm="group"), dataset).train_epoch()
    training.Trainer(replace(config, subset=2, batch_size=16)).train_epoch()


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu").type == "cpu"
    for wrong in ("gpu", "meta", "cuda:99", None):
        with pytest.raises(InputError, match=f"cannot use device {wrong!r}.*use 'cpu' or 'auto'"):
            pick_device(wrong)


def test_a_folder_of_another_run_is_refused(finished, tmp_path):
    folder = tmp_path / TINY.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(replace(TINY, lr=0.2).resolved().to_dict()))
    with pytest.raises(InputError, match="holds a run of another config"):
        fit_quietly(TINY, tmp_path)


def test_metrics_cut_at_any_byte_give_the_whole_lines(finished, tmp_path):
    whole = (finished.folder / "metrics.jsonl").read_bytes()
    for size in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:size])
        assert read_metrics(tmp_path) == finished.metrics[: whole[:size].count(b"\n")]


def test_a_damaged_or_hostile_checkpoint_is_refused(finished, tmp_path):
    whole = (finished.folder / "checkpoint-last.pt").read_bytes()
    path = tmp_path / "checkpoint-last.pt"
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="checkpoint-last.pt is not a file of this kit"):
            load_tensors(path)

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"model": Hostile()}, path)
    with pytest.raises(InputError, match="is not a file of this kit"):
        load_tensors(path)
    assert not (tmp_path / "owned").exists()


def test_an_example_that_engm_leaves_out_is_counted_and_spoils_no_number():
    @dataclass(frozen=True)
    class Spoilt(Natural):
        def losses(self, model, x, x_adv, y):
            first = torch.zeros(len(x))
            first[0] = float("nan")
            return super().losses(model, x, x_adv, y) + first

    def metrics(method):
        torch.manual_seed(0)
        model = small_cnn(in_channels=1, width=4)
        examples = data.batches(data.load("digits", subset=40).train, 20, seed=0, epoch=0)
        return train_one_epoch(model, method, ENGM(model, lr=1e-12), examples)

    spoilt, whole = metrics(Spoilt()), metrics(Natural())
    assert (spoilt["excluded"], whole["excluded"]) == (2, 0)
    assert spoilt["train_loss"] == pytest.approx(whole["train_loss"], rel=0.1)
    assert spoilt["example_norm"] == pytest.approx(whole["example_norm"], rel=0.1)


@pytest.mark.parametrize(("method", "steps"), [("pgd_at", 3), ("fast_at", 7)])
def test_the_best_epoch_is_chosen_with_many_steps_where_training_takes_one(
    method, steps, tmp_path, monkeypatch
):
    seen = []

    def spy(model, split, attack, **options):
        seen.append(attack.num_steps)
        return accuracy_under(model, split, attack, **options)

    monkeypatch.setattr(training, "accuracy_under", spy)
    settings = dict(num_steps=3) if method == "pgd_at" else {}
    config = RunConfig(subset=50, width=2, epochs=1, eval_steps=7, method=method, **settings)
    fit(config, tmp_path, device="cpu", progress=False)
    assert seen[0] == steps


def test_where_best_is_last_its_images_are_attacked_once(tmp_path, monkeypatch):
    attacked = training.evaluate_run
    calls = []

    def spy(folder, which, *rest, **options):
        calls.append(which)
        return attacked(folder, which, *rest, **options)

    monkeypatch.setattr(training, "evaluate_run", spy)
    run = fit_quietly(replace(TINY, epochs=1), tmp_path)
    assert calls == ["last"] and run.result["best"] == run.result["last"]
    last, best = (run.folder / f"adversarial-{which}.pt" for which in ("last", "best"))
    assert last.samefile(best) and not (run.folder / "result-partial.json").exists()


def test_a_kill_in_the_final_attack_keeps_its_batches_though_no_images_are_to_stay(
    tmp_path, monkeypatch
):
    attacked, calls, config = accuracy._attacked, [], replace(TINY, epochs=1)

    def killed(*given):
        if given[2].shape[0] == 297:  # the second of 500 and 297 images, that of the test set alone
            raise KeyboardInterrupt
        return attacked(*given)

    def counted(*given):
        calls.append(len(given[2]))
        return attacked(*given)

    monkeypatch.setattr(accuracy, "_attacked", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_quietly(config, tmp_path, save_adversarial=False)
    monkeypatch.setattr(accuracy, "_attacked", counted)
    run = fit_quietly(config, tmp_path, save_adversarial=False)
    assert calls == [297]
    assert not list(run.folder.glob("adversarial*"))
    assert run.result["last"] == fit_quietly(config, tmp_path / "whole").result["last"]


def test_images_that_an_earlier_call_was_told_not_to_keep_are_made(tmp_path, monkeypatch):
    config = replace(TINY, epochs=1)
    write = runs.write_json

    def killed(path, value):
        if path.name == "result.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(runs, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_quietly(config, tmp_path, save_adversarial=False)
    monkeypatch.undo()
    folder = fit_quietly(config, tmp_path).folder
    assert len(list(folder.glob("adversarial-*.pt"))) == 2


def test_a_kill_in_the_final_attack_costs_nothing_that_was_finished(tmp_path, monkeypatch):
    attacked = training.evaluate_run
    calls = []

    def killed(folder, which, *rest, **options):
        calls.append(which)
        if calls == ["last", "best"]:
            raise KeyboardInterrupt
        return attacked(folder, which, *rest, **options)

    config = replace(TINY, epochs=4, seed=5)
    expected = fit_quietly(config, tmp_path / "whole")
    assert expected.metrics[-1]["epoch"] != expected.result["best"].get("epoch")
    monkeypatch.setattr(training, "evaluate_run", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_quietly(config, tmp_path)
    run = fit_quietly(config, tmp_path)
    assert calls == ["last", "best", "best"]
    assert run.result["last"] == expected.result["last"]
    assert run.result["best"] == expected.result["best"]
