"""The kit's training as a row of `engm bench --what training`: settings with a name, and a loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count, islice
from typing import Any

from torch import nn

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
_PLAIN = {setting: getattr(RunConfig, setting) for setting, _ in _WORDS.values()}


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
def compiling(names: Sequence[str]) -> Iterator[None]:
    """Sees to it that rows that are to be compiled are, or fail."""
    if not any("compile" in name.split() for name in names):
        yield
        return
    from torch._dynamo import config

    # after 8 models of one class torch would go on without compiling
    wanted = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with config.patch({name: value for name, value in wanted.items() if hasattr(config, name)}):
        yield


class Kit:
    """The kit's training loop, held between steps; the images are on the device.

    `name` says how to train, see `row_name`; attack and batch size are those of `config`.
    """

    def __init__(
        self, model: nn.Module, dataset: data.Dataset, config: RunConfig, name: str
    ) -> None:
        settings = _PLAIN | dict(_WORDS[word] for word in row_name(name).split())
        self.trainer = Trainer(replace(config, **settings), dataset, model=model)
        size, seed = self.trainer.config.batch_size or 0, config.seed
        epochs = (
            data.batches(dataset.train, size, seed=seed, epoch=epoch, augment=True, drop_last=True)
            for epoch in count(1)
        )
        self.batches = chain.from_iterable(epochs)
        x, self.y = next(self.batches)  # that is attacked alone
        self.x = x.contiguous(memory_format=self.trainer.precision.memory_format)

    def train(self, steps: int) -> None:
        """Takes `steps` steps."""
        self.trainer.train_on(islice(self.batches, steps))

    def attack(self, times: int = 1) -> None:
        """Attacks one batch, always the same, and throws the result away."""
        trainer = self.trainer
        with kernels_compared(), trainer.precision.autocast(self.x.device):
            for _ in range(times):
                trainer.method.attack(trainer.attacked or trainer.model, self.x, self.y)
