"""What both benches show and write of their results: markdown tables, a chart, and the numbers."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from engm.report.tables import markdown, to_markdown
from engm.runs import write_bytes, write_json

# What the kit set itself for one NVIDIA H200, at batch sizes 128 and 256 (source: this kit).
SPEED_GOAL = 6.0
RATE_GOAL = 0.35
# And for an AT step with the norms estimated from the model's outputs, relative to MSGD.
OUTPUT_GOAL = 1.01


def table(result: Mapping[str, Any]) -> str:
    """Returns what `outer_step.run` or `training.run` measured as markdown tables, explained."""
    able, reasons = _parted(result["methods"])
    whole = result.get("what") == "training"
    lines = _training_lines(result, able) if whole else _step_lines(result, able)
    lines += [f"not able: {name}: {reason}" for name, reason in reasons.items()]
    if whole:
        profiles, reasons = _parted(result["profile"])
        rows = [_profile_row(name, entry) for name, entry in profiles.items()]
        lines += ["", to_markdown(rows).rstrip()] if rows else []
        failed = [f"not able: profile of {name}: {reason}" for name, reason in reasons.items()]
        return "\n".join(lines + (["", *failed] if failed else []))
    wrong = {name: entry["error"] for name, entry in able.items() if not entry["agrees"]}
    lines += [f"WRONG GRADIENT: {name}: relative error {e:.1e}" for name, e in wrong.items()]
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
            peaks = {name: (cost["peak_ratio"],) * 3 for name, cost in costs.items()}
            panels[f"peak memory, {title}"] = peaks
    write_bytes(out / "bench.png", to_png(cost_ratios(panels)))


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


def _verdict(spread: Sequence[float], goal: float, shown: str, most: bool = False) -> str:
    """Says whether a goal, the least or the `most` wanted, was reached, if both quartiles agree."""
    good = [value <= goal if most else value >= goal for value in spread[1:]]
    middle, low, high = map(shown.format, spread)
    if len(set(good)) > 1:
        return f"not settled ({middle}, quartiles {low} to {high})"
    return f"reached ({middle})" if good[0] else f"NOT reached ({middle})"


# --- the outer step


def _titles(result: Mapping[str, Any]) -> dict[str, str]:
    return {"outer": "outer step", "at": f"AT-{result['settings']['num_steps']} step"}


def _step_lines(result: Mapping[str, Any], able: Mapping[str, Any]) -> list[str]:
    def cells(cost: Mapping[str, Any] | None) -> tuple[str, str, str]:
        if cost is None:
            return "", "", ""
        return _ms(cost["median_seconds"]), _ratio(cost), f"{cost['peak_ratio']:.2f}"

    titles = _titles(result)
    head = ["method", *(part for title in titles.values() for part in (title, "time", "memory"))]
    rows = [
        [
            name,
            *(cell for step in titles for cell in cells(entry.get(step))),
            "agrees" if entry["agrees"] else "DISAGREES",
        ]
        for name, entry in able.items()
    ]
    lines = [
        markdown([*head, "gradient"], rows),
        "time and memory: ratio to msgd (quartiles of the rounds)",
    ]
    if "output" in able and result["settings"]["num_steps"] == 10:  # what the goal is about
        verdict = _verdict(_spread(able["output"]["at"]), OUTPUT_GOAL, "{:.3f}", most=True)
        lines.append(f"the kit's goal, {titles['at']} with output at most {OUTPUT_GOAL}: {verdict}")
    return lines


# --- whole training


def _training_lines(result: Mapping[str, Any], able: Mapping[str, Any]) -> list[str]:
    settings, data, tf32 = result["settings"], result["data"], result["environment"]["tf32"]
    allowed = {name: "yes" if flag else "no" for name, flag in tf32.items()}
    # the reference comes first, and the kit's rows have all the same attack
    counts = [e["attack"]["flops"] / settings["batch_size"] / 1e9 for e in able.values()]
    shown = [
        f"{who} {gflop:.3g} GFLOP an image"
        for who, gflop in zip(("the reference", "the kit"), counts, strict=False)
    ]
    return [
        to_markdown([_speed_row(name, entry) for name, entry in able.items()]),
        "speed: images a second against the reference's, round by round (quartiles); an epoch is "
        "50,000 images",
        f"data: {data['title']}, {data['images']} images; batch size {settings['batch_size']}",
        f"attack: its {settings['num_steps']} steps alone, of a batch; {', '.join(shown)}",
        _matrix_line(result["matrix"]),
        f"TF32 allowed in float32: convolutions {allowed['convolutions']}, products of matrices "
        f"{allowed['matrices']}",
        *(_goal_lines(able) if result["environment"]["cuda"] else []),
    ]


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


def _matrix_line(matrix: Mapping[str, Any]) -> str:
    if "reason" in matrix:
        return f"not able: rate of products of matrices: {matrix['reason']}"
    best = {name: max(rates.items(), key=itemgetter(1)) for name, rates in matrix.items()}
    shown = [f"{name} {rate:.3g} TFLOP/s ({size} rows)" for name, (size, rate) in best.items()]
    return f"products of square matrices: {', '.join(shown)}"


def _goal_lines(able: Mapping[str, Any]) -> list[str]:
    # of the rows with the reference's outer optimizer, the best by its median
    rows = {k: e for k, e in able.items() if k != "reference" and not k.startswith("engm")}
    speeds = {name: _spread(entry) for name, entry in rows.items()}
    rates = {k: _rates(e["attack"]) for k, e in rows.items() if e["attack"]["fraction"]}
    lines = []
    for title, goal, spreads, shown in (
        (f"{SPEED_GOAL:g} x the reference's epochs an hour", SPEED_GOAL, speeds, "{:.2f} x"),
        (f"attack steps at {RATE_GOAL:.0%} of the bf16 rate", RATE_GOAL, rates, "{:.1%}"),
    ):
        if spreads:
            best = max(spreads, key=spreads.__getitem__)
            lines.append(f"the kit's goal, {title}, {best}: {_verdict(spreads[best], goal, shown)}")
    return lines


def _rates(attack: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns median and quartiles of the part of the bf16 rate."""
    slow, median, fast = np.quantile(attack["seconds"], [0.75, 0.5, 0.25])
    return tuple(attack["fraction"] * median / each for each in (median, slow, fast))


def _profile_row(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    times = {**entry["kinds"], "idle": entry["idle"]}
    return {
        "profile": name,
        **{kind: f"{_ms(time)} ({time / entry['wall']:.0%})" for kind, time in times.items()},
        "step": _ms(entry["wall"]),
        "waiting for data": _ms(entry["data"]),
        "waits a step": f"{entry['waits']:.1f}",
    }
