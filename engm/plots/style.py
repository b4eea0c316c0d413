"""What all figures share: colours, axes, images, PNG."""

import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    *("#0072B2", "#E69F00", "#009E73"),
    *("#CC79A7", "#56B4E9", "#D55E00"),
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)


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
    """Returns the figure as a PNG of 64 colours, and the size at which it is to be shown."""
    from PIL import Image

    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", dpi=2 * figure.dpi, bbox_inches="tight")
    picture = Image.open(large).convert("RGB")
    # of the three methods the one that keeps rare colours (a red title over grey images) and greys
    picture = picture.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    width, height = picture.size
    return small.getvalue(), {"width": width // 2, "height": height // 2}


def percent_axis(axes: Axes, label: str) -> None:
    """Lets the y axis go from 0 to 100%, under `label`."""
    axes.set_ylim(0, 102)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    open_axes(axes)


def open_axes(axes: Axes) -> None:
    """Takes the lines at the top and on the right away."""
    axes.spines[["top", "right"]].set_visible(False)
