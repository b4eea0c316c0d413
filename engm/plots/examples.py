"""Single examples: images under attack, who pulls how hard, and what ENGM makes of it.

`x` are images `[n, c, h, w]` in [0, 1] with labels `y`, `[n]`; `x_adv` are the same under attack,
`logits` and `logits_adv` the model's answers, `[n, K]`. `norms` are |g_i| and `weights` w_i of a
batch, `[n]`; `scale` is ENGM's c and `floor` its f.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engm.optim import example_weights
from engm.plots.style import BLUE, GREY, ORANGE, RED, SKY, finish, open_axes, panels, show_image


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
    largest = (x_adv - x).abs().max().clamp(min=1e-8)
    for column in range(n):
        for row, pixels in enumerate((x, _stretched(x_adv - x), x_adv)):
            show_image(axes[row, column], pixels[column])
        axes[0, column].set_title(_answer(logits[column], class_names), fontsize=9)
        colour = RED if logits[column].argmax() != logits_adv[column].argmax() else "black"
        answer = _answer(logits_adv[column], class_names)
        axes[2, column].set_title(answer, fontsize=9, color=colour)
    for row, label in enumerate(("clean", f"change,\nat most {largest:.3g}", "adversarial")):
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

    Args:
        image: `[c, h, w]` in [0, 1].
        probabilities: What the model makes of it, `[K]`; at most the ten largest are shown.
        y: The true class, whose bar is blue.
        class_names: What the K classes are called.
        title: What stands above the image.
        clean: The image before the attack.
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
            clean, attacked = axes[top, column], axes[top + 1, column]
            show_image(clean, x[i])
            show_image(attacked, x_adv[i])
            clean.set_title(names[int(y[i])], fontsize=9)
            colour = "black" if logits_adv[i].argmax() == y[i] else RED
            attacked.set_title(_answer(logits_adv[i], names), fontsize=9, color=colour)
            attacked.set_xlabel(f"{float(norms[i]):.2g}", fontsize=9)
    for row, label in enumerate(
        ("hardest,\nclean", "attacked;\n$|g_i|$:", "least,\nclean", "attacked;\n$|g_i|$:")
    ):
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

    Args:
        norms: |g_i|, `[n]`.
        settings: Pairs of the scale c, in units of the mean |g_i|, and the floor f.
        fixed: Whether the y axis, logarithmic then, is the same whatever the settings are.
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

    Args:
        fitted: Under the title of each panel |dl_i/dx_i| and |g_i|, both `[n]`, and the slope and
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
