import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engm import models
from engm.errors import InputError

NAMES = ("small_cnn", "preact_resnet18", "wide_resnet34_10")


def count(model):
    return sum(p.numel() for p in model.parameters())


def expected_count(stem, widths, blocks, num_classes):
    # 3x3 convolutions without bias, two norm layers a block, 1x1 shortcuts where the shape changes
    total, channels = 9 * 3 * stem, stem
    for number, width in enumerate(widths):
        for block in range(blocks):
            total += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            if block == 0 and (number > 0 or channels != width):
                total += channels * width
            channels = width
    return total + 2 * channels + channels * num_classes + num_classes


def test_parameter_counts():
    with torch.device("meta"):
        resnet, wide = models.preact_resnet18(), models.wide_resnet34_10()
    # 11.17 M and 46.16 M are the numbers of the literature, for 10 classes
    assert count(resnet) == expected_count(64, (64, 128, 256, 512), 2, 10) == 11_172_170
    assert count(wide) == expected_count(16, (160, 320, 640), 5, 10) == 46_160_474
    # three convolutions with bias and a linear layer
    assert count(models.small_cnn()) == 28 * 32 + 289 * 64 + 577 * 128 + 129 * 10


def test_depth():
    with torch.device("meta"):
        resnet, wide = models.preact_resnet18(), models.wide_resnet34_10()
    kernels = [m.kernel_size for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    # 18 counts the linear layer and leaves the shortcuts out; 34 is the other way round
    assert kernels.count((3, 3)) + 1 == 18
    assert sum(isinstance(m, nn.Conv2d) for m in wide.modules()) == 34


@pytest.mark.parametrize(("name", "size"), [(NAMES[0], 8), (NAMES[0], 28), (NAMES[1], 64)])
def test_shapes(name, size):
    model = models.build(name, num_classes=7, width=8, in_channels=2).eval()
    assert model(torch.rand(3, 2, size, size)).shape == (3, 7)


@pytest.mark.parametrize(
    ("build", "stages", "blocks", "stem"),
    [(models.preact_resnet18, 4, 2, 6), (models.wide_resnet34_10, 3, 5, 16)],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_residual_networks_against_a_functional_reference(build, stages, blocks, stem, norm):
    torch.manual_seed(0)
    model = build(5, 6, norm, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    w = dict(model.named_parameters())

    def normed(h, name):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        groups = math.gcd(8, h.shape[1])
        if norm == "batch":
            dims, shaped = (0, 2, 3), h
        else:
            dims, shaped = (2, 3, 4), h.reshape(len(h), groups, -1, *h.shape[2:])
        variance = shaped.var(dims, unbiased=False, keepdim=True)
        scaled = (shaped - shaped.mean(dims, keepdim=True)) / (variance + 1e-5).sqrt()
        return scaled.reshape(h.shape) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    mean, std = (
        torch.tensor(v).double().view(1, 3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    )
    h = F.conv2d((x - mean) / std, w["stem.weight"], padding=1)
    assert h.shape[1] == stem
    for number in range(stages * blocks):
        key = f"blocks.{number}"
        stride = 2 if number > 0 and number % blocks == 0 else 1
        active = normed(h, f"{key}.norm1").relu()
        new = F.conv2d(active, w[f"{key}.conv1.weight"], stride=stride, padding=1)
        new = F.conv2d(normed(new, f"{key}.norm2").relu(), w[f"{key}.conv2.weight"], padding=1)
        if new.shape != h.shape:
            h = F.conv2d(active, w[f"{key}.shortcut.weight"], stride=stride)
        h = h + new
    h = normed(h, "norm").relu().mean((2, 3))
    expected = h @ w["linear.weight"].T + w["linear.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8)


def test_small_cnn_against_a_functional_reference():
    torch.manual_seed(0)
    model = models.small_cnn(4, 5, in_channels=1, mean=[0.3], std=[0.2]).double()
    w, x = dict(model.named_parameters()), torch.rand(3, 1, 28, 28).double()
    h = (x - model.pixels.mean) / model.pixels.std
    for number, stride in ((1, 1), (2, 2), (3, 2)):
        weight, bias = w[f"conv{number}.weight"], w[f"conv{number}.bias"]
        h = F.conv2d(h, weight, bias, stride, padding=1).relu()
    expected = h.mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    torch.testing.assert_close(model(x), expected)
    assert model.pixels.mean.item() == pytest.approx(0.3)
    assert model.pixels.std.item() == pytest.approx(0.2)


def test_normalisation_travels_with_a_checkpoint():
    saved = models.small_cnn(width=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    loaded = models.small_cnn(width=4)
    x = torch.rand(2, 3, 8, 8)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x), saved(x))
    # it is not trained, and the default leaves pixels as they are
    assert not any(name.startswith("pixels") for name, _ in saved.named_parameters())
    assert torch.equal(models.small_cnn(width=4).pixels(x), x)


@pytest.mark.parametrize(("name", "fan"), [("small_cnn", "in"), ("preact_resnet18", "out")])
def test_convolutions_start_with_variance_two_over_fan(name, fan):
    torch.manual_seed(0)
    model = models.build(name)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            channels = layer.in_channels if fan == "in" else layer.out_channels
            variance = 2 / (channels * math.prod(layer.kernel_size))
            # the variance of n normal draws is off by sqrt(2 / n); five of those
            off = 5 * math.sqrt(2 / layer.weight.numel())
            assert layer.weight.var().item() == pytest.approx(variance, rel=off)
            assert layer.bias is None or not layer.bias.any()
    assert not model.linear.bias.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 3, 12, 20])
def test_group_norm_keeps_examples_apart_at_every_width(name, width):
    model = models.build(name, width=width, norm="group")
    assert any(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    if width == 12:
        x = torch.rand(3, 3, 16, 16)
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_sits_in_a_layer_that_hooks_see_once(name, norm):
    model = models.build(name, width=8, norm=norm)
    calls = {}
    for layer in model.modules():
        if list(layer.parameters(recurse=False)):
            assert type(layer) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm)
            calls[layer] = []
            layer.register_forward_hook(
                lambda layer, a, b: calls[layer].append((*a, b, a[0].clone(), b.clone()))
            )
    model(torch.rand(2, 3, 16, 16))
    for seen in calls.values():
        assert len(seen) == 1
        # nothing later changed what a hook keeps
        a, b, a_then, b_then = seen[0]
        assert torch.equal(a, a_then)
        assert torch.equal(b, b_then)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(model="resnet50"),
        dict(norm="layer"),
        dict(norm="none", model="preact_resnet18"),
        dict(width=None, model="wide_resnet34_10"),
        dict(width=0),
        dict(width=1.5),
        dict(num_classes=1),
        dict(in_channels=0),
        dict(mean=(0.5, 0.5, 0.5)),
        dict(mean=(0.5,), std=(0.5, 0.5, 0.5)),
        dict(mean=(0.5, math.nan, 0.5), std=(0.5,) * 3),
        dict(std=(0.5, 0.0, 0.5), mean=(0.5,) * 3),
    ],
)
def test_a_wrong_setting_is_named(wrong):
    settings = dict(wrong)
    name = settings.pop("model", "small_cnn")
    with pytest.raises(InputError, match=next(iter(wrong))):
        models.build(name, **settings)


def test_wrong_images():
    model = models.small_cnn(width=2)
    with pytest.raises(InputError, match="in_channels"):
        model(torch.rand(2, 1, 8, 8))
    with pytest.raises(InputError, match=r"\[n, 3, height, width\]"):
        model(torch.rand(8, 3, 8))
    with pytest.raises(InputError, match=r"x.float\(\) / 255"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
