import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from engm.cli import main
from engm.config import RunConfig

SMALL = [
    *("--subset", "40", "--width", "4", "--num-steps", "2", "--eval-steps", "2"),
    *("--epochs", "2", "--device", "cpu"),
]


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    return root, [call("train", *SMALL, "--seed", seed, "--out", root) for seed in (0, 1)]


def test_train_prints_its_config_and_its_result(runs):
    root, outputs = runs
    folders = sorted(root.iterdir())
    assert len(folders) == 2
    for folder, output in zip(folders, sorted(outputs, key=lambda o: "seed1" in o), strict=True):
        assert str(folder) in output
        assert "lr             0.1" in output
        assert "| Digits | pgd_at | msgd |" in output
        assert (folder / "result.json").exists()


def test_evaluate_gives_what_training_recorded_and_takes_more_steps(runs):
    folder = sorted(runs[0].iterdir())[0]
    recorded = json.loads((folder / "result.json").read_text())
    output = call("evaluate", folder, "--device", "cpu")
    again = json.loads((folder / "evaluation.json").read_text())
    assert again == {which: recorded[which] for which in ("best", "last")}
    assert f"best: clean {recorded['best']['clean_accuracy']:.1%}" in output
    call("evaluate", folder, "--checkpoint", "last", "--num-steps", "7", "--device", "cpu")
    more = json.loads((folder / "evaluation.json").read_text())
    assert "num_steps=7" in more["last"]["attack"]
    assert list(more) == ["last"]


def test_report_puts_the_seeds_into_one_row(runs, tmp_path):
    output = call("report", runs[0], "--out", tmp_path / "table.md")
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0].startswith("| dataset | method | optimizer |")
    assert rows[2].endswith("| 2 |")
    assert len(rows) == 3
    assert rows[2] in output


def test_every_setting_of_a_run_is_an_option(runs):
    help_text = call("train", "--help")
    for name in RunConfig().to_dict():
        assert f"--{name.replace('_', '-')}" in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "cifar"], "is not digits or fashion-mnist or cifar10"),
        (["train", "--lr", "fast"], "'fast' is not a number such as 0.03 or 8/255"),
        (["train", "--epochs", "1.5"], "'1.5' is not a whole number"),
        (["train", "--lr", "-1"], "lr must be above 0, got -1.0"),
        (["train", "--wide", "1"], "no such option '--wide'; the options are --dataset, --subset"),
        (["report", "x", "--wide"], "no such option '--wide'; the options are --out, -h"),
        (["train", "--out", ""], "'--out': the path is empty; '.' is the present folder"),
        (["train", "--data-root", ""], "the path is empty"),
        (["evaluate", ""], "the path is empty"),
        (["report", "x", "--out", ""], "the path is empty"),
        (["train", "--seed", ""], "'' is not a whole number"),
        (["train", "--lr", f"{10**400}/1"], "is not a number such as 0.03 or 8/255"),
        (["train", "--wd", "1"], "--weight-decay"),
        (["train", "--device", "gpu"], "cannot use device 'gpu'"),
        (["train", "--dataset", "cifar10", "--data-root", "nowhere"], "prepare.py cifar10"),
        (["evaluate", "nowhere"], "nowhere is not a run directory"),
        (["report", "nowhere"], "there is no run in nowhere"),
        (["trian"], "the commands are demo, evaluate, report, run, train"),
    ],
)
def test_mistakes_get_one_line_that_names_what_is_valid(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = 1 if "must be" in message or "nowhere" in arguments or "gpu" in arguments else 2
    assert message in " ".join(call(*arguments, code=code).split())


def test_fractions_and_flags_reach_the_config(monkeypatch):
    seen = []
    monkeypatch.setattr("engm.training.fit", lambda config, *a, **k: seen.append(config) or 1 / 0)
    CliRunner().invoke(main, ["train", "--eps", "8/255", "--scale", "2", "--channels-last"])
    assert (seen[0].eps, seen[0].scale, seen[0].channels_last) == (8 / 255, 2.0, True)


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    arguments = ["train", *SMALL[:-4], "--epochs", "3000", "--device", "cpu", "--out", tmp_path]
    code = f"from engm.cli import main; main({[str(a) for a in arguments]!r})"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint-last.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("stopped; the same command goes on after the last whole epoch\n")


def test_a_loss_that_is_not_finite_is_said_in_one_line(tmp_path):
    output = call("train", *SMALL, "--lr", "1e20", "--out", tmp_path, code=1)
    assert "Error: epoch" in output and "A smaller lr may help" in output


def test_a_reader_that_leaves_early_is_no_error(monkeypatch):
    def collect(root):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("engm.results.collect", collect)
    assert call("report", "runs", code=1) == ""


def test_names_that_are_not_unicode_are_paths_too(runs, tmp_path):
    folder = tmp_path / "\udcff ü 😀"
    try:
        shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    except OSError:
        pytest.skip("this file system takes Unicode names alone")
    assert "evaluation.json" in call("evaluate", folder, "--device", "cpu")
    assert "1 |" in call("report", folder, "--out", folder / "table.md")
    (folder / "result.json").unlink()
    assert "no finished run" in call("report", folder)


def test_unfinished_runs_are_named_and_a_run_that_is_given_twice_is_refused(runs, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    (folder / "result.json").unlink()
    assert f"left out, not finished: {folder}" in call("report", runs[0], folder)
    assert "hold the same run" in call("report", runs[0], runs[0], code=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_said(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in call("train", *SMALL, "--out", tmp_path / "runs", code=1)


def test_a_file_where_the_folder_should_be_is_said(tmp_path):
    (tmp_path / "runs").write_text("")
    assert "runs" in call("train", *SMALL, "--out", tmp_path / "runs", code=1)
