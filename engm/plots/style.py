"""What all figures share: colours, axes, seeds, images, PNG."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    *("#0072B2", "#E69F00", "#009E73"),
    *("#CC79A7", "#56B4E9", "#D55E00"),
)
GREY = "#777777"
MARKERS = "os^DvP"


def panels(
    titles: Iterable[str] = ("",),
    size: tuple[float, float] = (6, 3.4),
    *,
    grid: str = "",
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Makes a pyplot figure with axes side by side, open at the top and on the right.

    Args:
        titles: What stands above each of them.
        size: Width and height of the figure in inches.
        grid: The axis that has lines across: "x", "y", "both" or none.
        options: For `plt.subplots`, such as `sharey=True`.
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


def show_image(axes: Axes, image: Tensor) -> None:
    """Draws `[c, h, w]` pixels in [0, 1] on `axes`, grey for one channel, without ticks."""
    pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels.clip(0, 1))
    axes.set(xticks=[], yticks=[])


def to_png(figure: Figure) -> bytes:
    """Returns the figure as a PNG and closes it, for a widget to show."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    return file.getvalue()
