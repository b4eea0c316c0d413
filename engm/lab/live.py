"""A small training run that a reader of the notebooks starts, watches and stops."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engm import data
from engm.config import TYPES, RunConfig, choices
from engm.optim import ENGM
from engm.plots import BLUE, ORANGE, finish, open_axes, percent_axis, to_png
from engm.training import Trainer

_CHOICES = ("method", "optimizer", "lr", "eps", "epochs")


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training came to.

    Attributes:
        loss: Mean training loss.
        clean_accuracy: Fraction of the validation images that are classified rightly.
        robust_accuracy: Fraction that still is under an attack like that of training.
        weights: w_i of every example of the epoch, `[n]`; all 1 where the optimizer has none.
    """

    loss: float
    clean_accuracy: float
    robust_accuracy: float
    weights: Tensor


class _Stopped(Exception):
    pass


def train(
    images: data.Dataset, config: RunConfig, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Epoch]:
    """Trains on the device of `images`, and yields each epoch as it ends; nothing is written.

    Args:
        images: The data set of `config`.
        config: The run.
        stopped: Asked before each batch; the epoch that it ends is not yielded.

    Raises:
        NonFiniteLossError: As `engm.training.Trainer`.
    """
    trainer = Trainer(config, images)
    while trainer.epoch < trainer.config.epochs:
        weights: list[Tensor] = []
        try:
            done = trainer.train_epoch(_watched(trainer, weights, stopped))
        except _Stopped:
            return
        yield Epoch(
            done["train_loss"],
            done["validation_clean_accuracy"],
            done["validation_robust_accuracy"],
            torch.cat(weights).cpu(),
        )


def _watched(
    trainer: Trainer, weights: list[Tensor], stopped: Callable[[], bool]
) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in trainer.batches():
        if stopped():
            raise _Stopped
        yield x, y
        # whoever asks for the next batch has taken the step of this one
        last = trainer.optimizer.last if isinstance(trainer.optimizer, ENGM) else None
        weights.append(last.weights if last else torch.ones(len(y)))


def view(history: Sequence[Epoch], earlier: Mapping[str, Sequence[Epoch]] | None = None) -> Figure:
    """Draws loss and accuracies over the epochs so far, and how the example weights are spread.

    Runs from `earlier`, under their names, are faint lines. The figure is not one of pyplot's,
    which belong to the main thread.
    """
    figure = Figure(figsize=(9, 2.8))
    left, middle, right = figure.subplots(1, 3)
    runs: list[tuple[str, Sequence[Epoch]]] = [*(earlier or {}).items(), ("", history)]
    for (name, run), line in zip(runs, cycle(("--", "-.", ":")), strict=False):
        look: Any = dict(linestyle=line, alpha=0.5) if name else dict(marker="o", markersize=3)
        epochs = range(1, len(run) + 1)
        left.plot(epochs, [epoch.loss for epoch in run], color=BLUE, label=name, **look)
        for colour, kind in ((BLUE, "clean"), (ORANGE, "robust")):
            percents = [100 * getattr(epoch, f"{kind}_accuracy") for epoch in run]
            middle.plot(epochs, percents, color=colour, label="" if name else kind, **look)
    if earlier:
        left.legend(frameon=False, fontsize=7, loc="lower left")
    left.set(ylim=(0, 1.1 * max(epoch.loss for _, run in runs for epoch in run)))
    left.set_ylabel("training loss")
    percent_axis(middle, "accuracy, validation (%)")
    for axes in (left, middle):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    weights = history[-1].weights.tolist()
    right.hist(weights, bins=20, range=(0, max(2, *weights)), color=ORANGE)
    right.set(xlabel="example weight $w_i$, last epoch", ylabel="examples")
    for axes in (left, right):
        open_axes(axes)
    return finish(figure, middle)


class TrainingLab(ipywidgets.VBox):
    """Choices of method, optimizer, lr, eps and epochs, a start and a stop button, a live picture.

    A run starts when the reader presses the button, and trains in a thread of its own, so that
    the stop button is heard meanwhile. The curves of the last runs stay as faint lines.

    Args:
        images: What to train on, and on which device.
        config: Where the choices start, and all that there is no choice of.

    Attributes:
        method: Its choice; likewise `optimizer`, `lr`, `eps` and `epochs`.
        start: The button that starts a run; `stop` ends it after the batch at hand.
        message: How it goes, in one sentence.
        history: The epochs so far; `picture` shows them, as a PNG.
        earlier: The runs before, each under what was chosen.
    """

    def __init__(self, images: data.Dataset, config: RunConfig) -> None:
        self._images, self._config = images, config
        config = config.resolved()
        assert config.eps
        self.method, self.optimizer = (
            ipywidgets.Dropdown(
                options=choices(TYPES[name]), value=getattr(config, name), description=name
            )
            for name in ("method", "optimizer")
        )
        self.lr = ipywidgets.FloatLogSlider(
            value=config.lr, min=-3, max=0.5, step=0.05, description="lr", readout_format=".3f"
        )
        self.eps = ipywidgets.FloatSlider(
            value=config.eps,
            min=config.eps / 10,
            max=2 * config.eps,
            step=config.eps / 10,
            description="eps",
            readout_format=".3f",
        )
        self.epochs = ipywidgets.IntSlider(
            value=config.epochs, min=1, max=max(50, config.epochs), description="epochs"
        )
        self.start = ipywidgets.Button(description="Start")
        self.stop = ipywidgets.Button(description="Stop", disabled=True)
        self.message = ipywidgets.Label("Nothing is running.")
        # a VBox would stretch it to the width of the page, and blur it
        hidden = {"align_self": "flex-start", "display": "none"}  # until there is a picture
        self.picture = ipywidgets.Image(format="png", layout=hidden)
        self.history: list[Epoch] = []
        self.earlier: dict[str, list[Epoch]] = {}
        self._name = ""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.start.on_click(self._on_start)
        self.stop.on_click(self._on_stop)
        choose = [getattr(self, name) for name in _CHOICES]
        buttons = ipywidgets.HBox([self.start, self.stop])
        super().__init__([*choose, buttons, self.message, self.picture])

    def join(self) -> None:
        """Waits until the run, if there is one, has ended."""
        if self._thread is not None:
            self._thread.join()

    def _on_start(self, _: Any) -> None:
        if self._thread is not None and self._thread.is_alive():
            return  # two clicks in a row
        self._stopped.clear()
        if self.history:
            self.earlier.pop(self._name, None)  # the same choices again
            recent = [*self.earlier.items(), (self._name, self.history)][-3:]
            self.earlier = dict(recent)
        self._name = f"{self.method.value}, {self.optimizer.value}, lr {self.lr.value:.2g}"
        self._name += f", eps {self.eps.value:.2g}"
        self.history = []
        self.start.disabled, self.stop.disabled = True, False
        self.message.value = "The first epoch is running."
        # a daemon, so that it cannot keep a kernel alive
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _on_stop(self, _: Any) -> None:
        self._stopped.set()
        self.message.value = "Stopping after this batch."

    def _run(self) -> None:
        try:
            chosen = {name: getattr(self, name).value for name in _CHOICES}
            config = replace(self._config, step_size=None, **chosen)  # it follows eps
            for epoch in train(self._images, config, self._stopped.is_set):
                self.history.append(epoch)
                self.picture.value = to_png(view(self.history, self.earlier))
                self.picture.layout.display = None
                self.message.value = (
                    f"Epoch {len(self.history)} of {config.epochs}: loss {epoch.loss:.3f}, clean "
                    f"accuracy {epoch.clean_accuracy:.1%}, robust {epoch.robust_accuracy:.1%}."
                )
            if self._stopped.is_set():
                self.message.value = f"Stopped; whole epochs: {len(self.history)}."
        except Exception as error:  # a thread has nobody else to tell
            reason = str(error).strip().partition("\n")[0]
            self.message.value = f"The run ended early: {reason or type(error).__name__}"
        finally:
            self.start.disabled, self.stop.disabled = False, True
