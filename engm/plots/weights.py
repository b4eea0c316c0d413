"""Example weights: who pulls how hard, and what ENGM makes of it."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from engm.optim import example_weights
from engm.plots.style import BLUE, COLOURS, ORANGE, RED, SKY, open_axes, show_image


def strongest_share(pulls: Tensor, part: float = 0.1) -> float:
    """Returns which part of the sum of all pulls the strongest `part` of the examples has.

    Args:
        pulls: |g_i| or w_i |g_i|, `[n]`.
        part: Fraction of the examples, rounded to whole ones, at least one.
    """
    count = max(1, round(part * len(pulls)))
    pulls = pulls.double()
    return (pulls.topk(count).values.sum() / pulls.sum()).item()


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

    Args:
        x: Images, `[n, c, h, w]` in [0, 1].
        x_adv: The same under attack.
        y: Their labels, `[n]`.
        logits_adv: The model's answer to `x_adv`, `[n, K]`.
        norms: |g_i|, `[n]`.
        class_names: What the K classes are called.
    """
    count = min(4, len(x))
    order = norms.argsort(descending=True).tolist()
    chances, answers = logits_adv.softmax(1).max(1)
    figure, axes = plt.subplots(4, count, figsize=(1.25 * count, 6), squeeze=False)
    for top, chosen in ((0, order[:count]), (2, order[-count:])):
        for column, i in enumerate(chosen):
            clean, attacked = axes[top, column], axes[top + 1, column]
            show_image(clean, x[i])
            show_image(attacked, x_adv[i])
            clean.set_title(_short(class_names[int(y[i])]), fontsize=9)
            answer = _short(class_names[int(answers[i])])
            attacked.set_title(
                f"{answer} ({100 * float(chances[i]):.0f}%)",
                fontsize=9,
                color="black" if answers[i] == y[i] else RED,
            )
            attacked.set_xlabel(f"{float(norms[i]):.2g}", fontsize=9)
    for row, label in enumerate(
        ("hardest,\nclean", "attacked;\n$|g_i|$:", "least,\nclean", "attacked;\n$|g_i|$:")
    ):
        axes[row, 0].set_ylabel(label, fontsize=10)
    figure.tight_layout()
    return figure


def who_pulls(norms: Tensor) -> Figure:
    """Draws what so many of the hardest pulling examples pull all together.

    Args:
        norms: |g_i|, `[n]`.
    """
    pulls = norms.detach().double().cpu().sort(descending=True).values.numpy()
    percent = 100 * np.arange(len(pulls) + 1) / len(pulls)
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.plot(percent, 100 * np.cumsum([0, *pulls]) / pulls.sum(), color=ORANGE, linewidth=2)
    axes.plot([0, 100], [0, 100], "--", color="#555555", label="if all pulled alike")
    axes.set_xlabel("examples, hardest first (%)")
    axes.set_ylabel("part of all pulls (%)")
    axes.legend(frameon=False, loc="lower right")
    open_axes(axes)
    figure.tight_layout()
    return figure


def weight_function(norms: Tensor, scale: float, floor: float) -> Figure:
    """Draws the weight (left) and the pull (right) of an example over the length of its gradient.

    Args:
        norms: |g_i| of a batch, `[n]`, drawn as ticks along the axis.
        scale: c.
        floor: f.
    """
    points = norms.detach().double().cpu()
    lengths = points.new_tensor(np.linspace(0, float(points.max()), 400))
    weights = example_weights(lengths, scale, floor)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.6))
    left.plot(lengths, weights, color=BLUE, linewidth=2, label="ENGM")
    right.plot(lengths, weights * lengths, color=BLUE, linewidth=2, label="ENGM")
    left.plot(lengths, lengths * 0 + 1, "--", color=ORANGE, label="MSGD")
    right.plot(lengths, lengths, "--", color=ORANGE, label="MSGD")
    right.axhline(scale, color="#555555", linewidth=1, linestyle="--", label="$c$")
    right.plot(points, points * 0, "|", color="black", markersize=8, alpha=0.4)
    for axes in (left, right):
        axes.axvline(floor * scale, color="#999999", linewidth=1, linestyle=":", label="$fc$")
        axes.set_xlabel("norm $|g_i|$")
        open_axes(axes)
    left.set_yscale("log")
    left.minorticks_off()
    left.set_ylabel("weight $w_i$ (log axis)")
    right.set_ylabel("pull $w_i|g_i|$")
    right.legend(frameon=False)
    figure.tight_layout()
    return figure


def weighted_pulls(
    norms: Tensor, settings: Sequence[tuple[float, float]], fixed: bool = False
) -> Figure:
    """Draws the pulls of a batch without and with weights, sorted, a panel for each setting.

    Args:
        norms: |g_i|, `[n]`.
        settings: Pairs of the scale c, in units of the mean |g_i|, and the floor f.
        fixed: Whether the y axis, logarithmic then, is the same whatever the settings are.
    """
    norms = norms.detach().double().cpu().sort().values
    before = norms / norms.mean()
    figure, row = plt.subplots(
        1, len(settings), figsize=(max(5.0, 2.4 * len(settings)), 2.7), squeeze=False, sharey=True
    )
    for axes, (scale, floor) in zip(row[0], settings, strict=True):
        after = before * example_weights(before, scale, floor)
        axes.plot(before, color=ORANGE, linewidth=2, label="MSGD: $|g_i|$")
        axes.plot(after, "--", color=BLUE, linewidth=2, label="ENGM: $w_i|g_i|$")
        axes.axhline(scale, color="#555555", linewidth=1, linestyle=":", label="$c$")
        shares = [100 * strongest_share(pulls) for pulls in (before, after)]
        axes.set_title(
            f"scale {scale:.2g}, floor {floor:.2g}\ntenth: {shares[0]:.0f}% → {shares[1]:.0f}%",
            fontsize=9,
        )
        axes.set_xlabel("examples, by $|g_i|$")
        axes.set_xticks([])
        open_axes(axes)
    if fixed:  # a slider that also moves the axis would hide what it does
        row[0, 0].set_yscale("log")
        row[0, 0].set_ylim(0.01, 2 * max(10.0, float(before.max())))
    row[0, 0].set_ylabel("pull / mean $|g_i|$")
    row[0, 0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    return figure


def gram_matrices(patches: Tensor, outputs: Tensor) -> Figure:
    """Draws two Gram matrices of one example and their product, whose sum is |share|^2.

    Args:
        patches: Inner products of the patches that a convolution sees, `[p, p]`.
        outputs: Inner products of the output gradients at the same positions, `[p, p]`.
    """
    total = (patches * outputs).sum().item()
    panels = {
        "patches: $a_p \\cdot a_q$": patches,
        "output gradients: $b_p \\cdot b_q$": outputs,
        f"product; its sum: {total:.3g}": patches * outputs,
    }
    colours = plt.get_cmap("PuOr", 9)  # few colours make a small file
    figure, row = plt.subplots(1, 3, figsize=(6.8, 2.5))
    for axes, (title, matrix) in zip(row, panels.items(), strict=True):
        values = matrix.detach().cpu().numpy()
        largest = abs(values).max() or 1.0
        # symmetric, so that white is 0; the extremes are few, and would leave the rest pale
        limit = float(np.quantile(abs(values), 0.99)) or largest
        axes.imshow(values, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("position $q$")
    row[0].set_ylabel("position $p$")
    figure.tight_layout()
    return figure


def running_scale(means: Sequence[float], scales: Sequence[float]) -> Figure:
    """Draws the scale c over the steps, and the mean |g_i| of each batch behind it.

    Args:
        means: Mean |g_i| of the batch of each step.
        scales: c of each step.
    """
    figure, axes = plt.subplots(figsize=(5.4, 2.6))
    steps = range(1, len(means) + 1)
    axes.plot(steps, means, color="#BBBBBB", linewidth=1, label="mean $|g_i|$ of the batch")
    axes.plot(steps, scales, color=BLUE, linewidth=2, label="$c$")
    axes.set_xlabel("step")
    axes.set_ylabel("example norm")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    open_axes(axes)
    figure.tight_layout()
    return figure


def weights_over_epochs(weights: Sequence[Tensor]) -> Figure:
    """Draws how the example weights of each epoch are spread, as stacked bars.

    Args:
        weights: All w_i of each epoch, each `[n]`.
    """
    edges = (0.0, 0.5, 1.0, 2.0, 10.0, np.inf)
    names = ("below 1/2", "1/2 to 1", "1 to 2", "2 to 10", "above 10")
    values = [epoch.detach().cpu().double().numpy() for epoch in weights]
    shares = np.array([100 * np.histogram(v, edges)[0] / len(v) for v in values])
    bottoms = shares.cumsum(1) - shares
    # from orange, weighted down, to blue, weighted up
    colours = (RED, ORANGE, "#DDDDDD", SKY, BLUE)
    figure, axes = plt.subplots(figsize=(6.4, 3))
    epochs = np.arange(len(values)) + 1
    for k, name in reversed(list(enumerate(names))):
        axes.bar(epochs, shares[:, k], 0.9, bottoms[:, k], color=colours[k], label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("examples (%)")
    axes.legend(title="weight $w_i$", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    open_axes(axes)
    figure.tight_layout()
    return figure


def corrupted_steps(
    factors: Sequence[float], steps: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Draws what one example does to the gradient of a batch while its loss is multiplied.

    Args:
        factors: What the loss was multiplied by.
        steps: Under the names of the legend the lengths of the batch's gradient, and its cosines
            with what it is without that example, both as many as `factors`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.6))
    looks = zip(cycle(COLOURS), cycle(("-", "--", "-.")), steps.items(), strict=False)
    for colour, line, (name, (lengths, cosines)) in looks:
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
        open_axes(axes)
    left.legend(frameon=False)
    figure.tight_layout()
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 11 else f"{name[:10]}…"
