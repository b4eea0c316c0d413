"""Other libraries' ways to the norms of examples, as measures that ENGM's step can be run with.

Each is used as its documentation says, for the same step: norms |g_i| first, then sum_i w_i g_i.
They are here to be compared with, in `engm bench`; training does not use them. Opacus and BackPACK
are optional: `pip install 'engm[peers]'`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from engm.errors import InputError
from engm.norms.measures import Closure, Measured, Weighted, run_closure

Autocast = Callable[[], AbstractContextManager[Any]]
Measure = Callable[[Closure | None, Tensor | None], Measured]


def vmap_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Gradients of every example by `torch.func`: `vmap` of the gradient of one example's loss.

    It cannot run the closure, which takes a batch, so it runs the model on `inputs` itself.
    """
    if _has_batch_norm(model):
        raise InputError("BatchNorm in train mode needs the batch, and vmap shows it one example")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fixed = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        with autocast():
            logits = functional_call(model, (values, fixed), (image[None],))
            return cross_entropy(logits, label[None])

    per_example = vmap(grad_and_value(loss), in_dims=(None, 0, 0))

    def measure(closure: Closure | None, inputs: Tensor | None) -> Measured:
        assert inputs is not None
        values = {name: p.detach() for name, p in trainable.items()}
        gradients, losses = per_example(values, inputs, y)
        return losses, *_from_gradients({p: gradients[name] for name, p in trainable.items()})

    return measure


def opacus_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Gradients of every example by the hooks of Opacus (`GradSampleModule`)."""
    from opacus.grad_sample import GradSampleModule

    GradSampleModule(model, loss_reduction="sum", strict=_has_batch_norm(model))

    def measure(closure: Closure | None, inputs: Tensor | None) -> Measured:
        losses = run_closure(closure)
        losses.sum().backward()
        gradients = _taken(model, "grad_sample")
        return losses.detach(), *_from_gradients(gradients)

    return measure


def opacus_ghost_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Norms by Opacus' ghost clipping, then a second backward pass with weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as GhostModule

    ghost = GhostModule(model, loss_reduction="sum", strict=_has_batch_norm(model))
    parameters = _trainable(model)

    def measure(closure: Closure | None, inputs: Tensor | None) -> Measured:
        losses = run_closure(closure)
        losses.sum().backward(retain_graph=True)
        norms = ghost.get_norm_sample().detach()

        def weighted(weights: Tensor, rows: Tensor | None) -> dict[Tensor, Tensor]:
            ghost.disable_hooks()
            try:
                return _second_backward(losses, parameters, weights)
            finally:
                ghost.enable_hooks()

        return losses.detach(), norms, weighted

    return measure


def backpack_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Gradients of every example by BackPACK's `BatchGrad`."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    if _has_batch_norm(model):
        raise InputError("with BatchNorm in train mode it weighs shares, which is another gradient")
    extend(model)

    def measure(closure: Closure | None, inputs: Tensor | None) -> Measured:
        losses = run_closure(closure)
        with backpack(BatchGrad()):
            losses.sum().backward()
        gradients = _taken(model, "grad_batch")
        return losses.detach(), *_from_gradients(gradients)

    return measure


def backpack_l2_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Norms by BackPACK's `BatchL2Grad`, then a second backward pass with weighted losses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extend(model)
    parameters = _trainable(model)

    def measure(closure: Closure | None, inputs: Tensor | None) -> Measured:
        losses = run_closure(closure)
        with backpack(BatchL2Grad()):
            losses.sum().backward(retain_graph=True)
        norms = torch.stack(list(_taken(model, "batch_l2").values())).sum(0).sqrt()

        def weighted(weights: Tensor, rows: Tensor | None) -> dict[Tensor, Tensor]:
            return _second_backward(losses, parameters, weights)

        return losses.detach(), norms, weighted

    return measure


PEERS: dict[str, Callable[[nn.Module, Tensor, Autocast], Measure]] = {
    "vmap": vmap_measure,
    "opacus": opacus_measure,
    "opacus-ghost": opacus_ghost_measure,
    "backpack": backpack_measure,
    "backpack-l2": backpack_l2_measure,
}


def _from_gradients(gradients: dict[Tensor, Tensor]) -> tuple[Tensor, Weighted]:
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).square() for g in gradients.values()]

    def weighted(weights: Tensor, rows: Tensor | None) -> dict[Tensor, Tensor]:
        flat = {p: weights.to(g.dtype) @ g.flatten(1) for p, g in gradients.items()}
        return {p: g.view(p.shape) for p, g in flat.items()}

    return torch.stack(squares).sum(0).sqrt(), weighted


def _taken(model: nn.Module, attribute: str) -> dict[Tensor, Tensor]:
    found: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad:
                if getattr(p, attribute, None) is None:
                    raise InputError(f"it has no formula for {type(module).__name__}")
                found[p] = getattr(p, attribute)
                setattr(p, attribute, None)  # Opacus would add the next batch to it
                p.grad = None
    return found


def _second_backward(
    losses: Tensor, parameters: list[nn.Parameter], weights: Tensor
) -> dict[Tensor, Tensor]:
    for p in parameters:
        p.grad = None
    (weights.to(losses.dtype) * losses).sum().backward()
    gradients: dict[Tensor, Tensor] = {p: p.grad for p in parameters if p.grad is not None}
    for p in parameters:
        p.grad = None
    return gradients


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _has_batch_norm(model: nn.Module) -> bool:
    # Strict, Opacus refuses BatchNorm, but also every buffer, such as the pixels' mean.
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
