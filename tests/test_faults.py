"""Full disks, other processes, wrong clocks, damaged files: nothing that was complete is lost.

`kill -9` of a training run, files cut by it and the checks of single files are tested beside the
code they are about, in test_training.py, test_runs.py, test_files.py and test_data.py.
"""

import ctypes
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from engm import data, runs
from engm import data as data_cache
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError
from engm.evaluation import accuracy as evaluation
from engm.evaluation.accuracy import load_model
from engm.evaluation.autoattack import kept
from engm.preparation import caches
from engm.preparation.layouts import Contents
from engm.runs import load_tensors, save_tensors
from engm.training import fit

TINY = RunConfig(subset=20, width=4, num_steps=1, eval_steps=1, epochs=3, batch_size=10, seed=3)
ARGUMENTS = [
    f"--{name.replace('_', '-')}={getattr(TINY, name)}"
    for name in ("subset", "width", "num_steps", "eval_steps", "epochs", "batch_size", "seed")
]
FILES = ("config.json", "metrics.jsonl", "checkpoint-last.pt", "checkpoint-best.pt", "result.json")


def fit_quietly(out):
    return fit(TINY, out, device="cpu", progress=False)


def call(*arguments, code=0):
    """Runs the command `engm`; a failure has to be one line. Gives what it printed."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert code == 0 or isinstance(result.exception, SystemExit), result.exception
    return result.output if code == 0 else result.output[result.output.index("Error: ") :]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nobody disturbed."""
    return fit_quietly(tmp_path_factory.mktemp("runs")).folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it whose last step, the evaluation, is still to be done."""
    copy = Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))
    (copy / "result.json").unlink()
    return copy


def contents(folder):
    files = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def assert_same(folder, finished):
    """Bitwise the weights, metrics and results of the undisturbed run, and nothing left over."""
    for which in ("last", "best"):
        name = f"checkpoint-{which}.pt"
        mine, theirs = load_tensors(folder / name)["model"], load_tensors(finished / name)["model"]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    found, expected = (
        [{**json.loads(line), "seconds": 0} for line in (f / "metrics.jsonl").open()]
        for f in (folder, finished)
    )
    assert found == expected
    found, expected = (json.loads((f / "result.json").read_text()) for f in (folder, finished))
    assert {**found, "environment": 0} == {**expected, "environment": 0}
    assert not list(folder.glob(".*"))


# --- two processes at one run, and a clock

# its clock runs back, from 1982
CHILD = """
import itertools, time
hours = itertools.count(110_000, -1)
time.time = lambda: 3600.0 * next(hours)
time.time_ns = lambda: 3600 * 10**9 * next(hours)
import sys, torch
from engm import runs, training
from engm.config import RunConfig
torch.set_num_threads({threads})
append = runs.append_metrics

def pausing(folder, line):
    append(folder, line)
    if line["epoch"] == 2:
        print("paused", flush=True)
        sys.stdin.readline()

runs.append_metrics = pausing
training.fit(RunConfig(**{config!r}), {out!r}, device="cpu", progress=False)
"""


@contextmanager
def another_process(out):
    """A process that trains the run in `out`, and waits in its second epoch for a line."""
    code = CHILD.format(threads=torch.get_num_threads(), config=TINY.to_dict(), out=str(out))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    try:
        assert process.stdout.readline() == "paused\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_the_first_completes_unharmed(finished, tmp_path):
    folder = tmp_path / TINY.name
    with another_process(tmp_path) as process:
        (folder / ".metrics.jsonl.0a1b2c3d.tmp").write_bytes(b"of a write that goes on")
        before = contents(folder)
        with pytest.raises(InputError, match="another process is at work in .*; wait for it, or s"):
            fit_quietly(tmp_path)
        message = call("train", *ARGUMENTS, "--device", "cpu", "--out", tmp_path, code=1)
        assert f"another process is at work in {folder}; wait for it" in message
        assert message.count("\n") == 1
        assert contents(folder) == before
        # what is there already can be read and attacked meanwhile
        options = ["--images", "10", "--num-steps", "1", "--checkpoint", "last", "--device", "cpu"]
        assert "last checkpoint: 10 examples" in call("evaluate", folder, *options)
        assert "no finished run" in call("report", tmp_path)
        assert {name: (folder / name).read_bytes() for name in before} == before
        (folder / ".metrics.jsonl.0a1b2c3d.tmp").unlink()
        process.communicate("go on\n", timeout=120)
        assert process.returncode == 0
    assert_same(folder, finished)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert all(line["seconds"] >= 0 for line in lines)


def test_neither_the_lock_of_a_killed_process_nor_its_clock_is_an_obstacle(finished, tmp_path):
    folder = tmp_path / TINY.name
    with another_process(tmp_path) as process:
        process.kill()
        process.wait()
        assert (folder / ".lock").exists()
        assert_same(fit_quietly(tmp_path).folder, finished)


# --- a full disk


@contextmanager
def files_of_at_most(size):
    """A limit of the system on how long a file may get; what is beyond it is not written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("module", "writer", "name", "time"),
    [
        (runs, "write_json", "config.json", 1),
        (runs, "append_metrics", "metrics.jsonl", 2),
        (runs, "save_tensors", "checkpoint-best.pt", 1),
        (runs, "save_tensors", "checkpoint-last.pt", 2),
        (evaluation, "save_tensors", "adversarial-best.pt", 1),
        (runs, "write_json", "result.json", 1),
    ],
)
def test_a_write_that_is_cut_short_costs_nothing(
    module, writer, name, time, finished, tmp_path, monkeypatch
):
    write, times, before = getattr(module, writer), [], {}

    def cut_short(path, *values):
        path = path / name if path.is_dir() else path
        times.extend([path.name] * (path.name == name))
        if path.name != name or len(times) != time:
            return write(path.parent if writer == "append_metrics" else path, *values)
        before.update(contents(path.parent))
        with files_of_at_most(40 + (len(before[name]) if name == "metrics.jsonl" else 0)):
            write(path.parent if writer == "append_metrics" else path, *values)

    monkeypatch.setattr(module, writer, cut_short)
    with pytest.raises(OSError, match="ake room, and make the same call again") as caught:
        fit_quietly(tmp_path)
    assert name in str(caught.value)
    monkeypatch.undo()
    after = contents(tmp_path / TINY.name)
    if name == "metrics.jsonl":  # the one file that grows; what follows its last line is no line
        assert len(after[name]) == len(before[name]) + 40
        after[name] = before[name]
    assert after == before
    assert_same(fit_quietly(tmp_path).folder, finished)


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "engm-test", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a disk can be mounted here by root alone, or not at all")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("room", [0, 24_000, 130_000])
def test_on_a_full_disk_the_command_says_so_and_goes_on_when_there_is_room(room, disk, finished):
    (disk / "others").write_bytes(bytes(2**20 - room))
    command = ["train", *ARGUMENTS, "--device", "cpu", "--out", disk / "runs"]
    message = call(*command, code=1)
    assert re.search("No space left on device|is the disk full", message)
    assert "ake room, and make the same call again" in message
    assert message.count("\n") == 1
    folder = disk / "runs" / TINY.name
    there = contents(folder) if folder.exists() else {}
    assert not [name for name in there if name.endswith(".tmp")]
    assert ("config.json" in there, "checkpoint-last.pt" in there) == (room > 0, room > 100_000)
    assert "result.json" not in there
    for name in set(there) & {"checkpoint-last.pt", "checkpoint-best.pt"}:
        load_tensors(folder / name)
    (disk / "others").unlink()
    call(*command)
    assert_same(folder, finished)


# --- folders that cannot be written to


@contextmanager
def subject_to_permissions():
    """Takes from root, for a while, the right to write whatever the permissions say (Linux)."""
    if os.geteuid() != 0:
        yield
        return
    system = ctypes.CDLL(None)
    if not hasattr(system, "capset"):
        pytest.skip("root may write everywhere")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    rights = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    assert system.capget(header, rights) == 0
    before = rights[0]
    rights[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE
    assert system.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = before
        assert system.capset(header, rights) == 0


def test_an_unwritable_folder_is_said_with_what_to_do(folder, finished, tmp_path):
    closed, runs = tmp_path / "closed", folder.parent
    closed.mkdir()
    before = contents(folder)
    closed.chmod(0o555)
    folder.chmod(0o555)
    try:
        with subject_to_permissions():
            for out, named in ((closed, closed), (closed / "new", closed / "new"), (runs, folder)):
                message = call("train", *ARGUMENTS, "--device", "cpu", "--out", out, code=1)
                assert "Permission denied; choose a folder that can be written to: '" in message
                assert str(named) in message and message.count("\n") == 1
            with pytest.raises(PermissionError, match="choose a folder that can be written to"):
                save_tensors(closed / "chunk.pt", {})
            assert "choose a folder" in call("evaluate", folder, "--images", "10", code=1)
    finally:
        closed.chmod(0o755)
        folder.chmod(0o755)
    assert list(closed.iterdir()) == []
    assert contents(folder) == before
    assert_same(fit_quietly(runs).folder, finished)


# --- files that are cut, changed, or from somewhere else


class Hostile:
    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return os.system, (f"touch '{self.trap}'",)


def cut(path, trap):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path, trap):
    path.write_bytes(b"")


def flipped(path, trap):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        stored = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)


def plain_pickle(path, trap):
    path.write_bytes(pickle.dumps(Hostile(trap)))


def foreign(path, trap):
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "extra": Hostile(trap)}, path)


def foreign_and_old(path, trap):
    torch.save({"extra": Hostile(trap)}, path, _use_new_zipfile_serialization=False)


DAMAGES = [cut, empty, flipped, plain_pickle, foreign, foreign_and_old]


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_and_ours_is_refused(
    damage, which, folder, finished, tmp_path
):
    path, trap = folder / f"checkpoint-{which}.pt", tmp_path / "trap"
    damage(path, trap)
    before = contents(folder)
    remedy = rf"checkpoint-{which}\.pt is not a file of this kit, .*; delete {folder} and run again"
    with pytest.raises(InputError, match=remedy):
        load_model(folder, which, data.load("digits", subset=20))
    message = call("train", *ARGUMENTS, "--device", "cpu", "--out", folder.parent, code=1)
    assert re.search(remedy, message) and message.count("\n") == 1
    assert not trap.exists()
    after = contents(folder)
    assert {name: after[name] for name in FILES[:-1]} == {n: before[n] for n in FILES[:-1]}
    assert "result.json" not in after
    if damage is foreign:  # what the message says is enough
        shutil.rmtree(folder)
        assert_same(fit_quietly(folder.parent).folder, finished)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_chunk_that_is_not_whole_and_ours_is_refused(damage, tmp_path):
    path, trap, cpu = tmp_path / "chunk.pt", tmp_path / "trap", torch.device("cpu")
    for make in (lambda: {"broken": torch.ones(100)}, lambda: 1 / 0):
        assert torch.equal(kept(path, cpu, make)["broken"], torch.ones(100))
    damage(path, trap)
    with pytest.raises(InputError, match="chunk.pt (is not a file of this kit|must hold a dict)"):
        kept(path, cpu, lambda: 1 / 0)
    assert not trap.exists()


def test_the_traps_would_work(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "first")))
    torch.save({}, tmp_path / "a.pt")
    for number, damage in enumerate((foreign, foreign_and_old)):
        damage(tmp_path / "a.pt", tmp_path / f"trap {number}")
        torch.load(tmp_path / "a.pt", weights_only=False)
        assert (tmp_path / f"trap {number}").exists()
    assert (tmp_path / "first").exists()


@pytest.mark.parametrize("left", [None, 0, 0.5])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_a_file_that_is_missing_or_half_is_noticed_and_can_be_had_again(
    name, left, folder, finished
):
    shutil.copy(finished / "result.json", folder)  # a finished run
    path, out = folder / name, folder.parent
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    before = contents(folder)
    if name == "result.json" and left is None:
        return assert_same(fit_quietly(out).folder, finished)
    with pytest.raises(InputError, match=name) as caught:
        fit_quietly(out)
    assert contents(folder) == before
    message = str(caught.value)
    if name == "config.json" and left is None:
        assert "has lost its config.json; delete it" in message
    elif name == "metrics.jsonl":
        epochs = 0 if not left else path.read_bytes().count(b"\n")
        assert f"has {epochs} of 3 epochs; delete {folder} and run again" in message
    else:
        assert "delete it" in message
        path.unlink()
        if name == "config.json":  # a finished run gets none made up for it
            (folder / "result.json").unlink()
        assert_same(fit_quietly(out).folder, finished)


def test_an_unfinished_run_whose_metrics_are_gone_does_not_go_on_without_them(folder):
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"has 0 of 3 epochs; delete .* and run again"):
        fit_quietly(folder.parent)
    assert (folder / "checkpoint-last.pt").exists()


# --- the cache of the datasets


def test_a_cache_of_which_half_was_replaced_is_refused_and_made_anew(tmp_path, monkeypatch):
    spec = replace(data_cache.SPECS["cifar10"], train_count=20, test_count=10)
    monkeypatch.setitem(data_cache.SPECS, "cifar10", spec)

    def write(value):
        arrays = {"train_labels": np.arange(20, dtype=np.uint8) % 10}
        arrays["test_labels"] = np.arange(10, dtype=np.uint8)
        for part, count in (("train", 20), ("test", 10)):
            arrays[f"{part}_images"] = np.full((count, 3, 32, 32), value, np.uint8)
            arrays[f"{part}_images"][0] = 0
        assert spec.class_names
        found = Contents(arrays, spec.class_names, spec.title)
        return caches.write_cache(spec, found, tmp_path, "here", tmp_path)

    def cached():
        return data_cache.read_arrays(spec, tmp_path)[0]["test_images"][1:]

    cache = write(1)
    assert (cached() == 1).all()
    whole = cache.read_bytes()
    remedy = "make room, and make the same call again"
    with files_of_at_most(1000), pytest.raises(OSError, match=remedy):
        write(2)
    assert cache.read_bytes() == whole
    assert (cached() == 1).all()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "write_json", killed)  # between the arrays and what is said of them
    with pytest.raises(KeyboardInterrupt):
        write(2)
    monkeypatch.undo()
    with pytest.raises(InputError, match="cifar10.npz is not what .* make it anew: `engm prep"):
        data_cache.read_arrays(spec, tmp_path)
    for size in range(0, len(whole), len(whole) // 7):
        cache.write_bytes(whole[:size])
        with pytest.raises(InputError, match="make it anew: `engm prepare cifar"):
            data_cache.read_arrays(spec, tmp_path)
    write(3)
    assert (cached() == 3).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10.json", "cifar10.npz"]
