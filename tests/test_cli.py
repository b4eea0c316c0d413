import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from click.testing import CliRunner

from engm import training
from engm.cli import main
from engm.config import RunConfig
from engm.runs import load_tensors, read_config, write_json

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
        assert "lr                0.1" in output and "beta              default" in output
        assert f"training, then attacking the test images, in {folder}" in output
        assert f"next: engm evaluate {folder} attacks it in more ways" in output
        assert "| Digits | pgd_at | msgd |" in output
        result = json.loads((folder / "result.json").read_text())
        n, part = result["best"]["num_examples"], result["best"]["robust_accuracy"]
        (low, high), *_ = re.findall(r"robust \(best\) ([\d.]+) to ([\d.]+)", output)
        # Wilson's ends are where the normal interval of the end itself reaches what was seen
        for end in (float(low) / 100, float(high) / 100):
            assert abs(part - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, abs=2e-3)
        assert f"95% intervals, from {n} test images" in output


def test_a_recipe_is_overridden_by_what_is_given_alone_even_where_that_is_the_default(
    monkeypatch, tmp_path
):
    seen = []

    def fit(config, *args, **kwargs):
        seen.append(config.to_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(training, "load_data", lambda *_: SimpleNamespace())
    monkeypatch.setattr(training, "expected_seconds", lambda *left: 86_400 * left[-1])
    command = ["train", "--recipe", "mart", "--lr", "0.1", "--device", "cpu", "--out", tmp_path]
    output = call(*command, code=130)
    published = dict(recipe="mart", dataset="cifar10", weight_decay=3.5e-3, eps=0.031, epochs=120)
    assert seen[0].items() >= (published | {"lr": 0.1}).items()
    assert "recipe mart: YisenWang/MART, train_resnet.py; options override it" in output
    assert "this takes up to about 120 days, by the time of one pass" in output
    assert "a quick try: --subset 500 --width 8" in output
    assert ", wants a GPU; quicker: --model preact_resnet18" in output
    few = "--subset", "500", "--test-images", "100"
    assert "a quick try" not in call(*command, *few[:2], code=130)
    assert "a quick try" in call(*command, "--subset", 1000, code=130)  # it attacks all test images
    assert "a quick try" not in call(*command, "--subset", 1000, *few[2:], code=130)
    assert seen[1]["subset"] == 500
    assert "grey levels" not in output
    tiny = call(*command, "--eps", "0.0001", code=130)
    assert "eps is 0.0255 grey levels of 255; no image of 8 bits has that" in tiny
    assert "no effect" not in call(*command, "--scale", "1", "--optimizer", "engm", code=130)
    idle = call(*command, "--scale", "1", "--optimizer", "msgd", code=2)
    assert "--scale has no effect with msgd; leave it out, or take an --optimizer" in idle
    idle = call(*command, "--max-norm", "2", "--optimizer", "engm", code=2)
    assert "--max-norm has no effect with engm" in idle and "reads it: msgd-clip" in idle


def test_training_that_ends_near_chance_is_said_at_once(tmp_path):
    command = "--epochs", "1", "--subset", "30", "--test-images", "50", "--lr", "1e-6"
    command = *command, "--step-size", "0.5", "--out", tmp_path
    said = call("train", *command)
    assert "near chance: best in 1, last in 1 of 1 seeds (a robust accuracy of at most" in said
    assert "--step-size 0.5 is more than twice --eps 0.15: a single step" in said


def test_evaluate_attacks_both_checkpoints_and_leaves_what_training_recorded(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    recorded = json.loads(before["result.json"])
    output = call("evaluate", folder, "--device", "cpu")
    for which in ("best", "last"):
        found = json.loads((folder / f"evaluation-{which}.json").read_text())
        assert found["checkpoint"] == which
        assert found["num_examples"] == 797
        # two steps of 1.25 eps, as the run itself was evaluated with
        attack = found["attacks"]["PGD-2 cross-entropy"]
        assert attack["accuracy"] == recorded[which]["robust_accuracy"]
        assert found["clean"]["accuracy"] == recorded[which]["clean_accuracy"]
        assert (folder / f"evaluation-{which}" / attack["file"]).exists()
        assert (folder / f"robustness-{which}.png").exists()
        assert f"{which} checkpoint: 797 examples, linf eps 0.15, seed 0" in output
    assert f"attacking the best and the last checkpoint of {folder} on 797 test images" in output
    assert f"next: engm report {tmp_path} shows it beside the other runs" in output
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "| **worst case** |" in output and "**large eps**" in output


def test_evaluate_takes_a_checkpoint_steps_eps_and_images(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    options = ["--checkpoint", "last", "--num-steps", "3", "--eps", "8/255", "--images", "20"]
    output = call("evaluate", folder, *options, "--device", "cpu")
    assert "last checkpoint: 20 examples, linf eps 0.0313725, seed 0" in output
    assert "| PGD-3 margin |" in output
    assert not (folder / "evaluation-best.json").exists()


def test_evaluate_runs_autoattack_when_it_is_asked(runs, monkeypatch):
    seen, remarks = [], []

    def evaluate_checkpoint(run, which, data, **how):
        seen.append((which, how))
        return SimpleNamespace(remark="it stays" if which in remarks else "")

    monkeypatch.setattr("engm.evaluation.suite.evaluate_checkpoint", evaluate_checkpoint)
    folder = sorted(runs[0].iterdir())[0]
    output = call("evaluate", folder, "--autoattack", "--device", "cpu")
    usual = dict(eps=None, num_steps=None, images=None, progress=True)
    assert seen == [(which, {**usual, "autoattack": True}) for which in ("best", "last")]
    assert "shows it beside the other runs" in output
    remarks.append("best")  # of which another evaluation is the one that a report reads
    output = call("evaluate", folder, "--device", "cpu")
    assert "shows it" not in output and "move evaluation-best.json out" in output


def test_report_puts_the_seeds_into_one_row(runs, tmp_path):
    output = call("report", runs[0], "--out", tmp_path / "table.md")
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0].startswith("| dataset | method | optimizer |")
    assert rows[2].endswith("| 2 |")
    assert sum(row.startswith("|") for row in rows) == 3
    assert rows[2] in output
    assert "rows of one seed" not in output
    folder = sorted(runs[0].iterdir())[0]
    result = json.loads((folder / "result.json").read_text())
    n, z = result["last"]["num_examples"], 1.959964
    widths = [
        200 * z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
        for p in (result[which]["robust_accuracy"] for which in ("best", "last"))
    ]
    one = f"rows of one seed have no deviation.* of up to {max(widths):.1f} points"
    assert re.search(one, call("report", folder))


def test_report_compares_writes_and_draws(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs[0], root)
    for seed in (0, 1):
        call("train", *SMALL, "--optimizer", "engm", "--lr", "0.2", "--seed", seed, "--out", root)
    out, figures = tmp_path / "out", tmp_path / "figures"
    options = ["--choose", "lr", "--compare", "msgd", "--out", out, "--figures", figures]
    output = call("report", root, *options)
    assert "| msgd, lr 0.1 | robust (best) |" in output
    assert "fewer than 3 pairs: nothing is concluded" in output
    assert f"written to {out / 'report.html'}" in output
    assert {p.name for p in figures.iterdir()} == {
        *("best_and_last.png", "differences.png", "learning_curves.png")
    }
    assert call("report", root, "--format", "csv").startswith("dataset,method,optimizer,lr,clean")
    assert "<!doctype html>" in call("report", root, "--format", "html")
    assert "no run of msgd to pair with" in call("report", root, "--compare", "msgd")
    assert "would be latex" in call("report", "x", "--out", "a.tex", "--format", "csv", code=1)
    assert "extension is none of" in call("report", "x", "--out", tmp_path / "a.pdf", code=1)


@pytest.mark.parametrize("option", ["--figures", "--out", "--logs"])
def test_report_says_where_it_cannot_write_and_what_to_do(runs, tmp_path, option):
    file = tmp_path / "file"
    file.write_text("")
    # nobody writes to /proc, not even root
    for place in (file, file / "figures", Path("/proc/figures")):
        said = call("report", runs[0], option, place, code=1)
        assert f"Error: {place} cannot be written to (" in said
        assert "; give another" in said and "Errno" not in said
    assert file.read_text() == ""


def test_report_takes_of_a_run_that_two_versions_made_the_last(runs, tmp_path):
    source = sorted(runs[0].iterdir())[0]
    for version in ("0.1.0", "0.0.9"):
        shutil.copytree(source, tmp_path / f"engm-{version}" / source.name)
    os.utime(tmp_path / "engm-0.0.9" / source.name / "result.json", (0, 0))
    output = call("report", tmp_path)
    old = tmp_path / "engm-0.0.9" / source.name
    assert output.splitlines()[2].endswith("| 1 |")
    assert f"left out, made again by another version: {old}\n" in output
    assert "next: --out report.html makes a page of it" in output


def test_report_mixes_what_was_not_evaluated_alike_only_when_told(runs, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    for name in ("config.json", "result.json"):
        text = (folder / name).read_text().replace('"eval_steps": 2', '"eval_steps": 9')
        (folder / name).write_text(text)
    output = call("report", runs[0], folder, code=1)
    assert "not evaluated alike: eval_steps 2 (2 runs), 9 (1 run)" in output
    assert f"differs from most is {folder}" in output
    assert "| eval_steps |" in call("report", runs[0], folder, "--mixed")


def test_every_setting_of_a_run_is_an_option(runs):
    help_text = call("train", "--help")
    for name in RunConfig().to_dict():
        assert f"--{name.replace('_', '-')}" in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--dataset", "cifar"],
            "or tiny-imagenet; the kit knows these data alone, images of your own",
        ),
        (["train", "--lr", "fast"], "'fast' is not a number such as 0.03 or 8/255"),
        (["train", "--epochs", "1.5"], "'1.5' is not a whole number"),
        (["train", "--lr", "-1"], "lr must be above 0, got -1.0"),
        (["train", "--optimiser", "engm"], "did you mean --optimizer?"),
        (
            ["train", "--wide", "1"],
            "did you mean --width? the options are --recipe, --dataset",
        ),
        (["report", "x", "--wide"], "no such option '--wide'; the options are --compare, --choose"),
        (["train", "--out", ""], "'--out': the path is empty; '.' is the present folder"),
        (["train", "--data-root", ""], "the path is empty"),
        (["evaluate", ""], "the path is empty"),
        (["report", "x", "--out", ""], "the path is empty"),
        (["train", "--seed", ""], "'' is not a whole number"),
        (["train", "--lr", f"{10**400}/1"], "is not a number such as 0.03 or 8/255"),
        (["train", "--wd", "1"], "--weight-decay"),
        (["train", "--opt", "engm"], "did you mean --optimizer?"),
        (["train", "--learning-rate", "0.2"], "did you mean --lr?"),
        (["sweep", "train", "--grid", "learning_rate=0.1"], "did you mean lr?"),
        (["report", "ROOT", "--choose", "learning_rate"], "did you mean lr?"),
        (["train", "--awp", "5"], "awp must be at most 1, got 5.0"),
        (
            ["train", "--validation-images", "2000"],
            "validation_images must be a whole number",
        ),
        (["evaluate", "RUN", "--images", "100000"], "--images must be a whole number, 1 to 797"),
        (["prepare", "cifar10", "--arch", "x"], "did you mean --archive?"),
        (["prepare", "cifar10", "--archive", "nope"], "there is no file or folder nope"),
        (["bench", "--methods", "exakt"], "unknown method 'exakt'; choose one of msgd, exact"),
        (["bench", "--what", "training", "--methods", "exakt"], "unknown method 'exakt'; name"),
        (["sweep", "train", "--set", "dataset=cifar100"], "engm prepare cifar100"),
        (["sweep", "06_cifar", "--set", "dataset=cifar100"], "engm prepare cifar100"),
        (["train", "--lr", "0.1", "--lr=0.2"], "--lr is given twice; give it once"),
        (["train", "--compile", "--no-compile"], "--compile is given twice"),
        (["train", "--method", "trade"], "; did you mean trades?"),
        (["prepare", "--archive", "x"], "of which data set? engm prepare NAME --archive x"),
        (["prepare", "cifar"], "'cifar' is not one of fashion-mnist, cifar10, cifar100, tiny"),
        (["prepare", "digits"], "the digits come with scikit-learn and need no preparation"),
        (["evaluate", "x", "--images", "0"], "'0' is not a whole number from 1 on"),
        (["evaluate", "FILE"], "config.json is a file; give its folder, /"),
        (["train", "--device", "gpu"], "cannot use device 'gpu'"),
        (["train", "--dataset", "cifar10", "--data-root", "nowhere"], "engm prepare cifar10"),
        (["evaluate", "RUN", "--device", "gpu"], "cannot use device 'gpu'"),
        (["evaluate", "nowhere"], "there is no such folder; `engm train` makes one"),
        (["run", "06_cifar", "-p", "epochs", "0"], "epochs must be at least 1"),
        (["run", "06_cifar", "-p", "eps", "8"], "eps must be"),
        (["run", "06_cifar", "-p", "seeds", "[1, 2, 1]"], "seeds = [1, 2, 1] counts a seed twice"),
        (["sweep", "train", "--set", "lr"], "requires 2 arguments. Write --set NAME VALUE."),
        (
            ["sweep", "train", "--set", "epochs", "--out", "q"],
            "--set epochs has no value; write --set NAME VALUE",
        ),
        (["sweep", "train", "--set", "ls=0.2"], "unknown setting ls; the settings are"),
        (["run", "06_cifar", "-p", "learning_rate=1"], "; did you mean lr? 06_cifar takes"),
        (["run", "06_cifar", "-p", "lr=x"], "lr = 'x' is not of type float"),
        (["train", "--optimizer", "ENGM"], "did you mean engm?"),
        (["train", "--awp-warmup", "3"], "--awp-warmup is 3, but there is no awp; try --awp 0.01"),
        (
            ["train", "--device", "cpu", "--capture"],
            "--capture records CUDA graphs, and this is a cpu",
        ),
        (["train", "--no-compile=1"], "Option '--no-compile' does not take a value."),
        (["sweep", "trian", "--grid", "lr=0.1"], "or train, for training runs"),
        (["train", "--subset", "801"], "subset must be a whole number, 1 to 800; got 801"),
        (["report", "nowhere"], "there is no folder /"),
        (["report", "FILE"], "config.json is a file; give its folder, /"),
        (["evaluate", "ROOT"], "is not a run directory, but holds some; give one of digits-pgd_at"),
        (["trian"], "'trian'; did you mean train? the commands are bench, colab, "),
    ],
)
def test_mistakes_get_one_line_that_names_what_is_valid(
    arguments, message, runs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = next(runs[0].iterdir())
    places = {"RUN": run, "FILE": run / "config.json", "ROOT": runs[0]}
    arguments = [places.get(a, a) for a in arguments]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    output = " ".join(result.output.split())
    assert message in output
    usage = "Usage: " in output or "does not take a value" in output
    assert result.exit_code == (2 if usage else 1)
    assert "Traceback" not in output and isinstance(result.exception, SystemExit)
    assert not any(
        word in output for word in ("training, then", "attacking", "measuring", "Reading")
    )


def test_every_option_arrives(monkeypatch):
    seen = []
    monkeypatch.setattr("engm.training.fit", lambda *a, **k: seen.extend((*a, k)) or 1 / 0)
    monkeypatch.setattr("engm.training.load_data", lambda config, root: (config, root))
    arguments = [
        "train",
        "--eps",
        "8/255",
        "--optimizer",
        "engm",
        "--scale",
        "2",
        "--channels-last",
        "--out",
        "o",
    ]
    arguments += ["--device", "cpu", "--data-root", "d", "--no-save-adversarial"]
    CliRunner().invoke(main, arguments)
    config, out, others = seen
    expected = RunConfig(optimizer="engm", eps=8 / 255, scale=2.0, channels_last=True).resolved()
    assert (config, out) == (expected, Path("o"))
    dataset = expected, Path("d")
    assert others == {"device": "cpu", "dataset": dataset, "save_adversarial": False}
    del seen[:]
    CliRunner().invoke(main, ["train"])
    assert seen[:2] == [RunConfig().resolved(), Path("runs")]


def test_help_and_version():
    assert call("train", "-h") == call("train", "--help")
    help_text = " ".join(call("train", "-h").split())
    assert "[linf|l2]" in help_text and "[mean|float]" in help_text and "INT" in help_text
    assert "[default: 0.1]" in help_text
    assert call("--version").startswith("main, version") or "version" in call("--version")


@pytest.mark.skipif(sys.platform != "linux", reason="reads what GNU's OpenMP says")
def test_threads_of_a_command_do_not_spin_while_they_wait(tmp_path):
    environment = os.environ | {"OMP_DISPLAY_ENV": "verbose"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, "-m", "engm", "evaluate", str(tmp_path / "nowhere")]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    # OpenMP itself says, when torch loads it, what it was told.
    assert "GOMP_SPINCOUNT = '0'" in shown.stderr


def test_run_hands_on_its_values_and_fails_with_the_notebook(monkeypatch, tmp_path):
    from engm.lab import batch as notebooks

    seen = []
    error = notebooks.NotebookError(3, "source", "ValueError", "no")

    def run(path, values, **how):
        seen.append((path.stem, values, how))
        return notebooks.NotebookRun(
            "n", tmp_path / "n.ipynb", 1.0, None if len(seen) == 1 else error
        )

    monkeypatch.setattr(notebooks, "run", run)
    name = notebooks.available()[0].stem
    output = call("run", name, "--out", tmp_path, "--timeout", 7).splitlines()
    assert output[0] == f"running {name} with its defaults, in {tmp_path}"
    assert output[-2:] == [str(tmp_path / "n.ipynb"), f"next: jupyter lab {tmp_path / 'n.ipynb'}"]
    assert seen == [(name, {}, {"output_dir": tmp_path, "timeout": 7.0})]
    assert f"{name} failed in cell [3] (source): ValueError: no" in call("run", name, code=1)
    call("run", "09_results", "-p", "runs", "sweep", "--out", tmp_path, code=1)
    assert seen[-1][1] == {"runs": str(Path("sweep").resolve())}  # not in the folder of --out
    cell = nbformat.v4.new_code_cell("runs = 3", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "own.ipynb")
    call("run", tmp_path / "own.ipynb", "-p", "runs", 5, "--out", tmp_path / "o", code=1)
    assert seen[-1][1] == {"runs": 5}  # no folder
    assert "there is no parameter 'nonsense'" in call("run", name, "-p", "nonsense", 1, code=1)
    told = call("run", "06_cifar", "-p", "out", "runs/a", "--out", tmp_path, code=1)
    assert f"kept in {tmp_path / 'runs' / 'a'}, and" in told  # not in ./runs/a
    assert "-p out FOLDER keeps them" in call("run", "06_cifar", "--out", tmp_path, code=1)
    twice = call("run", name, "-p", "lr", "0.1", "-p", "lr", "0.2", code=1)
    assert "lr is set twice; leave one of them out" in twice


def test_run_and_demo_say_what_takes_hours_and_how_to_go_on_after_ctrl_c(monkeypatch, tmp_path):
    from engm.lab import batch as notebooks
    from engm.lab import page as report

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "run", stop)
    monkeypatch.setattr(report, "run", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ENGM_DATA", str(tmp_path / "data"))
    missing = call("run", "06_cifar", "-p", "dataset", "cifar10", code=1)
    assert "CIFAR-10 is not prepared" in missing  # before anything runs
    monkeypatch.setattr("engm.data.recorded_digest", lambda name: "0" * 64)
    again = "has what ran; the same command runs it from the start"
    plain = call("run", "03_engm_step_by_step", "--out", tmp_path, code=130)
    assert plain.endswith(f"stopped; {tmp_path / '03_engm_step_by_step.ipynb'} {again}\n")
    assert "take hours" not in plain and "takes long" not in plain
    large = call("run", "06_cifar", "-p", "dataset", "cifar10", "--out", tmp_path, code=130)
    assert "take hours or more; a quick try: -p subset 500 -p epochs 1" in large
    assert ", with -p out FOLDER it keeps the runs that it trains and goes on with" in large
    kept = call("run", "06_cifar", "-p", "out", "runs/a", "--out", tmp_path, code=130)
    goes_on = f"kept in {tmp_path / 'runs/a'}, and the same command takes them up\n"
    assert kept.endswith(f"stopped; runs that it has trained are {goes_on}")
    demo = call("demo", "--out", tmp_path, code=130)
    assert f"stopped; the notebooks that it ran are kept in {tmp_path}; the same command" in demo


@pytest.mark.parametrize("broken", [False, True])
def test_demo_fails_where_a_notebook_does(broken, monkeypatch, tmp_path):
    from engm.lab import batch as notebooks
    from engm.lab import page as report

    error = notebooks.NotebookError(3, "source", "ValueError", "no") if broken else None
    runs = [notebooks.NotebookRun(n, tmp_path, 1.0, e) for n, e in (("a", error), ("b", None))]
    monkeypatch.setattr(report, "demo", lambda out: runs if out == tmp_path else None)
    call("demo", "--out", tmp_path, code=int(broken))


def stopped_when(there: Callable[[], bool], *arguments: object) -> str:
    """What a command says on its standard error when Ctrl-C meets it at a moment."""
    # a test run in the background of a shell ignores the signal, and hands that on
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heed + f"from engm.cli import main; main({[str(a) for a in arguments]!r})"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    return errors


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    arguments = ["train", *SMALL[:-4], "--epochs", "3000", "--device", "cpu", "--out", tmp_path]
    errors = stopped_when(lambda: any(tmp_path.glob("*/checkpoint-last.pt")), *arguments)
    assert errors.endswith("goes on after the last whole epoch, if there is one\n")
    assert "going on" not in errors
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    done = load_tensors(metrics.parent / "checkpoint-last.pt")["epoch"]
    with open(metrics, "a") as file:  # as a kill before the checkpoint of an epoch leaves it
        file.write("{}\n" * 2)
    cut = len(metrics.read_text().splitlines())
    more = stopped_when(lambda: len(metrics.read_text().splitlines()) > cut, *arguments)
    assert f"going on after epoch {done} of 3000" in more


def test_a_finished_run_that_was_captured_is_shown_where_there_is_no_gpu(runs, tmp_path):
    made = next(runs[0].glob("*-seed0-*"))
    config = replace(read_config(made), capture=True)
    folder = shutil.copytree(made, tmp_path / config.name)
    write_json(folder / "config.json", config.to_dict())
    output = call("train", *SMALL, "--seed", 0, "--capture", "--out", tmp_path)
    assert f"showing the finished run in {folder}" in output


def test_ctrl_c_ends_a_notebook_in_one_line_and_keeps_what_ran(tmp_path):
    sleeps = "open('here', 'w').close(); import time; time.sleep(600)"
    cells = [nbformat.v4.new_code_cell(each) for each in ("n: int = 1", "print(n)", sleeps)]
    cells[0].metadata.tags = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_sleeps.ipynb")
    out = tmp_path / "out"
    command = ["run", tmp_path / "00_sleeps.ipynb", "--out", out]
    errors = stopped_when((out / "here").exists, *command)
    then = "has what ran; the same command runs it from the start"
    assert errors.endswith(f"stopped; {out / '00_sleeps.ipynb'} {then}\n")
    kept = nbformat.read(out / "00_sleeps.ipynb", as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in cells]
    assert kept.cells[1].outputs and "papermill" not in kept.metadata


def test_a_loss_that_is_not_finite_is_said_in_one_line(tmp_path):
    output = call("train", *SMALL, "--lr", "1e20", "--out", tmp_path, code=1)
    assert "Error: epoch" in output and "A smaller lr may help" in output


def test_ctrl_c_elsewhere_is_said_too(monkeypatch):
    def collect(root):
        raise KeyboardInterrupt

    monkeypatch.setattr("engm.report.records.collect", collect)
    assert call("report", "runs", code=130) == "\nstopped\n"


def test_ctrl_c_in_evaluate_says_what_is_kept(runs, monkeypatch):
    from engm.evaluation import suite

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "evaluate_checkpoint", stop)
    output = call("evaluate", next(runs[0].iterdir()), code=130)
    assert output.endswith("has finished; the same command makes it anew\n")


def test_a_reader_that_leaves_early_is_no_error(monkeypatch):
    def collect(root):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("engm.report.records.collect", collect)
    assert call("report", "runs", code=1) == ""


def test_names_that_are_not_unicode_are_paths_too(runs, tmp_path):
    folder = tmp_path / "\udcff ü 😀"
    try:
        shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    except OSError:
        pytest.skip("this file system takes Unicode names alone")
    call("evaluate", folder, "--images", "10", "--device", "cpu")
    assert (folder / "evaluation-best.json").exists()
    assert "1 |" in call("report", folder, "--out", folder / "table.md")
    (folder / "result.json").unlink()
    assert "no finished run" in call("report", folder)


def test_unfinished_runs_are_named_and_a_run_that_is_given_twice_is_refused(runs, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(sorted(runs[0].iterdir())[0], folder)
    (folder / "result.json").unlink()
    said = call("report", runs[0], folder)
    assert f"left out, not finished: {folder}" in said and "--compare msgd" not in said
    alone = call("report", sorted(runs[0].iterdir())[1], folder, "--compare", "adam", code=1)
    assert f"left out, not finished: {folder}" in alone  # before it is refused
    assert "is given twice; give each folder once" in call("report", runs[0], runs[0], code=1)
    shutil.copytree(sorted(runs[0].iterdir())[0], tmp_path / "copy")
    assert "hold the same run" in call("report", runs[0], tmp_path / "copy", code=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_said(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in call("train", *SMALL, "--out", tmp_path / "runs", code=1)


def test_a_file_where_the_folder_should_be_is_said(tmp_path):
    (tmp_path / "runs").write_text("")
    assert "runs" in call("train", *SMALL, "--out", tmp_path / "runs", code=1)
    assert "choose a folder" in call("train", *SMALL, "--out", "/proc/engm", code=1)
