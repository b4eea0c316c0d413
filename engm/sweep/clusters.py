"""Workers of `dask.distributed`: those of this machine, and those of a scheduler elsewhere."""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from engm.errors import InputError
from engm.sweep.plan import code_version

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def local(workers: int, *, own_gpus: bool = True) -> Iterator[Any]:
    """Starts workers on this machine, each a process with one task at a time.

    They share the cores, unless OMP_NUM_THREADS says how many threads each has. A worker that dies
    is replaced. If the block raises, all of them are killed, with what they started.

    Args:
        workers: How many.
        own_gpus: Let each worker see one GPU only, where there are some.

    Yields:
        A dask client.

    Raises:
        InputError: If dask is not installed.
    """
    _need_dask()
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, Nanny, Scheduler, SpecCluster

    gpus = _gpus() if own_gpus else []
    specs = {}
    for index in range(workers):
        env = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        # a limit of memory would kill runs that do well
        own: dict[str, Any] = dict(nthreads=1, memory_limit=0, env=env, host="127.0.0.1")
        specs[index] = {"cls": Nanny, "options": own | {"silence_logs": logging.CRITICAL}}
    head = dict(host="127.0.0.1", dashboard_address=None, dashboard=False)
    threads = os.environ.get(_THREADS[0]) or str(max(1, CPU_COUNT // workers))
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,  # tasks wait in the scheduler
        # libraries read these when they are loaded, so they must be there before
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(_THREADS, threads),
    }
    scheduler = {"cls": Scheduler, "options": head}
    with (
        _same_environment(),
        dask.config.set(settings),
        SpecCluster(specs, scheduler, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster) as client,
    ):
        try:
            yield client
        except BaseException:
            _kill(cluster)
            raise


@contextmanager
def remote(address: str, patience: float) -> Iterator[Any]:
    """Connects to a scheduler and its workers.

    If the block is interrupted, workers that do nothing else are started anew, since a task that
    runs in one cannot be stopped in another way.

    Args:
        address: Its address, such as "tcp://10.0.0.1:8786".
        patience: Seconds to wait for it.

    Yields:
        A dask client.

    Raises:
        InputError: If there is no scheduler, a worker is not fit, or dask is not installed.
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
        _check_workers(client)
        try:
            yield client
        except KeyboardInterrupt:
            with suppress(Exception):  # the scheduler may be gone
                _stop(client)
            raise


def submit(client: Any, function: Callable[..., None], *arguments: Any, key: str) -> Any:
    """Has a worker call `function`, and returns the future.

    Neither the scheduler nor a worker needs the kit to take the task, so a worker without it can
    say so.
    """
    content = pickle.dumps((function, arguments))

    # a function within a function is sent as code, not by its name
    def work(content: bytes) -> None:
        import pickle

        function, arguments = pickle.loads(content)
        function(*arguments)

    return client.submit(work, content, key=key)


def finished(
    client: Any,
    futures: Sequence[Any],
    patience: float,
    show: Callable[[int, int], None],
) -> Iterator[Any]:
    """Hands out futures as they end, well or not.

    Ends early where the connection to the scheduler was lost and is there again: the scheduler has
    forgotten the futures that were not handed out.

    Args:
        client: The client that has the futures.
        futures: What to wait for.
        patience: Seconds that the scheduler may be away.
        show: Called about once a second with the number of tasks that run, and of workers.

    Raises:
        InputError: If the scheduler is gone.
    """
    from distributed import CancelledError, wait

    left = list(futures)
    while left:
        with suppress(TimeoutError, CancelledError):
            wait(left, timeout=1, return_when="FIRST_COMPLETED")
        for future in [future for future in left if future.status in ("finished", "error")]:
            left.remove(future)
            yield future
        try:
            at_work = client.processing() if client.status == "running" else {}
        except OSError:
            at_work = {}
        if client.status != "running" or any(future.cancelled() for future in left):
            _wait_for_connection(client, patience)
            return
        keys = {future.key for future in left}
        # a worker does one task at a time; what else it has waits
        show(sum(not keys.isdisjoint(tasks) for tasks in at_work.values()), len(at_work))


def check_worker(version: str) -> None:
    """Refuses, on a worker, to run other code than the sweep's, or several tasks at once.

    Args:
        version: What `code_version` gives where the sweep was started.

    Raises:
        InputError: If the worker is not fit.
    """
    from distributed import get_worker

    worker = get_worker()
    _check_threads(worker.address, worker.state.nthreads)
    _check_version(worker.address, code_version(), version)


def _check_workers(client: Any) -> None:
    for worker, threads in client.nthreads().items():
        _check_threads(worker, threads)

    def version() -> str:  # sent as code, see `submit`
        from engm.sweep.plan import code_version

        return code_version()

    for worker, found in client.run(version, on_error="return").items():
        if isinstance(found, BaseException):
            raise InputError(f"the worker {worker} has no engm ({found}); install it there")
        _check_version(worker, found, code_version())


def _check_threads(worker: str, threads: int) -> None:
    if threads > 1:
        raise InputError(
            f"the worker {worker} runs {threads} tasks at once in one process, where they share "
            "random numbers; start it with `dask worker --nthreads 1`, and more workers instead"
        )


def _check_version(worker: str, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise InputError(
            f"the worker {worker} runs {theirs}, and the sweep is of {ours}; update the code there "
            "and start the worker again, or the sweep where the code has changed since it began"
        )


def _wait_for_connection(client: Any, patience: float) -> None:
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


@contextmanager
def _same_environment() -> Iterator[None]:
    # dask sets what its workers inherit
    before = os.environ.copy()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _need_dask() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise InputError('dask is not installed: pip install "engm[sweep]"') from None
