"""Time and memory of a piece of work, what several cost beside one another, and how to show it."""

import gc
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from engm.bench import speeds
from engm.errors import InputError
from engm.runs import atomic_path, write_json


def seconds(work: Callable[[], object], device: torch.device, *, wall: bool = False) -> float:
    """Returns how long `work` takes, until the device has done all of it.

    With one thread on the CPU it is the time that the processor spent on it, so that programs
    which run beside it count little; else, or where `wall` is set, it is the time on the clock.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = process_time if one_thread and not wall else perf_counter
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Returns the most that `work` held at one time above what there was when it began.

    On CUDA that is what torch's allocator reports. On the CPU it is the running sum of torch's
    allocations and releases, as the profiler records them: exact, and the same in every run, but
    without scratch space that libraries such as oneDNN allocate by themselves. What `work` releases
    of before counts on CUDA only, so release gradients first.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print a line for each use
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def summarise(
    seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Returns medians, and ratios to "msgd": of times round by round, and of peak memory.

    Args:
        seconds: The time of each method in each round.
        peaks: The peak memory of each, in bytes.
    """
    found = {}
    for name, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds["msgd"], strict=True)]
        low, middle, high = quartiles(ratios)
        found[name] = {
            "median_seconds": statistics.median(times),
            "ratio": middle,
            "low": low,
            "high": high,
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks["msgd"],
        }
    return found


def held(work: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Runs `work`, and returns the most bytes that it held above what there was before.

    Returns:
        `peak_bytes`, of tensors, and `reserved_bytes`, with what the allocator and CUDA graphs
        keep; None on the CPU.
    """
    if device.type != "cuda":
        work()
        return {"peak_bytes": None, "reserved_bytes": None}
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # so that nothing is taken from what others gave back
    torch.cuda.reset_peak_memory_stats(device)
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    work()
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - held,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - reserved,
    }


def forget_peak(device: torch.device) -> None:
    """Lets the peak of `held` begin anew, where something passing was in it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def speed_up(times: Sequence[float], base: Sequence[float], each: int) -> dict[str, Any]:
    """Returns how long rounds took, and their speed beside that of others.

    Args:
        times: Of each round.
        base: Of the rounds that they are compared with.
        each: How many steps a round has.

    Returns:
        All `seconds`; of a step `median_seconds`, `low_seconds` and `high_seconds`, the median and
        the quartiles; `ratio`, `low` and `high`, those of the ratios of `base` to `times`.
    """
    low_time, _, high_time = quartiles([time / each for time in times])
    low, ratio, high = quartiles([other / time for time, other in zip(times, base, strict=True)])
    return {
        "seconds": list(times),
        "median_seconds": statistics.median(times) / each,
        "low_seconds": low_time,
        "high_seconds": high_time,
        "ratio": ratio,
        "low": low,
        "high": high,
    }


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


def table(result: Mapping[str, Any]) -> str:
    """Returns what a bench found as a markdown table, and below it what it could not.

    Args:
        result: Of `engm.bench.run`, or of `engm.bench.training.run`, which says so under "what".
    """
    if result.get("what") == "training":
        return speeds.table(result)
    titles = _titles(result)
    steps = " | time | memory | ".join(titles.values())
    lines = [f"| method | {steps} | time | memory | gradient |", "|" + 8 * "---|"]
    for name, entry in result["methods"].items():
        if "reason" not in entry:
            cells = [cell for step in titles for cell in _cells(entry.get(step))]
            agrees = "agrees" if entry["agrees"] else "DISAGREES"
            lines.append(f"| {' | '.join([name, *cells, agrees])} |")
    lines += ["", "time and memory: ratio to msgd (quartiles of the rounds)"]
    for name, entry in result["methods"].items():
        if "reason" in entry:
            lines.append(f"not able: {name}: {entry['reason']}")
        elif not entry["agrees"]:
            errors = ", ".join(f"{kind} {error:.1e}" for kind, error in entry["errors"].items())
            lines.append(f"WRONG GRADIENT: {name}: relative error {errors}")
    return "\n".join(lines)


def write(result: Mapping[str, Any], out: Path) -> None:
    """Writes `bench.json` and `bench.png` into the folder `out`."""
    from engm.plots import cost_ratios, to_png

    write_json(out / "bench.json", result)
    panels = speeds.panels(result) if result.get("what") == "training" else _panels(result)
    with atomic_path(out / "bench.png") as temporary:
        temporary.write_bytes(to_png(cost_ratios(panels)))


def _panels(result: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    able = {k: entry for k, entry in result["methods"].items() if "reason" not in entry}
    panels = {}
    for step, title in _titles(result).items():
        entries = {name: entry[step] for name, entry in able.items() if step in entry}
        panels[f"time, {title}"] = {
            name: (entry["ratio"], entry["low"], entry["high"]) for name, entry in entries.items()
        }
        panels[f"peak memory, {title}"] = {
            name: (entry["peak_ratio"],) * 3 for name, entry in entries.items()
        }
    return panels


def _titles(result: Mapping[str, Any]) -> dict[str, str]:
    return {"outer": "outer step", "at": f"AT-{result['settings']['num_steps']} step"}


def _cells(entry: Mapping[str, Any] | None) -> list[str]:
    if entry is None:
        return ["", "", ""]
    time = f"{entry['ratio']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"
    return [f"{1000 * entry['median_seconds']:.1f} ms", time, f"{entry['peak_ratio']:.2f}"]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
