"""Two real processes train one run together."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engm.attacks import FGSM, PGD
from engm.config import RunConfig
from engm.runs import load_tensors, read_metrics, read_result
from engm.training import fit

# the last batch has a single example, which each process takes
CONFIG = RunConfig(
    subset=49, width=4, epochs=2, batch_size=16, num_steps=2, eval_steps=3, lr=0.02, momentum=0.5
)


def launch(config, out, processes=2):
    settings = [
        part
        for name, value in config.to_dict().items()
        if value not in (None, False)
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["-m", "engm", "train", *settings, "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("optimizer", ["msgd", "engm"])
def test_two_processes_train_the_run_of_one(tmp_path, optimizer):
    config = RunConfig(**CONFIG.to_dict() | {"optimizer": optimizer})
    alone = fit(config, tmp_path / "alone", device="cpu", progress=False)
    said = ended(launch(config, tmp_path / "shared"))
    assert said.count("optimizer ") == 2  # the config and the table, once each
    folder = tmp_path / "shared" / config.name
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.folder.iterdir()}
    for ours, theirs in zip(read_metrics(folder), alone.metrics, strict=True):
        for key in ("example_norm", "validation_robust_accuracy", "validation_clean_accuracy"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=0.02)
        # the example of the last batch counts once for each process
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.03)
        assert ours.get("excluded") == theirs.get("excluded")
    weights = load_tensors(folder / "checkpoint-last.pt")["model"]
    expected = load_tensors(alone.folder / "checkpoint-last.pt")["model"]
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_killed_and_started_again_it_goes_on(tmp_path):
    config = RunConfig(**CONFIG.to_dict() | {"epochs": 5, "model_norm": "batch"})
    ended(launch(config, tmp_path / "whole"))
    process = launch(config, tmp_path / "cut")
    folder = tmp_path / "cut" / config.name
    while not (folder / "checkpoint-last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to its processes
    process.communicate(timeout=60)
    assert not (folder / "result.json").exists()
    ended(launch(config, tmp_path / "cut"))
    whole = tmp_path / "whole" / config.name
    first, second = (load_tensors(f / "checkpoint-last.pt")["model"] for f in (folder, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)
    accuracies = [read_result(f)["best"]["robust_accuracy"] for f in (folder, whole)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.1, step_size=0.05, num_steps=2),
        PGD(eps=0.5, step_size=0.2, num_steps=2, norm="l2", restarts=2),
        PGD(eps=0.1, step_size=0.05, num_steps=2, loss="kl", start_noise=0.001),
        PGD(eps=0.1, step_size=0.05, num_steps=3, restarts=2, stop_early=True),
        FGSM(eps=0.1, random_start=True),
        FGSM(eps=0),
    ],
)
def test_a_part_of_a_batch_gets_what_it_gets_with_the_others(attack):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4)).double()
    x, y = torch.rand(7, 1, 4, 4, dtype=torch.float64), torch.randint(4, (7,))

    def attacked(**more):
        return attack(model, x, y, generator=torch.Generator().manual_seed(3), **more)

    for rows in (slice(0, 3), slice(3, 7)):
        torch.testing.assert_close(attacked(rows=rows), attacked()[rows], rtol=0, atol=1e-12)
