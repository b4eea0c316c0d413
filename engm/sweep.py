"""Runs the tasks of a sweep on processes of this machine, or on a cluster, and loses nothing.

The engine is dask.distributed. A task is a folder named by its settings, so what is done is not
run again, and what was cut off goes on from its checkpoint: after a kill of a worker, of the
scheduler or of the sweep itself, the same command again is all it takes.

    out/engm-0.1.0-1f2e3d4c/digits-pgd_at-engm-seed0-5a6b7c8d/    a run, as `fit` writes it
    out/engm-0.1.0-1f2e3d4c/06_cifar-9e8f7a6b/                    a notebook, and its result
    .../error.json                                                why a task failed, if it did
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from engm.config import RunConfig
from engm.errors import InputError
from engm.files import write_json
from engm.run_directory import RESULT
from engm.sweep_plan import TRAIN, Task, code_version

ERROR, DONE = "error.json", "done.json"
_ATTEMPTS = 2
_PAUSE = 2  # seconds before the second attempt: the kernel of a killed worker may still write
_PATIENCE = 30  # seconds that a scheduler may be away


@dataclass(frozen=True)
class Options:
    """How tasks are run.

    Attributes:
        workers: Processes on this machine; each has its share of the cores, and a GPU of its own
            where there are some.
        scheduler: Address of a running dask scheduler, such as "tcp://10.0.0.1:8786", whose
            workers are used in their place. They must see the same folders.
        timeout: Seconds that a notebook may take.
        device: As for `fit`.
        data_root: As for `fit`.
        progress: Show a progress bar.

    Raises:
        InputError: If a number is out of range.
    """

    workers: int = 1
    scheduler: str | None = None
    timeout: float | None = None
    device: str = "auto"
    data_root: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses numbers that are out of range."""
        if self.workers < 1:
            raise InputError(f"workers must be 1 or more, got {self.workers}")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout must be a number of seconds above 0, got {self.timeout}")


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `error` is None where it is complete."""

    task: Task
    folder: Path
    error: str | None = None


def run(tasks: Sequence[Task], out: Path, options: Options | None = None) -> list[Outcome]:
    """Runs what is not done yet, and says how each task ended.

    A task that raises is run once more; if it fails again, its error is kept in its folder, and the
    others go on. A second call runs the failed ones again. Ctrl-C ends all workers and raises
    `KeyboardInterrupt`.

    Args:
        tasks: As `plan` makes them.
        out: Folder of the sweep.
        options: One worker on this machine, where left out.

    Returns:
        An outcome for each task, in their order.

    Raises:
        InputError: If the scheduler cannot be reached, or dask is not installed.
    """
    options = options or Options()
    folder = Path(out).resolve() / code_version()
    found = {task.name: Outcome(task, folder / task.name) for task in tasks}
    open_tasks = [task for task in tasks if not _done(task, folder)]
    bar = tqdm(
        total=len(tasks),
        initial=len(tasks) - len(open_tasks),
        desc="sweep",
        disable=not options.progress,
    )
    with bar:
        if open_tasks:
            for outcome in _run(open_tasks, folder, options, bar):
                found[outcome.task.name] = outcome
    return [found[task.name] for task in tasks]


def _run(tasks: list[Task], folder: Path, options: Options, bar: Any) -> Iterator[Outcome]:
    folder.mkdir(parents=True, exist_ok=True)
    with _client(min(options.workers, len(tasks)), options.scheduler) as client:
        futures = {
            client.submit(_work, task, folder, options, code_version(), key=task.name): task
            for task in tasks
        }
        failed = 0
        try:
            for future in _finished(list(futures), client):
                task = futures[future]
                # dask gives up a task that took several workers with it
                error = future.result() if future.status == "finished" else _reason(future)
                failed += error is not None
                bar.set_postfix_str(f"{failed} failed" if failed else "")
                bar.update()
                yield Outcome(task, folder / task.name, error)
        finally:
            with suppress(Exception):  # the scheduler may be gone
                client.cancel(list(futures), force=True)


def _finished(futures: list[Any], client: Any) -> Iterator[Any]:
    from distributed import wait

    lost_at = None
    while futures:
        with suppress(TimeoutError):
            wait(futures, timeout=1, return_when="FIRST_COMPLETED")
        if client.status == "running":
            lost_at = None
        elif time.monotonic() - (lost_at := lost_at or time.monotonic()) > _PATIENCE:
            raise InputError(
                f"the scheduler {client.scheduler.addr} is gone; start it and its workers again, "
                "and the same command goes on where this one was"
            )
        for future in [future for future in futures if future.status in ("finished", "error")]:
            futures.remove(future)
            yield future


def _reason(future: Any) -> str:
    error = future.exception()
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _work(task: Task, folder: Path, options: Options, version: str) -> str | None:
    """Runs on a worker: one task, twice if it must be; returns why it failed, or None."""
    if code_version() != version:
        raise InputError(f"this worker has {code_version()}, and the sweep {version}; update it")
    where = folder / task.name
    with suppress(OSError):
        (where / ERROR).unlink()
    for attempt in range(_ATTEMPTS):
        try:
            if task.target == TRAIN:
                _train(task, folder, options)
            else:
                _notebook(task, where, options)
            return None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if attempt + 1 < _ATTEMPTS:
            time.sleep(_PAUSE)
    with suppress(OSError):  # a full disk is the reason, and takes no note
        write_json(where / ERROR, {"error": reason, "settings": task.settings})
    return reason


def _done(task: Task, folder: Path) -> bool:
    return (folder / task.name / (RESULT if task.target == TRAIN else DONE)).exists()


def _train(task: Task, folder: Path, options: Options) -> None:
    from engm.training import fit

    where: dict[str, Any] = dict(device=options.device, data_root=options.data_root)
    fit(RunConfig.from_dict(task.settings), folder, **where, progress=False)


def _notebook(task: Task, where: Path, options: Options) -> None:
    from engm import notebooks

    values = dict(task.settings)
    # the notebook's own runs are kept, so that a second attempt goes on from them
    if "out" in notebooks.parameters(Path(task.target)) and values.get("out") is None:
        values["out"] = str(where / "runs")
    how: dict[str, Any] = dict(timeout=options.timeout, progress=False)
    done = notebooks.run(task.target, values, output_dir=where, **how)
    if done.error is not None:
        raise RuntimeError(str(done.error))
    write_json(where / DONE, {"settings": task.settings, "seconds": done.seconds})


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    try:
        import dask
        from distributed import Client, Nanny, Scheduler, SpecCluster
    except ImportError:
        raise InputError('dask is not installed: pip install "engm[sweep]"') from None
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_PATIENCE)
        except (OSError, ValueError, TimeoutError) as error:
            raise InputError(
                f"there is no scheduler at {scheduler!r} ({error}); start one with `dask scheduler`"
            ) from None
        with client:
            yield client
        return
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    gpus = _gpus()
    specs = {}
    for index in range(workers):
        env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        # one task a worker at a time; a limit of memory would kill runs that do well
        own: dict[str, Any] = dict(nthreads=1, memory_limit=0, env=env, host="127.0.0.1")
        specs[index] = {"cls": Nanny, "options": own | {"silence_logs": logging.CRITICAL}}
    head = dict(host="127.0.0.1", dashboard_address=None, dashboard=False)
    settings = {"distributed.scheduler.worker-saturation": 1.0}  # tasks wait in the scheduler
    with (
        dask.config.set(settings),
        SpecCluster(
            specs, {"cls": Scheduler, "options": head}, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _gpus() -> list[str]:
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]
