"""The kit's training as a row of `engm bench --what training`: settings with a name, and a loop."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any

from torch import Tensor, nn

from engm import data
from engm.bench.speeds import REFERENCE
from engm.config import RunConfig
from engm.device import kernels_compared
from engm.errors import InputError
from engm.training import Trainer


@dataclass(frozen=True)
class Variant:
    """A way to train with the kit."""

    optimizer: str = "msgd"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    capture: bool = False

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """Reads a name such as "engm bfloat16 channels_last".

        Raises:
            InputError: If a word is unknown, or is there twice.
        """
        choices = {
            "optimizer": ("msgd", "engm", "engm-input"),
            "precision": ("float32", "bfloat16"),
        }
        flags = ("channels_last", "compile", "capture")
        known = [*choices["optimizer"], *choices["precision"], *flags]
        found: dict[str, Any] = {}
        for word in name.split():
            fields = [field for field, words in choices.items() if word in words]
            field, value = (fields[0], word) if fields else (word, True)
            if word not in known:
                raise InputError(
                    f"unknown method {name!r}; name {REFERENCE!r}, or a few of the words "
                    f"{', '.join(known)}, such as 'bfloat16 channels_last'"
                )
            if field in found:
                raise InputError(f"{name!r} says its {field.replace('_', ' ')} twice; say it once")
            found[field] = value
        if not found:
            raise InputError("a method has no name; write such as 'bfloat16 channels_last'")
        return cls(**found)

    @property
    def name(self) -> str:
        """Its words, in one order."""
        flags = [word for word in ("channels_last", "compile", "capture") if getattr(self, word)]
        optimizer = [] if self.optimizer == "msgd" else [self.optimizer]
        return " ".join([*optimizer, self.precision, *flags])


@contextmanager
def as_named(names: Sequence[str]) -> Iterator[None]:
    """Sees to it that a row is what its name says, or fails."""
    compiled = any(name != REFERENCE and Variant.parse(name).compile for name in names)
    with warnings.catch_warnings(), _recompiling() if compiled else nullcontext():
        warnings.simplefilter("ignore")  # how "input" speaks of its fit
        yield


class Kit:
    """The kit's training loop, held between steps.

    Args:
        model: The model, anywhere.
        split: Training images, on the device.
        config: Attack, optimizer and batch size.
        variant: How to train.

    Raises:
        InputError: If the device or torch is not able to.
    """

    def __init__(
        self, model: nn.Module, split: data.Split, config: RunConfig, variant: Variant
    ) -> None:
        config = RunConfig(**config.to_dict() | asdict(variant)).resolved()
        names = tuple(map(str, range(data.SPECS[config.dataset].num_classes)))
        # mean and deviation are those of the model, which is there already
        dataset = data.Dataset(config.dataset, split, split, split, names, mean=(), std=())
        self.trainer = Trainer(config, dataset, model=model)
        assert config.batch_size is not None
        self.batches = _endless(split, config.batch_size, config.seed)
        x, self.y = next(_endless(split, config.batch_size, config.seed))
        self.x = x.contiguous(memory_format=self.trainer.precision.memory_format)

    def prepare(self, steps: int) -> None:
        """Does nothing: the batches are endless."""

    def train(self, steps: int) -> None:
        """Takes `steps` steps."""
        self.trainer.train_on(islice(self.batches, steps))

    def attack(self) -> None:
        """Attacks one batch, always the same, and throws the result away."""
        trainer = self.trainer
        with kernels_compared(), trainer.precision.autocast(self.x.device):
            trainer.method.attack(trainer.attacked or trainer.model, self.x, self.y)


def _endless(split: data.Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count(1):
        yield from data.batches(
            split, batch_size, seed=seed, epoch=epoch, augment=True, drop_last=True
        )


@contextmanager
def _recompiling() -> Iterator[None]:
    # After 8 models of one class torch would go on without compiling.
    from torch._dynamo import config

    wanted = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with config.patch({name: value for name, value in wanted.items() if hasattr(config, name)}):
        yield
