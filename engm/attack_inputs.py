"""What an attack refuses: settings out of range, images and labels that are none, odd models."""

import math

import torch
from torch import Tensor, nn

from engm.errors import InputError


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not one of `choices`."""
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_pixels(name: str, value: float, norm: str) -> None:
    """Refuses a length that is no number of pixel units, 0 or more, at most 1 under linf."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{name} must be a number, 0 or more; got {value!r}")
    if norm == "linf" and value > 1:
        raise InputError(f"{name} is {value}, but pixels are in [0, 1]: write 8/255, not 8")


def check_count(name: str, value: int) -> None:
    """Refuses what is not a whole number, 1 or more."""
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number, 1 or more; got {value!r}")


def check_batch(x: Tensor, y: Tensor, look: bool = True) -> int:
    """Returns the highest class of a batch; refuses one that is not as attacks want it.

    Args:
        x: Images.
        y: Classes.
        look: Whether to look at the values too, which waits for the device. If not, returns 0.
    """
    if not x.is_floating_point() or x.ndim < 2:
        raise InputError(
            f"x is {x.dtype} of shape {list(x.shape)}; give [n, ...] floats in [0, 1], "
            "as in x.float() / 255"
        )
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise InputError(
            f"y is {y.dtype} of shape {list(y.shape)}; give {len(x)} classes, int64 as in y.long()"
        )
    if y.device != x.device:
        raise InputError(f"x is on {x.device} and y on {y.device}; move them to one device")
    if len(x) == 0 or not look:
        return 0
    # the one wait for the device
    ends = torch.stack([end.float() for end in (x.min(), x.max(), y.min(), y.max())])
    low, high, lowest, highest = ends.tolist()
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"x goes from {low:.8g} to {high:.8g}, but pixels are in [0, 1]; normalise inside the "
            "model, and clamp what augmentation pushes out"
        )
    if lowest < 0:
        raise InputError(f"y has the class {lowest:.0f}; classes count from 0")
    return int(highest)


def checked_logits(model: nn.Module, highest: int, images: Tensor) -> Tensor:
    """Returns logits, at least float32; refuses what is not `[n, K]` with K above `highest`."""
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model gave {got}; it must give logits of shape [{len(images)}, K]")
    if logits.shape[1] <= max(highest, 1):
        raise InputError(
            f"the model gives {logits.shape[1]} logits, but classes go up to {max(highest, 1)}; "
            "build it with one logit for each class"
        )
    # in bfloat16 the losses of two restarts would hardly differ
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
