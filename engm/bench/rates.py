"""Floating point operations: how many an attack has, and how many a second a device can do."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engm.bench.costs import seconds

# The rate of a GPU rises with the size until caches and power limit it.
SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
_SAMPLES = 5
_SAMPLE_SECONDS = 0.1


def flops(work: Callable[[], object]) -> int:
    """Returns the floating point operations of `work`, run eagerly once.

    Counted are convolutions and products of matrices, forward and backward, a multiplication with
    its addition as two; not counted are normalisation and what goes element by element.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with counter:
        work()
    return counter.get_total_flops()


class _Nowhere:
    # The counter's own tracker of modules hooks into the backward pass, which `autograd.grad` of
    # images does not allow; totals need none.
    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def matrix_rates(
    device: torch.device, sizes: Sequence[int] | None = None
) -> dict[str, dict[str, float]]:
    """Measures products of square matrices.

    Args:
        device: Where.
        sizes: Rows of the matrices; by default those of `SIZES`.

    Returns:
        For "bfloat16" and "float32" (as torch's flags make it), under each size, the best rate of
        several samples in TFLOP/s.
    """
    sizes = sizes or SIZES.get(device.type, SIZES["cpu"])
    return {
        name: {str(size): _best(device, getattr(torch, name), size) for size in sizes}
        for name in ("bfloat16", "float32")
    }


def _best(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left, right, product = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def times(count: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(count):
                _multiply(left, right, product)

        return work

    times(3)()
    once = seconds(times(3), device, wall=True) / 3
    count = min(max(int(_SAMPLE_SECONDS / max(once, 1e-9)), 1), 1000)
    least = min(seconds(times(count), device, wall=True) for _ in range(_SAMPLES))
    return 2 * size**3 * count / least / 1e12


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    torch.mm(left, right, out=product)
