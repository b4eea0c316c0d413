import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engm import data
from engm.config import RunConfig
from engm.errors import InputError
from engm.evaluation.accuracy import accuracy_under, attack_of, evaluate_run, load_model
from engm.report.records import collect
from engm.runs import (
    append_metrics,
    environment,
    load_tensors,
    read_config,
    read_metrics,
    read_result,
    save_tensors,
)
from engm.training import fit

TINY = RunConfig(subset=20, width=4, num_steps=1, eval_steps=1, epochs=2, batch_size=10, seed=3)
ROOT = Path(__file__).parents[1]


def fit_quietly(out):
    return fit(TINY, out, device="cpu", progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fit_quietly(tmp_path_factory.mktemp("runs")).folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def unfinished(folder):
    (folder / "result.json").unlink()
    return folder


def test_the_environment_traces_a_number_to_its_commit_and_machine():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        found = environment(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert found["threads"] == threads + 1
    assert found["device"].startswith("cpu, ")
    assert found["cuda"] is None
    assert found["packages"]["torch"] == torch.__version__
    expected = None
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        expected = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    assert (found["commit"] or "").removesuffix("-dirty") == (expected or "")


def test_a_config_of_another_version_names_the_file_and_the_setting(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "warmup": 3}))
    for read in (read_config, collect, lambda f: fit_quietly(f.parent)):
        with pytest.raises(InputError, match=r"config\.json is not of this .*setting warmup"):
            read(folder)


def test_a_finished_run_without_its_config_is_not_given_a_new_one(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has lost its config\.json; delete it"):
        fit_quietly(folder.parent)


@pytest.mark.parametrize("spoil", ["no data", "no last", "list", "word", "words for numbers"])
def test_a_result_that_is_none_is_refused_wherever_it_is_read(spoil, folder):
    path = folder / "result.json"
    result = json.loads(path.read_text())
    assert read_result(folder) == result
    without = {k: v for k, v in result.items() if k != spoil.removeprefix("no ")}
    gap = {**result, "robust_overfitting_gap": "0.1"}
    spoilt = {"list": [], "word": "done", "words for numbers": gap}.get(spoil, without)
    path.write_text(json.dumps(spoilt))
    for read in (read_result, collect, lambda f: fit_quietly(f.parent)):
        with pytest.raises(InputError, match=r"result\.json is not the result of a run; delete it"):
            read(folder)


def test_metrics_have_no_nan_and_a_damaged_line_is_named(tmp_path):
    append_metrics(tmp_path, {"epoch": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_metrics(tmp_path, {"epoch": float("nan")})
    assert read_metrics(tmp_path) == [{"epoch": 1}]
    for line in (b"{'epoch': 2}\n", b"\xff\n"):
        (tmp_path / "metrics.jsonl").write_bytes(line)
        with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
            read_metrics(tmp_path)


def test_a_line_of_metrics_is_on_the_disk_before_the_checkpoint_that_counts_it(
    tmp_path, monkeypatch
):
    path, sizes = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr("os.fsync", lambda _: sizes.append(path.stat().st_size))
    append_metrics(tmp_path, {"epoch": 1})
    assert sizes == [path.stat().st_size] == [13]


def test_what_a_kill_in_a_write_left_is_cleared_away(folder):
    unfinished(folder)
    (folder / ".checkpoint-last.pt.0a1b2c3d.tmp").write_bytes(b"half")
    fit_quietly(folder.parent)
    assert not list(folder.glob(".*"))


def test_a_checkpoint_of_another_model_is_refused(folder):
    unfinished(folder)
    path = folder / "checkpoint-last.pt"
    state = load_tensors(path)
    other = {**state["model"], "linear.weight": torch.zeros(3, 3)}
    no_settings = {**state["optimizer"], "param_groups": []}
    for spoilt in ({}, {**state, "model": 3}, {**state, "model": other}):
        save_tensors(path, spoilt)
        with pytest.raises(InputError, match=r"checkpoint-last\.pt does not fit the config"):
            load_model(folder, "last", data.load("digits", subset=20))
    for spoilt in ({"model": state["model"]}, {**state, "optimizer": no_settings}):
        save_tensors(path, spoilt)
        with pytest.raises(InputError, match=r"checkpoint-last\.pt does not fit the config"):
            fit_quietly(folder.parent)
    torch.save([state], path)
    with pytest.raises(InputError, match="must hold a dictionary, not a list"):
        load_tensors(path)


def test_a_missing_checkpoint_and_an_unknown_one_are_said(folder):
    dataset = data.load("digits", subset=20)
    (folder / "checkpoint-best.pt").unlink()
    with pytest.raises(InputError, match=r"no file .*checkpoint-best\.pt; logs hold no weights"):
        load_model(folder, "best", dataset)
    with pytest.raises(InputError, match="unknown checkpoint 'first'; choose one of last, best"):
        load_model(folder, "first", dataset)


def test_a_run_is_evaluated_on_its_own_dataset_alone(folder):
    other = replace(data.load("digits", subset=20), name="fashion-mnist")
    with pytest.raises(InputError, match="is a run on digits; it was given fashion-mnist"):
        evaluate_run(folder, "last", other)


def test_a_run_is_evaluated_with_its_own_attack_and_seed(folder):
    dataset = data.load("digits", subset=20, test=30)
    found = evaluate_run(folder, "last", dataset, save_to=folder / "x.pt")
    attack = attack_of(TINY)
    assert found.attack == {"kind": "PGD", **vars(attack)}
    expected = accuracy_under(load_model(folder, "last", dataset), dataset.test, attack, seed=3)
    assert torch.equal(found.x_adv, expected.x_adv)
    assert torch.equal(load_tensors(folder / "x.pt")["x_adv"], expected.x_adv)


def test_a_loaded_model_is_in_eval_mode_and_tensors_go_where_they_are_asked_for(folder):
    assert not load_model(folder, "last", data.load("digits", subset=20)).training
    there = load_tensors(folder / "checkpoint-last.pt", "meta")["model"]["linear.weight"]
    assert there.device.type == "meta"


@pytest.mark.parametrize(
    "settings", [{"subset": 10**6}, {"model": "preact_resnet18", "model_norm": "none"}]
)
def test_a_run_that_cannot_start_leaves_no_folder(settings, tmp_path):
    with pytest.raises(InputError, match="fit takes a RunConfig, not Linear"):
        fit(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(InputError, match="subset|norm"):
        fit(RunConfig(**settings), tmp_path / "runs", device="cpu", progress=False)
    assert not (tmp_path / "runs").exists()
