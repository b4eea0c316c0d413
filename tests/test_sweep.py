"""Sweeps as real processes, which are killed, interrupted and started again."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import dask
import psutil
import pytest
import torch
from click.testing import CliRunner
from distributed import LocalCluster  # also fills dask.config with its defaults
from filelock import FileLock
from test_sweep_plan import notebook

from engm import sweep
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError
from engm.report.records import collect, near_chance, summarise, to_markdown
from engm.runs import load_tensors, read_config, write_json
from engm.sweep import clusters, running
from engm.sweep.plan import TRAIN, code_version, plan
from engm.training import fit

FIXED = {"subset": 40, "width": 2, "num_steps": 1, "eval_steps": 1}
SETTINGS = [part for name, value in FIXED.items() for part in ("--set", name, str(value))]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PATIENCE = 240


class Sweep:
    """`engm sweep` in a process group of its own, as a shell starts it."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "engm", "sweep", *map(str, arguments)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # tests that run in the background of a shell hand on that Ctrl-C is ignored
        heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, start_new_session=True, preexec_fn=heed, **pipes
        )

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self):
        return [child for child in self.family() if "spawn_main" in " ".join(child.cmdline())]

    def ended(self, code=0):
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == code, err
        assert "Traceback" not in err
        return out, err


@pytest.fixture
def start():
    with ExitStack() as stack:

        def begin(*arguments):
            running = Sweep(*arguments)
            stack.callback(running.process.kill)
            return running

        yield begin


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def results(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}


def at_work(out):
    """Runs that are past their first epoch and not done."""
    folders = [path.parent for path in out.glob("*/*/checkpoint-last.pt")]
    return [folder for folder in folders if not (folder / "result.json").exists()]


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def weights(folder):
    return {
        which: load_tensors(folder / f"checkpoint-{which}.pt")["model"]
        for which in ("best", "last")
    }


@pytest.fixture
def one_thread():
    """As the workers have; another number of threads may end with other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_workers_and_a_killed_sweep_change_no_bit(start, tmp_path):
    what = [TRAIN, *SETTINGS, "--set", "epochs", 20, "--workers", 2, "--seeds", 2]
    what += ["--grid", "optimizer=msgd,engm", "--grid", "lr=0.05,0.1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    grid = {"optimizer": ["msgd", "engm"], "lr": [0.05, 0.1]}
    for task in plan(TRAIN, grid, settings=FIXED | {"epochs": 20}, seeds=2):
        fit(RunConfig(**task.settings), whole, device="cpu", progress=False)
    runs = collect(whole)[0]
    table = to_markdown(summarise(runs))

    disturbed = start(*what, "--out", cut)
    for _ in range(2):
        killed = len(results(cut))
        until(lambda: at_work(cut))
        workers = until(disturbed.workers)
        workers[0].kill()
        until(lambda killed=killed: len(results(cut)) > killed)
    until(lambda: at_work(cut))
    family = disturbed.family()
    disturbed.process.kill()
    disturbed.process.wait()
    assert gone(family)
    before = results(cut)
    assert 2 <= len(before) < 8

    out, err = start(*what, "--out", cut).ended()
    assert out.startswith(f"8 runs, {len(before)} done already, in ")
    assert err.count("\r") < 20  # nobody watches
    assert table in out
    after = results(cut)
    assert {path: after[path] for path in before} == before  # not run again
    others, unfinished = collect(cut)
    assert not unfinished and to_markdown(summarise(others)) == table
    for ours, theirs in zip(others, runs, strict=True):
        assert ours.config == theirs.config
        assert ours.result | {"environment": 0} == theirs.result | {"environment": 0}
        expected = weights(theirs.folder)
        for which, tensors in weights(ours.folder).items():
            assert all(torch.equal(tensors[name], expected[which][name]) for name in tensors)
    # neither locks nor halves of files, but the free lock of a run killed right after its result
    free = {path.with_name(".lock") for path in before}
    assert not set(cut.rglob(".*")) - free


def test_a_run_that_fails_is_recorded_and_the_rest_goes_on(start, tmp_path):
    what = [TRAIN, *SETTINGS, "--set", "epochs", 3, "--grid", "lr=1e30,0.1", "--out", tmp_path]
    what += ["--no-save-adversarial"]
    out, err = start(*what).ended(1)
    [record] = collect(tmp_path)[0]
    assert record.config.lr == 0.1
    assert not (record.folder / "adversarial-best.pt").exists()
    assert to_markdown(summarise([record])) in out
    assert near_chance([record]) and "1 of 1 rows near chance: engm report says which" in err
    [path] = tmp_path.glob("*/*/error.json")
    error = json.loads(path.read_text())
    assert error["settings"]["lr"] == read_config(path.parent).lr == 1e30
    assert error["error"].startswith("NonFiniteLossError: epoch 2")
    assert f"failed: {path.parent.name}: {error['error']}" in err
    assert "1 of 2 runs failed" in err
    tried, done = path.stat().st_mtime_ns, results(tmp_path)
    out, _ = start(*what).ended(1)
    assert "2 runs, 1 done already" in out
    assert path.stat().st_mtime_ns > tried
    assert results(tmp_path) == done


def waiting(folder):
    """A notebook that says that it has begun, and waits for a file `go`; its folder is three up."""
    return notebook(
        folder,
        "seed: int = 0",
        "import time\nfrom pathlib import Path\nroot = Path('../../..')",
        "(root / f'begun-{seed}').touch()",
        "while not (root / 'go').exists():\n    time.sleep(0.1)",
    )


def test_a_hanging_notebook_is_ended_and_a_failing_one_tried_twice(start, tmp_path):
    path = notebook(
        tmp_path,
        'kind: str = "good"',
        "import os, time\nfrom pathlib import Path",
        "with open('attempts', 'a') as file:\n    print(os.getpid(), file=file)",
        "if kind == 'bad':\n    raise ValueError('no good')",
        "while kind == 'slow':\n    time.sleep(0.1)",
    )
    what = [path, "--grid", "kind=bad,good,slow", "--timeout", 12, "--workers", 2]
    _, err = start(*what, "--out", tmp_path / "out").ended(1)
    folders = {
        json.loads(p.read_text())["settings"]["kind"]: p.parent
        for p in (tmp_path / "out").glob("*/*/*.json")
    }
    assert sorted(folders) == ["bad", "good", "slow"]
    kernels = {k: (f / "attempts").read_text().split() for k, f in folders.items()}
    assert {kind: len(pids) for kind, pids in kernels.items()} == {"bad": 2, "good": 1, "slow": 2}
    assert not any(psutil.pid_exists(int(pid)) for pids in kernels.values() for pid in pids)
    assert (folders["good"] / "done.json").exists()
    reasons = {k: json.loads((folders[k] / "error.json").read_text()) for k in ("bad", "slow")}
    assert "ValueError: no good" in reasons["bad"]["error"]
    assert "not finished within 12 s" in reasons["slow"]["error"]
    assert "2 of 3 runs failed" in err


def test_ctrl_c_leaves_no_process_and_a_second_start_goes_on(start, tmp_path):
    what = [waiting(tmp_path), "--seeds", 3, "--workers", 2, "--out", tmp_path / "out"]
    running = start(*what)
    until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
    family = running.family()
    kernels = [p for p in family if "ipykernel" in " ".join(p.cmdline())]
    assert len(kernels) == 2
    began = time.monotonic()
    os.killpg(running.process.pid, signal.SIGINT)
    _, err = running.ended(130)
    assert time.monotonic() - began < 60  # and not the hour that the notebooks would take
    assert "stopped; the same command goes on" in err
    # ended by the sweep, not left to notice by themselves
    assert not [p for p in kernels if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert gone(family)
    (tmp_path / "go").touch()
    out, _ = start(*what).ended()
    assert out.startswith("3 runs, 0 done already")
    assert len(list(tmp_path.glob("out/*/*/done.json"))) == 3
    assert call(*what).output.startswith("3 runs, 3 done already")


@contextmanager
def processes():
    """Starts dask's processes, as the README does by hand, and ends them with all they started."""
    started = []

    def begin(*arguments, **environment):
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *map(str, arguments), "--no-dashboard"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT | environment,
                cwd="/",  # whose engm comes before that of PYTHONPATH
            )
        )
        return started[-1]

    try:
        yield begin
    finally:
        for process in started:
            family = []
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
            for each in [*family, process]:
                each.kill()
            process.wait()


@contextmanager
def cluster(port):
    with processes() as begin:
        scheduler = begin("scheduler", "--host", "127.0.0.1", "--port", port)
        begin(*worker(port))
        yield scheduler


def worker(port, threads=1):
    return ["worker", f"tcp://127.0.0.1:{port}", "--nthreads", threads, "--host", "127.0.0.1"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def call(*arguments):
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


def test_a_scheduler_elsewhere_may_be_away_or_be_gone(tmp_path, monkeypatch):
    port = free_port()
    what = [TRAIN, *SETTINGS, "--set", "epochs", 20, "--out", tmp_path, "--device", "cpu"]
    what += ["--scheduler", f"tcp://127.0.0.1:{port}"]
    monkeypatch.setattr(running, "_PATIENCE", 1)
    found = call(*what)
    assert found.exit_code == 1
    assert f"there is no scheduler at 'tcp://127.0.0.1:{port}'" in found.output

    monkeypatch.setattr(running, "_PATIENCE", 60)
    met = []
    with ExitStack() as stack:

        def disturb(scheduler):
            for patience in (60, 1):
                until(lambda: set(results(tmp_path)) > set(met) and at_work(tmp_path))
                met.extend(results(tmp_path))
                monkeypatch.setattr(running, "_PATIENCE", patience)
                scheduler.kill()
                if patience == 60:
                    scheduler = stack.enter_context(cluster(port))

        first = stack.enter_context(cluster(port))
        other = threading.Thread(target=disturb, args=[first])
        other.start()
        found = call(*what, "--seeds", 4)
        other.join()
    assert found.exit_code == 1, found.output
    assert "the scheduler is gone; start it and its workers again" in found.output
    before = results(tmp_path)
    assert 2 <= len(before) < 4
    monkeypatch.setattr(running, "_PATIENCE", 60)
    with cluster(port):
        found = call(*what, "--seeds", 4)
    assert found.exit_code == 0, found.output
    assert f"4 runs, {len(before)} done already" in found.output
    after = results(tmp_path)
    assert len(after) == 4
    assert {path: after[path] for path in before} == before


def test_a_worker_has_its_threads_and_its_gpu_and_is_replaced_when_it_dies(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("dask.system.CPU_COUNT", 6)
    before = dict(os.environ)

    def about():
        import psutil

        # what the process was started with: libraries read it when they are loaded
        return psutil.Process().environ()["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        clusters.local(2) as client,
    ):
        assert sorted(client.run(about).values()) == [("3", "3"), ("3", "5")]
        deadly = client.submit(os._exit, 1)
        assert "died again and again" in running._reason(deadly.exception())
        client.wait_for_workers(2, timeout=PATIENCE)
        assert client.submit(abs, -1).result() == 1
    assert dict(os.environ) == before


def test_a_run_that_is_at_work_already_is_waited_for_and_taken(tmp_path):
    [task] = plan(TRAIN, {}, settings=FIXED)
    folder = tmp_path / task.name
    folder.mkdir()
    other = threading.Thread(target=running._work, args=(task, tmp_path, sweep.Options()))
    with FileLock(folder / ".sweep.lock"):
        other.start()
        other.join(0.3)
        assert other.is_alive()
        write_json(folder / "result.json", {})
    other.join(30)
    assert not other.is_alive()
    assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_runs_of_other_code_are_warned_of_and_kept(tmp_path):
    [task] = plan(TRAIN, {}, settings=FIXED | {"epochs": 1})
    folder = sweep.folder_of(tmp_path)
    assert folder.name == f"engm-{metadata.version('engm')}"
    write_json(folder / "code.json", {"code": ["engm-0.1.0-older"]})
    with pytest.warns(UserWarning, match="has runs of other code .engm-0.1.0-older; this is"):
        sweep.run([task], tmp_path)
    used = json.loads((folder / "code.json").read_text())["code"]
    assert used == ["engm-0.1.0-older", code_version()]
    assert code_version().startswith(folder.name + "-")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep.run([task], tmp_path)  # nothing is left to run
    assert collect(tmp_path)[0]


def test_workers_that_join_late_and_are_not_fit_are_sent_away(start, tmp_path):
    port, out, other = free_port(), tmp_path / "runs", tmp_path / "other" / "engm"
    for name, text in (("none", "raise ImportError('not here')"), ("other", None)):
        place = tmp_path / name / "engm"
        if text is None:
            shutil.copytree(Path(sweep.__file__).parents[1], place)
            text = (place / "__init__.py").read_text() + "# another version"
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(text)
    with processes() as begin:
        begin("scheduler", "--host", "127.0.0.1", "--port", port)
        begin(*worker(port))
        what = [waiting(tmp_path), "--seeds", 6, "--out", out]
        sweeping = start(*what, "--scheduler", f"tcp://127.0.0.1:{port}")
        until(lambda: list(tmp_path.glob("begun-*")))
        late = [
            begin(*worker(port, threads=2)),
            begin(*worker(port), PYTHONPATH=str(tmp_path / "none")),
            begin(*worker(port), PYTHONPATH=str(other.parent)),
        ]
        for process in late:
            process.wait(PATIENCE)  # sent away, with its nanny
        (tmp_path / "go").touch()
        _, err = sweeping.ended()
    assert len(list(out.glob("*/*/done.json"))) == 6 and not list(out.rglob("error.json"))
    for reason in ("runs 2 tasks at once", "has no engm of this version", "and the sweep is of"):
        assert err.count(reason) == 1, err
    assert err.count("The sweep goes on without it") == 3


def test_a_worker_that_is_not_fit_from_the_start_is_refused_and_stays(tmp_path):
    tasks = plan(TRAIN, {}, settings=FIXED | {"dataset": "cifar10"})
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as found:
        for settings, reason in (
            ({"data_root": tmp_path}, f"finds no cifar10 in {tmp_path}; prepare it there"),
            ({"data_root": tmp_path, "device": "gpu"}, "cannot use device 'gpu'"),
        ):
            options = sweep.Options(scheduler=found.scheduler_address, **settings)
            with pytest.raises(InputError, match=f"the worker .* {reason}"):
                sweep.run(tasks, tmp_path / "runs", options)
            (tmp_path / "cifar10.json").touch()
        assert len(found.scheduler.workers) == 1
    assert not (tmp_path / "runs").exists()


def test_a_worker_must_have_the_folder_and_the_images_of_the_sweep(tmp_path, monkeypatch):
    one = SimpleNamespace(state=SimpleNamespace(nthreads=1))
    mark, code = tmp_path / "mark", code_version()

    def lacking(*data):
        return clusters.Needs(code, mark, data, tmp_path, "cpu").lacking(one)

    assert "does not see" in lacking()
    mark.touch()
    assert lacking() == ""
    write_json(tmp_path / "cifar10.json", {"cache_sha256": "ours"})
    assert lacking(("cifar10", "ours")) == lacking(("cifar10", None)) == ""
    assert "has other images of cifar10 in" in lacking(("cifar10", "theirs"))

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clusters, "TemporaryFile", full)
    assert lacking() == f"cannot write to {tmp_path} (No space left on device)"


def test_workers_must_agree_on_images_that_the_sweep_has_not(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGM_DATA", str(tmp_path))
    write_json(tmp_path / "cifar10.json", {"cache_sha256": "ours"})
    data = (("cifar10", None), ("digits", None), ("fashion-mnist", "known"))
    needs, one = clusters.Needs("code", datasets=data), SimpleNamespace(address="tcp://a")
    monkeypatch.setattr(clusters.Needs, "lacking", lambda *_: "")
    workers: list[dict] = [{}, {"tcp://a": None, "tcp://b": RuntimeError("it has no engm")}]

    def run(work, on_error):  # none is there yet; then the scheduler is away; then two are there
        if len(answers) == 2:
            answers.append("away")
            raise OSError("Timed out trying to connect")
        answers.append("asked")
        there = workers.pop(0) if len(workers) > 1 else workers[0]
        return {address: said or work(one) for address, said in there.items()}

    answers: list[str] = ["asked"]
    client = SimpleNamespace(run=run, status="running")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    found = dict(clusters.agreed(client, needs, 1).datasets)
    assert found == {"cifar10": "ours", "digits": None, "fashion-mnist": "known"}
    assert answers == ["asked", "asked", "away", "asked"]
    workers = [{"tcp://a": None, "tcp://b": "theirs"}]
    with pytest.raises(InputError, match="different images of cifar10 .*ours on tcp://a, theirs"):
        clusters.agreed(client, needs, 1)
    client.status, answers = "closed", ["asked", "asked"]
    with pytest.raises(InputError, match="the scheduler is gone; start it"):
        clusters.agreed(client, needs, 1)


def test_workers_that_do_not_agree_leave_no_folder(tmp_path, monkeypatch):
    [task] = plan(TRAIN, {}, settings=FIXED)

    @contextmanager
    def remote(*_):
        yield SimpleNamespace(nthreads=lambda: {"tcp://a": 1})

    def disagree(*_):
        raise InputError("the workers have different images")

    monkeypatch.setattr(clusters, "remote", remote)
    monkeypatch.setattr(clusters, "agreed", disagree)
    options = sweep.Options(scheduler="tcp://x", progress=False)
    with pytest.raises(InputError, match="different images"):
        sweep.run([task], tmp_path / "runs", options)
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_full_for_all_is_no_fault_of_a_worker(tmp_path, monkeypatch):
    [task] = plan(TRAIN, {}, settings=FIXED)
    writable, met = clusters.TemporaryFile, []

    def filling(**where):
        met.append(where)
        if len(met) > 1:  # the workers were looked at before there was anything to do
            raise OSError(errno.ENOSPC, "No space left on device")
        return writable(**where)

    monkeypatch.setattr(clusters, "TemporaryFile", filling)
    monkeypatch.setattr(clusters, "retire", lambda *_, **__: pytest.fail("it was sent away"))
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as found:
        options = sweep.Options(scheduler=found.scheduler_address, device="cpu", progress=False)
        [outcome] = sweep.run([task], tmp_path, options)
    assert "cannot be written to (No space left on device); make room" in outcome.error


def test_a_run_that_has_ended_elsewhere_is_not_taken_for_done(tmp_path, monkeypatch):
    tasks = plan(TRAIN, {"seed": [0, 1]}, settings=FIXED)
    monkeypatch.setattr(running, "_failed", lambda *_: iter(()))
    monkeypatch.setattr(clusters, "local", lambda *_, **__: nullcontext())
    outcomes = sweep.run(tasks, tmp_path)
    assert all("there is no result in" in outcome.error for outcome in outcomes)


def test_finished_runs_on_other_images_of_the_name_are_not_taken_for_done(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGM_DATA", str(tmp_path))
    (task,) = plan(TRAIN, {}, settings=FIXED | {"dataset": "cifar10"})
    folder = sweep.folder_of(tmp_path) / task.name
    write_json(folder / "result.json", {})
    write_json(folder / "config.json", {"environment": {"data_sha256": "theirs"}})
    assert sweep.run([task], tmp_path)[0].error is None  # nothing here to compare with
    write_json(tmp_path / "cifar10.json", {"cache_sha256": "ours"})
    with pytest.raises(InputError, match="is a run on other images of that name"):
        sweep.run([task], tmp_path)


def test_the_only_worker_that_ever_came_is_not_sent_away():
    client = SimpleNamespace(nthreads=lambda: {"tcp://a": 2}, retire_workers=pytest.fail)
    with pytest.raises(InputError, match="has no engm"):
        clusters.retire(client, "tcp://a", "the worker tcp://a has no engm", alone=False)


def test_of_runs_that_two_versions_made_the_last_counts(tmp_path):
    folders = []
    for version, name, age in (("0.1.0", "a", 20), ("0.2.0", "a", 10), ("0.2.0", "b", 30)):
        folders.append(tmp_path / f"engm-{version}" / name)
        write_json(folders[-1] / "result.json", {})
        os.utime(folders[-1] / "result.json", (10_000 - age,) * 2)
    assert sweep.superseded(folders) == {folders[0]}
    assert sweep.superseded(folders[1:]) == set()
    (tmp_path / "engm-0.2.0").rename(tmp_path / "mine")
    assert sweep.superseded([folders[0], tmp_path / "mine" / "a"]) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'TARGET'"),
        (["train", "--workers", 2, "--scheduler", "tcp://a:1"], "either --workers or --scheduler"),
        (["train", "--workers", 0], "'0' is not a whole number from 1 on"),
        (["train", "--grid", "lr"], "'lr' is no part of a grid"),
        (["train", "--set", "lr", 1, "--set", "lr", 2], "lr is set twice; --grid NAME=A,B"),
        (["train", "--set", "batch-size", 1, "--set", "batch_size", 2], "batch_size is set twice"),
        (["train", "--grid", "batch-size=1", "--grid", "batch_size=2"], "batch_size is set twice"),
        (["train", "--set", "lrr", 1], "did you mean lr"),
        (["train", "--timeout", 5], "timeout is for notebooks"),
        (["00_tour", "--device", "cpu"], "save_adversarial are for training"),
        (["nothing"], "there is no notebook 'nothing'"),
        (["plan.yaml"], "there is no file plan.yaml"),
        (["plan.yaml", "--seeds", 2], "a plan has its own grid"),
        (["train", "--out", ""], "the path is empty"),
        (["train", "--scheduler", "nonsense"], "there is no scheduler at 'nonsense'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = call(*arguments)
    assert found.exit_code in (1, 2)
    assert message in " ".join(found.output.split())
    assert "Traceback" not in found.output
    assert not list(tmp_path.rglob("*.json"))


def test_a_plan_and_its_options_arrive(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "run", lambda *given: seen.append(given) or [])
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text("run: train\nout: there\nseeds: 2\nsettings: {epochs: 4}\n")
    Path("runs/engm-0.0.1-old").mkdir(parents=True)
    assert call("plan.yaml", "--scheduler", "tcp://a:1").exit_code == 0
    found = call(
        *("plan.yaml", "--out", "runs", "--workers", 3, "--device", "cpu", "--data-root", "d"),
        "--no-save-adversarial",
    )
    assert "runs of other versions stay beside it: engm-0.0.1-old" in found.output
    call("train", "--set", "batch-size", 7)
    tasks = plan(TRAIN, {}, settings={"epochs": 4}, seeds=2)
    here = sweep.Options(workers=3, device="cpu", data_root=tmp_path / "d", save_adversarial=False)
    assert seen == [
        (tasks, Path("there"), sweep.Options(scheduler="tcp://a:1")),
        (tasks, Path("runs"), here),
        (plan(TRAIN, {}, settings={"batch_size": 7}), Path("runs"), sweep.Options()),
    ]


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout": 0}, {"timeout": float("nan")}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
        sweep.Options(**wrong)
