"""Runs the tasks of a sweep on processes of this machine, or on a cluster, and loses nothing.

The engine is dask.distributed. A task is a folder named by its settings, so what is done is not
run again, and what was cut off goes on from its checkpoint: after a kill of a worker, of the
scheduler or of the sweep itself, the same command again is all it takes.

    out/engm-0.1.0/digits-pgd_at-engm-seed0-5a6b7c8d/    a run, as `fit` writes it
    out/engm-0.1.0/06_cifar-9e8f7a6b/                    a notebook, and its result
    .../error.json                                       why a task failed, if it did
    out/engm-0.1.0/code.json                             the code that the runs were made with
"""

import secrets
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from engm.config import RunConfig
from engm.data import load, recorded_digest
from engm.errors import InputError, check_count
from engm.runs import RESULT, check_data, make_folder, read_json, write_json
from engm.sweep import clusters
from engm.sweep.plan import TRAIN, Task, code_version

ERROR, DONE, LOCK, CODE = "error.json", "done.json", ".sweep.lock", "code.json"
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
        device: As for `fit`, as are `data_root` and `save_adversarial`, which notebooks lack.
        progress: Show a progress bar.
    """

    workers: int = 1
    scheduler: str | None = None
    timeout: float | None = None
    device: str = "auto"
    data_root: Path | None = None
    save_adversarial: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        check_count("workers", self.workers)
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if self.data_root is not None:
            # one that workers in other folders understand
            object.__setattr__(self, "data_root", Path(self.data_root).resolve())


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
    return (folder / task.name / (RESULT if task.target == TRAIN else DONE)).exists()


def superseded(folders: Collection[Path]) -> set[Path]:
    """Returns those finished runs of a sweep that another version of the package made once more.

    Each version has a folder of its own in a sweep's; of the same run in several, the last counts.
    """
    copies: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for folder in folders:
        place = folder.resolve()
        if place.parent.name.startswith("engm-"):
            copies[place.parents[1], place.name].append(folder)
    last = [max(runs, key=lambda run: (run / RESULT).stat().st_mtime) for runs in copies.values()]
    return {run for runs in copies.values() for run in runs}.difference(last)


def run(tasks: Sequence[Task], out: Path, options: Options | None = None) -> list[Outcome]:
    """Runs what is not done yet, and says how each task ended, in their order.

    A task that raises is run once more; if it fails again, its error is kept in its folder, and the
    others go on. A second call runs the failed ones again. Ctrl-C ends what runs and raises
    `KeyboardInterrupt`. A worker that joins while the sweep runs and is not fit for it is sent
    away, and its tasks go to others.

    Raises:
        InputError: As `check`; or the scheduler cannot be reached or is lost, its workers are not
            fit for the sweep, or dask is not installed.

    Warns:
        UserWarning: If the folder has runs of other code, or a worker is sent away.
    """
    options = options or Options()
    digests = check(tasks, out, options)
    folder = folder_of(out)
    left = [task for task in tasks if not is_done(task, folder)]
    errors: dict[str, str] = {}
    if left:
        needs = clusters.Needs(code_version())
        if options.scheduler is None:  # of one machine, where a run says by itself what is missing
            own_gpus = options.device in ("auto", "cuda")
            cluster = clusters.local(min(options.workers, len(left)), own_gpus=own_gpus)
        else:
            mark = folder / f".sweep-{secrets.token_hex(8)}"
            wanted = {task.settings["dataset"] for task in left if task.target == TRAIN}
            data = tuple((name, digests[name]) for name in sorted(wanted))
            needs = clusters.Needs(code_version(), mark, data, options.data_root, options.device)
            cluster = clusters.remote(options.scheduler, needs, _PATIENCE)
        pause = 0.1 if sys.stderr.isatty() else 60  # seldom where nobody watches it move
        how: dict[str, Any] = dict(mininterval=pause, maxinterval=max(10, pause))
        how |= dict(total=len(tasks), initial=len(tasks) - len(left), disable=not options.progress)
        with (
            _marked(needs.mark),
            cluster as client,
            tqdm(desc="sweep", unit="run", **how) as bar,
        ):
            if options.scheduler is not None:
                bar.set_postfix_str("" if client.nthreads() else "no worker yet")
                needs = clusters.agreed(client, needs, _PATIENCE)
            _note_code(folder)  # from here on there are runs of it
            for task, error in _failed(left, folder, options, needs, client, bar):
                errors[task.name] = error
                note = {"error": error, "settings": task.settings}
                with suppress(OSError):  # a full disk is the reason, and takes no note
                    write_json(folder / task.name / ERROR, note)
        for task in left:
            if task.name not in errors and not is_done(task, folder):
                errors[task.name] = f"it has ended, but there is no result in {folder}"
    for task in tasks:
        if is_done(task, folder):
            with suppress(OSError):  # of a worker that was killed with its last word said
                (folder / task.name / LOCK).unlink(missing_ok=True)
    return [Outcome(task, folder / task.name, errors.get(task.name)) for task in tasks]


@contextmanager
def _marked(mark: Path | None) -> Iterator[None]:
    # workers know the folder of the sweep by this file
    if mark is None:
        yield
        return
    make_folder(mark.parent, "give another --out")
    mark.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()
        with suppress(OSError):  # one that was made for nothing, with that of all versions
            mark.parent.rmdir()
            mark.parents[1].rmdir()


def check(tasks: Sequence[Task], out: Path, options: Options) -> dict[str, str | None]:
    """Refuses what cannot be run, before anything is.

    Returns:
        The digest of each data set of the tasks, `None` where it has none.

    Raises:
        InputError: If an option has no meaning for the tasks, or a finished run is on other images.
    """
    training = [task.target == TRAIN for task in tasks]
    if any(training) and options.timeout is not None:
        raise InputError("timeout is for notebooks; training is limited by its epochs")
    own = (options.device, options.data_root, options.save_adversarial) != ("auto", None, True)
    if not all(training) and own:
        raise InputError(
            "device, data_root and save_adversarial are for training; a notebook takes a GPU "
            "where it finds one, and its data from the folder that ENGM_DATA names"
        )
    names = sorted({task.settings.get("dataset", "digits") for task in tasks})
    digests = {name: recorded_digest(name, options.data_root) for name in names}
    here = options.scheduler is None
    folder = folder_of(out)
    for task in tasks:
        name, done = task.settings.get("dataset", "digits"), is_done(task, folder)
        if done and task.target == TRAIN:
            check_data(folder / task.name, digests[name])
        elif here and not done and name != "digits" and digests[name] is None:
            load(name, root=options.data_root)  # which says how to prepare it
    return digests


def _note_code(folder: Path) -> None:
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


def _failed(
    tasks: Sequence[Task],
    folder: Path,
    options: Options,
    needs: clusters.Needs,
    client: Any,
    bar: "tqdm[Any]",
) -> Iterator[tuple[Task, str]]:
    # hands out the tasks that failed and why, until all have ended
    from distributed import CancelledError, wait

    def submit(task: Task) -> Any:
        # A key of its own for each submission: what an earlier sweep on this scheduler, or one with
        # another folder, had under the same name is not taken for it.
        key = f"{task.name}-{secrets.token_hex(4)}"
        work = clusters.task(needs, _work, task, folder, options)
        return client.submit(work, key=key, retries=1)

    left = {submit(task): task for task in tasks}
    sent_away: set[str] = set()
    # a worker that is not fit is the last word only where none has been seen that is
    some_fit = options.scheduler is not None and bool(client.nthreads())
    failed = 0
    while left:
        with suppress(TimeoutError, CancelledError):
            wait(list(left), timeout=1, return_when="FIRST_COMPLETED")
        for future in [future for future in left if future.status in ("finished", "error")]:
            task = left.pop(future)
            error = future.exception() if future.status == "error" else None
            worker = getattr(error, "unfit_worker", None)
            # where the sweep cannot write either, no worker is at fault
            if worker and needs.mark and (full := clusters.unwritable(folder)):
                error = _Failed(f"{folder} cannot be written to ({full}); make room, and try again")
            elif worker:
                left[submit(task)] = task
                if worker not in sent_away:
                    with suppress(OSError):  # where the scheduler is away, it is met again
                        clusters.retire(client, worker, str(error), alone=some_fit)
                        sent_away.add(worker)
                        warnings.warn(f"{error}. The sweep goes on without it", stacklevel=3)
                continue
            some_fit = options.scheduler is not None
            bar.update()
            if error is not None:
                failed += 1
                yield task, _reason(error)
        at_work: dict[str, Any] = {}
        with suppress(OSError):
            at_work = client.processing() if client.status == "running" else {}
        if client.status != "running" or any(future.cancelled() for future in left):
            clusters.wait_for_connection(client, _PATIENCE)
            # the scheduler that is there now knows nothing of them
            left = {submit(task): task for task in left.values()}
        # a worker does one task at a time; what else it has waits
        keys = {future.key for future in left}
        running = sum(not keys.isdisjoint(theirs) for theirs in at_work.values())
        text = f"{running} running, {failed} failed" if at_work else "no worker yet"
        bar.set_postfix_str(text, refresh=sys.stderr.isatty())


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, _Failed):
        return text
    if type(error).__name__ == "KilledWorker":
        return "its worker died again and again; is there enough memory?"
    return f"{type(error).__name__}: {text}"


class _Failed(Exception):
    """Carries the reason from a worker to the sweep, whatever the error was."""


def _work(task: Task, folder: Path, options: Options) -> None:
    # runs on a worker; a lock of processes would be called leaked where a Ctrl-C ends it
    tqdm.set_lock(threading.RLock())
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
    from engm.lab import batch, parameters

    values = dict(task.settings)
    # the notebook's own runs are kept, so that a second attempt goes on from them
    if "out" in parameters.parameters(Path(task.target)) and values.get("out") is None:
        values["out"] = str(where / "runs")
    done = batch.run(task.target, values, output_dir=where, timeout=options.timeout, progress=False)
    if done.error is not None:
        raise RuntimeError(str(done.error))
    write_json(where / DONE, {"settings": task.settings, "seconds": done.seconds})
