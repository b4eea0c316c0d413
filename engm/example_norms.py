"""Example norms: how long is what each example contributes to the gradient of a batch?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engm.errors import InputError


def loop_norms(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns |g_i|, g_i the gradient of `losses[i]`, with one backward pass an example.

    Obviously correct, but slow: n passes over the graph of the whole batch. It works with every
    model and keeps no more than one gradient at a time. The graph of `losses` survives, so that a
    backward pass can follow.

    Train-mode BatchNorm lets every example of a batch act on the activations of all others; g_i is
    then the gradient of `losses[i]` with the statistics as functions of the whole batch. In every
    case the g_i add up to the gradient of `losses.sum()`.

    Args:
        losses: One loss per example, `[n]`, attached to a graph.
        parameters: The tensors to differentiate by; those the losses do not depend on count zero.

    Returns:
        The norms, `[n]`, in float32, or float64 where the parameters are. Source: this kit.

    Raises:
        InputError: If the losses depend on none of the parameters.
    """
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            raise InputError(
                "the losses do not depend on any of the parameters; is it the same model?"
            )
        squares = [g.to(dtype).square().sum() for g in gradients if g is not None]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms)
