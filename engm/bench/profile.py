"""Where the time of a step goes, by kind of work, as torch's profiler sees it."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from engm.bench.costs import seconds
from engm.errors import InputError

KINDS = ("convolution, matrix", "normalisation", "elementwise, rest", "copies", "optimizer")
_CONVOLUTION, _NORMALISATION, _REST, _COPIES, _OPTIMIZER = KINDS

# The first that matches: a compiled kernel is named after all that was fused into it, a template of
# CUTLASS after the copies that it makes.
_PATTERNS = (
    (_OPTIMIZER, r"multi_tensor_apply|^optimizer\."),
    (_CONVOLUTION, r"^triton_tem_"),
    (_NORMALISATION, r"^triton_\w*(batch|group|layer)_norm"),
    (_REST, r"^triton_"),
    (
        _CONVOLUTION,
        r"convol|conv2d|gemm|gemv|xmma|cutlass|wgrad|dgrad|fprop|winograd|nvjet|splitk"
        r"|::(add|b|badd|addb)?mm\b|\b(addmm|mm|bmm)backward|::(matmul|linear|einsum)\b",
    ),
    (
        _NORMALISATION,
        r"(batch|group|layer)_?norm|\bbn_|rowwisemoments|fusedparams|gammabeta"
        r"|computeinternalgradients",
    ),
    (_COPIES, r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|converttensor"),
)
# Where the host waits for the device. On the CPU: where it would, on a GPU.
_WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaEventSynchronize"),
    "cpu": ("aten::_local_scalar_dense",),
}
_LOADER = "enumerate(DataLoader)"
# Spans that torch or Inductor name, on the device too; they hold kernels, and are none.
_SPANS = ("Optimizer.", "ProfilerStep", _LOADER, "Torch-Compiled", "## ", "CompiledFunction")


def kind_of(name: str) -> str:
    """Returns which of `KINDS` a kernel or an operator is of, by its name.

    Layouts that a library changes for its convolutions count as copies. A compiled kernel that
    normalises counts as normalisation, whatever else was fused into it.
    """
    lower = name.lower()
    for kind, pattern in _PATTERNS:
        if re.search(pattern, lower):
            return kind
    return _REST


def profile(
    train: Callable[[int], object],
    steps: int,
    device: torch.device,
    seconds_per_step: float | None = None,
) -> dict[str, Any]:
    """Profiles some steps of training.

    On CUDA the kinds are times of kernels, so their sum may exceed the time that the device is
    busy, where kernels overlap. On the CPU they are times of operators without those that they
    call; what is left is Python and waiting.

    Args:
        train: Takes a number of steps; it should be warm.
        steps: How many to take.
        device: Where the work is done.
        seconds_per_step: What a step takes when it is not profiled. On CUDA "idle" is reckoned from
            it, since the profiler slows the host down, and hardly the kernels.

    Returns:
        Of a step, in seconds: `kinds`, `busy`, `idle`, `wall`, `profiled_wall`, and how long the
        host waited for `data`; and how often it `waits` for the device.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print a line for each use
    on_cuda = device.type == "cuda"
    if on_cuda:
        # else a second profile of CUDA graphs may end the process, as torch's own remark says
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=activities) as recorded:
        profiled = seconds(lambda: train(steps), device, wall=True) / steps
    events: list[Any] = list(recorded.events() or [])
    host = [event for event in events if event.device_type == DeviceType.CPU]
    if on_cuda:
        kernels = [event for event in events if _is_kernel(event)]
        if not kernels:
            raise InputError("the profiler saw no kernel")
        times = [(kind_of(e.name), e.time_range.elapsed_us()) for e in kernels]
        busy = _union((e.time_range.start, e.time_range.end) for e in kernels)
    else:
        works = [event for event in host if not _waits_for_data(event)]
        times = [(_kind_on_host(e), e.self_cpu_time_total) for e in works]
        busy = sum(time for _, time in times)
    sums = dict.fromkeys(KINDS, 0.0)
    for kind, time in times:
        sums[kind] += time
    wall = seconds_per_step if on_cuda and seconds_per_step else profiled
    per_step = 1e-6 / steps  # from microseconds of all steps
    names = _WAITS.get(device.type, _WAITS["cpu"])
    waiting = sum(e.time_range.elapsed_us() for e in host if e.name.startswith(_LOADER))
    return {
        "steps": steps,
        "kinds": {kind: time * per_step for kind, time in sums.items()},
        "busy": busy * per_step,
        "idle": max(wall - busy * per_step, 0.0),
        "wall": wall,
        "profiled_wall": profiled,
        "data": waiting * per_step,
        "waits": sum(event.name in names for event in host) / steps,
    }


def _is_kernel(event: Any) -> bool:
    span = getattr(event, "is_user_annotation", False) or event.name.startswith(_SPANS)
    return event.device_type == DeviceType.CUDA and not span


def _kind_on_host(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return _OPTIMIZER
        above = above.cpu_parent
    return kind_of(event.name)


def _waits_for_data(event: Any) -> bool:
    above = event
    while above is not None:
        if above.name.startswith(_LOADER):
            return True
        above = above.cpu_parent
    return False


def _union(spans: Iterable[Sequence[float]]) -> float:
    """Returns the length of what the spans cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted((s[0], s[1]) for s in spans):
        covered += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return covered
