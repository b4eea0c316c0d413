"""How to show what `engm.bench.training` measured."""

from collections.abc import Mapping
from typing import Any

REFERENCE = "reference"
# What the kit set itself for one NVIDIA H200, at batch sizes 128 and 256 (source: this kit).
SPEED_GOAL = 6.0
RATE_GOAL = 0.35


def table(result: Mapping[str, Any]) -> str:
    """Returns the measured speeds and the profiles as markdown tables, with what explains them."""
    able, unable = _parted(result["methods"])
    on_cuda = result["environment"]["cuda"] is not None
    heads = ["method", "step", "images/s", "epochs/hour", "speed", "attack", "TFLOP/s", "of bf16"]
    heads += ["memory", "reserved"] * on_cuda
    rows = [[name, *_cells(entry, on_cuda)] for name, entry in able.items()]
    flags = result["environment"]["tf32"]
    lines = [
        *_markdown(heads, rows),
        "",
        "speed: images a second against the reference's, round by round (quartiles); an epoch is "
        "50,000 images",
        f"data: {result['data']['title']}, {result['data']['images']} images; batch size "
        f"{result['settings']['batch_size']}",
        _attack_line(result, able),
        _matrix_line(result["matrix"]),
        f"TF32 allowed in float32: convolutions {_yes(flags['convolutions'])}, products of "
        f"matrices {_yes(flags['matrices'])}",
        *(_goals(result, able) if on_cuda else []),
        *(f"not able: {name}: {entry['reason']}" for name, entry in unable.items()),
    ]
    profiles = _profiles(result["profile"])
    return "\n".join([*lines, *[""] * bool(profiles), *profiles])


def panels(result: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Returns what `engm.plots.cost_ratios` draws: speeds of training and of the attack alone."""
    able, _ = _parted(result["methods"])
    return {
        "images a second": {k: (e["ratio"], e["low"], e["high"]) for k, e in able.items()},
        "attacks a second": {
            k: (e["attack"]["ratio"], e["attack"]["low"], e["attack"]["high"])
            for k, e in able.items()
        },
    }


def _cells(entry: Mapping[str, Any], on_cuda: bool) -> list[str]:
    attack = entry["attack"]
    memory = [f"{entry[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "reserved_bytes")
              if on_cuda]  # fmt: skip
    fraction = attack["fraction"]
    return [
        f"{1000 * entry['median_seconds']:.1f} ms",
        f"{entry['images_per_second']:.0f}",
        f"{entry['epochs_per_hour']:.1f}",
        f"{entry['ratio']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})",
        f"{1000 * attack['median_seconds']:.1f} ms",
        f"{attack['tflops']:.3g}",
        "" if fraction is None else f"{fraction:.1%}",
        *memory,
    ]


def _attack_line(result: Mapping[str, Any], able: Mapping[str, Any]) -> str:
    size, steps = (result["settings"][key] for key in ("batch_size", "num_steps"))
    counts = {
        name: f"{entry['attack']['flops'] / size / 1e9:.3g} GFLOP an image"
        for name, entry in able.items()
    }
    kits = [name for name in counts if name != REFERENCE]
    shown = [f"the reference {counts[REFERENCE]}", *(f"the kit {counts[k]}" for k in kits[:1])]
    return f"attack: its {steps} steps alone, of a batch; {', '.join(shown)}"


def _matrix_line(matrix: Mapping[str, Any]) -> str:
    if "reason" in matrix:
        return f"not able: rate of products of matrices: {matrix['reason']}"
    best = {name: max(rates.items(), key=lambda item: item[1]) for name, rates in matrix.items()}
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s ({size} rows)"
                      for name, (size, rate) in best.items())  # fmt: skip
    return f"products of square matrices: {rates}"


def _goals(result: Mapping[str, Any], able: Mapping[str, Any]) -> list[str]:
    # of the rows with the reference's outer optimizer
    rows = {k: e for k, e in able.items() if k != REFERENCE and not k.startswith("engm")}
    if not rows:
        return []
    name, entry = max(rows.items(), key=lambda item: item[1]["ratio"])
    found = [_goal(f"{SPEED_GOAL:g} x the reference's epochs an hour",
                   entry["ratio"] >= SPEED_GOAL, f"{entry['ratio']:.2f} x, {name}")]  # fmt: skip
    fractions = {k: e["attack"]["fraction"] for k, e in rows.items() if e["attack"]["fraction"]}
    if fractions:
        name, fraction = max(fractions.items(), key=lambda item: item[1])
        title = f"attack steps at {RATE_GOAL:.0%} of the bf16 rate"
        found.append(_goal(title, fraction >= RATE_GOAL, f"{fraction:.1%}, {name}"))
    return found


def _goal(title: str, reached: bool, shown: str) -> str:
    return f"goal, {title}: {'reached' if reached else 'NOT reached'} ({shown})"


def _profiles(profiles: Mapping[str, Any]) -> list[str]:
    able, unable = _parted(profiles)
    lines = []
    if able:
        kinds = list(next(iter(able.values()))["kinds"])
        heads = ["profile", *kinds, "idle", "step", "waiting for data", "waits a step"]
        rows = []
        for name, entry in able.items():
            wall = entry["wall"]
            times = [*entry["kinds"].values(), entry["idle"]]
            cells = [f"{1000 * time:.1f} ms ({time / wall:.0%})" for time in times]
            cells += [f"{1000 * wall:.1f} ms", f"{1000 * entry['data']:.1f} ms"]
            rows.append([name, *cells, f"{entry['waits']:.1f}"])
        lines = _markdown(heads, rows)
    failed = [f"not able: profile of {name}: {entry['reason']}" for name, entry in unable.items()]
    return lines + [""] * bool(lines and failed) + failed


def _parted(entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what was measured, and what only has a reason."""
    unable = {name: entry for name, entry in entries.items() if "reason" in entry}
    return {name: entry for name, entry in entries.items() if name not in unable}, unable


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    rule = "|" + len(heads) * "---|"
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
