"""A Trainer honours every setting of a run, or refuses it; whoever trains uses a Trainer."""

from dataclasses import fields, replace

import pytest
import torch

from engm import data
from engm.bench.training import Kit
from engm.config import RunConfig
from engm.errors import InputError
from engm.evaluation.accuracy import attack_of
from engm.lab import live
from engm.models import small_cnn
from engm.training import Trainer

TINY = RunConfig(subset=40, width=4, num_steps=2, epochs=2, batch_size=16, model_norm="batch")


def train_attack(trainer):
    return trainer.method.attack


def first_batch(trainer):
    return next(trainer.batches())[0]


def after_an_epoch(trainer):
    trainer.train_epoch()
    return torch.cat([p.flatten() for p in trainer.model.parameters()]).detach()


def rates(trainer):
    found = []
    for _ in range(6):
        trainer.optimizer.step(lambda: trainer.model(torch.zeros(2, 1, 8, 8)).sum(1))
        trainer.scheduler.step()
        found.append(trainer.optimizer.param_groups[0]["lr"])
    return found


def layers(trainer):
    return [type(module).__name__ for module in trainer.model.modules()]


def group(name):
    return lambda trainer: trainer.optimizer.param_groups[0][name]


ENGM = {"optimizer": "engm"}
# the setting: another value, what it changes in a Trainer, and the settings that it wants beside it
HONOURED = {
    "classes": (4, lambda t: t.dataset.num_classes, {}),
    "subset": (20, lambda t: len(t.examples), {}),
    "validation_images": (30, lambda t: len(t.dataset.validation), {}),
    "test_images": (50, lambda t: len(t.dataset.test), {}),
    "augment": ("crop-and-mirror", first_batch, {}),
    "label_noise": (0.5, lambda t: t.examples.labels, {}),
    "model": ("preact_resnet18", layers, {}),
    "width": (5, lambda t: sum(p.numel() for p in t.model.parameters()), {}),
    "model_norm": ("group", layers, {}),
    "method": ("trades", lambda t: type(t.method), {}),
    "eps": (0.1, train_attack, {}),
    "norm": ("l2", train_attack, {}),
    "num_steps": (3, train_attack, {}),
    "step_size": (0.01, train_attack, {}),
    "start_noise": (0.001, train_attack, {}),
    "attack_mode": ("train", after_an_epoch, {}),
    "beta": (2.0, lambda t: t.method, {"method": "trades"}),
    "awp": (0.01, after_an_epoch, {}),
    "awp_warmup": (1, after_an_epoch, {"awp": 0.01}),
    "label_smoothing": (0.2, lambda t: t.method, {}),
    "optimizer": ("engm", lambda t: type(t.optimizer), {}),
    "lr": (0.05, group("lr"), {}),
    "momentum": (0.5, group("momentum"), {}),
    "weight_decay": (0.1, group("weight_decay"), {}),
    "scale": (2.0, lambda t: t.optimizer.scale, ENGM),
    "floor": (1.0, lambda t: t.optimizer.floor, ENGM),
    "max_norm": (0.5, lambda t: t.optimizer.max_norm, {"optimizer": "msgd-clip"}),
    "schedule": ("cosine", rates, {}),
    "epochs": (1, lambda t: len(list(t)), {}),
    "batch_size": (8, lambda t: len(first_batch(t)), {}),
    "eval_steps": (3, lambda t: attack_of(t.config), {}),  # `fit` evaluates with it
    "seed": (1, after_an_epoch, {}),
    "precision": ("bfloat16", after_an_epoch, {}),
    "channels_last": (True, lambda t: t.precision, {}),
    "compile": (True, lambda t: type(t.attacked), {}),
}
REFUSED = {"dataset": "fashion-mnist", "capture": True}  # other images; on a CPU
LABELS = {"recipe"}  # it sets others, see test_config


def made(config):
    config = config.resolved()
    counts = {"validation": config.validation_images, "test": config.test_images}
    counts |= {"classes": config.classes, "subset": config.subset}
    return Trainer(config, data.load("digits", **counts))


def test_every_setting_is_in_one_of_the_lists():
    assert {field.name for field in fields(RunConfig)} == {*HONOURED, *REFUSED, *LABELS}


@pytest.mark.parametrize("name", HONOURED)
def test_a_setting_changes_what_is_trained(name):
    value, seen, beside = HONOURED[name]
    config = replace(TINY, **beside)
    before, again, after = (
        seen(made(c)) for c in (config, config, replace(config, **{name: value}))
    )
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, again)
        assert before.shape != after.shape or not torch.equal(before, after)
    else:
        assert (before == again) and (before != after)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name):
    digits = data.load("digits", subset=40)
    with pytest.raises(InputError):
        list(Trainer(replace(TINY, **{name: REFUSED[name]}), digits))


@pytest.mark.parametrize("name", ["subset", "validation_images", "test_images"])
def test_data_of_another_size_than_the_settings_say_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is 30"):
        Trainer(replace(TINY, **{name: 30}), data.load("digits", subset=40))


def test_it_loads_its_data_leaves_the_random_state_alone_and_goes_on(tmp_path):
    state = torch.get_rng_state()
    whole = Trainer(replace(TINY, validation_images=30), device=torch.device("cpu"))
    lines = list(whole)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert list(whole) == []
    half = made(replace(TINY, validation_images=30))
    half.train_epoch()
    rest = made(replace(TINY, validation_images=30))
    rest.load_state_dict(half.state_dict())
    (line,) = rest
    assert {**line, "seconds": 0} == {**lines[1], "seconds": 0}
    assert torch.equal(torch.get_rng_state(), state)


def test_the_lab_and_the_bench_train_as_a_trainer_does():
    digits = data.load("digits", subset=40)
    config = replace(TINY, optimizer="engm", precision="bfloat16", seed=3, channels_last=True)
    watched = [epoch.loss for epoch in live.train(digits, config)]
    assert watched == [line["train_loss"] for line in Trainer(config, digits)]
    kit = Kit(small_cnn(width=4, in_channels=1), digits, TINY, "engm bfloat16 channels_last")
    assert kit.trainer.config == replace(config, seed=0).resolved()
    assert kit.trainer.precision == Trainer(config, digits).precision
