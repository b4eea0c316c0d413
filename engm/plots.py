"""The figures of the notebooks. Colours are Okabe and Ito's, which colour-blind readers tell apart.

Every function draws on a new pyplot figure and returns it; accuracies go in as fractions and are
shown in percent. Mappings have the names of the legend, or the titles of the panels.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from engm.norms.inputs import Fit
from engm.optim import example_weights
from engm.report.records import Quantity
from engm.report.sensitivity import near_best
from engm.report.statistics import Paired

if TYPE_CHECKING:
    from engm.evaluation.suite import RobustnessReport

COLOURS = BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    *("#0072B2", "#E69F00", "#009E73"),
    *("#CC79A7", "#56B4E9", "#D55E00"),
)
GREY = "#777777"
Value = TypeVar("Value")


def coloured(named: Mapping[str, Value]) -> Iterator[tuple[str, str, Value]]:
    """Gives each name, with what stands under it, a colour: `(colour, name, value)`."""
    for colour, (name, value) in zip(cycle(COLOURS), named.items(), strict=False):
        yield colour, name, value


def panels(
    titles: Iterable[str] = ("",),
    size: tuple[float, float] = (6, 3.4),
    *,
    grid: str = "",
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Makes a pyplot figure with axes side by side, open at the top and on the right.

    The axis `grid` ("x", "y" or "both") has lines across; `size` is in inches, and `options` are
    those of `plt.subplots`.
    """
    titles = list(titles)
    figure, row = plt.subplots(1, len(titles), figsize=size, squeeze=False, **options)
    for axes, title in zip(row[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
        open_axes(axes)
        if grid:
            axes.grid(axis=grid, alpha=0.3)
    return figure, list(row[0])


def finish(figure: Figure, legend: Axes | None = None, **options: Any) -> Figure:
    """Gives the axes `legend` a legend with these `options`, lays the figure out, returns it."""
    if legend is not None:
        legend.legend(frameon=False, **options)
    figure.tight_layout()
    return figure


def width_of(names: Iterable[str]) -> float:
    """Returns the inches that the longest of some names needs on a figure, about."""
    return 0.075 * max(map(len, names))


def open_axes(axes: Axes) -> None:
    """Takes the lines at the top and on the right away."""
    axes.spines[["top", "right"]].set_visible(False)


def sharp_figures() -> None:
    """Shows this notebook's figures with twice the pixels a side, and in 64 colours.

    That is sharp on today's screens, and few colours keep the file small. Outside IPython it does
    nothing.
    """
    from IPython.core.getipython import get_ipython

    formatter = getattr(get_ipython(), "display_formatter", None)
    if formatter is None:
        return
    plt.switch_backend(plt.get_backend())  # now, as it would set its own way to show a figure
    formatter.formatters["image/png"].for_type(Figure, sharp_png)


def sharp_png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Returns the figure as a PNG of at most 64 colours, and the size at which it is to be shown.

    The 16 commonest colours, such as the grey of a grid and the tint of a band, are among them.
    """
    from PIL import Image

    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    picture = Image.open(large).convert("RGB")
    width, height = picture.size
    found: Any = picture.getcolors(width * height)
    common = np.array([colour for _, colour in sorted(found, reverse=True)[:16]])
    # of the three methods the one that keeps rare colours: a red title over grey images
    spread = picture.quantize(48, Image.Quantize.MAXCOVERAGE).getpalette() or []
    others = np.array(spread[: 3 * 48]).reshape(-1, 3)
    far = (abs(others[:, None] - common).max(axis=2) > 8).all(axis=1)  # none beside a common one
    palette = Image.new("P", (1, 1))
    palette.putpalette([*common.ravel().tolist(), *others[far].ravel().tolist()])
    picture = picture.quantize(palette=palette, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue(), {"width": width // 2, "height": height // 2}


def percent_axis(axes: Axes, label: str) -> None:
    """Lets the y axis go from 0 to 100%, under `label`."""
    axes.set(ylim=(0, 102), ylabel=label, axisbelow=True)
    axes.grid(axis="y", alpha=0.3)
    open_axes(axes)


def seeds_and_mean(
    axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], colour: str, **look: Any
) -> None:
    """Draws a thin line for each of several seeds, and a thick one for their mean.

    `look` is for that of the mean, such as its label.
    """
    for values in seeds if len(seeds) > 1 else []:
        axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.5)
    axes.plot(x, np.mean(seeds, axis=0), color=colour, linewidth=2, **look)


def show_image(axes: Axes, image: Tensor, title: str = "", wrong: bool = False) -> None:
    """Draws `[c, h, w]` pixels in [0, 1], grey for one channel; a `wrong` title is red."""
    pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.clip(0, 1))
    axes.set(xticks=[], yticks=[])
    if title:
        axes.set_title(title, fontsize=9, color=RED if wrong else "black")


def to_png(figure: Figure) -> bytes:
    """Returns the figure as a PNG and closes it, for a widget to show."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    return file.getvalue()


# --- curves over what was varied, x: epochs, steps, eps, noise


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Draws one line a name over `x`."""
    figure, [axes] = panels(grid="y")
    for colour, name, values in coloured(curves):
        axes.plot(x, values, "o-", color=colour, label=name, markersize=4)
    if all(isinstance(value, int) for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel=x_label, ylabel=y_label)
    return finish(figure, axes)


def accuracy_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Draws `lines` of accuracies, given as fractions, in percent."""
    percent = {name: [100 * value for value in values] for name, values in curves.items()}
    figure = lines(x, percent, x_label, y_label)
    percent_axis(figure.axes[0], y_label)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draws clean and robust validation accuracy over epochs; thin lines are single seeds.

    `runs` has under each name the metrics of each seed's run, as in `metrics.jsonl`.
    """
    below = width_of(runs) > 1.5  # there long names have the whole width
    size = (max(9, 1 + width_of(runs)), 3.4 + 0.25 * len(runs)) if below else (9, 3.4)
    figure, row = panels(("", ""), size, sharex=True)
    for axes, kind in zip(row, ("clean", "robust"), strict=True):
        key = f"validation_{kind}_accuracy"
        for colour, name, seeds in coloured(runs):
            values = [[100 * line[key] for line in metrics] for metrics in seeds]
            seeds_and_mean(axes, [line["epoch"] for line in seeds[0]], values, colour, label=name)
        percent_axis(axes, f"{kind} accuracy, validation (%)")
        axes.set_xlabel("epoch")
    if not below:
        return finish(figure, row[0])
    figure.set_layout_engine("constrained")
    figure.legend(*row[0].get_legend_handles_labels(), frameon=False, loc="outside lower left")
    return figure


def seed_lines(
    x: Sequence[float],
    quantities: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    x_label: str,
    *,
    log: bool = False,
) -> Figure:
    """Draws quantities side by side; thin lines are single seeds, thick ones their mean.

    Under the label of each panel's y axis stand its curves. The axes are logarithmic with `log`,
    and otherwise start at 0.
    """
    size = (3.3 * len(quantities), 2.7)
    # few dots an inch keep notebooks small
    figure, row = panels([""] * len(quantities), size, grid="y", dpi=80)
    for axes, (label, curves) in zip(row, quantities.items(), strict=True):
        for colour, name, seeds in coloured(curves):
            seeds_and_mean(axes, x, seeds, colour, marker="o", markersize=3, label=name)
        axes.set(xlabel=x_label, ylabel=label)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    return finish(figure, row[0])


def log_curves(
    values: Mapping[str, Mapping[str, Tensor]],
    x: Sequence[float],
    x_label: str,
    y_label: str,
    guides: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draws geometric means over the seeds on two logarithmic axes, and bands from low to high.

    Power laws are straight lines there. Under the title of each panel stand the values of its
    curves, above 0, `[seeds, len(x)]`; a name has the same colour in all panels. `guides` are
    drawn thin and grey in all of them, to compare with.
    """
    names = dict.fromkeys(name for curves in values.values() for name in curves)
    styles = zip(coloured(names), cycle(("-", "--", "-.", ":")), strict=False)
    looks = {name: (colour, style) for (colour, name, _), style in styles}
    size = (max(5.0, 2.9 * len(values)), 3.1)
    figure, row = panels(values, size, grid="both", sharey=True)
    for axes, curves in zip(row, values.values(), strict=True):
        for name, seeds in curves.items():
            colour, style = looks[name]
            found = seeds.detach().cpu().double().numpy()
            if len(found) > 1:
                band = found.min(0), found.max(0)
                axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
            mean = np.exp(np.log(found).mean(0))
            axes.plot(x, mean, style, marker="o", color=colour, label=name, markersize=3)
        for name, guide in (guides or {}).items():
            axes.plot(x, guide, color=GREY, linewidth=1, linestyle=":", label=name)
        axes.set(xscale="log", yscale="log", xlabel=x_label)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            few = math.log10(high / low) < 1.7
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    row[0].set_ylabel(y_label)
    return finish(figure, row[0], fontsize=8)


def fits(runs: Mapping[str, Sequence[Fit]], steps_per_epoch: int) -> Figure:
    """Draws how good each fit of the estimate was, over the steps; the first epoch is grey."""
    figure, row = panels(("", ""), (9, 3.4), grid="y", sharex=True, sharey=True)
    kinds = {"r_squared": "$R^2$ of the line", "rank_correlation": "rank correlation"}
    for axes, (kind, label) in zip(row, kinds.items(), strict=True):
        axes.axvspan(1, steps_per_epoch, color="#EEEEEE")
        for colour, name, history in coloured(runs):
            steps = [fit.step for fit in history]
            values = [getattr(fit, kind) for fit in history]
            axes.plot(steps, values, "o-", color=colour, label=name, markersize=3, linewidth=1)
        axes.set(xlabel="step", ylabel=label)
        axes.yaxis.set_tick_params(labelleft=True)
    return finish(figure, row[0], loc="lower right")


def robustness_curve(report: "RobustnessReport") -> Figure:
    """Draws what `engm.evaluate` found: a curve over eps with its 95% band, each attack at eps."""
    figure, [axes] = panels(size=(6, 3.8))
    radii, along = list(report.curve), list(report.curve.values())
    low, high = ([100 * getattr(found.interval, end) for found in along] for end in ("low", "high"))
    axes.fill_between(radii, low, high, color=BLUE, alpha=0.2, linewidth=0)
    percents = [100 * found.fraction for found in along]
    axes.plot(radii, percents, "o-", color=BLUE, markersize=4, label=report.along)
    # each accuracy has a sign of its own: they are close, and the sign alone tells them apart
    looks = zip(cycle("svD^PXdv<>"), cycle([*COLOURS[1:], BLUE]), report.attacks, strict=False)
    point: dict[str, Any] = dict(linestyle="none")
    for marker, colour, found in looks:
        point |= dict(marker=marker, color=colour, markersize=7, markerfacecolor="none")
        axes.plot([report.eps], [100 * found.accuracy.fraction], label=found.name, **point)
    point |= dict(marker="*", color="black", markersize=11, markerfacecolor="black")
    axes.plot([report.eps], [100 * report.worst.fraction], label="worst case", **point)
    # eps of interest are small, and the last one is many times as large
    axes.set_xscale("symlog", linthresh=report.eps, linscale=1)
    axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii], rotation=45)
    axes.minorticks_off()
    axes.axvline(report.eps, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"eps, {report.norm}, in pixel units")
    percent_axis(axes, "accuracy (%), 95% band")
    return finish(figure, axes, fontsize=8)


def corrupted_steps(
    factors: Sequence[float], steps: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Draws what one example does to the gradient of a batch while its loss is multiplied.

    `steps` are the lengths of the batch's gradient, and its cosines with what it is without that
    example, one for each of `factors`.
    """
    figure, (left, right) = panels(("", ""), (6.8, 2.6))
    looks = zip(cycle(("-", "--", "-.")), coloured(steps), strict=False)
    for line, (colour, name, (lengths, cosines)) in looks:
        style = dict(color=colour, linestyle=line, linewidth=2, label=name)
        left.loglog(factors, lengths, **style)
        right.semilogx(factors, cosines, **style)
    left.yaxis.set_major_locator(LogLocator(numticks=5))
    left.set_ylabel("norm of the batch's gradient")
    right.set_ylabel("cosine with the others'")
    for axes in (left, right):
        axes.set_xlabel("factor of one loss")
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.minorticks_off()
    return finish(figure, left)


def running_scale(means: Sequence[float], scales: Sequence[float]) -> Figure:
    """Draws the scale c over the steps, and the mean |g_i| of each batch behind it."""
    figure, [axes] = panels(size=(5.4, 2.6))
    steps = range(1, len(means) + 1)
    axes.plot(steps, means, color="#BBBBBB", linewidth=1, label="mean $|g_i|$ of the batch")
    axes.plot(steps, scales, color=BLUE, linewidth=2, label="$c$")
    axes.set(xlabel="step", ylabel="example norm", ylim=(0, None))
    return finish(figure, axes, loc="lower right")


# --- single examples: images under attack, who pulls how hard, and what ENGM makes of it
#
# `x` are images `[n, c, h, w]` in [0, 1] with labels `y`, `[n]`; `x_adv` are the same under attack,
# `logits` and `logits_adv` the model's answers, `[n, K]`. `norms` are |g_i| and `weights` w_i of a
# batch, `[n]`; `scale` is ENGM's c and `floor` its f.


def adversarial_examples(
    x: Tensor,
    x_adv: Tensor,
    logits: Tensor,
    logits_adv: Tensor,
    class_names: Sequence[str],
    size: float = 1.5,
) -> Figure:
    """Shows images, perturbations and adversarial images in three rows, with the predictions.

    An image has `size` inches a side.
    """
    n = len(x)
    figure, axes = plt.subplots(3, n, figsize=(size * n, 3 * size + 0.7), squeeze=False)
    change = x_adv - x
    for column in range(n):
        fooled = bool(logits[column].argmax() != logits_adv[column].argmax())
        answers = (_answer(each[column], class_names) for each in (logits, logits_adv))
        top, middle, bottom = axes[:, column]
        show_image(top, x[column], next(answers))
        show_image(middle, _stretched(change)[column])
        show_image(bottom, x_adv[column], next(answers), fooled)
    largest = f"change,\nat most {change.abs().max():.3g}"
    for row, label in enumerate(("clean", largest, "adversarial")):
        axes[row, 0].set_ylabel(label, fontsize=10)
    return finish(figure)


def prediction(
    image: Tensor,
    probabilities: Tensor,
    y: int,
    class_names: Sequence[str],
    title: str,
    clean: Tensor,
) -> Figure:
    """Shows an image under attack beside the clean one, the change, and the model's answer.

    At most the ten largest of the `probabilities`, `[K]`, have bars; that of the true class is
    blue. `title` stands above the image, and `clean` is what it was before the attack.
    """
    change = image - clean
    pictures = {
        f"clean: {class_names[y]}": clean,
        f"change, at most {float(change.abs().max()):.3f}": _stretched(change),
        title: image,
    }
    figure, (*lefts, right) = plt.subplots(1, 4, figsize=(10.5, 2.8), width_ratios=(1, 1, 1, 1.6))
    for axes, (name, pixels) in zip(lefts, pictures.items(), strict=True):
        show_image(axes, pixels)
        axes.set_title(name, fontsize=10)
    shown = sorted(probabilities.topk(min(10, len(probabilities))).indices.tolist())
    colours = [BLUE if k == y else RED if k == probabilities.argmax() else "#BBBBBB" for k in shown]
    names = [class_names[k] for k in shown]
    right.bar(names, [100 * float(probabilities[k]) for k in shown], color=colours)
    right.set(ylim=(0, 100), ylabel="probability (%)", xlabel="class (true one blue)")
    right.tick_params(axis="x", rotation=0 if max(map(len, names)) < 4 else 45)
    open_axes(right)
    return finish(figure)


def _stretched(change: Tensor) -> Tensor:
    return 0.5 + 0.5 * change / change.abs().max().clamp(min=1e-8)  # grey where nothing changes


def strongest_and_weakest(
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    logits_adv: Tensor,
    norms: Tensor,
    class_names: Sequence[str],
) -> Figure:
    """Shows the four examples with the longest gradients, and below the four with the shortest.

    Each stands there twice: clean, under its label, and under attack, under the model's answer,
    which is red where it is wrong. The length of the gradient is below.
    """
    count = min(4, len(x))
    order = norms.argsort(descending=True).tolist()
    names = [name if len(name) <= 11 else f"{name[:10]}…" for name in class_names]
    figure, axes = plt.subplots(4, count, figsize=(1.25 * count, 6), squeeze=False)
    for top, chosen in ((0, order[:count]), (2, order[-count:])):
        for column, i in enumerate(chosen):
            show_image(axes[top, column], x[i], names[int(y[i])])
            wrong = bool(logits_adv[i].argmax() != y[i])
            show_image(axes[top + 1, column], x_adv[i], _answer(logits_adv[i], names), wrong)
            axes[top + 1, column].set_xlabel(f"{float(norms[i]):.2g}", fontsize=9)
    attacked = "attacked;\n$|g_i|$:"
    for row, label in enumerate(("hardest,\nclean", attacked, "least,\nclean", attacked)):
        axes[row, 0].set_ylabel(label, fontsize=10)
    return finish(figure)


def strongest_share(pulls: Tensor) -> float:
    """Returns the part of the sum of all pulls, `[n]`, that the strongest tenth has.

    A tenth is a whole number of examples, at least one.
    """
    count = max(1, round(len(pulls) / 10))
    return float(pulls.double().topk(count).values.sum() / pulls.double().sum())


def who_pulls(norms: Tensor) -> Figure:
    """Draws what so many of the hardest pulling examples pull all together."""
    pulls = norms.detach().double().cpu().sort(descending=True).values.numpy()
    percent = 100 * np.arange(len(pulls) + 1) / len(pulls)
    figure, [axes] = panels(size=(5, 3.2))
    axes.plot(percent, 100 * np.cumsum([0, *pulls]) / pulls.sum(), color=ORANGE, linewidth=2)
    axes.plot([0, 100], [0, 100], "--", color=GREY, label="if all pulled alike")
    axes.set(xlabel="examples, hardest first (%)", ylabel="part of all pulls (%)")
    return finish(figure, axes, loc="lower right")


def pulls(norms: Tensor, weights: Tensor, scale: float) -> Figure:
    """Draws how hard each example pulls under MSGD, |g_i|, and under ENGM, w_i |g_i|, sorted."""
    lengths, order = (values.numpy() for values in norms.detach().cpu().sort())
    weighted = lengths * weights.detach().cpu().numpy()[order]
    figure, [axes] = panels(size=(7, 3.2))
    axes.plot(lengths, "o", color=ORANGE, markersize=4, label="MSGD: $|g_i|$")
    axes.plot(weighted, "o", color=BLUE, markersize=4, label="ENGM: $w_i|g_i|$")
    axes.axhline(scale, color=GREY, linewidth=1, linestyle="--", label="$c$")
    x_label = "examples of the batch, by their norm"
    axes.set(xlabel=x_label, ylabel="pull on the weights")
    return finish(figure, axes)


def weighted_pulls(
    norms: Tensor, settings: Sequence[tuple[float, float]], fixed: bool = False
) -> Figure:
    """Draws the pulls of a batch without and with weights, sorted, a panel for each setting.

    Settings are pairs of the scale c, in units of the mean |g_i|, and the floor f. `fixed` makes
    the y axis logarithmic, and the same whatever they are.
    """
    norms = norms.detach().double().cpu().sort().values
    before = norms / norms.mean()
    size = (max(5.0, 2.4 * len(settings)), 2.7)
    figure, row = panels([""] * len(settings), size, sharey=True)
    for axes, (scale, floor) in zip(row, settings, strict=True):
        after = before * example_weights(before, scale, floor)
        axes.plot(before, color=ORANGE, linewidth=2, label="MSGD: $|g_i|$")
        axes.plot(after, "--", color=BLUE, linewidth=2, label="ENGM: $w_i|g_i|$")
        axes.axhline(scale, color=GREY, linewidth=1, linestyle=":", label="$c$")
        shares = [100 * strongest_share(pulls) for pulls in (before, after)]
        axes.set_title(
            f"scale {scale:.2g}, floor {floor:.2g}\ntenth: {shares[0]:.0f}% → {shares[1]:.0f}%",
            fontsize=9,
        )
        axes.set(xlabel="examples, by $|g_i|$", xticks=[])
    if fixed:  # a slider that also moves the axis would hide what it does
        row[0].set_yscale("log")
        row[0].set_ylim(0.01, 2 * max(10.0, float(before.max())))
    row[0].set_ylabel("pull / mean $|g_i|$")
    return finish(figure, row[0], fontsize=9, loc="upper left")


def weight_function(norms: Tensor, scale: float, floor: float) -> Figure:
    """Draws the weight (left) and the pull (right) of an example over the length of its gradient.

    The `norms` of a batch are ticks along the axis.
    """
    points = norms.detach().double().cpu()
    lengths = points.new_tensor(np.linspace(0, float(points.max()), 400))
    weights = example_weights(lengths, scale, floor)
    figure, (left, right) = panels(("", ""), (6.8, 2.6))
    left.plot(lengths, weights, color=BLUE, linewidth=2, label="ENGM")
    right.plot(lengths, weights * lengths, color=BLUE, linewidth=2, label="ENGM")
    left.plot(lengths, lengths * 0 + 1, "--", color=ORANGE, label="MSGD")
    right.plot(lengths, lengths, "--", color=ORANGE, label="MSGD")
    right.axhline(scale, color=GREY, linewidth=1, linestyle="--", label="$c$")
    right.plot(points, points * 0, "|", color="black", markersize=8, alpha=0.4)
    for axes in (left, right):
        axes.axvline(floor * scale, color="#999999", linewidth=1, linestyle=":", label="$fc$")
        axes.set_xlabel("norm $|g_i|$")
    left.set(yscale="log", ylabel="weight $w_i$ (log axis)")
    left.minorticks_off()
    right.set_ylabel("pull $w_i|g_i|$")
    return finish(figure, right)


def weights_over_epochs(weights: Sequence[Tensor]) -> Figure:
    """Draws how the weights of all examples of each epoch are spread, as stacked bars."""
    edges = (0.0, 0.5, 1.0, 2.0, 10.0, np.inf)
    names = ("below 1/2", "1/2 to 1", "1 to 2", "2 to 10", "above 10")
    values = [epoch.detach().cpu().double().numpy() for epoch in weights]
    shares = np.array([100 * np.histogram(v, edges)[0] / len(v) for v in values])
    bottoms = shares.cumsum(1) - shares
    # from orange, weighted down, to blue, weighted up
    colours = (RED, ORANGE, "#DDDDDD", SKY, BLUE)
    figure, [axes] = panels(size=(6.4, 3))
    epochs = np.arange(len(values)) + 1
    for k, name in reversed(list(enumerate(names))):
        axes.bar(epochs, shares[:, k], 0.9, bottoms[:, k], color=colours[k], label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="examples (%)")
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5))
    return finish(figure, axes, title="weight $w_i$", **beside)


def gram_matrices(patches: Tensor, outputs: Tensor) -> Figure:
    """Draws two Gram matrices of one example and their product, whose sum is |g_i|^2.

    They are of the patches that a convolution sees, and of the output gradients, `[p, p]`.
    """
    product = patches * outputs
    matrices = {
        "patches: $a_p \\cdot a_q$": patches,
        "output gradients: $b_p \\cdot b_q$": outputs,
        f"product; its sum: {product.sum().item():.3g}": product,
    }
    colours = plt.get_cmap("PuOr", 9)  # few colours make a small file
    figure, row = panels(matrices, (6.8, 2.5))
    for axes, matrix in zip(row, matrices.values(), strict=True):
        values = matrix.detach().cpu().numpy()
        largest = abs(values).max() or 1.0
        # symmetric, so that white is 0; the extremes are few, and would leave the rest pale
        limit = float(np.quantile(abs(values), 0.99)) or largest
        axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.spines[:].set_visible(True)
        axes.set(xticks=[], yticks=[], xlabel="position $q$")
    row[0].set_ylabel("position $p$")
    return finish(figure)


def norms_from_inputs(fitted: Mapping[str, tuple[Tensor, Tensor, float, float]]) -> Figure:
    """Draws each example's norm over that of its input gradient, with the line between them.

    Under the title of each panel stand |dl_i/dx_i| and |g_i|, both `[n]`, and the slope and
    intercept of the line.
    """
    figure, row = panels(fitted, (3.4 * len(fitted), 3.4))
    for axes, (inputs, norms, slope, intercept) in zip(row, fitted.values(), strict=True):
        x, y = (values.detach().cpu().tolist() for values in (inputs, norms))
        axes.plot(x, y, "o", color=BLUE, markersize=4, alpha=0.6)
        ends = [min(x), max(x)]
        axes.plot(ends, [slope * end + intercept for end in ends], color=RED)
        axes.set(xlabel=r"input gradient $|\partial\ell_i/\partial x_i|$", ylim=(0, None))
    row[0].set_ylabel("example norm $|g_i|$")
    return finish(figure)


def _answer(logits: Tensor, class_names: Sequence[str]) -> str:
    probability, k = logits.softmax(0).max(0)
    return f"{class_names[int(k)]} ({100 * float(probability):.0f}%)"


# --- many runs side by side


def best_and_last_rows(rows: Mapping[str, Mapping[str, Quantity]]) -> Figure:
    """Draws robust test accuracy of the best and the last checkpoint, a line for each config.

    Points are means, whiskers one standard deviation over the seeds, of the quantities that
    `engm.report.records.summarise` gives. The axis does not begin at 0, so that configs close to
    each other are told apart.
    """
    width = max(7, 4.5 + width_of(rows))  # the names leave the points their place
    figure, [axes] = panels(size=(width, 1.2 + 0.3 * len(rows)), grid="y")
    for shift, which, colour, marker in ((-0.15, "best", BLUE, "o"), (0.15, "last", ORANGE, "s")):
        found = [row[f"robust ({which})"] for row in rows.values()]
        axes.errorbar(
            [100 * quantity.mean for quantity in found],
            [place + shift for place in range(len(found))],
            xerr=[100 * (quantity.deviation or 0.0) for quantity in found],
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2,
            linewidth=1.2,
            label=which,
        )
    axes.set_xlabel("robust accuracy, test (%), ± one standard deviation")
    _name_lines(axes, list(rows))
    # above the axes: there is no free corner in a full one
    return finish(figure, axes, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def difference_intervals(quantities: Mapping[str, Mapping[str, Paired]], baseline: str) -> Figure:
    """Draws paired differences: small dots are seeds, large ones means, whiskers their intervals.

    Under what was compared, such as "robust (best)", stand the differences of each line, from
    `baseline`. Student's interval is drawn, where there is one; blue where it leaves 0 out.
    """
    names = list(next(iter(quantities.values())))
    width = max(3.0, 1 + width_of(names)) + 3.2 * len(quantities)
    size = (width, 1.4 + 0.27 * len(names))
    figure, row = panels(quantities, size, grid="y", sharex=True, sharey=True)
    for axes, paired in zip(row, quantities.values(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, found in enumerate(paired.values()):
            settled = found.student is not None and 0 not in found.student
            colour = BLUE if settled else GREY
            values = [100 * difference for difference in found.differences]
            axes.plot(values, [place] * len(values), "o", color=ORANGE, markersize=3, zorder=4)
            axes.plot(sum(values) / len(values), place, "o", color=colour, markersize=6)
            if found.student is not None:
                ends = [100 * found.student.low, 100 * found.student.high]
                axes.plot(ends, [place] * 2, "|-", color=colour, markersize=11)
        axes.set_xlabel(f"points above {baseline}")
    _name_lines(row[0], names)
    return finish(figure)


def best_to_last(optimizers: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """Draws robust accuracy at the best and at the last checkpoint, joined by a line.

    Thin lines are single seeds, thick ones their mean. Under the title of each panel and the name
    of each set of images stand the two accuracies of each seed.
    """
    figure, row = panels(optimizers, (1.5 + 2.4 * len(optimizers), 3.4), sharey=True)
    for axes, sets in zip(row, optimizers.values(), strict=True):
        for marker, (colour, name, seeds) in zip(cycle("os^DvP"), coloured(sets), strict=False):
            values = (100 * np.asarray(seeds)).tolist()
            seeds_and_mean(axes, [0, 1], values, colour, marker=marker, label=name)
        axes.set_xticks([0, 1], ["best", "last"])
        axes.set_xlim(-0.2, 1.2)
        percent_axis(axes, "robust accuracy (%)" if axes is row[0] else "")
    return finish(figure, row[-1], loc="center left", bbox_to_anchor=(1, 0.5))


def accuracy_heat_maps(
    grids: Mapping[str, np.ndarray],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    *,
    within: float = 0.02,
) -> Figure:
    """Draws a grid of accuracies for each optimizer, all in the same colours.

    Grids are fractions, `[weight decays, learning rates]`, both rising, and nan for a collapsed
    run, which has a cross. A red line goes round what is `within` a margin of the grid's best, as
    `engm.report.sensitivity.near_best` has it.
    """
    every = np.stack([100 * np.asarray(grid, dtype=float) for grid in grids.values()])
    some = np.isfinite(every).any()
    low, high = (float(np.nanmin(every)), float(np.nanmax(every))) if some else (0.0, 100.0)
    colours = mpl.colormaps["cividis"].with_extremes(bad="white")
    size = (1.2 + (0.8 + 0.62 * len(lrs)) * len(grids), 1.5 + 0.5 * len(weight_decays))
    figure, row = panels(grids, size, sharey=True, layout="constrained")
    for axes, grid in zip(row, every, strict=True):
        drawn = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto")
        axes.spines[:].set_visible(True)
        for (i, j), value in np.ndenumerate(grid):
            if np.isnan(value):
                axes.plot(j, i, "x", color="black", markersize=8)
            else:
                tone = "black" if value > (low + high) / 2 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=tone, fontsize=9)
        _frame(axes, near_best(lrs, weight_decays, grid / 100, within=within).inside)
        axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        axes.set_yticks(range(len(weight_decays)), [f"{decay:g}" for decay in weight_decays])
        axes.set_xlabel("learning rate")
    row[0].set_ylabel("weight decay")
    figure.colorbar(drawn, ax=row, label="robust accuracy (%)")
    return figure


def cost_ratios(measures: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Figure:
    """Draws what each method costs as a multiple of the first one's cost, bars with whiskers.

    Under the title of each panel stand the middle, low and high ratio of each method.
    """
    longest = max(len(name) for ratios in measures.values() for name in ratios)
    width = max(3.4, 2 + 0.09 * longest)  # long names leave the bars their place
    figure, row = panels(measures, (width * len(measures), 3.4))
    for axes, ratios in zip(row, measures.values(), strict=True):
        middles, lows, highs = np.array(list(ratios.values())).T
        whiskers = [middles - lows, highs - middles]
        bars = axes.barh(list(ratios), middles, xerr=whiskers, capsize=3, color=BLUE)
        axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(f"ratio to {next(iter(ratios))}")
    return finish(figure)


def _name_lines(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first line on top


def _frame(axes: Axes, inside: np.ndarray) -> None:
    padded = np.pad(inside, 1)
    for i, j in np.argwhere(inside):
        # the side of a cell is drawn where its neighbour there is outside
        for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if not padded[i + 1 + di, j + 1 + dj]:
                x = [j + dj / 2] * 2 if dj else [j - 0.5, j + 0.5]
                y = [i + di / 2] * 2 if di else [i - 0.5, i + 0.5]
                axes.plot(x, y, color=RED, linewidth=2.5, solid_capstyle="round", clip_on=False)
