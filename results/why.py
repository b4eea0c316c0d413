"""Draws the figures and prints the tables of "Why" in results/README.md, from the logs beside it.

python results/why.py
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from engm.lab.diagnostics import Moments, c1_verdict
from engm.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, finish, panels, sharp_png
from engm.report import verdicts
from engm.report.records import Record, collect
from engm.report.statistics import Interval, student_interval
from engm.report.tables import to_markdown
from engm.runs import read_metrics

HERE = Path(__file__).parent
LOOKS = HERE / "cifar10-cpu-why"
COLOURS = {"msgd": BLUE, "engm": ORANGE}
NAMES = {"msgd": "MSGD", "engm": "ENGM"}
ROWS = {
    ("msgd", 0.05): ("MSGD", BLUE),
    ("msgd-clip", 0.05): ("MSGD, clipped", GREEN),
    ("engm", 0.05): ("ENGM", ORANGE),
    ("engm", 1.0): ("ENGM, floor 1", PINK),
    ("engm-input", 0.05): ("ENGM, input gradients", GREY),
    ("engm-input-only", 0.05): ("ENGM, input gradients alone", SKY),
    ("engm-output", 0.05): ("ENGM, output gradients alone", RED),
}


def looks(method: str, optimizer: str, noise: float) -> list[list[dict[str, Any]]]:
    """Returns for each seed the looks of a training, see plans/cifar10_cpu_why.py."""
    files = sorted(LOOKS.glob(f"{method}-{optimizer}-noise{noise}-seed*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()[1:]] for file in files]


def long_gradients() -> Figure:
    """How far the |g_i| of one moment lie apart, over training, with 10% wrong labels."""
    kinds = {"msgd": "PGD-AT by MSGD", "engm": "PGD-AT by ENGM"}
    figure, row = panels(kinds.values(), (9, 3.2), sharey=True)
    for axes, optimizer in zip(row, kinds, strict=True):
        seeds = looks("pgd_at", optimizer, 0.1)
        epochs = [look["epoch"] for look in seeds[0]]
        quantiles = np.mean(
            [[look["train"]["quantiles_over_mean"] for look in seed] for seed in seeds], axis=0
        )
        colour = COLOURS[optimizer]
        for low, high, alpha, label in ((0, 6, 0.2, "1% to 99%"), (1, 5, 0.4, "5% to 95%")):
            axes.fill_between(
                epochs, quantiles[:, low], quantiles[:, high], color=colour, alpha=alpha,
                label=label, linewidth=0,
            )  # fmt: skip
        axes.plot(epochs, quantiles[:, 3], color=colour, label="median")
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="epoch", xticks=epochs)
        axes.legend(frameon=False, loc="upper right")
    row[0].set_ylabel("$|g_i|$ / mean $|g_i|$")
    return finish(figure)


def who_is_weighted_down() -> Figure:
    """ENGM's weight against the margin, and how much of the pull is that of wrong labels."""
    titles = ("weights, network of MSGD", "pull of the 10% wrong labels")
    figure, (left, right) = panels(titles, (9, 3.4), grid="y")
    seeds = looks("pgd_at", "msgd", 0.1)
    shown = [look["epoch"] for look in seeds[0] if look["epoch"] in (5, 15, 30)]
    for epoch, colour in zip(shown, (GREY, ORANGE, BLUE), strict=True):
        parts = [look["train"]["by_margin"] for s in seeds for look in s if look["epoch"] == epoch]
        margin = np.mean([[part["margin"] for part in tenths] for tenths in parts], axis=0)
        weight = np.mean([[part["weight"] for part in tenths] for tenths in parts], axis=0)
        left.plot(margin, weight, "o-", color=colour, markersize=4, label=f"epoch {epoch}")
    left.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    left.set(xlabel="margin of the attacked image (tenths of the images)", ylabel="weight $w_i$")
    left.legend(frameon=False)
    for kind, label, style in (("msgd", "MSGD: $w_i = 1$", "-"), ("engm", "ENGM", "--")):
        for optimizer in COLOURS:
            parts = [
                [100 * look["train"]["groups"]["wrong label"][f"of_pull_{kind}"] for look in seed]
                for seed in looks("pgd_at", optimizer, 0.1)
            ]
            epochs = [look["epoch"] for look in seeds[0]]
            name = f"{label}, network of {NAMES[optimizer]}"
            right.plot(epochs, np.mean(parts, axis=0), style, color=COLOURS[optimizer], label=name)
    right.axhline(10, color=GREY, linewidth=0.8, linestyle=":")
    right.set(xlabel="epoch", ylabel="part of the sum of $w_i|g_i|$ (%)", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    return finish(figure)


def learned_and_lost() -> Figure:
    """Robust overfitting gap, and the best accuracy, against the training loss at the end."""
    titles = ("best minus last", "best checkpoint")
    figure, row = panels(titles, (9, 3.6), grid="y", sharex=True)
    for record in collect(HERE / "cifar10-cpu")[0]:
        name, colour = ROWS[record.config.optimizer, record.config.floor]
        loss = read_metrics(record.folder)[-1]["train_loss"]
        best = record.result["best"]["robust_accuracy"]
        main = record.config.seed > 0
        look = dict(color=colour, marker="o" if main else "x", linestyle="none", markersize=5)
        row[0].plot(loss, 100 * record.result["robust_overfitting_gap"], **look)  # type: ignore[arg-type]
        row[1].plot(loss, 100 * best, **look)  # type: ignore[arg-type]
    for axes, label in zip(row, ("gap (points)", "robust test accuracy (%)"), strict=True):
        axes.set(xlabel="training loss of the last epoch", ylabel=label)
        axes.axvline(np.log(10), color=GREY, linewidth=0.8, linestyle=":")
    for name, colour in ROWS.values():
        row[1].plot([], [], "o", color=colour, label=name, markersize=5)
    row[1].plot([], [], "x", color="black", label="runs that chose a rate", markersize=5)
    row[1].legend(frameon=False, fontsize=8, loc="lower left")
    return finish(figure)


def wrong_labels() -> Figure:
    """Robust accuracy of the best and the last checkpoint against the part of wrong labels."""
    figure, row = panels(("best checkpoint", "last checkpoint"), (9, 3.4), grid="y", sharey=True)
    found = _by_noise()
    for axes, which in zip(row, ("best", "last"), strict=True):
        for optimizer, colour in COLOURS.items():
            noises = sorted(noise for name, noise in found if name == optimizer)
            values = [
                [100 * r.result[which]["robust_accuracy"] for r in found[optimizer, noise]]
                for noise in noises
            ]
            shift = {"msgd": -0.3, "engm": 0.3}[optimizer]
            places = [100 * noise + shift for noise in noises]
            for place, seeds in zip(places, values, strict=True):
                axes.plot([place] * len(seeds), seeds, "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(places, [np.mean(v) for v in values], color=colour, label=NAMES[optimizer])
        axes.set(xlabel="wrong labels (%)", xticks=[0, 10, 20])
    row[0].set_ylabel("robust test accuracy (%)")
    return finish(figure, row[0])


def against_msgd() -> str:
    """Every row minus MSGD over the seeds 1 to 5, in points, and what it settles."""
    by_seed: dict[tuple[str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in collect(HERE / "cifar10-cpu")[0]:
        config = record.config
        if config.seed > 0:  # seed 0 chose the rates
            by_seed[config.optimizer, config.floor][config.seed] = record.result
    msgd = by_seed.pop(("msgd", 0.05))
    rows = []
    for key in [key for key in ROWS if key in by_seed]:
        best, less = (
            [of(by_seed[key][seed]) - of(msgd[seed]) for seed in sorted(msgd)]
            for of in (_best, _gap)
        )
        more, fewer = student_interval(best), student_interval([-gap for gap in less])
        c5 = "best is worse: does not count" if more.high < 0 else _outcome(fewer)
        rows.append(
            {
                "row": ROWS[key][0],
                "robust (best)": _spread(best, "+"),
                "Student 95%": f"{more.low:+.1f} to {more.high:+.1f}",
                "C4": _outcome(more),
                "gap": _spread(less, "+"),
                "Student 95% ": f"{-fewer.high:+.1f} to {-fewer.low:+.1f}",
                "C5 (overfitting)": c5,
                "pairs": len(msgd),
            }
        )  # fmt: skip
    return to_markdown(rows)


def at_equal_loss() -> str:
    """Gap of the main runs against the line that MSGD's runs have in the training loss, in points.

    The line is fitted to all runs of MSGD, clipped or not, that end with a loss below 2. The
    protocol does not have it.
    """
    runs = []
    for record in collect(HERE / "cifar10-cpu")[0]:
        loss = read_metrics(record.folder)[-1]["train_loss"]
        runs.append((record.config, loss, _gap(record.result)))
    msgd = [
        (loss, gap)
        for config, loss, gap in runs
        if config.optimizer.startswith("msgd") and loss < 2
    ]
    line = np.polyfit([loss for loss, _ in msgd], [gap for _, gap in msgd], 1)
    rows = []
    for (optimizer, floor), (name, _) in ROWS.items():
        own = [
            (loss, gap)
            for config, loss, gap in runs
            if (config.optimizer, config.floor) == (optimizer, floor) and config.seed > 0
        ]
        above = [float(gap - np.polyval(line, loss)) for loss, gap in own if loss < 2]
        rows.append(
            {
                "row": name,
                "training loss at the end": _mean(loss for loss, _ in own),
                "gap": _spread([gap for _, gap in own]),
                "gap minus the line": _spread(above, "+") if len(above) > 1 else "",
                "runs below 2": f"{len(above)} of {len(own)}",
            }
        )
    return to_markdown(rows)


def _best(result: dict[str, Any]) -> float:
    return float(100 * result["best"]["robust_accuracy"])


def _gap(result: dict[str, Any]) -> float:
    return float(100 * result["robust_overfitting_gap"])


def _outcome(gain: Interval) -> str:
    """Judges by plans/cifar10-cpu.md."""
    if gain.low > 0:
        return "holds"
    within_a_point = gain.low >= -1 and gain.high <= 1
    return "does not hold" if gain.high < 0 or within_a_point else "not settled"


def over_training() -> str:
    """How far norms lie apart, and how hard wrong labels pull; means over seeds, train mode."""
    rows = []
    for optimizer in COLOURS:
        seeds = looks("pgd_at", optimizer, 0.1)
        for place in range(len(seeds[0])):
            modes = [seed[place]["train"] for seed in seeds]
            wrong = [mode["groups"]["wrong label"] for mode in modes]
            rows.append(
                {
                    "network of": NAMES[optimizer],
                    "epoch": seeds[0][place]["epoch"],
                    "training loss": _mean(mode["loss"] for mode in modes),
                    "mean norm": _mean(mode["mean_norm"] for mode in modes),
                    "std / mean": _mean(mode["std_over_mean"] for mode in modes),
                    "99% / mean": _mean(mode["quantiles_over_mean"][-1] for mode in modes),
                    "norm of wrong labels / mean": _mean(
                        w["mean_norm"] / mode["mean_norm"]
                        for w, mode in zip(wrong, modes, strict=True)
                    ),
                    "their pull, MSGD (%)": _mean(100 * w["of_pull_msgd"] for w in wrong),
                    "their pull, ENGM (%)": _mean(100 * w["of_pull_engm"] for w in wrong),
                    "cosine of the two steps": _mean(mode["cosine"] for mode in modes),
                    "seeds": len(seeds),
                }
            )
    return to_markdown(rows)


def _mean(values: Iterable[float]) -> str:
    return f"{np.mean(list(values)):.2f}"


def shares_against_loop() -> str:
    """Norms of shares against the norms by `loop` in train mode, one batch of 50 a training."""
    rows = []
    for optimizer in COLOURS:
        for epoch in (10, 30):
            found = [
                look["loop"]
                for noise in (0.0, 0.1)
                for seed in looks("pgd_at", optimizer, noise)
                for look in seed
                if look["epoch"] == epoch
            ]
            rows.append(
                {
                    "network of": NAMES[optimizer],
                    "epoch": epoch,
                    "rank correlation": _range(f["rank_correlation"] for f in found),
                    "step of shares, cosine": _range(f["cosine_shares"] for f in found),
                    "step of MSGD, cosine": _range(f["cosine_msgd"] for f in found),
                    "batches": len(found),
                }
            )
    return to_markdown(rows)


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def variance_and_proxy() -> str:
    """C1 and C3 on this network, in train mode and in eval mode."""
    rows = []
    for mode in ("train", "eval"):
        moments = {
            method: [[_moments(look[mode]) for look in s] for s in looks(method, "msgd", 0.0)]
            for method in ("natural", "pgd_at")
        }
        verdict = c1_verdict(moments["natural"], moments["pgd_at"])
        good, fits = [], []
        for optimizer in COLOURS:
            for seed in looks("pgd_at", optimizer, 0.0):
                later = [b for look in seed if look["epoch"] > 1 for b in look[mode]["proxy"]]
                r_squared, rank = np.median(later, axis=0)
                good.append(bool(r_squared >= 0.5 and rank >= 0.7))
                fits.append((r_squared, rank))
        rows.append(
            {
                "mode": mode,
                "C1: norm, AT / NT": _each(verdict.norm_ratios),
                "C1: variance, AT / NT": _each(verdict.variance_ratios),
                "C1": verdict.outcome,
                "C1 at each horizon": ", ".join(verdict.horizons),
                "C3: $R^2$": _each(r_squared for r_squared, _ in fits),
                "C3: rank correlation": _each(rank for _, rank in fits),
                "C3": verdicts.from_seeds(good),
            }
        )
    return to_markdown(rows)


def _moments(mode: dict[str, Any]) -> Moments:
    mean, square = mode["mean_norm"], mode["gradient_norm"] ** 2
    return Moments(mean, mode["variance"] + square, square)


def _each(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def with_wrong_labels() -> str:
    """ENGM minus MSGD with wrong labels, and how that differs from none, in points."""
    found = _by_noise()
    rows = []
    for which in ("best", "last"):
        none: list[float] = []
        for noise in sorted({noise for _, noise in found}):
            values = {
                name: [100 * r.result[which]["robust_accuracy"] for r in found[name, noise]]
                for name in COLOURS
            }
            paired = [e - m for e, m in zip(values["engm"], values["msgd"], strict=True)]
            none = none or paired
            more = [p - n for p, n in zip(paired, none, strict=True)]
            row = {"checkpoint": which, "wrong labels (%)": f"{100 * noise:.0f}"}
            row |= {NAMES[name]: _spread(group) for name, group in values.items()}
            row |= {"ENGM minus MSGD": _spread(paired)}
            ends = student_interval(more) if any(more) else None
            row["minus that without"] = _spread(more) if ends else ""
            row["Student 95%"] = f"{ends.low:+.1f} to {ends.high:+.1f}" if ends else ""
            rows.append(row | {"seeds": len(paired)})
    return to_markdown(rows)


def _spread(values: list[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.1f} ± {np.std(values, ddof=1):.1f}"


def _by_noise() -> dict[tuple[str, float], list[Record]]:
    found: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for folder in ("cifar10-cpu", "cifar10-cpu-noise"):
        for record in collect(HERE / folder)[0]:
            config = record.config
            chosen = (config.optimizer, config.lr) in (("msgd", 0.3), ("engm", 0.1))
            if chosen and config.floor == 0.05 and config.seed in (1, 2, 3):
                found[config.optimizer, config.label_noise].append(record)
    return {key: sorted(group, key=lambda r: r.config.seed) for key, group in found.items()}


FIGURES = (long_gradients, who_is_weighted_down, learned_and_lost, wrong_labels)
TABLES = (
    against_msgd,
    at_equal_loss,
    over_training,
    shares_against_loop,
    with_wrong_labels,
    variance_and_proxy,
)

if __name__ == "__main__":
    (HERE / "pictures").mkdir(exist_ok=True)
    for draw in FIGURES:
        figure = draw()
        png, _ = sharp_png(figure)
        (HERE / "pictures" / f"{draw.__name__}.png").write_bytes(png)
        plt.close(figure)
    for table in TABLES:
        print(table.__doc__, table(), sep="\n\n")
