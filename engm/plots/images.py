"""Images, attacks and what a model thinks of them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from engm.plots.style import BLUE, RED, open_axes, show_image


def adversarial_examples(
    x: Tensor,
    x_adv: Tensor,
    logits: Tensor,
    logits_adv: Tensor,
    class_names: Sequence[str],
    size: float = 1.5,
) -> Figure:
    """Shows images, perturbations and adversarial images in three rows, with the predictions.

    Args:
        x: Images, `[n, c, h, w]` in [0, 1].
        x_adv: The same under attack.
        logits: The model's answer to `x`, `[n, K]`.
        logits_adv: Its answer to `x_adv`.
        class_names: What the K classes are called.
        size: Inches a side of each image.
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
    figure.tight_layout()
    return figure


def prediction(
    image: Tensor,
    probabilities: Tensor,
    y: int,
    class_names: Sequence[str],
    title: str,
    clean: Tensor | None = None,
) -> Figure:
    """Shows one image beside bars of the model's probabilities; the true class is blue.

    Args:
        image: `[c, h, w]` in [0, 1].
        probabilities: `[K]`; at most the ten largest are shown.
        y: The true class.
        class_names: What the K classes are called.
        title: What stands above the image.
        clean: The image before the attack; it and the change, stretched, then stand to the left.
    """
    panels = [(image, title)]
    if clean is not None:
        change = image - clean
        stretched = f"change, at most {float(change.abs().max()):.3f}"
        panels = [(clean, f"clean: {class_names[y]}"), (_stretched(change), stretched), *panels]
    widths = [*[1] * len(panels), 1.6]
    size = (7 if clean is None else 10.5, 2.8)
    figure, (*pictures, right) = plt.subplots(
        1, len(widths), figsize=size, gridspec_kw={"width_ratios": widths}
    )
    for axes, (pixels, name) in zip(pictures, panels, strict=True):
        show_image(axes, pixels)
        axes.set_title(name, fontsize=10)
    shown = sorted(probabilities.topk(min(10, len(probabilities))).indices.tolist())
    colours = [BLUE if k == y else RED if k == probabilities.argmax() else "#BBBBBB" for k in shown]
    names = [class_names[k] for k in shown]
    right.bar(names, [100 * float(probabilities[k]) for k in shown], color=colours)
    right.set_ylim(0, 100)
    right.set_ylabel("probability (%)")
    right.set_xlabel("class (true one blue)")
    right.tick_params(axis="x", rotation=0 if max(map(len, names)) < 4 else 45)
    open_axes(right)
    figure.tight_layout()
    return figure


def _stretched(change: Tensor) -> Tensor:
    return 0.5 + 0.5 * change / change.abs().max().clamp(min=1e-8)  # grey where nothing changes


def _answer(logits: Tensor, class_names: Sequence[str]) -> str:
    probability, k = logits.softmax(0).max(0)
    return f"{class_names[int(k)]} ({100 * float(probability):.0f}%)"
