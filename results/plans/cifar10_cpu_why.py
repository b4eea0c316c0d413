"""Looks into trainings of CIFAR-10 on a CPU: whose gradients are long, and what ENGM makes of them.

The protocol is cifar10-cpu-why.md. Each training leaves a file of lines of JSON, the first of them
its config and environment, then one a look; trainings whose file is there are not repeated.

    python results/plans/cifar10_cpu_why.py results/cifar10-cpu-why
"""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm import RunConfig
from engm.norms import Watch, loop_norms
from engm.runs import environment
from engm.training import Trainer

LOOKS = (1, 5, 10, 15, 18, 30)  # epochs
LOOPS = (10, 30)  # those at which `loop` is run as well
FLOOR = 0.05
BATCH = 50
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SETTINGS = RunConfig(
    dataset="cifar10",
    subset=1000,
    validation_images=500,
    test_images=1000,
    augment="none",
    model="preact_resnet18",
    width=16,
    eps=8 / 255,
    num_steps=5,
    epochs=30,
    batch_size=BATCH,
    precision="bfloat16",
    channels_last=True,
)


def trainings() -> Iterator[RunConfig]:
    """Yields the trainings, those that answer most first."""
    for seed in (1, 2, 3):
        for method, optimizer, noise in (
            ("pgd_at", "msgd", 0.1),
            ("pgd_at", "engm", 0.1),
            ("natural", "msgd", 0.0),
            ("pgd_at", "msgd", 0.0),
            ("pgd_at", "engm", 0.0),
        ):
            lr = {"msgd": 0.3, "engm": 0.1}[optimizer]
            yield replace(
                SETTINGS, method=method, optimizer=optimizer, label_noise=noise, lr=lr, seed=seed
            )


@dataclass(frozen=True)
class Seen:
    """One batch in one mode: per-example gradient norms, input gradient norms, margins, losses."""

    norms: Tensor
    inputs: Tensor
    margins: Tensor
    losses: Tensor
    gradient: Tensor  # the mean of the g_i, flat
    weighted: Tensor  # the mean of the w_i g_i


def weights_of(norms: Tensor) -> Tensor:
    """Returns ENGM's weights, w_i = c / max(|g_i|, f c) with c the mean norm."""
    scale = norms.mean()
    return scale / norms.clamp(min=FLOOR * scale)


def see(network: nn.Module, x: Tensor, y: Tensor) -> Seen:
    """Takes the gradients of the cross-entropy of each of `x`, in the mode that `network` is in."""
    pixels = x.clone().requires_grad_()
    with Watch(network) as watch:
        logits = network(pixels)
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
    images = watch.backward(losses, pixels)
    assert images is not None
    norms, logits = watch.norms(), logits.detach()
    true = logits.gather(1, y[:, None])[:, 0]
    return Seen(
        norms=norms,
        inputs=images.flatten(1).norm(dim=1),
        margins=true - logits.scatter(1, y[:, None], -torch.inf).amax(1),
        losses=losses.detach(),
        gradient=flat(watch.weighted(torch.ones_like(norms))) / len(y),
        weighted=flat(watch.weighted(weights_of(norms))) / len(y),
    )


def flat(gradients: dict[nn.Parameter, Tensor] | dict[Tensor, Tensor]) -> Tensor:
    """Returns the gradients of all parameters as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def described(seen: list[Seen], wrong: Tensor) -> dict[str, object]:
    """Describes the batches of one look in one mode, which are in the order of the images."""
    norms = torch.cat([batch.norms for batch in seen])
    margins = torch.cat([batch.margins for batch in seen])
    weights = torch.cat([weights_of(batch.norms) for batch in seen])
    gradient = torch.stack([batch.gradient for batch in seen]).mean(0)
    weighted = torch.stack([batch.weighted for batch in seen]).mean(0)
    square = float(gradient.square().sum())
    groups = {"wrong label": wrong, "right, robust": ~wrong & (margins > 0)}
    groups["right, not robust"] = ~wrong & (margins <= 0)
    order = margins.argsort()
    return {
        "loss": mean(torch.cat([batch.losses for batch in seen])),
        "robust": mean((margins > 0).float()),
        "mean_norm": mean(norms),
        "std_over_mean": float(norms.std(correction=0) / norms.mean()),
        "quantiles_over_mean": [float(norms.quantile(q) / norms.mean()) for q in QUANTILES],
        "variance": float(norms.double().square().mean()) - square,
        "gradient_norm": square**0.5,
        "weighted_norm": float(weighted.norm()),
        "cosine": float(nn.functional.cosine_similarity(gradient, weighted, dim=0)),
        "groups": {
            name: {
                "images": int(group.sum()),
                "mean_norm": mean(norms[group]),
                "mean_weight": mean(weights[group]),
                "of_pull_msgd": float(norms[group].sum() / norms.sum()),
                "of_pull_engm": float((weights * norms)[group].sum() / (weights * norms).sum()),
            }
            for name, group in groups.items()
            if group.any()
        },
        "by_margin": [
            {name: mean(values[part]) for name, values in
             {"margin": margins, "norm": norms, "weight": weights}.items()}
            for part in order.chunk(10)
        ],
        "proxy": [
            [float(np.corrcoef(b.inputs, b.norms)[0, 1] ** 2),
             float(spearmanr(b.inputs, b.norms).statistic)]
            for b in seen
        ],
    }  # fmt: skip


def against_loop(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Holds the norms of shares of one batch against the norms by `loop`, in train mode."""
    parameters = list(network.parameters())
    shares = see(network, x, y).norms
    losses = nn.functional.cross_entropy(network(x), y, reduction="none")
    loops = loop_norms(losses, parameters)

    def step(weights: Tensor) -> Tensor:
        total = (weights * losses).sum()
        return flat(dict(zip(parameters, torch.autograd.grad(
            total, parameters, retain_graph=True), strict=True)))  # fmt: skip

    by_loop = step(weights_of(loops))
    return {
        "rank_correlation": float(spearmanr(shares, loops).statistic),
        "mean_ratio": float(shares.mean() / loops.mean()),
        "std_over_mean_shares": float(shares.std(correction=0) / shares.mean()),
        "std_over_mean_loop": float(loops.std(correction=0) / loops.mean()),
        "cosine_shares": float(
            nn.functional.cosine_similarity(step(weights_of(shares)), by_loop, dim=0)
        ),
        "cosine_msgd": float(
            nn.functional.cosine_similarity(step(torch.ones_like(loops)), by_loop, dim=0)
        ),
    }


def mean(values: Tensor) -> float:
    """Returns the mean as a number."""
    return float(values.double().mean())


def look(trainer: Trainer) -> dict[str, object]:
    """Looks at all training images, in train mode and in eval mode; the model stays as it was."""
    images, labels = trainer.examples.images.float() / 255, trainer.examples.labels
    wrong = labels != trainer.dataset.train.labels
    parts = torch.arange(len(labels)).split(BATCH)
    network = copy.deepcopy(trainer.model).float()
    attacked = [trainer.method.attack(network, images[p], labels[p]) for p in parts]
    line: dict[str, object] = {"epoch": trainer.epoch}
    for mode in ("train", "eval"):
        network.load_state_dict(trainer.model.state_dict())  # with the statistics of BatchNorm
        network.train(mode == "train")
        seen = [see(network, x, labels[p]) for x, p in zip(attacked, parts, strict=True)]
        line[mode] = described(seen, wrong)
    if trainer.epoch in LOOPS:
        line["loop"] = against_loop(network.train(), attacked[0], labels[parts[0]])
    return line


def train(config: RunConfig, path: Path) -> None:
    """Trains, with a look after some of the epochs; the file appears when all is done."""
    trainer = Trainer(config, device=torch.device("cpu"))
    lines: list[dict[str, object]] = [
        {"config": asdict(trainer.config), "environment": environment(trainer.device)}
    ]
    for epoch in tqdm(range(1, config.epochs + 1), path.stem):
        torch.manual_seed(1000 * config.seed + epoch)
        metrics = trainer.train_on(trainer.batches())
        trainer.epoch = epoch
        if epoch in LOOKS:
            lines.append(look(trainer) | {"train_loss": metrics["train_loss"]})
    path.write_text("".join(json.dumps(rounded(line)) + "\n" for line in lines))


def rounded(value: object) -> object:
    """Rounds what was measured to five significant digits, and leaves all else."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(v) if name != "config" else v for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def main(out: Path) -> None:
    """Runs the trainings that have no file in `out` yet."""
    out.mkdir(parents=True, exist_ok=True)
    for config in trainings():
        name = f"{config.method}-{config.optimizer}-noise{config.label_noise}-seed{config.seed}"
        if not (out / f"{name}.jsonl").exists():
            train(config, out / f"{name}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
