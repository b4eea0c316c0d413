"""What a reader of the notebooks can move; built-in ipywidgets only, which Colab shows too."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import torch
from torch import Tensor, nn

from engm import plots
from engm.attacks import eval_mode
from engm.optim import example_weights


class _Explorer(ipywidgets.VBox):
    """Sliders above a picture that is drawn anew when one is moved."""

    def __init__(self, *sliders: Any, below: Sequence[Any] = ()) -> None:
        # a VBox would stretch it to the width of the page, and blur it
        self.picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})
        super().__init__([*sliders, self.picture, *below])
        for slider in sliders:
            slider.continuous_update = False
            slider.layout.width = "28rem"
            slider.style.description_width = "initial"
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
        eps: The slider; `image` is that over the images.
        picture: The figure, as a PNG.
        predicted: The class that the model sees at the moment.
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
        self._model, self._x, self._y = model, x, y
        self._class_names, self._attack_of = class_names, attack_of
        self.eps = ipywidgets.FloatSlider(
            max=largest_eps, step=largest_eps / 20, description="eps", readout_format=".3f"
        )
        self.image = ipywidgets.IntSlider(max=len(x) - 1, description="image")
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
        names = self._class_names
        title = f"eps {eps:.3f}: {names[self.predicted]}"
        figure = plots.prediction(x[0], probabilities, int(y), names, title, clean)
        self.picture.value = plots.to_png(figure)


class WeightExplorer(_Explorer):
    """Sliders over scale and floor: how hard each example of a batch pulls under ENGM.

    Args:
        norms: |g_i| of a batch, `[n]`, such as `optimizer.last.norms`.

    Attributes:
        scale: The slider of c, in units of the mean |g_i|, on a log axis; `floor` is that of f.
        picture: The figure, as a PNG; `readout` says what the strongest tenth pulls.
    """

    def __init__(self, norms: Tensor) -> None:
        self._norms = norms.detach().double().cpu()
        self.scale = ipywidgets.FloatLogSlider(
            value=1.0, min=-1, max=1, step=0.05, description="scale / mean", readout_format=".2f"
        )
        self.floor = ipywidgets.FloatSlider(
            value=0.05, min=0.01, max=1.0, step=0.01, description="floor", readout_format=".2f"
        )
        self.readout = ipywidgets.Label()
        super().__init__(self.scale, self.floor, below=[self.readout])

    def _draw(self, change: Any = None) -> None:
        scale, floor = self.scale.value, self.floor.value
        weights = example_weights(self._norms, scale * self._norms.mean().item(), floor)
        before, after = map(plots.strongest_share, (self._norms, weights * self._norms))
        self.readout.value = (
            f"The strongest tenth has {before:.0%} of the pull under MSGD, {after:.0%} under ENGM; "
            f"weights from {weights.min():.2g} to {weights.max():.2g}."
        )
        figure = plots.weighted_pulls(self._norms, [(scale, floor)], True)
        self.picture.value = plots.to_png(figure)
