"""Where the time of a step goes, by kind of work, as torch's profiler sees it."""

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from engm.bench.measuring import QUIET, seconds
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
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, lower)), _REST)


def profile(
    train: Callable[[int], object], steps: int, device: torch.device, seconds_per_step: float
) -> dict[str, Any]:
    """Profiles some steps of training, which should be warm.

    On CUDA the kinds are times of kernels, and "idle" is reckoned from `seconds_per_step`, what a
    step takes when it is not profiled: the profiler slows the host down, and hardly the kernels. On
    the CPU they are times of operators without those that they call; what is left is Python and
    waiting.

    Returns:
        Of a step, in seconds: `kinds`, `idle`, `wall`, and how long the host waited for `data`; and
        how often it `waits` for the device.
    """
    os.environ.setdefault(*QUIET)
    activities, on_cuda = [ProfilerActivity.CPU], device.type == "cuda"
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
        # else a second profile of CUDA graphs may end the process, as torch's own remark says
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with torch.profiler.profile(activities=activities) as recorded:
        wall = seconds(lambda: train(steps), device, wall=True) / steps
    kinds, data, waits = dict.fromkeys(KINDS, 0.0), 0.0, 0
    per_step = 1e-6 / steps  # from microseconds of all steps
    for event in recorded.events() or []:
        if event.device_type == DeviceType.CUDA:
            span = event.is_user_annotation or event.name.startswith(_SPANS)
            if not span:
                kinds[kind_of(event.name)] += event.time_range.elapsed_us() * per_step
            continue
        waits += event.name in _WAITS["cuda" if on_cuda else "cpu"]
        if event.name.startswith(_LOADER):
            data += event.time_range.elapsed_us() * per_step
        elif not on_cuda and not _within(event, _LOADER):
            kind = _OPTIMIZER if _within(event, "Optimizer.step") else kind_of(event.name)
            kinds[kind] += event.self_cpu_time_total * per_step
    busy = sum(kinds.values())
    if on_cuda and not busy:
        raise InputError("the profiler saw no kernel")
    if on_cuda:
        wall = seconds_per_step
    return {
        "steps": steps,
        "kinds": kinds,
        "idle": max(wall - busy, 0.0),
        "wall": wall,
        "data": data,
        "waits": waits / steps,
    }


def _within(event: Any, name: str) -> bool:
    """Returns whether an operator, or one that calls it, has a name that begins so."""
    while event is not None and not event.name.startswith(name):
        event = event.cpu_parent
    return event is not None
