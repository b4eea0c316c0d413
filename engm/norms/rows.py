"""Which rows of a tensor belong to which example: found by probing, not assumed.

For the gradient of a layer's output under the sum of the losses, and again under their sum with
weights r_i, a row that belongs to example i alone comes out r_i times as large.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of n examples along a dimension, k for each.

    Attributes:
        dim: The dimension.
        n: How many examples.
        run: How many rows of an example are neighbours, before those of the next one come; all k,
            as those of its windows are, where `None`. 1 after `cat([x, x_adv])`, and in between
            where a sequence is put before the batch: [T, n, k / T] in one.
    """

    dim: int
    n: int
    run: int | None = None

    def split(self, values: Tensor) -> Tensor:
        """Returns the values as `[n, k, ...]`, the other dimensions in their order."""
        values = values.movedim(self.dim, 0)
        rest = values.shape[1:]
        runs = values.reshape(-1, self.n, self.run or len(values) // self.n, *rest)
        return runs.transpose(0, 1).reshape(self.n, -1, *rest)

    def owners(self, count: int, device: torch.device) -> Tensor:
        """Returns the example that each of `count` rows belongs to, `[count]`."""
        row = torch.arange(count, device=device)
        return row // (self.run or count // self.n) % self.n


def probe_weights(losses: Tensor) -> Tensor:
    """Returns the r_i of a probe, `[n]`: powers of two, by which any float is scaled exactly."""
    generator = torch.Generator().manual_seed(len(losses))
    order = torch.randperm(len(losses), generator=generator) % 8
    return torch.pow(2.0, order).to(losses.device, losses.dtype)


@dataclass(frozen=True)
class Summary:
    """What is kept of a gradient b: random sums over all dimensions but one.

    There is one for each dimension that may hold the examples.

    Attributes:
        sums: For each such dimension a number a row, `[rows]`.
        sizes: The length of each row.
        dtype: Of b.
    """

    sums: dict[int, Tensor]
    sizes: dict[int, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, b: Tensor, n: int) -> "Summary":
        """Sums up `b` for a batch of n examples."""
        sums, sizes = {}, {}
        for dim in range(min(b.dim(), 3)):
            if b.shape[dim] and b.shape[dim] % n == 0:
                rows = b.movedim(dim, 0).reshape(b.shape[dim], -1)
                rows = rows.to(torch.promote_types(b.dtype, torch.float32))
                generator = torch.Generator().manual_seed(dim)
                random = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype)
                sums[dim], sizes[dim] = rows @ random.to(b.device), rows.norm(dim=1)
        return cls(sums, sizes, b.dtype)

    @property
    def empty(self) -> bool:
        """Whether b was zero, so that nothing is to be learnt from it."""
        return not any(bool(size.any()) for size in self.sizes.values()) and bool(self.sizes)

    def rows(self, probe: "Summary", weights: Tensor) -> tuple[Rows | None, bool]:
        """Returns the rows of the examples, and whether no others fit, too.

        Rows of zeros, or of what is not finite, would belong to any example. The first are `None`
        where a row belongs to none or to several.

        Args:
            probe: The summary of b under the losses with weights; this one is without.
            weights: r_i, `[n]`.
        """
        precise = self.dtype in (torch.float32, torch.float64)
        tolerance = 1e-4 if precise else 2e-2
        rounding = 10 * torch.finfo(self.dtype).eps
        fitting: list[Rows] = []
        for rows in self.candidates(len(weights)):
            plain, size = self.sums[rows.dim], self.sizes[rows.dim]
            factor = weights.to(plain.dtype)[rows.owners(len(plain), plain.device)]
            off = (probe.sums[rows.dim] - factor * plain).abs()
            # what a loss that is 0 but for rounding leaves is rounding, too, and numbers that
            # underflow are no multiples any more
            least = rounding * size.nan_to_num(0, 0, 0).max() + torch.finfo(size.dtype).tiny
            allowed = factor * (tolerance * size + least)
            # an example that is not finite tells nothing
            if bool(((off <= allowed) | ~off.isfinite()).all()):
                fitting.append(rows)
                if bool((size > 0).all()):
                    break  # every row has had its say
        return (fitting[0] if fitting else None), len(fitting) == 1 or len(weights) == 1

    def candidates(self, n: int) -> Iterator[Rows]:
        """Yields the ways in which the rows may belong to n examples, the likeliest first."""
        for dim, plain in self.sums.items():
            yield Rows(dim, n)
            if n < len(plain):
                yield Rows(dim, n, run=1)
        for dim, plain in self.sums.items():
            k = len(plain) // n
            yield from (Rows(dim, n, run) for run in range(2, k) if k % run == 0)
