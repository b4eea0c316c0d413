"""What `pyautoattack` needs around it, so that a call leaves no trace."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn

from engm.attacks import eval_mode
from engm.errors import InputError


def library() -> ModuleType:
    """Returns the package, or says how to install it."""
    try:
        import pyautoattack
    except ImportError:
        need = 'AutoAttack needs pyautoattack: pip install "engm[autoattack]"'
        raise InputError(need) from None
    return pyautoattack


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Puts random states, training flags and what requires gradients back after the block."""
    # FAB calls backward, which would add to the gradients of parameters
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # torch.manual_seed seeds every GPU
    with eval_mode(model), torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            for parameter in trainable:
                parameter.requires_grad = False
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad = True


def tiles_fit(height: int, width: int) -> bool:
    """Returns whether Square can run on images of that size under l2."""
    # Square starts under l2 from tiles as wide as a fifth of the height, along both sides
    tile = height // 5
    first = (height - 5 * tile) // 2
    return tile == 1 or all(tile and first + n // tile * tile <= n for n in (height, width))


def largest_of_each(warnings: list[str]) -> tuple[str, ...]:
    """Returns one of the warnings that differ in their numbers alone."""
    # batches repeat a warning with other numbers: the one with the largest stands for all
    kinds: dict[str, str] = {}
    for warning in sorted(warnings, key=lambda text: [int(n) for n in re.findall(r"\d+", text)]):
        # the package's words, without its pointers to what is not here
        short = re.split(r" See | Please use version", warning)[0]
        kinds[re.sub(r"\d+", "", short)] = short
    return tuple(kinds.values())
