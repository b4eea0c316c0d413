"""What a reader of the notebooks can move; built-in ipywidgets only, which Colab shows too."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import torch
from torch import Tensor, nn

from engm import plots
from engm.attacks import eval_mode
from engm.errors import InputError


class EpsExplorer(ipywidgets.VBox):
    """A slider over eps: an image under attack, and what the model thinks of it.

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
            value=0.0,
            max=largest_eps,
            step=largest_eps / 20,
            description="eps",
            readout_format=".3f",
            continuous_update=False,
        )
        self.image = ipywidgets.IntSlider(
            max=len(x) - 1, description="image", continuous_update=False
        )
        # a VBox would stretch it to the width of the page, and blur it
        self.picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})
        self.predicted = -1
        super().__init__([self.eps, self.image, self.picture])
        for slider in (self.eps, self.image):
            slider.observe(self._draw, names="value")
        self._draw()

    def _draw(self, change: Any = None) -> None:
        chosen, eps = slice(self.image.value, self.image.value + 1), self.eps.value
        x, y = self._x[chosen], self._y[chosen]
        if eps > 0:
            # the same start at every move, so that eps alone changes the picture
            generator = torch.Generator(x.device).manual_seed(0)
            x = self._attack_of(eps)(self._model, x, y, generator=generator)
        with eval_mode(self._model), torch.no_grad():
            probabilities = self._model(x).softmax(1)[0]
        self.predicted = int(probabilities.argmax())
        title = f"eps {eps:.3f}: {self._class_names[self.predicted]}"
        figure = plots.prediction(x[0], probabilities, int(y), self._class_names, title)
        self.picture.value = plots.to_png(figure)
