"""How well ENGM knows the architectures of torchvision and timm: a table by name.

Each is built without pretrained weights, and the norms of its examples
are held against the loop's in float64. That is done in eval mode, since BatchNorm in train mode
couples the examples, and the norms of shares mean something else (see `engm.norms.watch.Watch`).
Weights are moved off their first values before: zeros, and scales of 1e-6, would hide what lies
behind them; and BatchNorm's running statistics are those of a batch. Then the cost of an outer step
of ENGM is measured beside that of MSGD, in turns, in float32 and train mode, by one thread. What
the log has already is not measured again: a run that was stopped goes on.

    python results/architectures.py
    python results/architectures.py timm/vit_tiny_patch16_224 --log outputs/architectures.jsonl
"""

import gc
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engm.bench.measuring import ratios, reason, seconds
from engm.errors import InputError, check_choice
from engm.norms.watch import Watch, loop_norms
from engm.optim import ENGM, MSGD
from engm.report.tables import to_markdown
from engm.runs import environment

LOG = Path(__file__).parent / "architectures.jsonl"
CLASSES = 10
BATCH = 8  # of the cost
FEW = 2  # images in float64
TOLERANCE = 1e-8

# Small ones of each family, by height and width of the images.
_LISTED = {
    ("torchvision", 64): """
        mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 regnet_x_400mf
        regnet_y_400mf mobilenet_v2 efficientnet_b0 resnet18 densenet121 googlenet
        efficientnet_v2_s resnext50_32x4d swin_t swin_v2_t convnext_tiny alexnet
        wide_resnet50_2 vit_b_32 vgg11_bn""",
    ("torchvision", 80): "inception_v3",
    ("torchvision", 224): "maxvit_t",
    ("timm", 64): """
        vit_tiny_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 cait_xxs24_224
        xcit_nano_12_p8_224 convnext_atto convnextv2_atto efficientnet_b0 regnety_002 nfnet_l0
        resnetv2_50x1_bit poolformer_s12 mobilevit_xxs mobilevitv2_050 pvt_v2_b0 mixer_s32_224
        resmlp_12_224 gmlp_ti16_224 focalnet_tiny_srf edgenext_xx_small dla34 dpn48b ghostnet_050
        rexnet_100 res2net50_26w_4s selecsls42 ese_vovnet19b_slim repvgg_a0 fastvit_t8
        mobileone_s0 inception_next_atto hgnetv2_b0 tinynet_e mobilenetv4_conv_small
        mambaout_femto efficientvit_b0 repvit_m0_9 starnet_s050 resnest14d skresnet18 xception41
        lcnet_035 caformer_s18 swiftformer_xs coat_lite_tiny visformer_tiny hrnet_w18_small
        tiny_vit_5m_224 pit_ti_224 swinv2_tiny_window8_256 volo_d1_224 coatnet_nano_rw_224
        tnt_s_patch16_224 nest_tiny davit_tiny twins_svt_small hiera_tiny_224
        convit_tiny mvitv2_tiny test_vit2 beit_base_patch16_224""",
    ("timm", 112): "eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 sequencer2d_s",
    ("timm", 128): """
        levit_128s gcvit_xxtiny maxvit_pico_rw_256 lambda_resnet26rpt_256 botnet26t_256
        mobilenetv4_hybrid_medium""",
    ("timm", 224): "efficientformer_l1",
    ("timm", 240): "crossvit_tiny_240",
    ("timm", 256): "halonet26t",
}  # fmt: skip
SIZES = {
    f"{library}/{name}": size
    for (library, size), names in _LISTED.items()
    for name in names.split()
}


def build(name: str, size: int) -> nn.Module:
    """Returns an architecture by its name, such as "timm/vit_tiny_patch16_224", for 10 classes."""
    library, name = name.split("/")
    from engm.preparation.vision import torchvision  # timm imports it as well

    if library == "torchvision":
        heads = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        sizes = {"image_size": size} if name.startswith("vit") else {}
        sizes = {"input_size": (size, size)} if name.startswith("maxvit") else sizes
        return torchvision.models.get_model(
            name, weights=None, num_classes=CLASSES, **heads, **sizes
        )
    import timm

    with suppress(TypeError):  # most take images of any size, and no such argument
        return timm.create_model(name, num_classes=CLASSES, img_size=size)
    return timm.create_model(name, num_classes=CLASSES)


def measure(name: str, size: int, repeats: int) -> dict[str, Any]:
    """Returns what `run` logs of an architecture."""
    torch.manual_seed(0)
    model = build(name, size)
    shape = (3, size, size)
    move_off(model, torch.rand(BATCH, *shape))
    count = sum(p.numel() for p in model.parameters())
    entry = {"name": name, "image_size": size, "parameters": count}
    entry |= agreement(model.double().eval(), torch.rand(FEW, *shape, dtype=torch.float64))
    entry |= {"coupled": any(map(_couples, model.modules())), "batch_size": BATCH}
    return entry | {
        "cost": _cost(model.float().train(), torch.rand(BATCH, *shape), entry["works"], repeats),
        "environment": _environment(),
    }


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    """Returns a loss for each image, `[n]`."""
    return cross_entropy(model(x), torch.arange(len(x)) % CLASSES, reduction="none")


def _couples(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def move_off(model: nn.Module, x: Tensor) -> None:
    """Moves weights off values that they all share; BatchNorms take the statistics of x."""
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.05 * torch.randn_like(parameter)
        norms = [module for module in model.modules() if _couples(module)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def agreement(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Returns how the norms are found, and how far they are from the loop's."""
    with Watch(model) as watch:
        losses = losses_of(model, x)
    expected = loop_norms(losses, [p for p in model.parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            watch.backward(losses)
        except InputError as error:
            return _instead(model, x) | {"reason": str(error)}
    slow = [str(one.message) for one in caught if "one example at a time" in str(one.message)]
    error = float(((watch.norms() - expected).abs() / expected).max().detach())
    works = "exact, slow" if slow else "exact"
    return {"works": works if error < TOLERANCE else "WRONG", "error": error, "warned": slow}


def _instead(model: nn.Module, x: Tensor) -> dict[str, Any]:
    try:
        ENGM(model, 0.0, norms="input", refresh_every=None).step(
            lambda: losses_of(model, x), inputs=x
        )
    except InputError:
        return {"works": "loop"}
    return {"works": "input"}


def _cost(model: nn.Module, x: Tensor, works: str, repeats: int) -> dict[str, Any]:
    """Returns seconds of a step by MSGD and by ENGM, and their ratio."""
    kind = works.split(",")[0]
    norms = kind if kind in ("input", "loop") else "exact"
    optimizers = {
        "msgd": MSGD(model.parameters(), 0.0, momentum=0.9),
        "engm": ENGM(model, 0.0, norms=norms, refresh_every=None if norms == "input" else 20),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}

    def step(optimizer: MSGD | ENGM) -> None:
        optimizer.zero_grad()
        optimizer.step(lambda: losses_of(model, x), inputs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(repeats + 1):
            for name, optimizer in optimizers.items():
                took = seconds(partial(step, optimizer), x.device)
                if turn:  # the first is the check, and a warm-up
                    times[name].append(took)
    return {"seconds": times, **ratios(times["engm"], times["msgd"])}


def run(
    names: Sequence[str], log: Path, repeats: int, say: Callable[[str], object] = print
) -> list[dict[str, Any]]:
    """Measures architectures, and logs each as it is done.

    Args:
        names: Of `SIZES`; what the log has already is not measured again.
        log: A file of JSON lines, one an architecture, which is added to.
        repeats: Steps that are timed.
        say: Told each name as its turn comes.

    Returns:
        All lines of the log. An architecture that failed has a `reason` in place of numbers.

    Raises:
        InputError: If a name is unknown.
    """
    for name in names:
        check_choice("architecture", name, SIZES)
    torch.set_num_threads(1)
    done = {entry["name"] for entry in read(log)}
    log.parent.mkdir(parents=True, exist_ok=True)
    for name in [name for name in names if name not in done]:
        say(name)
        try:
            entry = measure(name, SIZES[name], repeats)
        except Exception as error:  # of any kind: the others are measured all the same
            entry = {"name": name, "works": "failed", "reason": reason(error)}
        with log.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        gc.collect()  # a model with a circle of references goes, too
    return read(log)


def _environment() -> dict[str, Any]:
    facts = environment(torch.device("cpu"))
    with suppress(PackageNotFoundError):
        facts["packages"]["timm"] = version("timm")
    return facts


def read(log: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; none where there is no such file."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines]


def summary(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns in a few lines how many architectures work, and at what cost."""
    names: dict[str, list[str]] = {kind: [] for kind in ("exact", *(e["works"] for e in entries))}
    for entry in entries:
        names[entry["works"]].append(entry["name"])
    exact = len(names.pop("exact"))
    rest = "".join(f"; {kind}: {', '.join(sorted(those))}" for kind, those in names.items())
    lines = [f"- {len(entries)} architectures, {exact} exact{rest}."]
    worst = max((entry["error"] for entry in entries if "error" in entry), default=0)
    lines.append(f"- Norms differ from the loop's in float64 by at most {worst:.1e} of their size.")
    for title, coupled in (("without", False), ("with", True)):
        costs = [e["cost"]["ratio"] for e in entries if "cost" in e and e["coupled"] is coupled]
        if costs:
            low, median, high = np.quantile(costs, [0, 0.5, 1])
            lines.append(
                f"- {len(costs)} are {title} BatchNorm: an outer step takes {median:.2f} times as "
                f"long as MSGD's in the median, from {low:.2f} to {high:.2f}."
            )
    return "\n".join(lines) + "\n"


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns a row for each architecture, in markdown."""
    return to_markdown([_row(entry) for entry in sorted(entries, key=lambda e: e["name"])])


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    cost = entry.get("cost")
    return {
        "architecture": entry["name"],
        "image": str(entry.get("image_size", "")),
        "weights": f"{entry['parameters'] / 1e6:.1f}M" if cost else "",
        "norms": entry["works"],
        "error": f"{entry['error']:.0e}" if "error" in entry else "",
        "BatchNorm": "yes" if entry.get("coupled") else "",
        "outer step / MSGD": "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**cost) if cost else "",
        "why": entry.get("reason", "") or "; ".join(entry.get("warned", [])),
    }


@click.command()
@click.argument("names", nargs=-1)
@click.option("--log", type=click.Path(path_type=Path), default=LOG, help="JSON lines, added to")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
def main(names: tuple[str, ...], log: Path, repeats: int) -> None:
    """Measure the architectures NAMES, by default all, and print the table."""
    entries = run(names or list(SIZES), log, repeats, say=partial(click.echo, err=True))
    click.echo(f"{summary(entries)}\n{table(entries)}", nl=False)


if __name__ == "__main__":
    main()
