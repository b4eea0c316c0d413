"""Whether an update may be made, found out without making the host wait for a GPU."""

from typing import Any

import torch
from torch import Tensor

from engm import processes
from engm.errors import NonFiniteLossError


class StepGuard:
    """Keeps an optimizer from updating the weights with a batch whose losses are not finite.

    On the CPU `check` raises at once. On a GPU to ask would stall the device until the host has had
    its answer. So the host goes on: the device skips the update, and all that follow, because
    `skip` is the `found_inf` of torch's fused optimizers; the error comes with one of the next
    steps, as soon as the host can know without waiting, or with `settle`. Either way the weights
    are then those before the step that failed.

    Args:
        message: Of the error, with {bad} and {count} for the examples of the batch.

    Attributes:
        skip: `[1]`, above 0 once a step has failed; `None` on the CPU.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.skip: Tensor | None = None
        self._steps = 0  # updates asked for so far
        self._record: Tensor | None = None  # of the first failure: step from 1, bad, count
        self._answer: tuple[Tensor, Any] | None = None  # a copy for the host, under way

    def check(self, failed: Tensor, bad: Tensor) -> None:
        """Takes note of a part of a batch.

        Args:
            failed: Whether no update may be made, a single boolean, the same in all processes.
            bad: Which examples are not finite, `[n]` booleans.

        Raises:
            NonFiniteLossError: If this part failed (on the CPU), or an earlier one did.
        """
        if not defers(bad.device):
            if bool(failed):
                raise NonFiniteLossError(self.message.format(bad=int(bad.sum()), count=len(bad)))
            return
        if self._record is None:
            self._record = torch.zeros(3, dtype=torch.int64, device=bad.device)
        if not processes.several():  # they would not hear of it in the same step
            self._poll()
        now = [failed * (self._steps + 1), failed * bad.sum(), failed * len(bad)]
        self._record = torch.where(self._record[0] > 0, self._record, torch.stack(now))
        self.skip = (self._record[:1] > 0).float()

    def stepped(self) -> None:
        """Counts an update."""
        self._steps += 1

    def settle(self) -> None:
        """Waits for the device, and raises what `check` could not yet.

        Raises:
            NonFiniteLossError: If an update was skipped.
        """
        self._answer = None
        if self._record is not None:
            self._raise(self._record)

    def _poll(self) -> None:
        assert self._record is not None
        if self._answer is None:
            self._answer = _to_host(self._record)
        copy, done = self._answer
        if done is None or done.query():
            self._answer = None
            self._raise(copy)

    def _raise(self, record: Tensor) -> None:
        step, bad, count = record.tolist()
        if step > 0:
            error = NonFiniteLossError(self.message.format(bad=bad, count=count))
            error.steps_ago = self._steps - step + 1
            self._record, self.skip = None, None
            raise error


def defers(device: torch.device) -> bool:
    """Returns whether to read a number from `device` would make the host wait for it."""
    return device.type != "cpu"


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    if values.device.type != "cuda":
        return values.cpu(), None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))
    return copy, done
