"""What attacks see in place of the model that is judged: another one, a surrogate, a function."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engm.attacks import Model, eval_mode
from engm.errors import InputError
from engm.evaluation.accuracy import Attack


@dataclass(frozen=True)
class Transfer:
    """An attack that is made on another model, and judged on the one that is evaluated.

        attacks = standard_attacks(eps) | {"transfer": Transfer(PGD(eps=eps, ...), second_model)}

    What a second model's images fool and the model's own gradients do not find, those gradients
    hide. Source: Papernot et al. 2017, arXiv 1602.02697.

    Attributes:
        attack: What is made.
        source: The model that it is made on.
    """

    attack: Attack
    source: Model = field(repr=False)

    @property
    def eps(self) -> float:
        """That of the attack."""
        return self.attack.eps

    @property
    def norm(self) -> str:
        """That of the attack."""
        return self.attack.norm

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns x_adv for a batch; `model` is not looked at."""
        with eval_mode(self.source):
            return self.attack(self.source, x, y, generator=generator)


class StraightThrough(nn.Module):
    """The answers of a model, with the gradient of a surrogate that can be differentiated.

    Source: Athalye et al. 2018, arXiv 1802.00420 (BPDA).
    """

    def __init__(self, model: nn.Module, surrogate: nn.Module) -> None:
        super().__init__()
        self.model, self.surrogate = model, surrogate

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits, `[n, K]`."""
        with torch.no_grad():
            logits = self.model(x.detach().clone())
        return _Replaced.apply(self.surrogate(x), logits)


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Called(nn.Module):
    def __init__(self, called: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.called, self.dtype = called, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x.to(self.dtype))


def as_module(model: Model, dtype: torch.dtype) -> nn.Module:
    """Returns a module that takes images of `dtype`: the model itself wherever it does.

    A plain function will do, and so will a model with weights of another dtype, or one that was
    made in inference mode (which autograd would not work with, and which is copied).

    Raises:
        InputError: If `model` cannot be called, or is a class.
    """
    if isinstance(model, type) or not callable(model):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)[:60]
        raise InputError(
            f"model must be a module or a function, from images to logits; got {given}"
        )
    if not isinstance(model, nn.Module):
        return _Called(model, dtype)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model)
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    return model if wanted == dtype else _Called(model, wanted)
