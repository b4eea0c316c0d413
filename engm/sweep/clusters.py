"""Workers of `dask.distributed`: those of this machine, and those of a scheduler elsewhere."""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from unittest.mock import patch

from engm.errors import InputError
from engm.sweep.plan import code_version

_ROOM = 2**20  # bytes that a disk must have left at least
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Needs:
    """What a worker must have: code, and elsewhere than here the folder, data sets and a device.

    Attributes:
        code: Its `code_version`.
        mark: A file in the folder of the runs, where it must be able to write.
        datasets: Names of data sets, each with the digest of its cache, `None` for any.
        data_root: Where they are.
        device: That of `fit`.
    """

    code: str
    mark: Path | None = None
    datasets: tuple[tuple[str, str | None], ...] = ()
    data_root: Path | None = None
    device: str = "auto"

    def lacking(self, worker: Any) -> str:
        """Says on a worker what it lacks, as the end of a sentence; empty if nothing."""
        threads = worker.state.nthreads
        if threads > 1:
            return (
                f"runs {threads} tasks at once in one process, where they share random numbers; "
                "start it with `dask worker --nthreads 1`, and more workers instead"
            )
        if code_version() != self.code:
            return (
                f"runs {code_version()}, and the sweep is of {self.code}; update the code there "
                "and start the worker again, or the sweep where the code has changed since it began"
            )
        if self.mark is not None:
            folder = self.mark.parent
            if not self.mark.exists():
                return f"does not see {folder} as the sweep does; have both use the same disk"
            if reason := unwritable(folder):
                return f"cannot write to {folder} ({reason})"
        if self.datasets:
            from engm.data import data_root, recorded_digest
            from engm.device import pick_device

            folder = data_root(self.data_root)
            for name, digest in self.datasets:
                if name != "digits" and not (folder / f"{name}.json").is_file():
                    return f"finds no {name} in {folder}; prepare it there"
                if digest and recorded_digest(name, folder) != digest:
                    return f"has other images of {name} in {folder} than the sweep; copy its cache"
            try:
                pick_device(self.device)
            except InputError as error:
                return f"is not fit for the sweep: {error}"
        return ""


def unwritable(folder: Path) -> str:
    """Says why this process cannot write to a folder; empty if it can."""
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        return str(error.strerror)
    return ""


@contextmanager
def local(workers: int, *, own_gpus: bool = True) -> Iterator[Any]:
    """Starts workers on this machine, each a process with one task at a time; yields a dask client.

    They share the cores, unless OMP_NUM_THREADS says how many threads each has, and with `own_gpus`
    each sees one GPU only. A worker that dies is replaced. If the block raises, all of them are
    killed, with what they started.
    """
    _need_dask()
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
        patch.dict(os.environ),  # dask sets what its workers inherit; here it is put back
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
def remote(address: str, needs: Needs, patience: float) -> Iterator[Any]:
    """Connects to a scheduler, within `patience` seconds; yields a dask client if its workers fit.

    If the block is interrupted, workers that do nothing else are started anew, since a task that
    runs in one cannot be stopped in another way.
    """
    _need_dask()
    from distributed import Client

    try:
        client = Client(address, timeout=patience)
    except (OSError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"there is no scheduler at {address!r} ({reason}); `dask scheduler` starts one and "
            "prints its address"
        ) from None
    with client:
        for refusal in client.run(task(needs), on_error="return").values():
            if refusal is not None:
                raise InputError(str(refusal))
        try:
            yield client
        except KeyboardInterrupt:
            with suppress(Exception):  # the scheduler may be gone
                _stop(client)
            raise


def task(needs: Needs, function: Callable[..., Any] | None = None, *arguments: Any) -> Any:
    """Makes what a worker runs: first it looks at itself, then it calls `function`.

    A worker without the kit can take it, too, and say so. The error of one that is not fit has its
    address as `unfit_worker`.
    """
    content = pickle.dumps((needs, function, arguments))

    # a function within a function is sent as code, not by its name
    def work(dask_worker: Any = None) -> Any:
        import pickle

        from distributed import get_worker

        worker = dask_worker or get_worker()
        try:
            needs, function, arguments = pickle.loads(content)
            lacking = needs.lacking(worker)
        except (ImportError, AttributeError) as missing:
            lacking = f"has no engm of this version ({missing}); install it there"
        if lacking:
            error = RuntimeError(f"the worker {worker.address} {lacking}")
            error.unfit_worker = worker.address  # type: ignore[attr-defined]
            raise error
        return None if function is None else function(*arguments)

    return work


def agreed(client: Any, needs: Needs, patience: float) -> Needs:
    """Adds to `needs` the digests that the workers have of data sets which the sweep has not.

    Where there is no worker yet it waits for one, since those that come later are held to it.

    Raises:
        InputError: If workers have different ones, or the scheduler is away for more than
            `patience` seconds.
    """
    from engm.data import recorded_digest

    data = dict(needs.datasets)
    for name in [name for name, digest in data.items() if digest is None and name != "digits"]:
        ask = task(needs, recorded_digest, name, needs.data_root)
        asked: dict[str, Any] = {}
        while not asked:
            try:
                asked = client.run(ask, on_error="return")
            except OSError:  # the scheduler may come back, as while the runs are made
                wait_for_connection(client, patience)
            if not asked:
                time.sleep(1)
        # a worker that is not fit gives an error, and is sent away when it gets a task
        found = {digest: worker for worker, digest in asked.items() if isinstance(digest, str)}
        if len(found) > 1:
            listed = ", ".join(f"{digest[:12]} on {worker}" for digest, worker in found.items())
            raise InputError(
                f"the workers have different images of {name} (sha256 of the cache: {listed}); "
                "copy one cache to all of them"
            )
        data[name] = next(iter(found), None)
    return replace(needs, datasets=tuple(data.items()))


def retire(client: Any, worker: str, reason: str, *, alone: bool) -> None:
    """Ends a worker that is not fit, so that its tasks go to others.

    Where there is no other at the moment, the reason is an `InputError`, unless `alone`.
    """
    workers = set(client.nthreads())
    if not alone and workers <= {worker}:
        raise InputError(reason)
    if worker in workers:
        client.retire_workers([worker])


def wait_for_connection(client: Any, patience: float) -> None:
    """Waits up to `patience` seconds for a scheduler that is away while the client tries again."""
    until = time.monotonic() + patience
    while client.status == "connecting" and time.monotonic() < until:
        time.sleep(0.1)
    if client.status != "running":
        raise InputError(
            "the scheduler is gone; start it and its workers again, and the same command goes on "
            "where this one was"
        )


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


def _need_dask() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise InputError('dask is not installed: pip install "engm[sweep]"') from None
