"""Three image classifiers that take pixels in [0, 1] and normalise inside.

Every layer with parameters is an `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm2d` or `nn.GroupNorm`, and
nothing works in place, so that per-example gradients can be read off with hooks.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engm.config import RunConfig
from engm.data import Dataset
from engm.errors import InputError, check_choice, check_count

Floats = Sequence[float] | None


def build(name: str, **settings: Any) -> nn.Module:
    """Builds the model called `name`: "small_cnn", "preact_resnet18" or "wide_resnet34_10".

    Args:
        name: Which one.
        **settings: Handed on: `num_classes`, `width`, `norm`, `in_channels`, `mean`, `std`.

    Raises:
        InputError: If there is no such model, or a setting is out of range.
    """
    models = {make.__name__: make for make in (small_cnn, preact_resnet18, wide_resnet34_10)}
    check_choice("model", name, models)
    return models[name](**settings)


def build_model(config: RunConfig, dataset: Dataset) -> nn.Module:
    """Makes the untrained model of a run, for the classes and the channels of its dataset."""
    config = config.resolved()
    assert config.model is not None
    return build(
        config.model,
        num_classes=dataset.num_classes,
        width=config.width,
        norm=config.model_norm,
        in_channels=dataset.image_shape[0],
        mean=dataset.mean,
        std=dataset.std,
    )


def small_cnn(
    num_classes: int = 10,
    width: int = 32,
    norm: str = "none",
    *,
    in_channels: int = 3,
    mean: Floats = None,
    std: Floats = None,
) -> nn.Module:
    """Three 3x3 convolutions and a linear layer, for 8x8 to 32x32 images. Source: this kit.

    The convolutions have `width`, `2 * width` and `4 * width` channels and strides 1, 2 and 2.

    Args:
        num_classes: Number of logits.
        width: Channels of the first convolution.
        norm: "none", "batch", or "group" with as many groups as the greatest common divisor of 8
            and the channels: 8 for the usual widths, and a number that divides any width.
        in_channels: Channels of the images.
        mean: Mean of each channel over the training images, in pixels in [0, 1]. Needs `std`.
        std: Standard deviation of each channel. Without both, pixels go in as they are.

    Returns:
        A module from `[n, in_channels, h, w]` pixels in [0, 1] to `[n, num_classes]` logits.

    Raises:
        InputError: If a setting is out of range; when called, if the images do not fit.
    """
    _check(norm, ("none", "batch", "group"), width, num_classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict(pixels=_Pixels(in_channels, mean, std))
    channels = in_channels
    for number, (wider, stride) in enumerate([(width, 1), (2 * width, 2), (4 * width, 2)], start=1):
        # a norm layer has a bias of its own
        layers[f"conv{number}"] = _conv3x3(channels, wider, stride, bias=norm == "none")
        layers[f"norm{number}"] = _norm_layer(norm, wider)
        layers[f"relu{number}"] = nn.ReLU()
        channels = wider
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels, num_classes)
    # fan_in: without norm layers nothing else keeps the activations at the scale of the pixels
    return _initialise(nn.Sequential(layers), "fan_in")


def preact_resnet18(
    num_classes: int = 10,
    width: int = 64,
    norm: str = "batch",
    *,
    in_channels: int = 3,
    mean: Floats = None,
    std: Floats = None,
) -> nn.Module:
    """PreAct ResNet-18 for 32x32 and 64x64 images: 11.17 million parameters with 10 classes.

    Source: He et al. 2016, arXiv 1603.05027, with the stem that is usual for small images (a 3x3
    convolution with stride 1, no max pooling) and a norm layer and ReLU before the pooling.

    Arguments, result and errors are those of `small_cnn`, but `norm` is "batch" or "group", and
    `width` is that of the stem and the first of four stages; the next are 2, 4 and 8 times as wide.
    """
    stages = [(1, 2, 1), (2, 2, 2), (4, 2, 2), (8, 2, 2)]
    return _residual(_Pixels(in_channels, mean, std), width, width, stages, norm, num_classes)


def wide_resnet34_10(
    num_classes: int = 10,
    width: int = 160,
    norm: str = "batch",
    *,
    in_channels: int = 3,
    mean: Floats = None,
    std: Floats = None,
) -> nn.Module:
    """Wide ResNet of depth 34, widening factor 10, no dropout: 46.16 million parameters.

    Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146; depth 34 as in Madry et al. 2018, arXiv
    1706.06083, and TRADES, arXiv 1901.08573.

    Arguments, result and errors are those of `small_cnn`, but `norm` is "batch" or "group", and
    `width` is that of the first of three stages, 160 = 16 times the widening factor 10; the next
    are 2 and 4 times as wide. The stem always has 16 channels.
    """
    # depth 34 = 3 stages x 5 blocks x 2 convolutions, 3 shortcuts and the stem
    stages = [(1, 5, 1), (2, 5, 2), (4, 5, 2)]
    return _residual(_Pixels(in_channels, mean, std), 16, width, stages, norm, num_classes)


class _Pixels(nn.Module):
    # buffers, so that the normalisation travels with a checkpoint and follows .to(device)
    mean: Tensor
    std: Tensor

    def __init__(self, in_channels: int, mean: Floats, std: Floats) -> None:
        super().__init__()
        in_channels = check_count("in_channels", in_channels)
        if (mean is None) != (std is None):
            raise InputError("give both mean and std, or neither to leave the pixels as they are")
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            given = [default] * in_channels if values is None else [float(v) for v in values]
            sound = all(math.isfinite(v) and (name == "mean" or v > 0) for v in given)
            if len(given) != in_channels or not sound:
                raise InputError(
                    f"{name} must be {in_channels} finite numbers, one for each channel, std above "
                    f"0; got {given}"
                )
            self.register_buffer(name, torch.tensor(given).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise InputError(f"images are {x.dtype}; give floats in [0, 1], as in x.float() / 255")
        if x.ndim != 4 or x.shape[1] != self.mean.shape[1]:
            raise InputError(
                f"images have shape {list(x.shape)}; this model takes [n, {self.mean.shape[1]}, "
                "height, width] (build it with in_channels=... for other images)"
            )
        return (x - self.mean) / self.std


class _PreActBlock(nn.Module):
    def __init__(self, channels: int, wider: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1 = _norm_layer(norm, channels)
        self.conv1 = _conv3x3(channels, wider, stride)
        self.norm2 = _norm_layer(norm, wider)
        self.conv2 = _conv3x3(wider, wider)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != wider:
            self.shortcut = nn.Conv2d(channels, wider, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        # an identity carries x itself; a change of shape carries the activated x
        carried = x if self.shortcut is None else self.shortcut(active)
        return carried + self.conv2(F.relu(self.norm2(self.conv1(active))))


def _residual(
    pixels: _Pixels,
    channels: int,
    width: int,
    stages: list[tuple[int, int, int]],
    norm: str,
    num_classes: int,
) -> nn.Module:
    _check(norm, ("batch", "group"), width, num_classes)
    stem = _conv3x3(pixels.mean.shape[1], channels)
    blocks = []
    for multiple, length, first_stride in stages:
        for stride in [first_stride] + [1] * (length - 1):
            blocks.append(_PreActBlock(channels, multiple * width, stride, norm))
            channels = multiple * width
    layers = OrderedDict(
        pixels=pixels,
        stem=stem,
        blocks=nn.Sequential(*blocks),
        norm=_norm_layer(norm, channels),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(channels, num_classes),
    )
    return _initialise(nn.Sequential(layers), "fan_out")


def _conv3x3(channels: int, wider: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, wider, 3, stride, padding=1, bias=bias)


def _norm_layer(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.Identity()


def _initialise(model: nn.Module, fan: Any) -> nn.Module:
    # He et al. 2015, arXiv 1502.01852: variance 2 / fan; the linear layer keeps torch's weights
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _check(norm: str, norms: tuple[str, ...], width: int, num_classes: int) -> None:
    check_choice("norm", norm, norms)
    check_count("width", width)
    check_count("num_classes", num_classes, 2)
