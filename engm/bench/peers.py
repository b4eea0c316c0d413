"""Other libraries' ways to the norms of examples, to compare ENGM's with in `engm bench`.

Each takes the place of `ENGM.measure`, so that the step is the same: norms |g_i| first, then
sum_i w_i g_i. It is used as its documentation says. Training does not use them. Opacus and BackPACK
are optional: `pip install 'engm[peers]'`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from engm.errors import InputError
from engm.norms.measures import Closure, Measured, weighted_losses

Autocast = Callable[[], AbstractContextManager[object]]
Measure = Callable[[Closure, Tensor], Measured]


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

    def measure(closure: Closure, inputs: Tensor) -> Measured:
        values = {name: p.detach() for name, p in trainable.items()}
        gradients, losses = per_example(values, inputs, y)
        return _of_gradients(losses, {p: gradients[name] for name, p in trainable.items()})

    return measure


def opacus_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Gradients of every example by the hooks of Opacus (`GradSampleModule`)."""
    from opacus.grad_sample import GradSampleModule

    GradSampleModule(model, loss_reduction="sum", strict=_has_batch_norm(model))
    return _gradients_left(model, "grad_sample", nullcontext)


def opacus_ghost_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Norms by Opacus' ghost clipping, then a second backward pass with weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as GhostModule

    ghost = GhostModule(model, loss_reduction="sum", strict=_has_batch_norm(model))

    def measure(closure: Closure, inputs: Tensor) -> Measured:
        losses = closure()
        losses.sum().backward(retain_graph=True)
        model.zero_grad()
        second_pass = weighted_losses(losses, model)

        def weighted(weights: Tensor, keep: Tensor | None) -> dict[Tensor, Tensor]:
            ghost.disable_hooks()
            try:
                return second_pass(weights, keep)
            finally:
                ghost.enable_hooks()

        return losses.detach(), ghost.get_norm_sample().detach(), weighted

    return measure


def backpack_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Gradients of every example by BackPACK's `BatchGrad`."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    if _has_batch_norm(model):
        raise InputError("with BatchNorm in train mode it weighs shares, which is another gradient")
    extend(model)
    return _gradients_left(model, "grad_batch", lambda: backpack(BatchGrad()))


def backpack_l2_measure(model: nn.Module, y: Tensor, autocast: Autocast) -> Measure:
    """Norms by BackPACK's `BatchL2Grad`, then a second backward pass with weighted losses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extend(model)

    def measure(closure: Closure, inputs: Tensor) -> Measured:
        losses = closure()
        with backpack(BatchL2Grad()):
            losses.sum().backward(retain_graph=True)
        squares = torch.stack(list(_taken(model, "batch_l2").values()))
        return losses.detach(), squares.sum(0).sqrt(), weighted_losses(losses, model)

    return measure


PEERS: dict[str, Callable[[nn.Module, Tensor, Autocast], Measure]] = {
    "vmap": vmap_measure,
    "opacus": opacus_measure,
    "opacus-ghost": opacus_ghost_measure,
    "backpack": backpack_measure,
    "backpack-l2": backpack_l2_measure,
}


def _gradients_left(model: nn.Module, attribute: str, active: Callable[[], Any]) -> Measure:
    """Measures with a backward pass that leaves gradients of every example at the parameters."""

    def measure(closure: Closure, inputs: Tensor) -> Measured:
        losses = closure()
        with active():
            losses.sum().backward()
        return _of_gradients(losses.detach(), _taken(model, attribute))

    return measure


def _of_gradients(losses: Tensor, gradients: dict[Tensor, Tensor]) -> Measured:
    """Returns what a measure returns, for gradients of every example, each `[n, ...]`."""
    lengths = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]

    def weighted(weights: Tensor, keep: Tensor | None) -> dict[Tensor, Tensor]:
        totals = {p: weights.to(g.dtype) @ g.flatten(1) for p, g in gradients.items()}
        return {p: total.view(p.shape) for p, total in totals.items()}

    return losses, torch.stack(lengths).norm(dim=0), weighted


def _taken(model: nn.Module, attribute: str) -> dict[Tensor, Tensor]:
    """Returns what the backward pass left at each parameter, and takes it away."""
    taken: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad:
                if getattr(p, attribute, None) is None:
                    raise InputError(f"it has no formula for {type(module).__name__}")
                taken[p] = getattr(p, attribute)
                setattr(p, attribute, None)  # Opacus would add the next batch to it
                p.grad = None
    return taken


def _has_batch_norm(model: nn.Module) -> bool:
    # strict, Opacus refuses BatchNorm, but also every buffer, such as the pixels' mean
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
