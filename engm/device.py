"""The model as the steps of an attack see it: frozen, and as fast as the device allows."""

import copy
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engm.config import RunConfig
from engm.errors import InputError

# layers whose weights autocast turns into the lower precision, in each pass anew
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WARM_UP = 3
# How far the loss that a replay reaches may lie from that of the recorded steps, as a part of their
# climb. Pixels cannot be compared: sums in another order turn signs, and the steps multiply that.
_TOLERANCE = 0.1

_Work = Callable[..., Tensor]
# takes the work and its first inputs; returns what they give, and the replay
_Recorder = Callable[[_Work, tuple[Tensor, ...]], tuple[Tensor, _Work]]


@dataclass(frozen=True)
class Precision:
    """How a model's passes are computed: arithmetic, and memory layout of the images."""

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    @classmethod
    def of(cls, config: RunConfig) -> "Precision":
        """Returns the precision of a run."""
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        return cls(getattr(torch, config.precision), layout)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context to run the model in."""
        lower = self.dtype != torch.float32
        known = torch.amp.is_autocast_available(device.type)  # not so for "meta"
        return torch.autocast(device.type if known else "cpu", self.dtype, enabled=lower and known)


class AttackedModel(nn.Module):
    """A frozen view of a model in eval mode, to be given to an attack in its place.

        attacked = AttackedModel(model, torch.bfloat16, compile=True, capture=True)
        x_adv = attack(attacked, x, y)  # the model as it is now

    It answers as the model does in eval mode. What is spared: gradients of weights, which a
    compiled backward pass would compute whether or not they are asked for; turning weights into
    bfloat16 in each step; starting thousands of kernels one by one; and, after the first batch of
    a shape, the look at the values of x and y, which waits for the device.

    The view shares the memory of the model's tensors; those that are cast it copies when an attack
    begins. Where the model was given other tensors (`p.data = ...`, `load_state_dict(assign=True)`,
    `.to(device)`) the view takes them over, and records anew; one with other layers is refused.

    Args:
        model: The model, left as it is.
        dtype: What the passes compute in, bfloat16 by way of `torch.autocast`.
        compile: Compile the passes (`torch.compile`), for batches of the first one's shape.
        capture: Record the steps of an attack as a CUDA graph, and replay it.

    Raises:
        InputError: If `capture` is asked for and the model is not on a CUDA device; in the first
            attack, if its graph cannot be made, or does not do what the steps do.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        capture: bool = False,
    ) -> None:
        super().__init__()
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if capture and self._device.type != "cuda":
            raise InputError(
                f"capture records CUDA graphs, but the model is on {self._device}; leave it out"
            )
        self._precision = Precision(dtype)
        self._frozen = _frozen(model, dtype)
        self._original = (model,)  # no submodule of this one
        self._both = list(zip(model.modules(), self._frozen.modules(), strict=True))
        self._compiled = torch.compile(self._frozen, dynamic=False) if compile else None
        self._record: _Recorder | None = _cuda_graph if capture else None
        self._replays: dict[Hashable, _Work] = {}
        self._known: set[torch.Size] = set()  # shapes of batches that were looked at
        self._begun = torch.Size()
        self._first: torch.Size | None = None  # what is compiled for
        self.eval()

    def train(self, mode: bool = True) -> "AttackedModel":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the model's logits; an `InputError` if the passes cannot be compiled here."""
        self._follow()
        with self._precision.autocast(self._device):
            if self._compiled is None or x.shape != self._first:
                return self._frozen(x)
            try:
                return self._compiled(x)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(error).strip().split("\n")[0]
                raise InputError(f"torch.compile failed: {reason}; leave compile out") from error

    @torch.no_grad()
    def begin(self, x: Tensor) -> bool:
        """Takes over the model's weights for an attack on `x`; returns whether to look at values.

        They are looked at where nothing of the shape of `x` was attacked before.
        """
        for value, original in self._follow():
            if value.dtype != original.dtype:  # cast
                value.copy_(original)
        self._begun = x.shape
        return x.shape not in self._known

    def _follow(self) -> list[tuple[Tensor, Tensor]]:
        """Takes over tensors that the model was given; returns the parameters of view and model."""
        if [module for module, _ in self._both] != [*self._original[0].modules()]:
            raise InputError("the model's layers were replaced; make its AttackedModel anew")
        pairs: list[tuple[Tensor, Tensor]] = []
        for module, own in self._both:
            for name, buffer in module._buffers.items():
                if own._buffers[name] is not buffer:
                    own._buffers[name] = buffer
                    self._replays.clear()  # they read the memory of before
            for name, value in own._parameters.items():
                original = module._parameters[name]
                if value is None or original is None:
                    continue
                pairs.append((value, original))
                if value.dtype != original.dtype and value.device == original.device:
                    continue  # cast
                if value.data_ptr() != original.data_ptr():
                    value.data = original.detach().to(value.dtype)
                    self._device = value.device
                    self._replays.clear()
        return pairs

    def run(self, key: Hashable, work: _Work, loss: _Work, *inputs: Tensor) -> Tensor:
        """Returns `work(*inputs)`, by a replay where it was recorded.

        Work with the same key and inputs of the same shapes is the same. It calls this model, reads
        nothing else that changes but the inputs, and climbs `loss`, a single number for images such
        as the first input.
        """
        self._known.add(self._begun)
        self._first = self._first or inputs[0].shape
        if self._record is None:
            return work(*inputs)
        key = key, *((value.shape, value.dtype) for value in inputs)
        if key not in self._replays:
            self._replays[key] = self._recorded(work, loss, inputs)
        return self._replays[key](*inputs)

    def _recorded(self, work: _Work, loss: _Work, inputs: tuple[Tensor, ...]) -> _Work:
        assert self._record is not None
        try:
            expected, replay = self._record(work, inputs)
        except RuntimeError as error:
            # no way back: torch's generator and allocator still take a recording as under way
            reason = str(error).split("\n")[0]
            message = f"the attack cannot be recorded: {reason}; leave capture out"
            raise InputError(message) from error
        images = inputs[0], expected, replay(*inputs)
        start, wanted, found = (float(loss(x_adv).detach()) for x_adv in images)
        # equal where nothing climbs
        if not abs(found - wanted) <= _TOLERANCE * abs(wanted - start) + 1e-6 * abs(wanted):
            raise InputError(
                f"the recorded attack does not do what its steps do: they take the loss from "
                f"{start:.4g} to {wanted:.4g}, a replay to {found:.4g}; leave capture out"
            )
        return replay


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            wanted = dtype if isinstance(module, _CAST) and dtype != torch.float32 else p.dtype
            shared[id(p)] = nn.Parameter(p.detach().to(wanted), requires_grad=False)
    return copy.deepcopy(model, shared).eval()


def _cuda_graph(work: _Work, inputs: tuple[Tensor, ...]) -> tuple[Tensor, _Work]:
    held = [value.clone() for value in inputs]
    with torch.cuda.device(inputs[0].device):
        # apart from the main stream, as recording wants it; kernels are chosen and compiled first
        apart, main = torch.cuda.Stream(), torch.cuda.current_stream()
        apart.wait_stream(main)
        with torch.cuda.stream(apart):
            for _ in range(_WARM_UP):
                expected = work(*held).clone()
        main.wait_stream(apart)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that pin a loader's memory, may do as they like
        with torch.cuda.graph(graph, stream=apart, capture_error_mode="thread_local"):
            output = work(*held)

    def replay(*values: Tensor) -> Tensor:
        for place, value in zip(held, values, strict=True):
            place.copy_(value)
        graph.replay()
        return output.clone()

    return expected, replay


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; "auto" is CUDA where there is one, else the CPU.

    Each process that `torchrun` starts on a machine has a GPU of its own under "auto" and "cuda".

    Raises:
        InputError: If there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (local := os.environ.get("LOCAL_RANK")):
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" has no numbers to copy
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise InputError(f"cannot use device {name!r}: {reason}; use 'cpu' or 'auto'") from None
    return device


def attacked_model(config: RunConfig, model: nn.Module) -> AttackedModel | None:
    """Returns the model as the attacks of a run see it; `None` where that is the model itself."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not (config.compile or config.capture):
        return None
    dtype = Precision.of(config).dtype
    return AttackedModel(model, dtype, compile=config.compile, capture=config.capture)


@contextmanager
def kernels_compared() -> Iterator[None]:
    """Lets cuDNN try its kernels once for each shape, and keep the fastest.

    Not for an evaluation whose batches shrink as examples are fooled: each size would be tried.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
