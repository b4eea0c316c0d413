"""Adversarial training as the public reference trains, to measure the kit against.

Source: Rice, Wong and Kolter 2020 (arXiv 2002.11569), `train_cifar.py` and `utils.py` of
github.com/locuslab/robust_overfitting, with the settings they have by default. The code is ours,
written to do the same work in the same order.

As published:
- images are a list of pairs of a float64 array, reflect-padded by 4 pixels, and a label; each item
  is cropped and mirrored as it is asked for, by choices drawn beforehand;
- a shuffling `DataLoader` with 2 worker processes and pinned memory; float64 batches go to the
  device, and become float32 there;
- float32, on CUDA inside `nn.DataParallel`, whatever torch's defaults make of it: convolutions may
  use TF32, products of matrices may not. `engm bench` records both flags and leaves them alone;
- PGD-10 on the model in train mode, so that running statistics move; every attack step's backward
  pass takes the gradients of the weights too; one more forward pass compares the losses with the
  best so far, and the better examples are assigned by a boolean mask;
- an outer step of `torch.optim.SGD`, momentum 0.9 and weight decay 5e-4, its rate set every step;
- one more forward pass, on the clean images, in train mode and with its graph;
- two losses and two counts of right answers are read back to the host every step.

Different here: the model is the kit's, whose normalisation of pixels is inside; `DataParallel` is
given the one device; the rate is that of the first half of the epochs. Epochs follow each other
without a break, with the crops of the first, so that every step is one of a whole batch, and what
an epoch's start costs (the choices, the start of the workers) is left out, as is the making of the
few batches that the workers have ready when a round begins. Both favour the reference.
"""

from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, RandomSampler

from engm.config import RunConfig
from engm.data import Split

BORDER = 4
WORKERS = 2
_EPOCHS = 10**6  # more than anyone waits for


class Crops(Dataset[tuple[np.ndarray, int]]):
    """Padded images, each cropped and mirrored when it is asked for, as `seed` draws it."""

    def __init__(self, split: Split, seed: int) -> None:
        images = split.images.permute(0, 2, 3, 1).cpu().numpy()
        border = (BORDER, BORDER)
        padded = np.pad(images, [(0, 0), border, border, (0, 0)], mode="reflect") / 255.0
        # a view with the channels first, whose memory has them last
        channels_first = padded.transpose(0, 3, 1, 2)
        self.pairs = list(zip(channels_first, split.labels.tolist(), strict=True))
        self.size = images.shape[1:3]
        generator, count = np.random.default_rng(seed), len(images)
        self.left = generator.choice(2 * BORDER + 1, size=count)
        self.top = generator.choice(2 * BORDER + 1, size=count)
        self.mirror = generator.choice([True, False], size=count)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image at `index`, float64 [c, h, w], and its label."""
        image, label = self.pairs[index]
        (height, width), top, left = self.size, self.top[index], self.left[index]
        image = image[:, top : top + height, left : left + width]
        if self.mirror[index]:
            image = image[:, :, ::-1].copy()  # torch takes no negative strides
        return image, label


def attack(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, num_steps: int
) -> Tensor:
    """Runs the reference's linf PGD and returns its perturbation, of the shape of x.

    The model stays in the mode that it is in, and its parameters gather gradients.
    """
    best_loss = torch.zeros(len(y)).to(x.device)
    best = torch.zeros_like(x)
    delta = torch.zeros_like(x).uniform_(-eps, eps)
    delta = torch.maximum(torch.minimum(delta, 1 - x), 0 - x)
    delta.requires_grad_()
    for _ in range(num_steps):
        cross_entropy(model(x + delta), y).backward()
        assert delta.grad is not None
        moved = (delta + step_size * delta.grad.detach().sign()).clamp(-eps, eps)
        delta.data.copy_(torch.maximum(torch.minimum(moved, 1 - x), 0 - x))
        delta.grad.zero_()
    losses = cross_entropy(model(x + delta), y, reduction="none")
    # the mask is formed twice, and each time the host waits for how many it selects
    best[losses >= best_loss] = delta.detach()[losses >= best_loss]
    best_loss = torch.maximum(best_loss, losses)
    return best


class Reference:
    """The reference's training loop, held between steps, so that its workers stay warm.

    The model is on its device and is trained in float32; the images may be anywhere. The config has
    batch size, attack, learning rate and the seed of the augmentation; the order comes from torch's
    global generator.
    """

    def __init__(self, model: nn.Module, split: Split, config: RunConfig) -> None:
        config = config.resolved()
        assert config.eps and config.step_size and config.num_steps
        self._attack = partial(
            attack, eps=config.eps, step_size=config.step_size, num_steps=config.num_steps
        )
        device = next(model.parameters()).device
        on_cuda = device.type == "cuda"
        self.model = nn.DataParallel(model, [device.index or 0]) if on_cuda else model
        self.model.train()
        self.lr = config.lr
        self.optimizer = torch.optim.SGD(
            model.parameters(), config.lr, momentum=0.9, weight_decay=5e-4
        )
        self.crops = Crops(split, config.seed)
        loader: DataLoader[Any] = DataLoader(
            self.crops,
            config.batch_size,
            sampler=RandomSampler(self.crops, num_samples=_EPOCHS * len(self.crops)),
            num_workers=WORKERS,
            pin_memory=on_cuda,
        )
        # without `self`, so that the workers end when nobody needs them
        self.batches = ((x.to(device).float(), y.to(device).long()) for x, y in loader)
        self.batch = next(self.batches)  # that is attacked alone
        self.sums = [0.0, 0.0, 0.0, 0.0]

    def train(self, steps: int) -> None:
        """Takes `steps` steps."""
        for x, y in islice(self.batches, steps):
            self.step(x, y)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Takes one step, on a batch that is on the device."""
        self.optimizer.param_groups[0]["lr"] = self.lr
        delta = self._attack(self.model, x, y).detach()
        robust_logits = self.model((x + delta).clamp(0, 1))
        robust_loss = cross_entropy(robust_logits, y)
        self.optimizer.zero_grad()
        robust_loss.backward()
        self.optimizer.step()
        logits = self.model(x)
        loss = cross_entropy(logits, y)
        self.sums[0] += robust_loss.item() * len(y)
        self.sums[1] += (robust_logits.max(1)[1] == y).sum().item()
        self.sums[2] += loss.item() * len(y)
        self.sums[3] += (logits.max(1)[1] == y).sum().item()

    def attack(self, times: int = 1) -> None:
        """Attacks one batch, always the same, and throws the result away."""
        for _ in range(times):
            self._attack(self.model, *self.batch)
