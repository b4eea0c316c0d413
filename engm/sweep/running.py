"""Runs the tasks of a sweep on processes of this machine, or on a cluster, and loses nothing.

The engine is dask.distributed. A task is a folder named by its settings, so what is done is not
run again, and what was cut off goes on from its checkpoint: after a kill of a worker, of the
scheduler or of the sweep itself, the same command again is all it takes.

    out/engm-0.1.0-1f2e3d4c/digits-pgd_at-engm-seed0-5a6b7c8d/    a run, as `fit` writes it
    out/engm-0.1.0-1f2e3d4c/06_cifar-9e8f7a6b/                    a notebook, and its result
    .../error.json                                                why a task failed, if it did
"""

import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from engm.config import RunConfig
from engm.errors import InputError
from engm.runs import write_json
from engm.sweep import clusters
from engm.sweep.plan import TRAIN, Task, code_version

ERROR, DONE, LOCK = "error.json", "done.json", ".sweep.lock"
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
        timeout: Seconds that a notebook may take; training has no such limit.
        device: As for `fit`; a notebook chooses its own.
        data_root: As for `fit`; a notebook's data is where `ENGM_DATA` says.
        save_adversarial: As for `fit`.
        progress: Show a progress bar.

    Raises:
        InputError: If a number is out of range.
    """

    workers: int = 1
    scheduler: str | None = None
    timeout: float | None = None
    device: str = "auto"
    data_root: Path | None = None
    save_adversarial: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses numbers that are out of range, and makes a path one that workers understand."""
        if self.workers < 1:
            raise InputError(f"workers must be 1 or more, got {self.workers}")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if self.data_root is not None:
            object.__setattr__(self, "data_root", Path(self.data_root).resolve())


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `error` is None where it is complete."""

    task: Task
    folder: Path
    error: str | None = None


def folder_of(out: Path) -> Path:
    """Returns the folder within `out` that holds the runs of this version of the code."""
    return Path(out).resolve() / code_version()


def is_done(task: Task, folder: Path) -> bool:
    """Returns whether the task is complete in `folder`, the one that `folder_of` gives."""
    from engm.runs import RESULT  # loads torch, which a scheduler does without

    return (folder / task.name / (RESULT if task.target == TRAIN else DONE)).exists()


def run(tasks: Sequence[Task], out: Path, options: Options | None = None) -> list[Outcome]:
    """Runs what is not done yet, and says how each task ended.

    A task that raises is run once more; if it fails again, its error is kept in its folder, and the
    others go on. A second call runs the failed ones again. Ctrl-C ends what runs and raises
    `KeyboardInterrupt`.

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
    folder = folder_of(out)
    left = {task.name: task for task in tasks if not is_done(task, folder)}
    errors: dict[str, str] = {}
    if left:
        folder.mkdir(parents=True, exist_ok=True)
        bar = _Bar(len(tasks), len(tasks) - len(left), options.progress)
        with bar.bar, _client(len(left), options) as client:
            while left:  # more than once where the scheduler was away for a moment
                for name, error in _ended(list(left.values()), folder, options, client, bar):
                    del left[name]
                    if error is not None:
                        errors[name] = error
    return [Outcome(task, folder / task.name, errors.get(task.name)) for task in tasks]


def _check(tasks: Sequence[Task], options: Options) -> None:
    for task in tasks:
        if task.target == TRAIN and options.timeout is not None:
            raise InputError("timeout is for notebooks; training is limited by its epochs")
        own = (options.device, options.data_root, options.save_adversarial) != ("auto", None, True)
        if task.target != TRAIN and own:
            raise InputError(
                "device, data_root and save_adversarial are for training; a notebook takes a GPU "
                "where it finds one, and its data from the folder that ENGM_DATA names"
            )


def _client(tasks: int, options: Options) -> Any:
    if options.scheduler is not None:
        return clusters.remote(options.scheduler, _PATIENCE)
    own_gpus = options.device in ("auto", "cuda")
    return clusters.local(min(options.workers, tasks), own_gpus=own_gpus)


def _ended(
    tasks: Sequence[Task], folder: Path, options: Options, client: Any, bar: "_Bar"
) -> Iterator[tuple[str, str | None]]:
    # A key of its own for each submission: what an earlier sweep on this scheduler, or one with
    # another folder, had under the same name is not taken for it.
    call = secrets.token_hex(4)
    futures = {
        clusters.submit(
            client, _work, t, folder, options, code_version(), key=f"{t.name}-{call}"
        ): t
        for t in tasks
    }
    for future in clusters.finished(client, list(futures), _PATIENCE, bar.show):
        task = futures[future]
        error = _reason(future) if future.status == "error" else None
        if error is not None:
            with suppress(OSError):  # a full disk is the reason, and takes no note
                write_json(folder / task.name / ERROR, {"error": error, "settings": task.settings})
        bar.ended(error)
        yield task.name, error


def _reason(future: Any) -> str:
    error = future.exception()
    text = " ".join(str(error).split())
    if isinstance(error, (_Failed, InputError)):
        return text
    if type(error).__name__ == "KilledWorker":
        return "its worker died again and again; is there enough memory?"
    if isinstance(error, ModuleNotFoundError):
        return f"its worker has no engm ({text}); install it there"
    return f"{type(error).__name__}: {text}"


class _Failed(Exception):
    """Carries the reason from a worker to the sweep."""


def _work(task: Task, folder: Path, options: Options, version: str) -> None:
    # runs on a worker
    clusters.check_worker(version)
    where = folder / task.name
    where.mkdir(parents=True, exist_ok=True)
    # a task may be at work still for a sweep that was killed: wait for it, and take what it made
    with FileLock(where / LOCK):
        if not is_done(task, folder):
            with suppress(OSError):
                (where / ERROR).unlink()
            _attempt(task, folder, options)
        (where / LOCK).unlink(missing_ok=True)


def _attempt(task: Task, folder: Path, options: Options) -> None:
    for attempt in range(_ATTEMPTS):
        if attempt > 0:
            time.sleep(_PAUSE)
        try:
            if task.target == TRAIN:
                _train(task, folder, options)
            else:
                _notebook(task, folder / task.name, options)
            return
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    raise _Failed(reason)


def _train(task: Task, folder: Path, options: Options) -> None:
    from engm.training import fit

    how: dict[str, Any] = dict(device=options.device, data_root=options.data_root)
    how |= dict(save_adversarial=options.save_adversarial, progress=False)
    fit(RunConfig.from_dict(task.settings), folder, **how)


def _notebook(task: Task, where: Path, options: Options) -> None:
    from engm.lab import batch

    values = dict(task.settings)
    # the notebook's own runs are kept, so that a second attempt goes on from them
    if "out" in batch.parameters(Path(task.target)) and values.get("out") is None:
        values["out"] = str(where / "runs")
    how: dict[str, Any] = dict(timeout=options.timeout, progress=False)
    done = batch.run(task.target, values, output_dir=where, **how)
    if done.error is not None:
        raise RuntimeError(str(done.error))
    write_json(where / DONE, {"settings": task.settings, "seconds": done.seconds})


class _Bar:
    """Done, running, failed and time left; seldom where nobody watches it move."""

    def __init__(self, total: int, done: int, progress: bool) -> None:
        self.watched = sys.stderr.isatty()
        pause = 0.1 if self.watched else 60
        how: dict[str, Any] = dict(mininterval=pause, maxinterval=max(10, pause), unit="run")
        self.bar = tqdm(total=total, initial=done, desc="sweep", disable=not progress, **how)
        self.failed = 0

    def show(self, running: int, workers: int) -> None:
        text = f"{running} running" if workers else "no worker yet"
        text += f", {self.failed} failed" * bool(self.failed)
        self.bar.set_postfix_str(text, refresh=self.watched)

    def ended(self, error: str | None) -> None:
        self.failed += error is not None
        self.bar.update()
