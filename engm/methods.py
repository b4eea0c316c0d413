"""Training methods: an attack (inner maximisation) and one loss per example (outer minimisation).

A training step with any method and any outer optimizer reads

    x_adv = method.attack(model, x, y)
    optimizer.zero_grad()
    optimizer.step(lambda: method.losses(model, x, x_adv, y))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from engm.attacks import PGD
from engm.config import RunConfig

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Method(Protocol):
    """What a training loop needs of a method."""

    @property
    def attack(self) -> Attack:
        """Makes `x_adv` from `(model, x, y)`, before the optimizer's step."""

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns one loss per example, `[n]`, inside the optimizer's closure."""


def no_attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns `x` itself."""
    return x


@dataclass(frozen=True)
class Natural:
    """Natural training (NT): cross-entropy on the clean images."""

    attack: Attack = no_attack

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the cross-entropy of each clean example, `[n]`."""
        return F.cross_entropy(model(x), y, reduction="none")


@dataclass(frozen=True)
class PGDAT:
    """Adversarial training with PGD (Madry et al. 2018, arXiv 1706.06083).

    Args:
        attack: The inner maximisation, such as `PGD(eps=8 / 255, step_size=2 / 255)`.
    """

    attack: Attack

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the cross-entropy of each adversarial example, `[n]`."""
        return F.cross_entropy(model(x_adv), y, reduction="none")


def build(config: RunConfig) -> Method:
    """Makes the method that a run asks for."""
    if config.method == "natural":
        return Natural()
    config = config.resolved()
    assert config.eps and config.step_size and config.num_steps
    attack = PGD(
        eps=config.eps, step_size=config.step_size, num_steps=config.num_steps, norm=config.norm
    )
    return PGDAT(attack)
