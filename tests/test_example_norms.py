"""Exact example norms against the loop, in float64, and what the exact path must not leave behind.

Three oracles: `loop_norms` with autograd's own weighted gradient; for the norms under BatchNorm in
train mode the definition of a share, one layer and one row at a time; and `torch.func`.
"""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from engm.bench.measuring import peak_bytes
from engm.errors import InputError
from engm.models import preact_resnet18, small_cnn
from engm.norms import layers as layer_shares
from engm.norms.rows import Rows, Summary
from engm.norms.watch import Checked, Watch, loop_norms
from engm.optim import ENGM

N = 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(output):
    # one loss per example, whose gradient differs from output to output
    return (output.flatten(1) * random(output[0].numel())).sum(1) + output.flatten(1).square().sum(
        1
    )


def classify(model, x):
    return F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")


def autograd_of(total, parameters):
    found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def assert_same(found, expected, rtol=1e-9):
    assert set(found) == set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in expected.items():
        assert found[parameter].shape == parameter.shape
        torch.testing.assert_close(found[parameter], gradient, rtol=rtol, atol=rtol * largest)


def assert_exact(model, closure):
    """Norms and weighted gradients of the one pass, against those of the loop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # the loop first: BatchNorm's buffers and an input that is changed in place stay out of it
    losses = closure()
    n = len(losses)
    weights, keep = random(n, seed=1).abs() + 0.1, torch.arange(n) % 2 == 0
    norms = loop_norms(losses, parameters)
    whole = autograd_of((weights * losses).sum(), parameters)
    part = autograd_of((weights * losses)[keep].sum(), parameters)
    for measure in (True, False):
        with Watch(model, measure) as watch:
            losses = closure()
        assert watch.backward(losses) is None
        assert all(p.grad is None for p in parameters)
        if measure:
            torch.testing.assert_close(watch.norms(), norms, rtol=1e-9, atol=0)
        assert_same(watch.weighted(weights), whole)
        assert_same(watch.weighted(weights * keep, keep), part)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.short = nn.Conv2d(2, 4, 1)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = self.short(x) + self.second(torch.relu(self.norm(self.first(x))))
        return self.last(torch.relu(h).mean((2, 3)))


class Twice(nn.Module):
    """One convolution, norm and linear layer, each used twice, at two sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.norm(self.conv(x)))
        h = self.norm(self.conv(h)).mean((2, 3))
        return self.linear(torch.tanh(self.linear(h)))


class Unused(nn.Module):
    """The second layer is called but has no part in the output; the third is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        self.second(h)
        self.first(h)
        return h


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Stopped(Unused):
    """One call of the first layer, and the third layer, get no gradient from below."""

    def forward(self, x):
        h = self.first(x)
        return self.second(h) + Stop.apply(self.third(self.first(h)))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, *, images):
        h = self.norm(input=self.conv(input=images)).relu().mean((2, 3))
        return self.linear(input=h)


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def in_eval(*layers):
    model = nn.Sequential(*layers)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(random(*module.running_mean.shape, seed=3))
            module.running_var.copy_(random(*module.running_var.shape, seed=4).square() + 0.5)
    return model.eval()


def after_conv(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 2, 2))


IMAGE = (2, 7, 6)
CASES = {
    "plain": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2)), IMAGE),
    "no bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), IMAGE),
    "residual": (Residual, IMAGE),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 2, groups=3)),
        (4, 7, 6),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.Conv2d(6, 2, 1)),
        (3, 5, 6),
    ),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=1), IMAGE),
    "1x1 strided": (lambda: nn.Conv2d(2, 3, 1, stride=2), IMAGE),
    "3x3 stride 2, odd": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 7)),
    "3x3 stride 2, even": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 8, 6)),
    "stride beyond kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 9, 10)),
    "rectangular": (
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(2, 1), dilation=(3, 1)),
        (2, 7, 9),
    ),
    "one output": (lambda: nn.Conv2d(2, 3, (7, 6)), IMAGE),
    "same": (lambda: nn.Conv2d(2, 3, (3, 4), padding="same", dilation=(2, 1)), IMAGE),
    "valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), IMAGE),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), IMAGE),
    "circular": (
        lambda: nn.Conv2d(2, 3, 3, 2, padding=(1, 2), padding_mode="circular"),
        IMAGE,
    ),
    "replicate, same": (
        lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="replicate"),
        IMAGE,
    ),
    "reused": (Twice, IMAGE),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "linear, positions": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        (2, 3, 6),
    ),
    "group norm": (lambda: after_conv(nn.GroupNorm(2, 4, eps=0.1)), IMAGE),
    "group norm on vectors": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)),
        (6,),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, eps=0.1), nn.Linear(5, 2)),
        (3, 6),
    ),
    "layer norm, 2 dims": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm((3, 5)), nn.Linear(5, 2)),
        (2, 3, 6),
    ),
    "layer norm, 3 dims, no bias": (lambda: after_conv(nn.LayerNorm((4, 5, 4), bias=False)), IMAGE),
    "instance norm 1d": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.InstanceNorm1d(3, affine=True, eps=0.1)),
        (3, 6),
    ),
    "instance norm 2d": (lambda: after_conv(nn.InstanceNorm2d(4, affine=True)), IMAGE),
    "instance norm 2d, running, train": (
        lambda: after_conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGE,
    ),
    "instance norm 1d, running, eval": (
        lambda: in_eval(
            nn.Linear(6, 5), nn.InstanceNorm1d(3, affine=True, track_running_stats=True, eps=0.1)
        ),
        (3, 6),
    ),
    "instance norm 2d, running, eval": (
        lambda: in_eval(
            *after_conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True, eps=0.1))
        ),
        IMAGE,
    ),
    "instance norm 3d": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.InstanceNorm3d(2, affine=True), nn.Tanh()),
        (2, 3, 2, 3),
    ),
    "batch norm 1d, eval": (
        lambda: in_eval(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=0.1), nn.Linear(5, 2)),
        (6,),
    ),
    "batch norm 1d, positions, eval": (
        lambda: in_eval(nn.Linear(6, 5), nn.BatchNorm1d(3), nn.Linear(5, 2)),
        (3, 6),
    ),
    "batch norm 2d, eval": (lambda: in_eval(*after_conv(nn.BatchNorm2d(4))), IMAGE),
    "batch norm 3d, eval": (
        lambda: in_eval(nn.Linear(3, 3), nn.BatchNorm3d(2), nn.Tanh(), nn.Linear(3, 2)),
        (2, 3, 2, 3),
    ),
    "norm without parameters": (lambda: after_conv(nn.GroupNorm(2, 4, affine=False)), IMAGE),
    "in place after conv and norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(True), nn.GroupNorm(2, 4), nn.ReLU(True), nn.Conv2d(4, 2, 2)
        ),
        IMAGE,
    ),
    # the outputs of these two are views, whose history an in-place change rewrites
    "in place after linear with positions": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(True), nn.Linear(5, 3), nn.ReLU(True)),
        (3, 6),
    ),
    "in place after instance norm": (
        lambda: nn.Sequential(
            nn.InstanceNorm2d(2, affine=True), nn.ReLU(True), nn.Conv2d(2, 2, 2), nn.ReLU(True)
        ),
        IMAGE,
    ),
    "frozen weight": (lambda: frozen(Residual(), "first.weight", "norm.weight"), IMAGE),
    "frozen bias": (lambda: frozen(Residual(), "first.bias", "norm.bias", "last.bias"), IMAGE),
    "frozen stem": (
        lambda: frozen(Residual(), "first.weight", "first.bias", "short.weight", "short.bias"),
        IMAGE,
    ),
    "frozen middle": (lambda: frozen(Residual(), "norm.weight", "norm.bias"), IMAGE),
    "only the last": (
        lambda: frozen(
            Residual(),
            *(name for name, _ in Residual().named_parameters() if not name.startswith("last")),
        ),
        IMAGE,
    ),
    "unused output": (Unused, (6,)),
    "no gradient": (Stopped, (6,)),
}


def made(build):
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():  # norm layers start at weight 1 and bias 0, which hides mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * random(*parameter.shape, seed=5))
    return model


@pytest.mark.parametrize("memory_cost", [0, 1e9], ids=["shares", "grams"])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_what_the_loop_gives(case, memory_cost, monkeypatch):
    monkeypatch.setattr(layer_shares, "_MEMORY_COST", memory_cost)
    build, shape = CASES[case]
    model = made(build)
    x = random(N, *shape)
    assert_exact(model, lambda: squares(model(x)))


def test_the_two_forms_are_taken_in_turn(monkeypatch):
    # so that the test above does compare two forms
    for cost, form in ((0, layer_shares.Stored), (1e9, layer_shares.Factors)):
        monkeypatch.setattr(layer_shares, "_MEMORY_COST", cost)
        for layer, a, b in (
            (nn.Linear(6, 5), random(N, 6), random(N, 5)),
            (nn.Conv2d(2, 3, 3), random(N, 2, 6, 6), random(N, 3, 4, 4)),
        ):
            formula, calls = layer_shares.formula_of(layer), [(a, b, Rows(0, len(a)))]
            assert isinstance(formula(layer, calls, True)["weight"], form)
            kept = formula(layer, calls, False)["weight"]
            assert isinstance(kept, layer_shares.Factors)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18"])
def test_the_models_of_the_kit(name, norm):
    if name == "preact_resnet18" and norm == "none":
        pytest.skip("there is none without norm layers")
    builder = {"small_cnn": small_cnn, "preact_resnet18": preact_resnet18}[name]
    model = made(lambda: builder(num_classes=3, width=4, norm=norm))
    model.eval()  # for BatchNorm, which in train mode has a test of its own
    x = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_exact(model, lambda: classify(model, x))


@st.composite
def convolutions(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.integers(1, 3))
    kernel, stride, dilation, more = pair(1, 4), pair(1, 3), pair(1, 3), pair(0, 5)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    kind = draw(st.sampled_from(["ints", "same", "valid"]))
    if kind == "same":
        stride, padding = (1, 1), kind
    else:
        padding = pair(0, 3) if kind == "ints" else kind
    # reflection needs an image larger than the padding
    size = [max(s, 4) + m for s, m in zip(span, more, strict=True)]
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    if kind == "same":
        size = [s + m for s, m in zip(span, size, strict=True)]
    layer = dict(
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, size, draw(st.integers(1, 3)), draw(st.sampled_from([0, 1e9]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions())
def test_convolutions_of_any_shape(drawn):
    layer, size, n, memory_cost = drawn
    model = made(lambda: nn.Conv2d(**layer))
    x = random(n, layer["in_channels"], *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_shares, "_MEMORY_COST", memory_cost)
        assert_exact(model, lambda: squares(model(x)))


@pytest.mark.parametrize("memory_cost", [0, 1e9])
def test_two_forwards_in_one_loss(memory_cost, monkeypatch):
    monkeypatch.setattr(layer_shares, "_MEMORY_COST", memory_cost)
    model = made(Residual)
    x, x_adv = random(N, *IMAGE), random(N, *IMAGE, seed=2)

    def trades():
        clean, adversarial = model(x), model(x_adv)
        divergence = F.kl_div(adversarial.log_softmax(1), clean.softmax(1), reduction="none")
        return F.cross_entropy(clean, torch.arange(N) % 3, reduction="none") + divergence.sum(1)

    assert_exact(model, trades)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_number_of_examples(n):
    model = made(Residual)
    x = random(n, *IMAGE)
    assert_exact(model, lambda: classify(model, x))


def test_a_model_called_with_keywords():
    model = made(Keywords)
    x = random(N, *IMAGE)
    assert_exact(model, lambda: squares(model(images=x)))


def test_inputs_that_require_a_gradient():
    model = made(Residual)
    x = random(N, *IMAGE).requires_grad_()
    assert_exact(model, lambda: classify(model, x))
    assert x.grad is None
    with Watch(model) as watch:
        losses = classify(model, x)
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    torch.testing.assert_close(watch.backward(losses, x), expected, rtol=1e-12, atol=0)


def test_an_attack_within_the_closure_has_no_part_in_the_losses():
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))).eval()

    def closure():
        x = random(N, 6).requires_grad_()
        model.train()
        (g,) = torch.autograd.grad(classify(model, x).sum(), x)
        model(x[:2])
        model.eval()
        model[1].reset_running_stats()
        return classify(model, (x + g.sign()).detach())

    assert_exact(model, closure)


def under(model, x):
    return checkpoint(model, x, use_reentrant=False)


def in_pairs(model, x):
    torch.manual_seed(0)  # of the dropout
    return model[3](under(model[1:3], under(model[0], x)))


def nested(model, x):
    torch.manual_seed(0)
    return under(lambda x: model[1:](under(model[0], 2 * x)), x)


def whole_twice(model, x):
    torch.manual_seed(0)
    return under(model, x) + under(model, x + 1)


def moved_away(model, x):
    torch.manual_seed(0)
    with torch.autograd.graph.save_on_cpu():
        return model(x)


class OwnNorm(nn.LayerNorm):
    """Has a forward of its own, and a scale: neither is reached by a layer's formula."""

    def __init__(self, width):
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        normed = F.layer_norm(x, self.normalized_shape, self.weight, self.bias)
        return torch.tanh(x * self.scale) + normed * self.scale


@pytest.mark.filterwarnings("ignore:the norms of .* found one example at a time")
@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm])
@pytest.mark.parametrize("forward", [in_pairs, nested, whole_twice, moved_away])
def test_layers_whose_inputs_are_not_kept(forward, norm):
    def make():
        first = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), norm(5))
        last = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        return nn.Sequential(first, nn.Linear(5, 5), nn.Dropout(0.4), last)

    model, x = made(make), random(N, 6)
    assert_exact(model, lambda: classify(lambda x: forward(model, x), x))
    with Watch(model) as watch:
        losses = classify(lambda x: forward(model, x), x)
    watch.backward(losses)
    assert all(share is None for share in watch._found.shares.values())
    assert not any(part.shares for part in watch._found.parts)


def test_hooks_of_the_user_may_change_inputs_and_outputs():
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    model[0].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    x = random(N, 6)
    assert_exact(model, lambda: classify(model, x))


@pytest.mark.parametrize("train", [False, True])
def test_losses_that_are_zero_but_for_rounding(train):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train(train)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    with Watch(net) as watch:
        losses = F.cross_entropy(200 * net(x), y, reduction="none")
    watch.backward(losses)
    assert 0 < int((losses == 0).sum()) < len(x) and int((losses < 1e-6).sum()) > 32
    if not train:
        again = F.cross_entropy(200 * net(x), y, reduction="none")
        expected = loop_norms(again, list(net.parameters()))
        torch.testing.assert_close(watch.norms(), expected, rtol=1e-3, atol=1e-4)


def test_norms_are_those_of_torch_func():
    model = made(lambda: small_cnn(num_classes=3, width=4, norm="group", in_channels=1))
    x, y = random(N, 1, 8, 8), torch.arange(N) % 3

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, image[None]), label[None])

    parameters = {k: p.detach() for k, p in model.named_parameters()}
    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    expected = torch.cat([g.flatten(1) for g in per_example.values()], 1).norm(dim=1)
    with Watch(model) as watch:
        losses = F.cross_entropy(model(x), y, reduction="none")
    watch.backward(losses)
    torch.testing.assert_close(watch.norms(), expected, rtol=1e-9, atol=0)
    weights = random(N, seed=1)
    found = watch.weighted(weights)
    for name, parameter in model.named_parameters():
        total = torch.einsum("n,n...->...", weights, per_example[name])
        torch.testing.assert_close(found[parameter], total, rtol=1e-9, atol=1e-12)


# BatchNorm in train mode


def shares_by_definition(model, closure):
    """Each row's share in the gradient of each parameter: `[n, ...]`.

    Layer by layer, with the input that the layer had and the gradient of its output, all rows of it
    but one set to 0.
    """
    calls = []

    def keep(module, args, output):
        output.retain_grad()
        calls.append((module, args[0].detach(), output))

    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    losses = closure()
    for hook in hooks:
        hook.remove()
    losses.sum().backward()
    batch = {p: p.grad for p in model.parameters()}
    shares = dict.fromkeys(model.parameters(), 0)
    for layer, a, output in calls:
        alone = copy.deepcopy(layer)
        again = alone(a)
        for i in range(len(losses)):
            b = torch.zeros_like(again)
            b[i] = output.grad[i]
            found = torch.autograd.grad(again, list(alone.parameters()), b, retain_graph=True)
            for parameter, share in zip(layer.parameters(), found, strict=True):
                row = torch.zeros(len(losses), *share.shape, dtype=share.dtype)
                row[i] = share
                shares[parameter] = shares[parameter] + row
    model.zero_grad()
    return shares, batch


def batch_norm_2d():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3),
        nn.Tanh(), nn.Flatten(), nn.Linear(18, 3),
    )  # fmt: skip


BATCH_NORMS = {
    "2d": (batch_norm_2d, IMAGE),
    "1d": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), (6,)),
    "no running statistics, in eval": (
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)
        ).eval(),
        (6,),
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Linear(3, 3), nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
        ),
        (2, 3, 2, 3),
    ),
    "preact_resnet18": (lambda: preact_resnet18(num_classes=3, width=2), (3, 8, 8)),
}


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("case", BATCH_NORMS)
def test_norms_with_batch_norm_in_train_mode_are_those_of_the_shares(case, forwards):
    build, shape = BATCH_NORMS[case]
    model = made(build)
    images = [random(N, *shape, seed=seed) for seed in range(forwards)]

    def closure():
        return sum(classify(model, x) for x in images)

    shares, batch = shares_by_definition(model, closure)
    expected = torch.cat([s.flatten(1) for s in shares.values()], 1).norm(dim=1)
    with Watch(model) as watch:
        losses = closure()
    watch.backward(losses)
    torch.testing.assert_close(watch.norms(), expected, rtol=1e-9, atol=0)
    assert_same(watch.weighted(torch.ones(N, dtype=torch.float64)), batch)
    # not the gradients of the single losses
    parameters = list(model.parameters())
    assert (loop_norms(closure(), parameters) / expected - 1).abs().max() > 0.01


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("case", BATCH_NORMS)
def test_with_batch_norm_in_train_mode_the_weighted_gradient_is_that_of_the_losses(
    case, forwards, measure
):
    build, shape = BATCH_NORMS[case]
    model = made(build)
    images = [random(N, *shape, seed=seed) for seed in range(forwards)]
    parameters, weights = list(model.parameters()), random(N, seed=1)

    def closure():
        return sum(classify(model, x) for x in images)

    shares, _ = shares_by_definition(model, closure)
    weighted = autograd_of((weights * closure()).sum(), parameters)
    with Watch(model, measure) as watch:
        losses = closure()
    watch.backward(losses)
    assert_same(watch.weighted(weights), weighted)
    keep = weights > 0
    kept = autograd_of((weights * closure())[keep].sum(), parameters)
    assert_same(watch.weighted(weights * keep, keep), kept)
    # which the weighted sum of the shares is not
    sums = torch.cat([torch.einsum("n,n...->...", weights, s).flatten() for s in shares.values()])
    right = torch.cat([weighted[p].flatten() for p in shares])
    assert (sums - right).norm() > 0.05 * right.norm()


def test_with_batch_norm_the_step_has_no_part_along_the_weights():
    # what BatchNorm follows may be scaled, so the gradient of any function is at right angles to it
    model = made(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=1e-30), nn.Linear(5, 3))
    )
    with Watch(model) as watch:
        losses = classify(model, random(N, 6))
    watch.backward(losses)
    weight = model[0].weight
    gradient = watch.weighted(1 / watch.norms())[weight]
    along = (gradient * weight).sum(1) / (gradient.norm(dim=1) * weight.norm(dim=1))
    assert along.abs().max() < 1e-9


# What has no formula, or is used in a way that the layers do not see


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.factor * x


class Standardised(nn.Conv2d):
    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, padding=1)


class Tokens(nn.Module):
    """A class token, a table of positions, an attention and the scale of a block, as in a ViT."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, N, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = x.view(len(x), N - 1, 6)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        h = self.norm(x)
        if self.attention.batch_first:
            h = self.attention(h, h, h)[0]
        else:
            h = h.transpose(0, 1)
            h = self.attention(h, h, h)[0].transpose(0, 1)
        return (x + self.scale * h)[:, 0]


class Windows(nn.Module):
    """Rows that are k windows an example, a bias from a table, and one from a network on it."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.table = nn.Parameter(torch.randn(5, 2))
        self.meta = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 6))
        self.register_buffer("places", random(N, 2, seed=3))

    def forward(self, x):
        h = self.norm(self.linear(x.view(-1, 2, 6)))  # three windows of two, [3 n, 2, 6]
        bias = self.table[torch.tensor([[0, 1], [4, 1]])].permute(2, 0, 1)  # [2, 2, 2]
        attention = (h @ h.transpose(1, 2)).unsqueeze(1) + bias
        h = (attention.softmax(-1) @ h.unsqueeze(1)).mean((1, 2)).view(len(x), -1, 6)
        return h.mean(1) + self.meta(self.places)[:1]


class Places(nn.Module):
    """A linear layer on a table with as many rows as there are examples."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", random(N, 3, seed=3))
        self.linear, self.out = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(x.view(len(x), -1, 6)[:, :N] + self.linear(self.places))).sum(1)


def sequence_first(layer):
    # rows are positions, as many as there are examples
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = layer(), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.layer(x.view(len(x), N, 6).transpose(0, 1)))).sum(0)

    return SequenceFirst()


def on_words(embedding):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = embedding, nn.Linear(6, 3)

        def forward(self, x):
            words = (x.view(len(x), -1)[:, :8] * 3).long() % 4
            return self.out(torch.tanh(self.embedding(words)).sum(1))

    return Words()


def tied(*between):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), *between, nn.Linear(6, 6))
    model[-1].weight = model[0].weight
    return model


def with_forward(layer, change):
    layer.forward = change(layer.forward)
    return layer


class TwoScales(nn.Module):
    """Two parameters whose gradients are one tensor."""

    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return (self.p + self.q) * x


class Axes(nn.Module):
    """Attention's tables of places for each axis, and rows of columns: [T, n, columns] in one."""

    def __init__(self):
        super().__init__()
        self.high = nn.Parameter(torch.randn(2, 4, 3))
        self.wide = nn.Parameter(torch.randn(2, 4, 3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        x = x.view(N, 2, 4, 3)
        high = torch.einsum("nhwc,hkc->nhwk", x, self.high).sum(-1)
        flat = torch.bmm(self.wide, x.permute(1, 3, 0, 2).reshape(2, 3, -1))  # [2, 4, n * 4]
        wide = flat.square().sum(1).view(2, N, 4).transpose(0, 1)
        columns = self.linear(x.transpose(0, 1).reshape(-1, 3)).tanh().view(2, N, 4, 3)
        return high + wide + columns.transpose(0, 1).sum(-1)


class Repeated(nn.Module):
    """A table that is repeated for every example, and a scale with its shift in one operation."""

    def __init__(self):
        super().__init__()
        self.table, self.shift = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        x = torch.addcmul(self.shift, self.scale, x, value=2) + self.table.tanh().repeat(N, 3, 1)
        return x.tanh() + self.table.repeat(N, 1)[:, None]


ANY = {
    "embedding": (lambda: on_words(nn.Embedding(4, 6, padding_idx=1)), (24,)),
    "embedding, counted": (lambda: on_words(nn.Embedding(4, 6, scale_grad_by_freq=True)), None),
    "tokens": (lambda: nn.Sequential(nn.Linear(18, 18), Tokens()), (18,)),
    "tokens, sequence first": (lambda: nn.Sequential(nn.Linear(18, 18), Tokens(False)), (18,)),
    "windows": (lambda: nn.Sequential(nn.Linear(36, 36), Windows()), (36,)),
    "places": (lambda: Places(), (24,)),
    "sequence first": (lambda: sequence_first(lambda: nn.Linear(6, 6)), (24,)),
    "sequence first, norm": (lambda: sequence_first(lambda: nn.LayerNorm(6)), (24,)),
    "forward changed": (lambda: OwnConv(2, 3, 3), IMAGE),
    "standardised": (lambda: nn.Sequential(Standardised(2, 3, 3), nn.GroupNorm(3, 3)), IMAGE),
    "scale": (lambda: nn.Sequential(nn.Linear(6, 6), Bare()), (6,)),
    "scale at the bottom": (lambda: nn.Sequential(Bare(), nn.Linear(6, 6)), (6,)),
    "two scales": (TwoScales, (6,)),
    "conv 1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, groups=2, padding="valid"), (2, 9)),
    "conv 1d, circular": (lambda: nn.Conv1d(2, 4, 3, padding_mode="circular", padding=1), (2, 9)),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2, padding=1), (2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, padding=1, groups=2), IMAGE),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 3, 3, 3)),
    "prelu": (lambda: nn.PReLU(), (2, 5)),
    "prelu, channels": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU(3)), IMAGE),
    "prelu, flat": (lambda: nn.PReLU(6), (6,)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)), (3, 6)),
    "bilinear": (lambda: Pair(nn.Bilinear(6, 6, 3)), (6,)),
    "lstm": (lambda: First(nn.LSTM(6, 4, batch_first=True)), (5, 6)),
    "weight norm": (lambda: weight_norm(nn.Linear(6, 6)), (6,)),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)).eval(), (6,)),
    "tied": (tied, (6,)),
    "used once, and behind its back": (lambda: Functional(1, True), (6,)),
    "used twice, and behind its back": (lambda: Functional(2, False), (6,)),
    "only behind its back": (lambda: Functional(0, True), (6,)),
    "repeated": (lambda: nn.Sequential(nn.Linear(6, 6), Repeated()), (3, 6)),
    "axes": (lambda: nn.Sequential(nn.Linear(24, 24), Axes()), (24,)),
    "forward of an instance": (
        lambda: with_forward(nn.Linear(6, 6), lambda f: lambda x: f(x).clamp(-1, 1)), (6,)
    ),
}  # fmt: skip


class Pair(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.flip(-1))


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Functional(nn.Module):
    """Uses the weight of a layer behind its back, after `calls` regular calls."""

    def __init__(self, calls, kept):
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 3)
        self.calls, self.kept = calls, kept

    def forward(self, x):
        h = x
        for _ in range(self.calls):
            h = self.linear(h)
        return self.last(F.linear(h if self.kept else x, self.linear.weight))


@pytest.mark.filterwarnings("ignore:the norms of")
@pytest.mark.parametrize("case", [name for name, (_, size) in ANY.items() if size])
def test_any_model(case):
    build, size = ANY[case]
    model, x = made(build), random(N, *size)
    assert_exact(model, lambda: squares(model(x)))
    # and where it is not the first, so that the images' side has a gradient
    assert_exact(model, lambda: squares(model(x.clone().requires_grad_())))


@pytest.mark.filterwarnings("error:the norms of")
@pytest.mark.parametrize("case", ["tokens", "windows", "repeated", "axes"])
def test_what_has_a_formula_is_not_taken_one_at_a_time(case):
    build, size = ANY[case]
    model, x = made(build), random(N, *size)
    assert_exact(model, lambda: squares(model(x)))


def test_rows_are_found_though_their_gradients_underflow():
    weights = torch.tensor([2.0, 8.0, 1.0])
    first = torch.tensor([[1.0, -2.0], [1e-45, 1e-45], [3.0, 1.0]])
    plain, probe = (0.3 * factor * first for factor in (torch.ones(3, 1), weights[:, None]))
    assert not plain[1].any() and probe[1].any()
    assert Summary.of(plain, 3).rows(Summary.of(probe, 3), weights) == (Rows(0, 3), True)
    assert Summary.of(plain, 3).rows(Summary.of(probe.flip(0), 3), weights)[0] is None


def test_a_layer_that_gradients_reach_late_is_looked_at_then():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.late = nn.Linear(24, 3), sequence_first(lambda: nn.Linear(6, 6))
            self.register_buffer("gate", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return self.first(x) + self.gate * self.late(x)

    model, x, checked = made(Gated), random(N, 24), Checked()
    for step in range(25):
        model.gate.fill_(step == 24)
        with Watch(model, checked=checked) as watch:
            losses = squares(model(x))
        watch.backward(losses)
        norms = watch.norms()
    torch.testing.assert_close(norms, loop_norms(squares(model(x)), list(model.parameters())))
    assert len(checked.plans) == 1  # not looked at anew in each step


class Gate(nn.Module):
    """Behind a gate that is shut at first, as ReZero has it, and a last layer that is zero."""

    def __init__(self, block, last=True):
        super().__init__()
        self.block, self.gate = block, nn.Parameter(torch.zeros(()))
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        if last:
            nn.init.zeros_(self.last.weight)
            nn.init.ones_(self.gate)

    def forward(self, x):
        h = self.first(x.unflatten(1, (5, 4)))
        if isinstance(self.block, nn.TransformerEncoderLayer):
            out = self.block(h.transpose(0, 1)).transpose(0, 1)  # [T, n, d], as torch has it
        else:
            out = self.block(h)[0]
        return self.last((h + self.gate * out)[:, -1])


LATE = {
    "gru": lambda: nn.GRU(6, 6, batch_first=True),
    "lstm": lambda: nn.LSTM(6, 6, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
}


@pytest.mark.filterwarnings("ignore:the norms of")
@pytest.mark.parametrize("last", [True, False], ids=["zero last layer", "gate"])
@pytest.mark.parametrize("block", LATE)
def test_what_no_gradient_reaches_in_the_first_step(block, last):
    torch.manual_seed(0)
    model = Gate(LATE[block](), last).double()
    reference, x = copy.deepcopy(model), random(N, 20)
    # weights of 1: what SGD does, weight decay included, whether a gradient is there or not
    optimizer = ENGM(model, 0.3, 0.9, weight_decay=0.1, scale=1e9, floor=1.0)
    sgd = torch.optim.SGD(reference.parameters(), 0.3, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        norms = loop_norms(classify(model, x), list(model.parameters()))
        optimizer.zero_grad()
        optimizer.step(lambda: classify(model, x))
        torch.testing.assert_close(optimizer.last.norms, norms, rtol=1e-9, atol=1e-15)
        sgd.zero_grad()
        classify(reference, x).mean().backward()
        sgd.step()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-9) for p, q in pairs)


PAIRS = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)  # x and x_adv of two
STEPS = torch.tensor([[[7.0], [8.0]], [[1.0], [4.0]]], dtype=torch.float64)  # [T, n, d]


class Table(nn.Module):
    """A look-up in a table that is made of parameters."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 1))

    def forward(self, ids):
        return F.embedding(torch.tensor(ids), self.table * 2)[:, 0]


class Product(nn.Module):
    """No layer, so that none says what shape anything has."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.factor


def paired(model, mask):
    out = model(PAIRS)[:, 0] * torch.tensor(mask)
    return out[:2] + out[2:]


def with_root(model, mask):
    h = model(STEPS)[-1, :, 0]
    return h + (torch.tensor(mask) * h).sqrt()


LINE = partial(nn.Linear, 1, 1, bias=False)
# a first step that says too little of the rows, and a later one: (model, losses, first, later)
TOO_LITTLE = {
    "one row of a pair": (LINE, paired, (1, 0, 0, 0), (1, 1, 1, 1)),
    "one example, sequence first": (
        LINE, lambda m, mask: m(STEPS)[-1, :, 0] * torch.tensor(mask), (0, 1), (1, 1),
    ),
    "a gradient that is nan": (LINE, with_root, (0, 1), (1, 1)),
    "ids in order": (Table, lambda m, ids: m(ids) * torch.tensor([1, 3]), [0, 2], [2, 0]),
    "another shape": (
        Product, lambda m, x: m(x)[:, 0].view(-1, 2).mean(0), PAIRS[:2], PAIRS,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the norms of")
@pytest.mark.parametrize("case", TOO_LITTLE)
def test_a_step_that_says_too_little_of_the_rows_does_not_decide_for_later_ones(case):
    build, losses, first, later = TOO_LITTLE[case]
    model = build().double()
    nn.init.ones_(next(model.parameters()))
    optimizer = ENGM(model, 0.0, scale=1.0)
    for batch in (first, later):
        optimizer.zero_grad()
        optimizer.step(partial(losses, model, batch))
    norms = loop_norms(losses(model, later), list(model.parameters()))
    torch.testing.assert_close(optimizer.last.norms, norms)


def test_the_rows_of_outputs_are_found_anew_where_their_shape_is_another():
    model, c = LINE().double(), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def later():
        out = model(PAIRS)[:, 0] * c
        return out[:2] + out[2:]

    optimizer = ENGM(model, 0.0, norms="output", refresh_every=None)
    optimizer.step(lambda: model(PAIRS[:2])[:, 0])
    optimizer.step(later)
    torch.testing.assert_close(optimizer.last.norms, torch.tensor([10.0, 20.0]).double().sqrt())


def test_what_lies_under_a_stop_is_left_alone_and_a_model_of_nothing_else_is_refused():
    model = made(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))))
    nn.init.zeros_(model[2].weight)
    before, x = copy.deepcopy(model.state_dict()), random(N, 6)
    optimizer = ENGM(model, 0.1, weight_decay=0.1)
    optimizer.step(lambda: squares(model[2](model[1](Stop.apply(model[0](x))))))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("0"), name
    for norms in ("exact", "loop"):
        with pytest.raises(InputError, match="do not depend on any of the parameters"):
            ENGM(model, 0.1, norms=norms).step(lambda: squares(Stop.apply(model(x))))


class HandMade(nn.Module):
    """A batch norm that is written by hand."""

    def forward(self, h):
        return (h - h.mean(0)) / (h.var(0) + 1).sqrt()


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def masked(model, x):
    logits, mask = model(x), torch.arange(len(x)) % 2 == 0
    ce = F.cross_entropy(logits[mask], torch.zeros(int(mask.sum())).long(), reduction="none")
    return torch.cat([ce, logits[~mask].square().sum(1)])


MEETING = {
    "parts by a mask": masked,
    "sorted": lambda model, x: classify(model, x).sort().values,
    "logits minus their mean": lambda model, x: squares(model(x) - model(x).mean(0)),
    "weights of the batch": lambda model, x: classify(model, x) * classify(model, x).softmax(0),
    "variance": lambda model, x: classify(model, x) + classify(model, x).var(),
    "pairs": lambda model, x: (model(x) - model(x).flip(0)).square().sum(1),
    "triplets": lambda model, x: (model(x) - model(x).roll(1, 0)).square().sum(1),
}


@pytest.mark.filterwarnings("ignore:the norms of")
@pytest.mark.parametrize("case", MEETING)
def test_where_examples_meet_they_are_taken_one_at_a_time(case):
    model, x = made(network), random(N, 6)
    assert_exact(model, lambda: MEETING[case](model, x))


def test_a_batch_norm_that_is_written_by_hand():
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), HandMade(), nn.Linear(5, 3)))
    with pytest.warns(UserWarning, match="the norms of 0.weight, 0.bias are found one example at"):
        assert_exact(model, lambda: classify(model, random(N, 6)))


@pytest.mark.parametrize("where", ["as a function", "outside of the model"])
def test_a_batch_norm_that_is_no_layer_of_the_model(where):
    # counts as one that is
    model = made(network)
    head = nn.BatchNorm1d(3, dtype=torch.float64)
    x, weights = random(N, 6), random(N, seed=1)

    def closure():
        h = model(x)
        function = F.batch_norm(h, None, None, head.weight, head.bias, training=True)
        return classify(head if where == "outside of the model" else lambda _: function, h)

    with Watch(nn.Sequential(model, head)) as watch:
        losses = closure()
    watch.backward(losses)
    squares_of = watch.squares()
    with Watch(model) as watch:
        losses = closure()
    watch.backward(losses)
    for parameter, squares in watch.squares().items():
        torch.testing.assert_close(squares, squares_of[parameter])
    whole = autograd_of((weights * closure()).sum(), list(model.parameters()))
    assert_same(watch.weighted(weights), whole)


def test_a_gradient_penalty():
    model = made(network)
    x = random(N, 6).requires_grad_()

    def closure():
        losses = classify(model, x)
        (g,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + g.square().sum(1)

    assert_exact(model, closure)


def refused(model, closure, message):
    with pytest.raises(InputError, match=message):
        ENGM(model, 0.1).step(closure)
    assert all(p.grad is None for p in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_parameters_put_in_place_of_the_models_own():
    model = made(network)
    x = random(N, 6)

    def call(change):
        changed = {k: change(p) for k, p in model.named_parameters()}
        return classify(lambda x: functional_call(model, changed, (x,)), x)

    assert_exact(model, lambda: call(lambda p: 2 * p))
    # another model's parameters, as of a teacher, are none of this model's business
    refused(model, lambda: call(lambda p: p.detach().clone().requires_grad_()), "the same model")
    assert_exact(
        model,
        lambda: classify(model, x) + call(lambda p: p.detach().clone().requires_grad_()),
    )


def test_an_input_that_is_changed_in_place_after_the_layer_saw_it():
    model = made(network)

    def closure():
        x = random(N, 6)
        losses = classify(model, x)
        x.mul_(2)
        return losses

    refused(model, closure, "the input of layer '0' was changed in place")


@pytest.mark.parametrize("order", ["cat", "repeat_interleave"])
def test_several_rows_an_example(order):
    model = made(lambda: nn.Sequential(Residual(), nn.Linear(3, 3)))
    x = random(N, *IMAGE)
    both = torch.cat([x, x + 0.1]) if order == "cat" else x.repeat_interleave(2, 0)

    def closure():
        losses = squares(model(both))
        return losses.view(2, N).sum(0) if order == "cat" else losses.view(N, 2).sum(1)

    assert_exact(model, closure)


def test_batch_norm_that_changes_mode_within_the_closure():
    model = made(batch_norm_2d)
    x = random(N, *IMAGE)

    def closure():
        clean = classify(model.eval(), x)
        return clean + classify(model.train(), x)

    refused(model, closure, "was put from train into eval mode, or back")


def test_losses_of_another_model():
    model, other = made(Residual), made(Residual)
    x = random(N, *IMAGE)
    refused(model, lambda: classify(other, x), "is it the same model")
    # nor does a call count that has no part in them
    refused(model, lambda: classify(other, x) + 0 * model(x).detach()[:, 0], "is it the same model")


def test_wrapped_models_are_refused():
    model = Residual()
    with pytest.raises(InputError, match="before torch.compile"):
        ENGM(torch.compile(model, backend="eager"), 0.1)
    with pytest.raises(InputError, match=r"the bare model.*model.module, in the closure too"):
        ENGM(nn.DataParallel(model), 0.1)


@pytest.mark.filterwarnings("ignore:the norms of")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_version_in_the_closure_gives_the_right_answer_or_none(backend, warm):
    # Compiled while the layers are watched, it works: the pieces end where a layer is called. With
    # a version that was compiled before, such as by an attack, the layers see nothing.
    torch._dynamo.reset()
    model = made(network)
    compiled = torch.compile(model, backend=backend)
    x, weights = random(N, 6), random(N, seed=1)
    parameters = list(model.parameters())
    losses = classify(model, x)
    norms = loop_norms(losses, parameters)
    whole = autograd_of((weights * losses).sum(), parameters)
    for _ in range(3):
        if warm:
            compiled(x)
        with Watch(model) as watch:
            losses = classify(compiled, x)
        try:
            watch.backward(losses)
        except InputError as error:
            said = str(error)
        else:
            said = None
            torch.testing.assert_close(watch.norms(), norms, rtol=1e-9, atol=0)
            assert_same(watch.weighted(weights), whole)
        assert said is None or "the model is compiled" in said


# Nothing is left behind


@pytest.mark.parametrize("norms", ["exact", "input", "loop"])
def test_nothing_outlives_the_step(norms):
    model = made(lambda: small_cnn(num_classes=3, width=4, norm="batch", in_channels=2))
    optimizer = ENGM(model, 0.1, norms=norms, refresh_every=2)
    x = random(8, *IMAGE)
    alive = []

    def closure():
        hooks = [
            module.register_forward_hook(lambda m, args, out: alive.append(weakref.ref(out)))
            for module in model.modules()
        ]
        logits = model(x)
        for hook in hooks:
            hook.remove()
        alive.append(weakref.ref(logits))
        return F.cross_entropy(logits, torch.arange(8) % 3, reduction="none")

    gc.collect()
    gc.disable()  # no cycle is left for it to find
    try:
        for _ in range(3):
            losses = optimizer.step(closure, inputs=x)
            assert len(alive) > 10
            assert not losses.requires_grad
            assert not any(ref() is not None and ref() is not x for ref in alive)
            assert all(not module._forward_hooks for module in model.modules())
            alive.clear()
    finally:
        gc.enable()


def test_what_a_share_does_not_need_is_let_go_within_the_pass():
    x, checked = torch.randn(N, 8, 16, 16), Checked()

    def peak(depth, exact):
        layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)) for _ in range(depth)]
        model = nn.Sequential(*(layer for pair in layers for layer in pair))

        def step():
            with Watch(model, checked=checked) as watch:
                losses = model(x).square().flatten(1).sum(1)
            if exact:
                watch.backward(losses)
                watch.weighted(torch.ones(N))
            else:
                losses.sum().backward()

        step()  # the check, which a later step does not make
        model.zero_grad()
        return peak_bytes(step, x.device)

    activation = 4 * x.numel()
    extra = [peak(depth, True) - peak(depth, False) for depth in (4, 12)]
    assert peak(12, False) - peak(4, False) > 15 * activation
    assert extra[1] - extra[0] < activation  # the room of one image batch, however deep


@pytest.mark.parametrize("norms", ["exact", "input"])
def test_nothing_outlives_a_closure_that_raises(norms):
    model = made(Residual)
    optimizer = ENGM(model, 0.1, norms=norms)
    x, alive = random(N, *IMAGE), []

    def closure():
        h = model(x)
        alive.append(weakref.ref(h))
        raise KeyError("closure")

    gc.collect()
    gc.disable()
    try:
        for wrong in (closure, lambda: classify(model, x).sum()):
            with pytest.raises((KeyError, InputError)) as caught:
                optimizer.step(wrong, inputs=x)
            del caught
            assert all(not module._forward_hooks for module in model.modules())
            assert all(ref() is None for ref in alive)
            assert not x.requires_grad
    finally:
        gc.enable()
    optimizer.step(lambda: classify(model, x), inputs=x)  # and it goes on


def test_only_parameters_with_a_part_get_a_gradient():
    model = made(Unused)
    x = random(N, 6)
    before = copy.deepcopy(model.state_dict())
    ENGM(model, 0.1, weight_decay=0.1).step(lambda: squares(model(x)))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("first"), name
        assert torch.equal(parameter, before[name]) != name.startswith("first"), name


def test_outputs_buffers_and_random_numbers_are_those_of_a_plain_pass():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(80, 3)
    )
    watched = copy.deepcopy(plain)
    x = random(N, *IMAGE).float()
    torch.manual_seed(1)
    losses = classify(plain, x)
    losses.sum().backward()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    found = ENGM(watched, 1e-30).step(lambda: classify(watched, x))
    assert torch.equal(found, losses.detach())
    assert torch.equal(torch.get_rng_state(), after)
    for (name, p), q in zip(plain.named_buffers(), watched.buffers(), strict=True):
        assert torch.equal(p, q), name
    assert watched.training


def test_norms_and_gradients_under_autocast():
    torch.manual_seed(0)
    model = small_cnn(num_classes=3, width=8, norm="group")
    x = torch.rand(8, 3, 16, 16)
    weights = torch.rand(8) + 0.5

    def losses_in(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            return classify(model, x)

    def measured(dtype):
        with Watch(model) as watch:
            losses = losses_in(dtype)
        watch.backward(losses)
        return watch.norms(), watch.weighted(weights)

    norms, gradients = measured(torch.float32)
    coarse, rough = measured(torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, norms)
    torch.testing.assert_close(coarse, norms, rtol=0.05, atol=0)
    plain = autograd_of((weights * losses_in(torch.bfloat16)).sum(), list(model.parameters()))
    for parameter, gradient in plain.items():
        assert (rough[parameter] - gradient).norm() < 0.02 * gradient.norm()
    apart = sum((rough[p] - g).square().sum() for p, g in gradients.items())
    assert apart < 0.1**2 * sum(g.square().sum() for g in gradients.values())
    optimizer = ENGM(model, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: classify(model, x))
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(optimizer.last.norms, norms, rtol=0.05, atol=0)


# Whole runs


def run(model, optimizer, steps, parts=None, start=0):
    for step in range(start, start + steps):
        x = random(6, *IMAGE, seed=step)
        optimizer.zero_grad()
        if parts is None:
            optimizer.step(lambda: classify(model, x), inputs=x)
        else:
            y = torch.arange(6) % 3
            for rows in torch.arange(6).split(parts):
                part = x[rows]
                optimizer.accumulate(
                    lambda: F.cross_entropy(model(part), y[rows], reduction="none"), part
                )
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def reused():
    return nn.Sequential(Twice(), nn.Linear(2, 3))


@pytest.mark.parametrize("build", [Residual, reused])
def test_exact_and_loop_are_one_optimizer(build):
    ends = []
    for norms in ("exact", "loop"):
        model = made(build)
        ends.append(
            run(model, ENGM(model, 0.05, weight_decay=5e-4, norms=norms, nesterov=True), 30)
        )
    assert not torch.equal(*ends)  # two ways of computing it
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("norms", ["exact", "loop"])
@pytest.mark.parametrize("scale", [0.7, "mean"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_make_the_step_of_the_whole(norms, scale, parts):
    ends = []
    for split in (None, parts):
        model = made(Residual)
        optimizer = ENGM(model, 0.05, weight_decay=5e-4, scale=scale, norms=norms)
        run(model, optimizer, 1)  # under "mean" the first step's scale is that of its first part
        ends.append(run(model, optimizer, 4, split, start=1))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_parameter_groups_have_learning_rates_of_their_own():
    ends = []
    for norms in ("exact", "loop"):
        model = frozen(made(Residual), "last.weight", "last.bias")
        optimizer = ENGM(model, 0.05, norms=norms)
        run(model, optimizer, 1)
        # thawed in the middle of the run, with a small learning rate
        model.last.requires_grad_(True)
        before = model.last.weight.detach().clone()
        optimizer.add_param_group({"params": list(model.last.parameters()), "lr": 1e-3})
        run(model, optimizer, 1, start=1)
        step = (model.last.weight - before).detach()
        torch.testing.assert_close(step, -1e-3 * model.last.weight.grad)
        assert step.norm() > 0
        model.first.requires_grad_(False)
        model.zero_grad()
        ends.append(run(model, optimizer, 2, start=2))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_an_operation_of_which_one_output_alone_counts_is_measured():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])  # of the way back a single step

    model = Last().double()
    for n in (2, 5):
        x = random(n, 4, 4)
        assert_exact(model, lambda x=x: classify(model, x))
