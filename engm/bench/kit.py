"""The kit's training as a row of `engm bench --what training`: settings with a name, and a loop."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count, islice
from typing import Any

from torch import Tensor, nn

from engm import data
from engm.config import RunConfig
from engm.device import kernels_compared
from engm.errors import InputError
from engm.training import Trainer

# The words of a name, in their order, and the setting that each of them is.
_WORDS: dict[str, tuple[str, Any]] = {
    **{name: ("optimizer", name) for name in ("msgd", "engm", "engm-input")},
    **{name: ("precision", name) for name in ("float32", "bfloat16")},
    **{name: (name, True) for name in ("channels_last", "compile", "capture")},
}
_PLAIN: dict[str, Any] = dict(
    optimizer="msgd", precision="float32", channels_last=False, compile=False, capture=False
)


def row_name(name: str) -> str:
    """Returns a name with its words in their order, "engm float32 compile" for "compile engm".

    Raises:
        InputError: If a word is unknown, or names a setting again.
    """
    words = name.split()
    settings = [_WORDS[word][0] for word in words if word in _WORDS]
    if not words or len(settings) < len(words):
        raise InputError(
            f"unknown method {name!r}; name 'reference', or a few of the words "
            f"{', '.join(_WORDS)}, such as 'bfloat16 channels_last'"
        )
    if len(set(settings)) < len(settings):
        raise InputError(f"{name!r} names a setting twice; name it once")
    if "precision" not in settings:
        words.append("float32")
    return " ".join(word for word in _WORDS if word in words and word != "msgd")


@contextmanager
def as_named(names: Sequence[str]) -> Iterator[None]:
    """Sees to it that a row is what its name says, or fails."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # how "input" speaks of its fit
        if any("compile" in name.split() for name in names):
            from torch._dynamo import config

            # after 8 models of one class torch would go on without compiling
            wanted = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
            known = {name: value for name, value in wanted.items() if hasattr(config, name)}
            stack.enter_context(config.patch(known))
        yield


class Kit:
    """The kit's training loop, held between steps.

    Args:
        model: The model, anywhere.
        dataset: The images, on the device.
        config: Attack and batch size.
        name: How to train, see `row_name`.

    Raises:
        InputError: If the device or torch is not able to.
    """

    def __init__(
        self, model: nn.Module, dataset: data.Dataset, config: RunConfig, name: str
    ) -> None:
        settings = _PLAIN | dict(_WORDS[word] for word in row_name(name).split())
        self.trainer = Trainer(replace(config, **settings), dataset, model=model)
        self._batches = self._endless()
        x, self._y = next(self._endless())
        self._x = x.contiguous(memory_format=self.trainer.precision.memory_format)

    def prepare(self, steps: int) -> None:
        """Does nothing: the batches are endless."""

    def train(self, steps: int) -> None:
        """Takes `steps` steps."""
        self.trainer.train_on(islice(self._batches, steps))

    def attack(self) -> None:
        """Attacks one batch, always the same, and throws the result away."""
        trainer = self.trainer
        with kernels_compared(), trainer.precision.autocast(self._x.device):
            trainer.method.attack(trainer.attacked or trainer.model, self._x, self._y)

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        config, images = self.trainer.config, self.trainer.dataset.train
        assert config.batch_size is not None
        for epoch in count(1):
            yield from data.batches(
                images, config.batch_size, seed=config.seed, epoch=epoch, augment=True,
                drop_last=True,
            )  # fmt: skip
