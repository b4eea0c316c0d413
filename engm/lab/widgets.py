"""What a reader of the notebooks can move; built-in ipywidgets only, which Colab shows too."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import torch
from torch import Tensor, nn

from engm import plots
from engm.attacks import eval_mode
from engm.errors import InputError
from engm.optim import example_weights


class _Explorer(ipywidgets.VBox):
    """Sliders above a picture that is drawn anew when one is moved."""

    def __init__(self, *sliders: Any, below: Sequence[Any] = ()) -> None:
        # a VBox would stretch it to the width of the page, and blur it
        self.picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})
        super().__init__([*sliders, self.picture, *below])
        for slider in sliders:
            slider.continuous_update = False
            slider.observe(self._draw, names="value")
        self._draw()

    def _draw(self, change: Any = None) -> None:
        raise NotImplementedError


class EpsExplorer(_Explorer):
    """A slider over eps: an image, its change under attack, and what the model thinks of it.

    Args:
        model: Takes pixels in [0, 1].
        x: Images to choose from, `[n, c, h, w]`.
        y: Their labels, `[n]`.
        class_names: What the classes are called.
        attack_of: Makes the attack for an eps above 0, such as
            `lambda eps: PGD(eps=eps, step_size=eps / 4)`.
        largest_eps: Where the slider ends, in pixel units.

    Attributes:
        eps: The slider.
        image: The slider over the images.
        picture: The figure, as a PNG.
        predicted: The class that the model sees at the moment.

    Raises:
        InputError: If there is no image, not one label for each, or no eps to slide to.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        class_names: Sequence[str],
        attack_of: Callable[[float], Any],
        largest_eps: float,
    ) -> None:
        if not (len(x) == len(y) > 0 and largest_eps > 0):
            raise InputError(
                f"the explorer needs images, a label for each and an eps above 0; got {len(x)} "
                f"images, {len(y)} labels and largest_eps={largest_eps!r}"
            )
        self._model, self._x, self._y = model, x, y
        self._class_names, self._attack_of = class_names, attack_of
        self.eps = ipywidgets.FloatSlider(
            max=largest_eps,
            step=largest_eps / 20,
            description="eps",
            readout_format=".3f",
            layout={"width": "28rem"},
        )
        self.image = ipywidgets.IntSlider(
            max=len(x) - 1, description="image", layout={"width": "28rem"}
        )
        self.predicted = -1
        super().__init__(self.eps, self.image)

    def _draw(self, change: Any = None) -> None:
        chosen, eps = slice(self.image.value, self.image.value + 1), self.eps.value
        x, y = self._x[chosen], self._y[chosen]
        clean = x[0]
        if eps > 0:
            # the same start at every move, so that eps alone changes the picture
            generator = torch.Generator(x.device).manual_seed(0)
            x = self._attack_of(eps)(self._model, x, y, generator=generator)
        with eval_mode(self._model), torch.no_grad():
            probabilities = self._model(x).softmax(1)[0]
        self.predicted = int(probabilities.argmax())
        title = f"eps {eps:.3f}: {self._class_names[self.predicted]}"
        names = self._class_names
        figure = plots.prediction(x[0], probabilities, int(y), names, title, clean)
        self.picture.value = plots.to_png(figure)


class WeightExplorer(_Explorer):
    """Sliders over scale and floor: how hard each example of a batch pulls under ENGM.

    Args:
        norms: |g_i| of a batch, `[n]`.

    Attributes:
        scale: The slider of c, in units of the mean |g_i|, on a log axis.
        floor: The slider of f.
        picture: The figure, as a PNG.
        readout: What the strongest tenth pulls, before and after, in words.
        share: The part of all pulls that the strongest tenth of the examples has under ENGM.

    Raises:
        InputError: If the norms are not a row of finite numbers, 0 or more, of which one is not 0.
    """

    def __init__(self, norms: Tensor) -> None:
        row = isinstance(norms, Tensor) and norms.dim() == 1 and len(norms) > 0
        if not (row and norms.isfinite().all() and norms.min() >= 0 and norms.max() > 0):
            got = f"shape {list(norms.shape)}" if isinstance(norms, Tensor) else type(norms)
            raise InputError(
                "the explorer needs the norms of a batch, a tensor [n] of finite numbers, 0 or "
                f"more, not all 0, such as optimizer.last.norms; got {got}"
                + (f" from {norms.min()} to {norms.max()}" if row else "")
            )
        self._norms = norms.detach().double().cpu()
        self.scale = ipywidgets.FloatLogSlider(
            value=1.0,
            base=10,
            min=-1,
            max=1,
            step=0.05,
            description="scale / mean",
            style={"description_width": "initial"},
            readout_format=".2f",
            layout={"width": "28rem"},
        )
        self.floor = ipywidgets.FloatSlider(
            value=0.05,
            min=0.01,
            max=1.0,
            step=0.01,
            description="floor",
            readout_format=".2f",
            layout={"width": "28rem"},
        )
        self.readout = ipywidgets.Label()
        super().__init__(self.scale, self.floor, below=[self.readout])

    def _draw(self, change: Any = None) -> None:
        scale, floor = self.scale.value, self.floor.value
        weights = example_weights(self._norms, scale * self._norms.mean().item(), floor)
        self.share = plots.strongest_share(weights * self._norms)
        self.readout.value = (
            f"The strongest tenth has {plots.strongest_share(self._norms):.0%} of the pull under "
            f"MSGD, {self.share:.0%} under ENGM; weights from {weights.min():.2g} to "
            f"{weights.max():.2g}."
        )
        figure = plots.weighted_pulls(self._norms, [(scale, floor)], True)
        self.picture.value = plots.to_png(figure)
