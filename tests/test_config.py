import copy
import hashlib
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from engm import config as settings
from engm.config import TYPES, RunConfig, parse_number
from engm.data import SPECS
from engm.errors import InputError, meant
from engm.sweep.plan import plan
from engm.values import read


@pytest.mark.parametrize(
    ("name", "wrong", "wanted"),
    [
        ("lr", ("0.1", float("nan"), float("inf"), 10**400, None), "a finite number"),
        ("lr", (0,), "above 0"),
        ("momentum", (1.0,), "below 1"),
        ("epochs", (1.5, True), "a whole number"),
        ("compile", (1,), "true or false"),
        ("dataset", ("cifar", np.array(["digits", "cifar10"])), "one of digits, .*cifar10"),
        ("scale", ("median",), "one of mean or a finite number"),
        ("eps", (8,), "at most 1 .*write 8/255"),
        ("floor", (1.1,), "at most 1"),
        ("seed", (-1,), "at least 0"),
        ("seed", (2**32,), "at most 4294967295"),
        ("batch_size", (0,), "at least 1"),
        ("awp", (-0.1,), "at least 0"),
        ("label_smoothing", (1,), "below 1"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_and_what_is_wanted(name, wrong, wanted):
    for value in wrong:
        with pytest.raises(InputError, match=f"{name} must be {wanted}"):
            RunConfig(**{name: value})


def test_an_unknown_setting_names_the_nearest_and_all():
    with pytest.raises(InputError, match=r"unknown setting epoch; did you mean epochs\? .*lr"):
        RunConfig.from_dict({"epoch": 3})
    with pytest.raises(InputError, match="unknown setting 3"):
        RunConfig.from_dict({3: 3})


@pytest.mark.parametrize(
    ("word", "suggested"),
    [
        ("--learningrate", "lr"),
        ("random-seed", "seed"),
        ("num_epochs", "epochs"),
        ("clip", "max_norm"),
        ("batch", "batch_size"),
        ("optimiser", "optimizer"),
        ("cool", None),
        ("", None),
    ],
)
def test_a_word_is_asked_after_if_a_setting_is_like_it(word, suggested):
    assert meant(word, TYPES) == (f"; did you mean {suggested}?" if suggested else "")


def test_the_ends_of_the_ranges_are_in_them():
    ends = dict(eps=1, floor=1, momentum=0, weight_decay=0, seed=2**32 - 1, batch_size=1, epochs=1)
    assert ends.items() <= RunConfig(**ends).to_dict().items()


def test_resolved_fills_in_what_suits_the_dataset_and_keeps_what_was_said():
    cifar = RunConfig(dataset="cifar10").resolved()
    assert (cifar.model, cifar.width, cifar.model_norm) == ("preact_resnet18", 64, "batch")
    assert cifar.eps == 8 / 255
    assert cifar.step_size == pytest.approx(2 / 255)
    chosen = dict(model="small_cnn", eps=0.1, step_size=0.05, width=8)
    said = RunConfig(dataset="cifar10", **chosen).resolved()
    assert said.to_dict().items() >= (chosen | {"model_norm": "none"}).items()
    assert said.resolved() == said
    zero = RunConfig(momentum=0, weight_decay=0, compile=False, scale=2).resolved()
    assert (zero.momentum, zero.weight_decay, zero.scale) == (0, 0, 2)


# the measured results stand on these: whoever changes one has to measure again
@pytest.mark.parametrize(
    ("dataset", "expected", "l2_eps"),
    [
        ("digits", ("small_cnn", 32, "none", 0.15, 5, 50), 0.5),
        ("fashion-mnist", ("small_cnn", 32, "none", 0.1, 7, 128), 1.5),
        ("cifar10", ("preact_resnet18", 64, "batch", 8 / 255, 10, 128), 128 / 255),
        ("cifar100", ("preact_resnet18", 64, "batch", 8 / 255, 10, 128), 128 / 255),
        ("tiny-imagenet", ("preact_resnet18", 64, "batch", 8 / 255, 10, 128), 128 / 255),
    ],
)
def test_the_defaults_of_a_dataset(dataset, expected, l2_eps):
    names = ("model", "width", "model_norm", "eps", "num_steps", "batch_size")
    found = RunConfig(dataset=dataset).resolved()
    assert tuple(getattr(found, name) for name in names) == expected
    assert found.step_size == pytest.approx(2.5 * expected[3] / expected[4])
    assert RunConfig(dataset=dataset, norm="l2").resolved().eps == l2_eps
    wide = RunConfig(dataset=dataset, model="wide_resnet34_10").resolved()
    assert (wide.width, wide.model_norm) == (160, "batch")


def test_the_name_follows_every_setting_and_only_the_settings():
    names = {RunConfig(**kw).name for kw in ({}, {"lr": 0.2}, {"seed": 1}, {"compile": True})}
    assert len(names) == 4
    assert RunConfig(lr=1).name == RunConfig(lr=1.0).name
    assert RunConfig().name == RunConfig().resolved().name


def test_the_name_leaves_out_what_is_as_ever_so_that_a_new_setting_renames_no_run():
    chosen = (
        '{"batch_size": 50, "eps": 0.15, "model": "small_cnn", "model_norm": "none", '
        '"num_steps": 5, "seed": 3, "step_size": 0.075, "width": 32}'
    )
    digest = hashlib.sha256(chosen.encode()).hexdigest()
    assert RunConfig(seed=3).name == f"digits-pgd_at-msgd-seed3-{digest[:8]}"


@pytest.mark.parametrize(
    ("method", "beta", "num_steps", "step_size"),
    [
        ("pgd_at", None, 5, 0.075),
        ("trades", 6.0, 5, 0.075),
        ("mart", 5.0, 5, 0.075),
        ("fast_at", None, 1, 0.1875),
    ],
)
def test_the_defaults_of_a_method(method, beta, num_steps, step_size):
    found = RunConfig(method=method).resolved()
    assert (found.beta, found.num_steps) == (beta, num_steps)
    assert found.step_size == pytest.approx(step_size)
    assert found.resolved() == found


@pytest.mark.parametrize(
    "wrong",
    [
        dict(beta=6),
        dict(beta=-1, method="trades"),
        dict(label_smoothing=0.1, method="mart"),
        dict(awp_warmup=3),
        dict(awp=0.01, awp_warmup=3, epochs=3),
        dict(num_steps=5, method="fast_at"),
        dict(attack_mode="train", method="natural"),
        dict(start_noise=0.001, method="natural"),
        dict(capture=True, attack_mode="train"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        RunConfig(**wrong)


# typed from the argument parsers of the published files, in their own units
PUBLISHED = """
                   trades  mart   robust-overfitting  fast-at  awp
batch_size         128     128    128                 128      128
epochs             76      120    200                 15       200
lr                 0.1     0.01   0.1                 0.2      0.1
momentum           0.9     0.9    0.9                 0.9      0.9
weight_decay       2e-4    3.5e-3 5e-4                5e-4     5e-4
eps                0.031   0.031  8/255               8/255    8/255
step_size          0.007   0.007  2/255               10/255   2/255
num_steps          10      10     10                  1        10
beta               6.0     5.0    none                none     none
start_noise        0.001   0.001  none                none     none
attack_mode        eval    eval   train               train    train
awp                0       0      0                   0        0.01
awp_warmup         0       0      0                   0        0
schedule           trades  trades piecewise           cyclic   piecewise
augment            crop-and-mirror crop-and-mirror reflect-crop-and-mirror crop-and-mirror \
                   reflect-crop-and-mirror
method             trades  mart   pgd_at              fast_at  pgd_at
model    wide_resnet34_10 preact_resnet18 preact_resnet18 preact_resnet18 preact_resnet18
dataset            cifar10 cifar10 cifar10            cifar10  cifar10
norm               linf    linf   linf                linf     linf
optimizer          msgd    msgd   msgd                msgd     msgd
label_smoothing    0       0      0                   0        0
precision          float32 float32 float32            float32  float32
""".replace("\\\n", "")


def test_recipes_are_the_published_figures_and_what_is_given_overrides_them():
    recipes, *rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    page = (Path(__file__).parents[1] / "results" / "methods-as-published.md").read_text()
    assert set(recipes) == set(settings.RECIPES) == set(get_args(settings.RecipeName))
    for recipe, *column in zip(recipes, *(row[1:] for row in rows), strict=True):
        published = {
            row[0]: read(text, TYPES[row[0]]) for row, text in zip(rows, column, strict=True)
        }
        assert f"| `{recipe}` | {settings.RECIPES[recipe].source} |" in page
        found = RunConfig(recipe=recipe).resolved()
        assert found.to_dict().items() >= published.items()
        assert found.resolved() == found == RunConfig.from_dict(found.to_dict())
        assert copy.deepcopy(found) == pickle.loads(pickle.dumps(found)) == found
        assert replace(found, seed=1).to_dict() == found.to_dict() | {"seed": 1}
        # also where it is what the kit has by default, and None: what suits the dataset
        given = dict(lr=0.1, epochs=30, eps=None, start_noise=None, dataset="digits", seed=2)
        own = RunConfig(recipe=recipe, **given).resolved()
        wanted = published | given | {"eps": 0.15}
        assert own.to_dict().items() >= wanted.items()
        (task,) = plan("train", {"recipe": [recipe]}, settings=dict(epochs="7"))
        assert task.settings == found.to_dict() | {"epochs": 7}
    assert RunConfig(lr=0.1).recipe is None


def test_a_config_survives_its_dictionary():
    config = RunConfig(optimizer="engm", scale=2.5, subset=30).resolved()
    assert RunConfig.from_dict(config.to_dict()) == config


def test_fractions_are_numbers():
    assert parse_number("8/255") == 8 / 255
    for wrong in ("8/0", "eight", "1/2/3", f"{10**400}/1"):
        with pytest.raises(InputError, match="is not a number"):
            parse_number(wrong)


def test_every_dataset_of_the_config_exists_and_has_its_defaults():
    assert set(get_args(settings.DatasetName)) == set(SPECS)
    for name in SPECS:
        values = RunConfig(dataset=name).resolved().to_dict()
        open_ends = {"recipe", "classes", "subset", "validation_images", "test_images", "augment"}
        open_ends |= {"start_noise", "beta"}
        assert {key for key, value in values.items() if value is None} == open_ends


def test_importing_the_package_and_its_command_loads_nothing_heavy():
    code = (
        "import sys, engm, engm.cli; "
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'papermill', 'ipywidgets') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_face_of_the_package_gives_every_name_it_promises():
    import engm

    assert {name: getattr(engm, name).__name__ for name in engm.__all__} == {
        name: name for name in engm.__all__
    }
    with pytest.raises(AttributeError, match="it has AWP, ENGM"):
        _ = engm.SGD
