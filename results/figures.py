"""Draws the figures of results/README.md from the logs beside it.

python results/figures.py
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from engm.plots.style import BLUE, GREEN, GREY, ORANGE, PINK, finish, panels, sharp_png
from engm.report.records import Record, collect
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
        axes.legend(frameon=False, loc="upper left")
    row[0].set_ylabel("$|g_i|$ / mean $|g_i|$")
    return finish(figure)


def who_is_weighted_down() -> Figure:
    """ENGM's weight against the margin, and how much of the pull is that of wrong labels."""
    titles = ("who is weighted down (MSGD's network, 10% wrong labels)", "pull of the wrong labels")
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
    left.set_yscale("log")
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
        row[0].plot([], [], "o", color=colour, label=name, markersize=5)
    row[0].plot([], [], "x", color="black", label="runs that chose a rate", markersize=5)
    row[0].legend(frameon=False, fontsize=8)
    return finish(figure)


def wrong_labels() -> Figure:
    """Robust accuracy of the best and the last checkpoint against the part of wrong labels."""
    figure, row = panels(("best checkpoint", "last checkpoint"), (9, 3.4), grid="y", sharey=True)
    found: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for folder in ("cifar10-cpu", "cifar10-cpu-noise"):
        for record in collect(HERE / folder)[0]:
            config = record.config
            chosen = (config.optimizer, config.lr) in (("msgd", 0.3), ("engm", 0.1))
            if chosen and config.floor == 0.05 and config.seed in (1, 2, 3):
                found[config.optimizer, config.label_noise].append(record)
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


if __name__ == "__main__":
    (HERE / "pictures").mkdir(exist_ok=True)
    for draw in (long_gradients, who_is_weighted_down, learned_and_lost, wrong_labels):
        figure = draw()
        png, _ = sharp_png(figure)
        (HERE / "pictures" / f"{draw.__name__}.png").write_bytes(png)
        plt.close(figure)
