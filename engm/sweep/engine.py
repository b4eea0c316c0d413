"""Runs the tasks of a sweep on workers of `dask.distributed`, and loses nothing.

A task is a folder named by its settings, so what is done is not run again, and what was cut off
goes on from its checkpoint: after a kill of a worker, of the scheduler or of the sweep itself, the
same command again is all it takes.

    out/engm-0.1.0/digits-pgd_at-engm-seed0-5a6b7c8d/    a run, as `fit` writes it
    out/engm-0.1.0/06_cifar-9e8f7a6b/                    a notebook, and its result
    .../error.json                                       why a task failed, if it did
    out/engm-0.1.0/code.json                             the code that the runs were made with
"""

import hashlib
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from engm.config import RunConfig
from engm.errors import InputError
from engm.sweep.plan import TRAIN, Task

# What needs torch is imported where it is used: the scheduler, too, loads this module.

ERROR, DONE, LOCK, CODE = "error.json", "done.json", ".sweep.lock", "code.json"
_PAUSE = 2  # seconds before the second attempt: the kernel of a killed worker may still write
_PATIENCE = 10  # seconds in which a scheduler answers
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Options:
    """How tasks are run.

    Attributes:
        workers: Processes on this machine; each has its share of the cores, and a GPU of its own
            where there are some.
        scheduler: Address of a running dask scheduler, such as "tcp://10.0.0.1:8786", whose
            workers are used in their place. They must see the same folders.
        timeout: Seconds that a notebook may take; training has no such limit.
        device: As for `fit`; a notebook chooses its own.
        data_root: As for `fit`; a notebook's data is where `ENGM_DATA` says.
        save_adversarial: As for `fit`.
        progress: Show a progress bar.
    """

    workers: int = 1
    scheduler: str | None = None
    timeout: float | None = None
    device: str = "auto"
    data_root: Path | None = None
    save_adversarial: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `error` is None where it is complete."""

    task: Task
    folder: Path
    error: str | None = None


def folder_of(out: Path) -> Path:
    """Returns the folder within `out` that holds the runs of this version of the package."""
    return Path(out).resolve() / f"engm-{metadata.version('engm')}"


def is_done(task: Task, folder: Path) -> bool:
    """Returns whether the task is complete in `folder`, the one that `folder_of` gives."""
    from engm.runs import RESULT

    return (folder / task.name / (RESULT if task.target == TRAIN else DONE)).exists()


def run(tasks: Sequence[Task], out: Path, options: Options | None = None) -> list[Outcome]:
    """Runs what is not done yet, and says how each task ended.

    A task that raises is run once more; if it fails again, its error is kept in its folder, and the
    others go on. A second call runs the failed ones again. Ctrl-C ends what runs and raises
    `KeyboardInterrupt`. A warning says where the folder has runs of other code.

    Args:
        tasks: As `plan` makes them.
        out: Folder of the sweep.
        options: One worker on this machine, where left out.

    Returns:
        An outcome for each task, in their order.

    Raises:
        InputError: If an option has no meaning for the tasks, the scheduler cannot be reached or is
            lost, its workers are not fit for the sweep, or dask is not installed.
    """
    options = options or Options()
    _check(tasks, options)
    if options.data_root is not None:  # workers may be at home in another folder
        options = replace(options, data_root=Path(options.data_root).resolve())
    folder = folder_of(out)
    left = [task for task in tasks if not is_done(task, folder)]
    errors: dict[str, str] = {}
    if left:
        with _client(len(left), options) as client:
            _note_code(folder)
            bar = _bar(len(tasks), len(tasks) - len(left), options.progress)
            for name, error in _ended(left, folder, options, client, bar):
                errors[name] = error
    return [Outcome(task, folder / task.name, errors.get(task.name)) for task in tasks]


def _check(tasks: Sequence[Task], options: Options) -> None:
    if options.workers < 1:
        raise InputError(f"workers must be 1 or more, got {options.workers}")
    training = [task.target == TRAIN for task in tasks]
    if any(training) and options.timeout is not None:
        raise InputError("timeout is for notebooks; training is limited by its epochs")
    own = (options.device, options.data_root, options.save_adversarial) != ("auto", None, True)
    if not all(training) and own:
        raise InputError(
            "device, data_root and save_adversarial are for training; a notebook takes a GPU "
            "where it finds one, and its data from the folder that ENGM_DATA names"
        )


@cache
def code_version() -> str:
    """Returns the version of the package and a digest of its source."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return f"engm-{metadata.version('engm')}-{digest.hexdigest()[:8]}"


def _note_code(folder: Path) -> None:
    from engm.runs import read_json, write_json

    ours, path = code_version(), folder / CODE
    used = read_json(path)["code"] if path.exists() else []
    if others := [version for version in used if version != ours]:
        warnings.warn(
            f"{folder} has runs of other code ({', '.join(others)}; this is {ours}). Where the "
            "difference decides results, give a new --out",
            stacklevel=3,
        )
    if ours not in used:
        write_json(path, {"code": [*used, ours]})


# --- the tasks, followed from here


def _ended(
    tasks: Sequence[Task], folder: Path, options: Options, client: Any, bar: "tqdm[Any]"
) -> Iterator[tuple[str, str]]:
    """Hands out the name and the error of tasks that failed, until all have ended."""
    from distributed import CancelledError, wait

    from engm.runs import write_json

    # A key of its own for each submission: what an earlier sweep on this scheduler, or one with
    # another folder, had under the same name is not taken for it.
    call = secrets.token_hex(4)
    left = {
        client.submit(
            _work, task, folder, options, code_version(), key=f"{task.name}-{call}", retries=1
        ): task
        for task in tasks
    }
    failed = 0
    with bar:
        while left:
            with suppress(TimeoutError, CancelledError):
                wait(list(left), timeout=1, return_when="FIRST_COMPLETED")
            for future in [future for future in left if future.status in ("finished", "error")]:
                task = left.pop(future)
                if future.status == "error":
                    failed += 1
                    error = _reason(future.exception())
                    note = {"error": error, "settings": task.settings}
                    with suppress(OSError):  # a full disk is the reason, and takes no note
                        write_json(folder / task.name / ERROR, note)
                    yield task.name, error
                bar.update()
            at_work: dict[str, Any] = {}
            with suppress(OSError):
                at_work = client.processing() if client.status == "running" else {}
            if client.status != "running" or any(future.cancelled() for future in left):
                raise InputError(
                    "the scheduler is gone; start it and its workers again, and the same command "
                    "goes on where this one was"
                )
            keys = {future.key for future in left}
            # a worker does one task at a time; what else it has waits
            running = sum(not keys.isdisjoint(theirs) for theirs in at_work.values())
            text = f"{running} running, {failed} failed" if at_work else "no worker yet"
            bar.set_postfix_str(text, refresh=sys.stderr.isatty())


def _bar(total: int, done: int, progress: bool) -> "tqdm[Any]":
    pause = 0.1 if sys.stderr.isatty() else 60  # seldom where nobody watches it move
    return tqdm(
        total=total,
        initial=done,
        desc="sweep",
        unit="run",
        disable=not progress,
        mininterval=pause,
        maxinterval=max(10, pause),
    )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (_Failed, InputError)):
        return text
    if type(error).__name__ == "KilledWorker":
        return "its worker died again and again; is there enough memory?"
    return f"{type(error).__name__}: {text}"


# --- a task, on a worker


class _Failed(Exception):
    """Carries the reason from a worker to the sweep, whatever the error was."""


def _work(task: Task, folder: Path, options: Options, version: str) -> None:
    from distributed import get_worker

    _check_worker(version, get_worker())
    where = folder / task.name
    where.mkdir(parents=True, exist_ok=True)
    # a task may be at work still for a sweep that was killed: wait for it, and take what it made
    with FileLock(where / LOCK):
        if not is_done(task, folder):
            (where / ERROR).unlink(missing_ok=True)
            try:
                if task.target == TRAIN:
                    _train(task, folder, options)
                else:
                    _notebook(task, where, options)
            except Exception as error:
                time.sleep(_PAUSE)
                raise _Failed(f"{type(error).__name__}: {error}") from None
        (where / LOCK).unlink(missing_ok=True)


def _train(task: Task, folder: Path, options: Options) -> None:
    from engm.training import fit

    fit(
        RunConfig.from_dict(task.settings),
        folder,
        device=options.device,
        data_root=options.data_root,
        save_adversarial=options.save_adversarial,
        progress=False,
    )


def _notebook(task: Task, where: Path, options: Options) -> None:
    from engm.lab import batch
    from engm.runs import write_json

    values = dict(task.settings)
    # the notebook's own runs are kept, so that a second attempt goes on from them
    if "out" in batch.parameters(Path(task.target)) and values.get("out") is None:
        values["out"] = str(where / "runs")
    done = batch.run(task.target, values, output_dir=where, timeout=options.timeout, progress=False)
    if done.error is not None:
        raise RuntimeError(str(done.error))
    write_json(where / DONE, {"settings": task.settings, "seconds": done.seconds})


def _check_worker(version: str, dask_worker: Any) -> None:
    """Refuses, on a worker, to run other code than the sweep's, or several tasks at once."""
    name, threads = dask_worker.address, dask_worker.state.nthreads
    if threads > 1:
        raise InputError(
            f"the worker {name} runs {threads} tasks at once in one process, where they share "
            "random numbers; start it with `dask worker --nthreads 1`, and more workers instead"
        )
    if code_version() != version:
        raise InputError(
            f"the worker {name} runs {code_version()}, and the sweep is of {version}; update the "
            "code there and start the worker again, or the sweep where the code has changed since "
            "it began"
        )


# --- workers


def _client(tasks: int, options: Options) -> AbstractContextManager[Any]:
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise InputError('dask is not installed: pip install "engm[sweep]"') from None
    if options.scheduler is not None:
        return _remote(options.scheduler)
    return _local(min(options.workers, tasks), own_gpus=options.device in ("auto", "cuda"))


@contextmanager
def _local(workers: int, *, own_gpus: bool = True) -> Iterator[Any]:
    """Gives a client of workers on this machine, each a process with one task at a time.

    They share the cores, unless OMP_NUM_THREADS says how many threads each has. A worker that dies
    is replaced. If the block raises, all of them are killed, with what they started.
    """
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, Nanny, Scheduler, SpecCluster

    gpus = _gpus() if own_gpus else []
    here = {"host": "127.0.0.1"}
    # a limit of memory would kill runs that do well
    usual = here | {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    specs = {}
    for index in range(workers):
        env = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        specs[index] = {"cls": Nanny, "options": usual | {"env": env}}
    head = {"cls": Scheduler, "options": here | {"dashboard_address": None, "dashboard": False}}
    threads = os.environ.get(_THREADS[0]) or str(max(1, CPU_COUNT // workers))
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,  # tasks wait in the scheduler
        # libraries read these when they are loaded, so they must be there before
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(_THREADS, threads),
    }
    with (
        _same_environment(),
        dask.config.set(settings),
        SpecCluster(specs, head, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster) as client,
    ):
        try:
            yield client
        except BaseException:
            _kill(cluster)
            raise


@contextmanager
def _remote(address: str) -> Iterator[Any]:
    """Gives a client of a scheduler elsewhere, all of whose workers are fit.

    If the block is interrupted, workers that do nothing else are started anew, since a task that
    runs in one cannot be stopped in another way.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=_PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"there is no scheduler at {address!r} ({reason}); `dask scheduler` starts one and "
            "prints its address"
        ) from None
    with client:
        for worker, refusal in client.run(_check_worker, code_version(), on_error="return").items():
            if isinstance(refusal, InputError):
                raise refusal
            if refusal is not None:
                raise InputError(f"the worker {worker} has no engm ({refusal}); install it there")
        try:
            yield client
        except KeyboardInterrupt:
            with suppress(Exception):  # the scheduler may be gone
                _stop(client)
            raise


def _kill(cluster: Any) -> None:
    import psutil  # type: ignore[import-untyped]  # dask brings it

    for nanny in cluster.workers.values():
        nanny.close_gracefully()  # not to be replaced
        with suppress(psutil.Error):
            worker = psutil.Process(nanny.pid)
            for process in [worker, *worker.children(recursive=True)]:
                with suppress(psutil.Error):
                    process.kill()


def _stop(client: Any) -> None:
    from distributed import Future

    keys = set(client.futures)
    at_work = client.processing()
    ours = [worker for worker, tasks in at_work.items() if tasks and keys.issuperset(tasks)]
    client.cancel([Future(key, client) for key in keys], force=True)
    client.restart_workers(ours, timeout=10, raise_for_error=False)


def _gpus() -> list[str]:
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def _same_environment() -> Iterator[None]:
    # dask sets what its workers inherit
    before = os.environ.copy()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
