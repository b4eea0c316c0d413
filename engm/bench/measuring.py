"""What a piece of work costs: time, memory, arithmetic, and ratios of them."""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
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

Built = TypeVar("Built")
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
    _wait_for(device)
    started = clock()
    work()
    _wait_for(device)
    return clock() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    """Measures products of square matrices.

    Returns:
        For "bfloat16" and "float32" (as torch's flags make it), under each of `SIZES`, the best
        rate of several samples in TFLOP/s.
    """
    rates: dict[str, dict[str, float]] = {"bfloat16": {}, "float32": {}}
    for name, by_size in rates.items():
        for size in SIZES["cuda" if device.type == "cuda" else "cpu"]:
            left, right, product = torch.randn(3, size, size, device=device).to(
                getattr(torch, name)
            )
            timer = Timer(
                "torch.mm(left, right, out=product)",
                globals={"torch": torch, "left": left, "right": right, "product": product},
                num_threads=torch.get_num_threads(),
            )
            fastest = min(timer.blocked_autorange(min_run_time=_SAMPLED).times)
            by_size[str(size)] = 2 * size**3 / fastest / 1e12
    return rates


def able_ones(
    names: Sequence[str], build: Callable[[str], Built]
) -> tuple[dict[str, Built], dict[str, dict[str, Any]]]:
    """Builds and warms up each method; returns those that are able, and why the others are not.

    What the others are compared with, the first, has to be able. A CUDA graph that cannot be
    recorded ends it all, since torch cannot go on after that.
    """
    able, unable = {}, {}
    for name in tqdm(names, "warm-up"):
        try:
            able[name] = build(name)
        except Exception as error:
            if name == names[0] or "cannot be recorded" in str(error):
                raise
            unable[name] = {"reason": reason(error)}
    return able, unable


def command_line(settings: Mapping[str, Any], device: torch.device) -> str:
    """Returns the `engm bench` that measures with these settings."""
    words = ["engm", "bench"]
    for name, value in {**settings, "device": device.type}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


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
