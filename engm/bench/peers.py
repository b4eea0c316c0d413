"""Other libraries' ways to the norms of examples, to compare ENGM's step with in `engm bench`.

Each is used as its documentation says, for the same step: norms |g_i| first, then sum_i w_i g_i.
Training does not use them. Opacus and BackPACK are optional: `pip install 'engm[peers]'`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from engm.errors import InputError
from engm.optim import example_weights

Closure = Callable[[], Tensor]
Autocast = Callable[[], AbstractContextManager[object]]
Weigh = Callable[[Tensor], Tensor]
# Takes the closure, the images that it gives to the model, and what turns the norms |g_i|, `[n]`,
# into weights; leaves sum_i w_i g_i in the `.grad` of the parameters.
Backward = Callable[[Closure, Tensor, Weigh], None]


class PeerSGD(torch.optim.SGD):
    """Momentum SGD along the mean of the w_i g_i, as ENGM, found by a peer; the rate is 0.

    Args:
        model: The model whose trainable parameters are optimised.
        backward: The peer's backward pass.
        floor: f of the weights w_i = c / max(|g_i|, f c); c is the mean norm.
        momentum: Momentum.
        weight_decay: Weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        backward: Backward,
        floor: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(trainable, 0.0, momentum, weight_decay=weight_decay)
        self._backward, self._floor = backward, floor

    def step(self, closure: Closure, inputs: Tensor) -> None:  # type: ignore[override]
        """Takes a step, as `ENGM.step`."""
        self._backward(closure, inputs, self._weigh)
        super().step()

    def _weigh(self, norms: Tensor) -> Tensor:
        return example_weights(norms, norms.mean(), self._floor) / len(norms)


def vmap_backward(model: nn.Module, y: Tensor, autocast: Autocast) -> Backward:
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

    def backward(closure: Closure, inputs: Tensor, weigh: Weigh) -> None:
        values = {name: p.detach() for name, p in trainable.items()}
        gradients, _ = per_example(values, inputs, y)
        _put_sum({p: gradients[name] for name, p in trainable.items()}, weigh)

    return backward


def opacus_backward(model: nn.Module, y: Tensor, autocast: Autocast) -> Backward:
    """Gradients of every example by the hooks of Opacus (`GradSampleModule`)."""
    from opacus.grad_sample import GradSampleModule

    GradSampleModule(model, loss_reduction="sum", strict=_has_batch_norm(model))

    def backward(closure: Closure, inputs: Tensor, weigh: Weigh) -> None:
        closure().sum().backward()
        _put_sum(_taken(model, "grad_sample"), weigh)

    return backward


def opacus_ghost_backward(model: nn.Module, y: Tensor, autocast: Autocast) -> Backward:
    """Norms by Opacus' ghost clipping, then a second backward pass with weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as GhostModule

    ghost = GhostModule(model, loss_reduction="sum", strict=_has_batch_norm(model))

    def backward(closure: Closure, inputs: Tensor, weigh: Weigh) -> None:
        losses = closure()
        losses.sum().backward(retain_graph=True)
        weights = weigh(ghost.get_norm_sample().detach())
        ghost.disable_hooks()
        try:
            _second_backward(model, losses, weights)
        finally:
            ghost.enable_hooks()

    return backward


def backpack_backward(model: nn.Module, y: Tensor, autocast: Autocast) -> Backward:
    """Gradients of every example by BackPACK's `BatchGrad`."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    if _has_batch_norm(model):
        raise InputError("with BatchNorm in train mode it weighs shares, which is another gradient")
    extend(model)

    def backward(closure: Closure, inputs: Tensor, weigh: Weigh) -> None:
        losses = closure()
        with backpack(BatchGrad()):
            losses.sum().backward()
        _put_sum(_taken(model, "grad_batch"), weigh)

    return backward


def backpack_l2_backward(model: nn.Module, y: Tensor, autocast: Autocast) -> Backward:
    """Norms by BackPACK's `BatchL2Grad`, then a second backward pass with weighted losses."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extend(model)

    def backward(closure: Closure, inputs: Tensor, weigh: Weigh) -> None:
        losses = closure()
        with backpack(BatchL2Grad()):
            losses.sum().backward(retain_graph=True)
        squares = torch.stack(list(_taken(model, "batch_l2").values()))
        _second_backward(model, losses, weigh(squares.sum(0).sqrt()))

    return backward


PEERS: dict[str, Callable[[nn.Module, Tensor, Autocast], Backward]] = {
    "vmap": vmap_backward,
    "opacus": opacus_backward,
    "opacus-ghost": opacus_ghost_backward,
    "backpack": backpack_backward,
    "backpack-l2": backpack_l2_backward,
}


def _put_sum(gradients: dict[Tensor, Tensor], weigh: Weigh) -> None:
    """Weighs the gradients of every example, each `[n, ...]`, by their norms."""
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).square() for g in gradients.values()]
    weights = weigh(torch.stack(squares).sum(0).sqrt())
    for parameter, gradient in gradients.items():
        total = weights.to(gradient.dtype) @ gradient.flatten(1)
        parameter.grad = total.view(parameter.shape)


def _second_backward(model: nn.Module, losses: Tensor, weights: Tensor) -> None:
    model.zero_grad()
    (weights.to(losses.dtype) * losses).sum().backward()


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
    # Strict, Opacus refuses BatchNorm, but also every buffer, such as the pixels' mean.
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
