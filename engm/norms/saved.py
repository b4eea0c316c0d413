"""What autograd saves for a backward pass, where a hook keeps it in place of autograd.

Such a hook is that of a checkpoint, which keeps nothing and computes it anew in each pass, or one
that moves it to the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def hooks_on_saved() -> Hooks | None:
    """Returns the hooks that now keep what autograd saves, pack and unpack; `None` for none."""
    # there is no public way to ask; without an answer inputs are kept, which takes more room
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if ask is None else ask(False)


class Kept(torch.autograd.Function):
    """Keeps a tensor as autograd keeps what a layer saves: under a checkpoint, not at all."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, a: Tensor) -> Tensor:
        """Saves `a`; a node is made since `anchor` wants a gradient."""
        ctx.save_for_backward(a)
        return anchor.new_empty(0)


@dataclass
class _Box:
    packed: Any
    value: Tensor | None = None


class Reader:
    """Lets what nodes saved be read beside autograd, which a checkpoint gives once in a pass.

    While a module that it is hooked to runs, it stands between autograd and the hook that keeps
    what is saved; what was read here, the node is then given without asking again.
    """

    def __init__(self) -> None:
        self._contexts: list[saved_tensors_hooks | None] = []
        self._reading = False
        self._read: list[_Box] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before `module` runs."""
        hooks, context = hooks_on_saved(), None
        if hooks is not None and not isinstance(hooks[0], _Pack):
            context = saved_tensors_hooks(_Pack(hooks[0]), self._unpack(hooks[1]))
            context.__enter__()
        self._contexts.append(context)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it has run, or has raised."""
        context = self._contexts.pop()
        if context is not None:
            context.__exit__(None, None, None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block what is asked for is read here, not by autograd."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def let_go(self) -> None:
        """Forgets what was read, after a pass."""
        for box in self._read:
            box.value = None
        self._read.clear()

    def _unpack(self, unpack: Callable[[Any], Tensor]) -> Callable[[_Box], Tensor]:
        def unpacked(box: _Box) -> Tensor:
            value = unpack(box.packed) if box.value is None else box.value
            box.value = value if self._reading else None
            if self._reading:
                self._read.append(box)
            return value

        return unpacked


@dataclass(frozen=True)
class _Pack:
    pack: Callable[[Tensor], Any]

    def __call__(self, value: Tensor) -> _Box:
        return _Box(self.pack(value))
