"""The figures of the notebooks. Colours are Okabe and Ito's, which colour-blind readers tell apart.

Every function draws on a new pyplot figure and returns it; accuracies go in as fractions and are
shown in percent.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engm.input_norms import Fit
from engm.results import Quantity

BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    *("#0072B2", "#E69F00", "#009E73"),
    *("#CC79A7", "#56B4E9", "#D55E00"),
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)


def adversarial_examples(
    x: Tensor,
    x_adv: Tensor,
    logits: Tensor,
    logits_adv: Tensor,
    class_names: Sequence[str],
) -> Figure:
    """Shows images, perturbations and adversarial images in three rows, with the predictions.

    Args:
        x: Images, `[n, c, h, w]` in [0, 1].
        x_adv: The same under attack.
        logits: The model's answer to `x`, `[n, K]`.
        logits_adv: Its answer to `x_adv`.
        class_names: What the K classes are called.
    """
    n = len(x)
    figure, axes = plt.subplots(3, n, figsize=(1.5 * n, 5.2), squeeze=False)
    delta = x_adv - x
    largest = delta.abs().max().clamp(min=1e-8)
    for column in range(n):
        for row, pixels in enumerate((x, 0.5 + 0.5 * delta / largest, x_adv)):
            show_image(axes[row, column], pixels[column])
        axes[0, column].set_title(_answer(logits[column], class_names), fontsize=9)
        colour = RED if logits[column].argmax() != logits_adv[column].argmax() else "black"
        answer = _answer(logits_adv[column], class_names)
        axes[2, column].set_title(answer, fontsize=9, color=colour)
    for row, label in enumerate(("clean", f"change,\nat most {largest:.3g}", "adversarial")):
        axes[row, 0].set_ylabel(label, fontsize=10)
    figure.tight_layout()
    return figure


def prediction(
    image: Tensor, probabilities: Tensor, y: int, class_names: Sequence[str], title: str
) -> Figure:
    """Shows one image beside bars of the model's probabilities; the true class is blue.

    Args:
        image: `[c, h, w]` in [0, 1].
        probabilities: `[K]`; at most the ten largest are shown.
        y: The true class.
        class_names: What the K classes are called.
        title: What stands above the image.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7, 2.8), gridspec_kw={"width_ratios": [1, 1.6]}
    )
    show_image(left, image)
    left.set_title(title, fontsize=10)
    shown = sorted(probabilities.topk(min(10, len(probabilities))).indices.tolist())
    colours = [BLUE if k == y else RED if k == probabilities.argmax() else "#BBBBBB" for k in shown]
    names = [class_names[k] for k in shown]
    right.bar(names, [100 * float(probabilities[k]) for k in shown], color=colours)
    right.set_ylim(0, 100)
    right.set_ylabel("probability (%)")
    right.set_xlabel("class (true one blue)")
    right.tick_params(axis="x", rotation=0 if max(map(len, names)) < 4 else 45)
    _open(right)
    figure.tight_layout()
    return figure


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Draws one line a name over `x`.

    Args:
        x: What was varied: eps, steps, epochs.
        curves: Values, as many as `x`, under the names of the legend.
        x_label: What `x` is, with its unit.
        y_label: What the values are, with their unit.
    """
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for colour, (name, values) in zip(cycle(COLOURS), curves.items(), strict=False):
        axes.plot(x, values, "o-", color=colour, label=name, markersize=4)
    if all(isinstance(value, int) for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    _open(axes)
    figure.tight_layout()
    return figure


def accuracy_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Draws `lines` of accuracies, given as fractions, in percent."""
    percent = {name: [100 * value for value in values] for name, values in curves.items()}
    figure = lines(x, percent, x_label, y_label)
    _percent_axis(figure.axes[0], y_label)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draws clean and robust validation accuracy over epochs; thin lines are single seeds.

    Args:
        runs: The metrics of each seed's run, as in `metrics.jsonl`, under the names of the legend.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for axes, kind in zip(panels, ("clean", "robust"), strict=True):
        key = f"validation_{kind}_accuracy"
        for colour, (name, seeds) in zip(cycle(COLOURS), runs.items(), strict=False):
            lines = [[100 * line[key] for line in metrics] for metrics in seeds]
            epochs = [line["epoch"] for line in seeds[0]]
            for line in lines if len(lines) > 1 else []:
                axes.plot(epochs, line, color=colour, linewidth=0.8, alpha=0.5)
            mean = [sum(column) / len(column) for column in zip(*lines, strict=True)]
            axes.plot(epochs, mean, color=colour, linewidth=2, label=name)
        _percent_axis(axes, f"{kind} accuracy, validation (%)")
        axes.set_xlabel("epoch")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def best_and_last(rows: Mapping[str, Mapping[str, Quantity]]) -> Figure:
    """Draws robust test accuracy of the best and the last checkpoint, bars with deviations.

    Args:
        rows: For each name the quantities of `engm.results.summarise`.
    """
    figure, axes = plt.subplots(figsize=(1.6 + 1.5 * len(rows), 3.4))
    for shift, which, colour in ((-0.2, "best", BLUE), (0.2, "last", ORANGE)):
        found = [row[f"robust ({which})"] for row in rows.values()]
        axes.bar(
            [index + shift for index in range(len(found))],
            [100 * quantity.mean for quantity in found],
            width=0.38,
            yerr=[100 * (quantity.deviation or 0.0) for quantity in found],
            capsize=3,
            color=colour,
            label=which,
        )
    axes.set_xticks(range(len(rows)), list(rows))
    _percent_axis(axes, "robust accuracy, test (%)")
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def pulls(norms: Tensor, weights: Tensor, scale: float) -> Figure:
    """Draws how hard each example pulls under MSGD, |g_i|, and under ENGM, w_i |g_i|, sorted.

    Args:
        norms: |g_i|, `[n]`.
        weights: w_i, `[n]`.
        scale: c, drawn as a line.
    """
    lengths, order = (values.numpy() for values in norms.detach().cpu().sort())
    weighed = lengths * weights.detach().cpu().numpy()[order]
    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(lengths, "o", color=ORANGE, markersize=4, label="MSGD: $|g_i|$")
    axes.plot(weighed, "o", color=BLUE, markersize=4, label="ENGM: $w_i|g_i|$")
    axes.axhline(scale, color="#555555", linewidth=1, linestyle="--", label="$c$")
    axes.set_xlabel("examples of the batch, by the length of their gradient")
    axes.set_ylabel("pull on the weights")
    axes.legend(frameon=False)
    _open(axes)
    figure.tight_layout()
    return figure


def cost_ratios(panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """Draws what each method costs as a multiple of the first one's cost, bars with whiskers.

    Args:
        panels: Under the title of each panel, for each method the middle, low and high ratio.
    """
    figure, row = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), squeeze=False)
    for axes, (title, ratios) in zip(row[0], panels.items(), strict=True):
        middles = [middle for middle, _, _ in ratios.values()]
        below = [middle - low for middle, low, _ in ratios.values()]
        above = [high - middle for middle, _, high in ratios.values()]
        bars = axes.barh(list(ratios), middles, xerr=[below, above], capsize=3, color=BLUE)
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"ratio to {next(iter(ratios))}")
        _open(axes)
    figure.tight_layout()
    return figure


def norms_from_inputs(panels: Mapping[str, tuple[Tensor, Tensor, float, float]]) -> Figure:
    """Draws each example's norm over that of its input gradient, with the line between them.

    Args:
        panels: Under the title of each panel |dl_i/dx_i| and |g_i|, both `[n]`, and the slope and
            intercept of the line.
    """
    figure, row = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), squeeze=False)
    for axes, (title, (inputs, norms, slope, intercept)) in zip(
        row[0], panels.items(), strict=True
    ):
        x, y = (values.detach().cpu().tolist() for values in (inputs, norms))
        axes.plot(x, y, "o", color=BLUE, markersize=4, alpha=0.6)
        ends = [min(x), max(x)]
        axes.plot(ends, [slope * end + intercept for end in ends], color=RED)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(r"input gradient $|\partial\ell_i/\partial x_i|$")
        axes.set_ylim(bottom=0)
        _open(axes)
    row[0, 0].set_ylabel("example norm $|g_i|$")
    figure.tight_layout()
    return figure


def fits(runs: Mapping[str, Sequence[Fit]], steps_per_epoch: int) -> Figure:
    """Draws how good each fit of the estimate was, over the steps; the first epoch is grey.

    Args:
        runs: The fits of each run under the names of the legend.
        steps_per_epoch: How many steps the first epoch had.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True)
    kinds = {"r_squared": "$R^2$ of the line", "rank_correlation": "rank correlation"}
    for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
        axes.axvspan(1, steps_per_epoch, color="#EEEEEE")
        for colour, (name, history) in zip(cycle(COLOURS), runs.items(), strict=False):
            steps = [fit.step for fit in history]
            values = [getattr(fit, kind) for fit in history]
            axes.plot(steps, values, "o-", color=colour, label=name, markersize=3, linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.yaxis.set_tick_params(labelleft=True)
        axes.grid(axis="y", alpha=0.3)
        _open(axes)
    panels[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def show_image(axes: Axes, image: Tensor) -> None:
    """Draws `[c, h, w]` pixels in [0, 1] on `axes`, grey for one channel, without ticks."""
    pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.clip(0, 1))
    axes.set_xticks([])
    axes.set_yticks([])


def to_png(figure: Figure) -> bytes:
    """Returns the figure as a PNG and closes it, for a widget to show."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    return file.getvalue()


def _answer(logits: Tensor, class_names: Sequence[str]) -> str:
    probability, k = logits.softmax(0).max(0)
    return f"{class_names[int(k)]} ({100 * float(probability):.0f}%)"


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(0, 102)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _open(axes)


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
