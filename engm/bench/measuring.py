"""What a piece of work costs: time, memory, arithmetic, and ratios of them."""

import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, product
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.profiler import ProfilerActivity
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from engm.errors import InputError
from engm.runs import environment

Method = TypeVar("Method")
Found = TypeVar("Found")
# Rows of matrices: the rate of a GPU rises with them until caches and power limit it.
SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
_SAMPLED = 0.2  # seconds
QUIET = ("KINETO_LOG_LEVEL", "99")  # torch's profiler would print a line for each use


def seconds(work: Callable[[], object], device: torch.device, *, wall: bool = False) -> float:
    """Returns how long `work` takes, until the device has done all of it.

    With one thread on the CPU it is the time that the processor spent on it, so that programs
    which run beside it count little; else, or where `wall` is set, it is the time on the clock.
    """
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = process_time if one_thread and not wall else perf_counter

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    started = now()
    work()
    return now() - started


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Returns the most that `work` held at one time above what there was when it began.

    On CUDA that is what torch's allocator reports. On the CPU it is the running sum of torch's
    allocations and releases, as the profiler records them: exact, and the same in every run, but
    without scratch space that libraries such as oneDNN allocate by themselves. What `work` releases
    of before counts on CUDA only, so release gradients first.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault(*QUIET)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results = recorded.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def ratios(values: ArrayLike, base: ArrayLike) -> dict[str, float]:
    """Returns median and quartiles, `ratio`, `low` and `high`, of `values` to `base` by rounds."""
    by_round = np.asarray(values) / np.asarray(base)
    low, ratio, high = np.quantile(by_round, [0.25, 0.5, 0.75]).tolist()
    return {"ratio": ratio, "low": low, "high": high}


def flops(work: Callable[[], object]) -> int:
    """Returns the floating point operations of `work`, run eagerly once.

    Counted are convolutions and products of matrices, forward and backward, a multiplication with
    its addition as two; not counted are normalisation and what goes element by element.
    """
    counter = FlopCounterMode(display=False)
    # Its tracker of modules hooks into the backward pass, which `autograd.grad` of images does not
    # allow. Totals need none.
    counter.mod_tracker = nullcontext()  # type: ignore[assignment]
    counter.mod_tracker.parents = {"Global"}
    with counter:
        work()
    return counter.get_total_flops()


def matrix_rates(device: torch.device) -> dict[str, dict[str, float]]:
    """Returns the best rate of several products of square matrices, in TFLOP/s.

    For "bfloat16" and "float32" (as torch's flags make it), under each of `SIZES`.
    """
    rates: dict[str, dict[str, float]] = {"bfloat16": {}, "float32": {}}
    for name, by_size in rates.items():
        for size in SIZES["cuda" if device.type == "cuda" else "cpu"]:
            matrices = torch.randn(3, size, size, device=device).to(getattr(torch, name))
            work = partial(torch.mm, matrices[0], matrices[1], out=matrices[2])
            timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
            fastest = min(timer.blocked_autorange(min_run_time=_SAMPLED).times)
            by_size[str(size)] = 2 * size**3 / fastest / 1e12
    return rates


def in_turns(
    title: str,
    methods: dict[str, Method],
    measure: Callable[[Method], Found],
    failed: dict[str, dict[str, Any]],
    repeats: int = 1,
) -> dict[str, list[Found]]:
    """Measures methods in turns (A B C A B C ...), so that a slow moment meets all of them.

    One that fails leaves `methods`, and `failed` gets its `reason`. The first, which the others are
    compared with, has to be able. A CUDA graph that cannot be recorded ends it all, since torch
    cannot go on after that. Returns what `measure` gave of each method that is able, by rounds.
    """
    base = next(iter(methods))
    found: dict[str, list[Found]] = {name: [] for name in methods}
    for _, name in tqdm([*product(range(repeats), methods)], title):
        if name not in methods:
            continue
        try:
            found[name].append(measure(methods[name]))
        except Exception as error:
            if name == base or "cannot be recorded" in str(error):
                raise
            failed[name] = {"reason": reason(error)}
            del methods[name]
    return {name: found[name] for name in methods}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Works on a device, without warnings, and leaves torch's random state as it was."""
    on_cuda = device.type == "cuda"
    with (
        torch.cuda.device(device) if on_cuda else nullcontext(),  # that torch's Timer waits for
        torch.random.fork_rng([device] if on_cuda else []),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # how peers speak of hooks, and "input" of its fit
        yield


def described(settings: dict[str, Any], device: torch.device, **more: Any) -> dict[str, Any]:
    """Returns the `engm bench` that measures with these settings, the settings, and where."""
    words = ["engm", "bench"]
    for name, value in {**more, **settings, "device": device.type}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            words += [flag, str(value)]
    command = shlex.join(words)
    return {**more, "command": command, "settings": settings, "environment": environment(device)}


def reason(error: Exception) -> str:
    """Returns in a line why something could not be measured, without paths of this machine."""
    if isinstance(error, ModuleNotFoundError):
        peer = str(error.name).split(".")[0] in ("opacus", "backpack")
        remedy = "; pip install 'engm[peers]'" if peer else ""
        return f"{error.name} is not installed{remedy}"
    first = (str(error).splitlines() or [""])[0].split(". ")[0]
    without_paths = re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", first)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{kind}{without_paths}"[:240]
