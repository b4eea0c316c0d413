"""What both benches show and write of their results: markdown tables, a chart, and the numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engm.report.tables import markdown, to_markdown
from engm.runs import atomic_path, write_json

# What the kit set itself for one NVIDIA H200, at batch sizes 128 and 256 (source: this kit).
SPEED_GOAL = 6.0
RATE_GOAL = 0.35
# And for an AT step with the norms estimated from the model's outputs, relative to MSGD.
OUTPUT_GOAL = 1.01


def table(result: Mapping[str, Any]) -> str:
    """Returns what a bench measured as markdown tables, with what explains them.

    Args:
        result: Of `engm.bench.run`, or of `engm.bench.training.run`, which says so under "what".
    """
    lines = _training_lines(result) if result.get("what") == "training" else _step_lines(result)
    return "\n".join(lines)


def write(result: Mapping[str, Any], out: Path) -> None:
    """Writes `bench.json` and `bench.png` into the folder `out`."""
    from engm.plots import cost_ratios, to_png

    write_json(out / "bench.json", result)
    able, _ = _parted(result["methods"])
    panels = {}
    if result.get("what") == "training":
        panels["images a second"] = {name: _spread(entry) for name, entry in able.items()}
        panels["attacks a second"] = {n: _spread(entry["attack"]) for n, entry in able.items()}
    else:
        for step, title in _titles(result).items():
            costs = {name: entry[step] for name, entry in able.items() if step in entry}
            panels[f"time, {title}"] = {name: _spread(cost) for name, cost in costs.items()}
            peaks = {name: cost["peak_ratio"] for name, cost in costs.items()}
            panels[f"peak memory, {title}"] = {name: (p, p, p) for name, p in peaks.items()}
    with atomic_path(out / "bench.png") as temporary:
        temporary.write_bytes(to_png(cost_ratios(panels)))


def _parted(entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what was measured, and the reasons why others were not."""
    reasons = {name: entry["reason"] for name, entry in entries.items() if "reason" in entry}
    return {name: entry for name, entry in entries.items() if name not in reasons}, reasons


def _spread(entry: Mapping[str, float]) -> tuple[float, float, float]:
    return entry["ratio"], entry["low"], entry["high"]


def _ratio(entry: Mapping[str, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*_spread(entry))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


# --- the outer step


def _titles(result: Mapping[str, Any]) -> dict[str, str]:
    return {"outer": "outer step", "at": f"AT-{result['settings']['num_steps']} step"}


def _step_lines(result: Mapping[str, Any]) -> list[str]:
    able, reasons = _parted(result["methods"])
    head, rows = ["method"], {name: [name] for name in able}
    for step, title in _titles(result).items():
        head += [title, "time", "memory"]
        for name, entry in able.items():
            cost = entry.get(step)
            rows[name] += (
                [_ms(cost["median_seconds"]), _ratio(cost), f"{cost['peak_ratio']:.2f}"]
                if cost
                else [""] * 3
            )
    for name, entry in able.items():
        rows[name].append("agrees" if entry["agrees"] else "DISAGREES")
    return [
        markdown([*head, "gradient"], rows.values()),
        "time and memory: ratio to msgd (quartiles of the rounds)",
        *_output_goal(result, able),
        *(f"not able: {name}: {reason}" for name, reason in reasons.items()),
        *(
            f"WRONG GRADIENT: {name}: relative error {entry['error']:.1e}"
            for name, entry in able.items()
            if not entry["agrees"]
        ),
    ]


def _output_goal(result: Mapping[str, Any], able: Mapping[str, Any]) -> list[str]:
    if "output" not in able:
        return []
    ratio = able["output"]["at"]["ratio"]
    reached = "reached" if ratio <= OUTPUT_GOAL else "NOT reached"
    title = _titles(result)["at"]
    return [f"goal, {title} with output at most {OUTPUT_GOAL}: {reached} ({ratio:.3f})"]


# --- whole training


def _training_lines(result: Mapping[str, Any]) -> list[str]:
    able, reasons = _parted(result["methods"])
    settings, data, tf32 = result["settings"], result["data"], result["environment"]["tf32"]
    allowed = {name: "yes" if flag else "no" for name, flag in tf32.items()}
    lines = [
        to_markdown([_speed_row(name, entry) for name, entry in able.items()]),
        "speed: images a second against the reference's, round by round (quartiles); an epoch is "
        "50,000 images",
        f"data: {data['title']}, {data['images']} images; batch size {settings['batch_size']}",
        _attack_line(settings, list(able.values())),
        _matrix_line(result["matrix"]),
        f"TF32 allowed in float32: convolutions {allowed['convolutions']}, products of matrices "
        f"{allowed['matrices']}",
        *(_goal_lines(able) if result["environment"]["cuda"] else []),
        *(f"not able: {name}: {reason}" for name, reason in reasons.items()),
    ]
    profiles, reasons = _parted(result["profile"])
    if profiles:
        table = to_markdown([_profile_row(name, entry) for name, entry in profiles.items()])
        lines += ["", table.rstrip()]
    if reasons:
        lines += ["", *(f"not able: profile of {name}: {why}" for name, why in reasons.items())]
    return lines


def _speed_row(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    attack = entry["attack"]
    return {
        "method": name,
        "step": _ms(entry["median_seconds"]),
        "images/s": f"{entry['images_per_second']:.0f}",
        "epochs/hour": f"{entry['epochs_per_hour']:.1f}",
        "speed": _ratio(entry),
        "attack": _ms(attack["median_seconds"]),
        "TFLOP/s": f"{attack['tflops']:.3g}",
        "of bf16": "" if attack["fraction"] is None else f"{attack['fraction']:.1%}",
    }


def _attack_line(settings: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    # the reference comes first, and the kit's rows have all the same attack
    shown = []
    for who, entry in zip(("the reference", "the kit"), entries, strict=False):
        gflop = entry["attack"]["flops"] / settings["batch_size"] / 1e9
        shown.append(f"{who} {gflop:.3g} GFLOP an image")
    return f"attack: its {settings['num_steps']} steps alone, of a batch; {', '.join(shown)}"


def _matrix_line(matrix: Mapping[str, Any]) -> str:
    if "reason" in matrix:
        return f"not able: rate of products of matrices: {matrix['reason']}"
    best = []
    for name, rates in matrix.items():
        size = max(rates, key=rates.__getitem__)
        best.append(f"{name} {rates[size]:.3g} TFLOP/s ({size} rows)")
    return f"products of square matrices: {', '.join(best)}"


def _goal_lines(able: Mapping[str, Any]) -> list[str]:
    # of the rows with the reference's outer optimizer
    rows = {k: e for k, e in able.items() if k != "reference" and not k.startswith("engm")}
    speeds = {name: entry["ratio"] for name, entry in rows.items()}
    rates = {name: entry["attack"]["fraction"] or 0.0 for name, entry in rows.items()}
    lines = []
    for title, goal, values, shown in (
        (f"{SPEED_GOAL:g} x the reference's epochs an hour", SPEED_GOAL, speeds, "{:.2f} x"),
        (f"attack steps at {RATE_GOAL:.0%} of the bf16 rate", RATE_GOAL, rates, "{:.1%}"),
    ):
        if any(values.values()):
            best = max(values, key=values.__getitem__)
            reached = "reached" if values[best] >= goal else "NOT reached"
            lines.append(f"goal, {title}: {reached} ({shown.format(values[best])}, {best})")
    return lines


def _profile_row(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    times = {**entry["kinds"], "idle": entry["idle"]}
    return {
        "profile": name,
        **{kind: f"{_ms(time)} ({time / entry['wall']:.0%})" for kind, time in times.items()},
        "step": _ms(entry["wall"]),
        "waiting for data": _ms(entry["data"]),
        "waits a step": f"{entry['waits']:.1f}",
    }
