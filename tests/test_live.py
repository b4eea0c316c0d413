import threading
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from engm import data, training
from engm.config import TYPES, RunConfig, choices
from engm.errors import NonFiniteLossError
from engm.evaluation.accuracy import accuracy_under
from engm.lab import live

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = RunConfig(subset=100, width=4, num_steps=2, epochs=3, lr=0.05, optimizer="engm")


@pytest.fixture(scope="module")
def images():
    return data.load("digits", subset=100, validation=50)


@pytest.fixture
def lab(images):
    return live.TrainingLab(images, SMALL)


def finish(lab):
    lab.start.click()
    lab.join()


def test_every_epoch_has_the_weights_of_all_its_examples(images):
    history = list(live.train(images, SMALL))
    assert len(history) == 3
    for epoch in history:
        assert epoch.weights.shape == (100,)
        assert epoch.weights.min() > 0 and epoch.weights.max() <= 1 / SMALL.floor + 1e-4
        assert all(batch.std() > 0.01 for batch in epoch.weights.split(50))
        assert epoch.robust_accuracy <= epoch.clean_accuracy
    assert history[-1].loss < history[0].loss


def test_the_seed_and_the_precision_decide_and_nothing_else(images):
    def losses(config):
        return [epoch.loss for epoch in live.train(images, config)]

    torch.manual_seed(1)
    first = losses(SMALL)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert losses(SMALL) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert losses(replace(SMALL, seed=1)) != first
    assert losses(replace(SMALL, precision="bfloat16")) != first


def test_an_optimizer_without_weights_has_ones(images):
    config = RunConfig(subset=100, width=4, num_steps=2, epochs=1)
    [epoch] = live.train(images, config)
    assert torch.equal(epoch.weights, torch.ones(100))


def test_training_can_be_stopped_at_any_batch(images):
    for batches in (0, 1, 2, 3):
        asked = iter(range(batches))
        done = list(live.train(images, SMALL, lambda: next(asked, None) is None))
        assert len(done) == batches // 2  # two batches an epoch


def test_earlier_runs_stay_as_faint_lines(lab):
    for lr in (0.05, 0.01, 0.2):
        lab.lr.value = lr
        finish(lab)
    assert [len(epochs) for epochs in lab.earlier] == [3, 3]
    losses, accuracies, _ = live.view(lab.history, lab.earlier).axes
    drawn = [list(line.get_ydata()) for line in losses.lines]
    assert drawn == [[e.loss for e in each] for each in (*lab.earlier, lab.history)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert losses.get_ylim()[1] >= max(map(max, drawn))
    assert len(accuracies.lines) == 6
    assert len(accuracies.get_legend().get_texts()) == 2


def test_nothing_runs_before_the_button_is_pressed(lab, images):
    before = threading.active_count()
    other = live.TrainingLab(images, SMALL)
    assert threading.active_count() == before
    assert (other.history, other.picture.value) == ([], b"")
    assert (other.start.disabled, other.stop.disabled) == (False, True)


def test_the_choices_start_where_the_config_is(lab):
    assert lab.method.options == tuple(choices(TYPES["method"]))
    assert lab.optimizer.options == tuple(choices(TYPES["optimizer"]))
    chosen = [getattr(lab, name).value for name in ("method", "optimizer", "lr", "eps", "epochs")]
    assert chosen == ["pgd_at", "engm", 0.05, 0.15, 3]


def test_a_run_shows_each_epoch(lab, monkeypatch):
    drawn = []
    draw = live.view
    monkeypatch.setattr(live, "view", lambda now, _: drawn.append(len(now)) or draw(now))
    figures = plt.get_fignums()
    finish(lab)
    assert drawn == [1, 2, 3]
    assert len(lab.history) == 3
    assert bytes(lab.picture.value).startswith(PNG)
    assert lab.message.value.startswith("Epoch 3 of 3: loss ")
    assert (lab.start.disabled, lab.stop.disabled) == (False, True)
    assert plt.get_fignums() == figures


def test_the_run_is_the_one_that_was_chosen(images, monkeypatch):
    lab = live.TrainingLab(images, SMALL.resolved())  # which has a step_size
    seen = []
    monkeypatch.setattr(live, "train", lambda images, config, stopped: seen.append(config) or [])
    lab.method.value, lab.optimizer.value = "natural", "msgd-clip"
    lab.lr.value, lab.eps.value, lab.epochs.value = 0.5, 0.3, 7
    finish(lab)
    [config] = seen
    assert (config.method, config.optimizer, config.epochs) == ("natural", "msgd-clip", 7)
    assert (config.lr, config.eps) == (0.5, 0.3)
    # the steps of the attack follow the eps that was chosen
    assert config.resolved().step_size == pytest.approx(2.5 * 0.3 / 2)
    assert (config.subset, config.width) == (100, 4)


def test_the_stop_button_ends_a_run_and_another_can_follow(lab, monkeypatch):
    drawn = threading.Event()
    draw = live.view
    monkeypatch.setattr(live, "view", lambda history, earlier: drawn.set() or draw(history))
    lab.epochs.max = lab.epochs.value = 100_000
    lab.start.click()
    assert (lab.start.disabled, lab.stop.disabled) == (True, False)
    assert drawn.wait(60)
    first = lab._thread
    lab.start.click()  # a second click changes nothing
    assert lab._thread is first
    lab.stop.click()
    lab.join()
    assert not first.is_alive()
    assert 1 <= len(lab.history) < 100_000
    assert lab.message.value == f"Stopped; whole epochs: {len(lab.history)}."
    assert (lab.start.disabled, lab.stop.disabled) == (False, True)

    lab.epochs.value = 2
    finish(lab)
    assert len(lab.history) == 2
    assert lab.message.value.startswith("Epoch 2 of 2")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NonFiniteLossError("step 3: a loss is nan\nin line 7"), "step 3: a loss is nan"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence(lab, monkeypatch, error, said):
    def fail(images, config, stopped):
        raise error

    monkeypatch.setattr(live, "train", fail)
    finish(lab)
    assert lab.message.value == f"The run ended early: {said}"
    assert (lab.start.disabled, lab.stop.disabled) == (False, True)
    monkeypatch.undo()
    finish(lab)
    assert len(lab.history) == 3


def test_the_view_shows_loss_accuracies_and_weights():
    weights = torch.tensor([0.5, 1.0, 6.0])
    history = [live.Epoch(2.0, 0.5, 0.25, weights), live.Epoch(1.0, 0.75, 0.5, weights)]
    loss, accuracy, histogram = live.view(history).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
    percents = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert percents == {"clean": [50, 75], "robust": [25, 50]}
    assert sum(bar.get_height() for bar in histogram.patches) == 3
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (loss, accuracy, histogram))


@pytest.mark.parametrize(("method", "steps"), [("pgd_at", 5), ("fast_at", 7)])
def test_a_run_is_watched_with_many_steps_where_training_takes_one(
    method, steps, images, monkeypatch
):
    seen = []

    def spy(model, split, attack):
        seen.append(attack.num_steps)
        return accuracy_under(model, split, attack)

    monkeypatch.setattr(training, "accuracy_under", spy)
    config = RunConfig(subset=100, width=2, epochs=1, eval_steps=7, method=method)
    assert len(list(live.train(images, config))) == 1
    assert seen == [steps]
