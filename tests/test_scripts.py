"""What people do in scripts of their own: each is right, or refused by name."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from engm import AWP, ENGM, MSGD
from engm.bench.measuring import peak_bytes
from engm.errors import InputError
from engm.norms import register_formula
from engm.norms.watch import loop_norms

N = 6
BATCH = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(N) % 3


def network(norm=None):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), norm or nn.Identity(), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def losses_of(model, x=BATCH, y=LABELS):
    return F.cross_entropy(model(x), y, reduction="none")


def step(model, optimizer, x=BATCH, y=LABELS):
    optimizer.zero_grad()
    return optimizer.step(lambda: losses_of(model, x, y), inputs=x)


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def make(name, model):
    if name == "msgd":
        return MSGD(model.parameters(), 0.1, momentum=0.9)
    return ENGM(model, 0.1, norms=name, refresh_every=None if name == "output" else 2)


NAMES = ["msgd", "exact", "input", "output", "both", "loop"]
quiet = pytest.mark.filterwarnings("ignore:at step")


@quiet
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_as_the_optimizer_does(name, way, tmp_path):
    model = network(nn.GroupNorm(1, 5))
    optimizer = make(name, model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own on the instance
    step(model, optimizer)
    if way == "deepcopy":
        other, twin = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        torch.save((model, optimizer), tmp_path / "both.pt")
        other, twin = torch.load(tmp_path / "both.pt", weights_only=False)
    for _ in range(3):
        step(model, optimizer)
        step(other, twin)
    assert torch.equal(weights_of(model), weights_of(other))
    assert not torch.equal(weights_of(model), weights_of(network(nn.GroupNorm(1, 5))))


def test_the_last_step_tells_of_all_parts():
    model = network()
    optimizer = ENGM(model, 0.1)
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        optimizer.accumulate(lambda rows=rows: losses_of(model, BATCH[rows], LABELS[rows]))
    norms = loop_norms(losses_of(model), list(model.parameters()))
    torch.testing.assert_close(optimizer.last.norms, norms)
    optimizer.step()
    assert len(optimizer.last.weights) == len(optimizer.last.good) == N
    step(model, optimizer)
    assert len(optimizer.last.weights) == N  # of the new batch alone


@pytest.mark.parametrize("name", ["msgd", "exact", "loop"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_within_the_closure_keeps_earlier_parts(name, set_to_none):
    models = network(), network()
    for model, inside in zip(models, (False, True), strict=True):
        optimizer = make(name, model)
        step(model, optimizer)
        optimizer.zero_grad(set_to_none)

        def closure(rows, model=model, optimizer=optimizer, inside=inside):
            if inside:
                optimizer.zero_grad(set_to_none)
            return losses_of(model, BATCH[rows], LABELS[rows])

        for rows in (slice(0, 4), slice(4, 6)):
            optimizer.accumulate(lambda rows=rows, closure=closure: closure(rows))
        optimizer.step()
    assert torch.equal(*map(weights_of, models))


@pytest.mark.parametrize("name", ["msgd", "exact"])
def test_step_hooks_run_once(name):
    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)  # puts hooks on the step of the parent, too
    model = network()
    optimizer = make(name, model)
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))
    step(model, optimizer)
    assert ran == ["before", "after"]


@quiet
@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_backward_pass_within_the_closure_is_refused(name, retain):
    model = network()
    optimizer = make(name, model)
    before = weights_of(model)

    def closure():
        losses = losses_of(model)
        losses.mean().backward(retain_graph=retain)
        return losses

    with pytest.raises(InputError, match="a backward pass within the closure filled p.grad"):
        optimizer.step(closure, inputs=BATCH)
    assert torch.equal(weights_of(model), before)
    step(model, optimizer)  # and it goes on


@quiet
@pytest.mark.parametrize("makes", [torch.tanh, torch.abs])  # saves its output, or the parameter
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_an_earlier_step_is_to_be_detached(name, makes):
    model = network()
    optimizer = make(name, model)
    kept = makes(next(model.parameters())).sum()

    def closure():
        return losses_of(model) * kept

    optimizer.step(closure, inputs=BATCH)
    optimizer.zero_grad()
    with pytest.raises(InputError, match=r"depend on the graph of an earlier pass.* h\.detach"):
        optimizer.step(closure, inputs=BATCH)
    step(model, optimizer)  # and it goes on


@pytest.mark.parametrize(
    ("closure", "way_out"),
    [
        (lambda model: losses_of(model).mean().backward(), "returns nothing.*leave backward"),
        (lambda model: losses_of(model).backward(), "return the losses, one per example, without"),
    ],
)
@pytest.mark.parametrize("name", ["msgd", "exact"])
def test_a_closure_that_goes_backward_as_a_script_did_is_told_what_to_return(
    name, closure, way_out
):
    model = network()
    optimizer = make(name, model)
    with pytest.raises(InputError, match=way_out):
        optimizer.step(lambda: closure(model))


def test_losses_from_outside_of_the_closure_leave_no_graph_behind():
    model = network()
    optimizer = ENGM(model, 0.1)
    losses = losses_of(model)
    expected = loop_norms(losses, list(model.parameters()))
    optimizer.step(lambda: losses)
    torch.testing.assert_close(optimizer.last.norms, expected)
    assert not optimizer.last.norms.requires_grad and not optimizer.last.weights.requires_grad


@quiet
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_that_hide_parameters_are_refused(name):
    model = network()
    x = BATCH.clone().requires_grad_()
    optimizer = make(name, model)
    with pytest.raises(InputError, match="4 parameters get .* use_reentrant=False"):
        optimizer.step(
            lambda: losses_of(lambda x: checkpoint(model, x, use_reentrant=True), x), inputs=x
        )


def test_checkpoints():
    model = network(nn.LayerNorm(5))
    parameters = list(model.parameters())
    norms = loop_norms(losses_of(model), parameters)
    optimizer = ENGM(model, 0.1)
    h = lambda: checkpoint(model[:3], BATCH, use_reentrant=False)  # noqa: E731
    optimizer.step(lambda: F.cross_entropy(model[3](h()), LABELS, reduction="none"))
    torch.testing.assert_close(optimizer.last.norms, norms)


def under_checkpoints(norm, name, n, lr=0.0, refresh_every=None):
    """Returns a step, which returns its norms, of a network with or without checkpoints."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(64, 64), norm(64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(4)
    ]
    model = nn.Sequential(*blocks)
    x, y = torch.randn(n, 64), torch.arange(n) % 64
    optimizer = ENGM(model, lr, norms=name, refresh_every=refresh_every)

    def run(checkpoints, first=0):
        def forward(h):
            for k, block in enumerate(blocks):
                under = checkpoints and k >= first
                h = checkpoint(block, h, use_reentrant=False) if under else block(h)
            return h

        model.forward = forward
        step(model, optimizer, x, y)
        optimizer.zero_grad()
        return optimizer.last.norms

    return run


@pytest.mark.filterwarnings("ignore:at step .* the line of the estimate")
@pytest.mark.parametrize("refresh_every", [2, None])
@pytest.mark.parametrize("name", ["exact", "input", "output", "both"])
def test_checkpoints_change_nothing(name, refresh_every):
    without = under_checkpoints(nn.LayerNorm, name, 8, 0.1, refresh_every)
    under = under_checkpoints(nn.LayerNorm, name, 8, 0.1, refresh_every)
    for _ in range(5):
        # float32: what rounding does to the first step grows in the later ones
        torch.testing.assert_close(under(True, first=1), without(False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "first", "later"), [("exact", 0.6, 0.37), ("output", 0.8, 0.8), ("input", 0.8, 0.8)]
)
def test_checkpoints_save_memory(name, first, later):
    firsts, peaks = [], []
    for checkpoints in (False, True):
        run = under_checkpoints(nn.LayerNorm, name, 512)
        for found in (firsts, peaks):
            found.append(peak_bytes(lambda c=checkpoints, r=run: r(c, 1), torch.device("cpu")))
    assert firsts[1] < first * firsts[0] and peaks[1] < later * peaks[0], (firsts, peaks)
    if name == "input":
        with pytest.raises(
            InputError, match="nor, with norms='input' or 'both', round the first layer"
        ):
            run(True)


@pytest.mark.parametrize("name", ["exact", "input", "output", "loop"])
def test_selective_checkpoints(name):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)).double()
    policy = lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE  # noqa: E731
    how = dict(
        use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
    )
    model.forward = lambda x: model[2](checkpoint(model[1], model[0](x), **how))
    if name == "output":
        return step(model, make(name, model))
    with pytest.raises(InputError, match="checkpoints with context_fn= allow one backward pass"):
        step(model, make(name, model))


@pytest.mark.parametrize("name", ["exact", "input", "output", "loop"])
def test_checkpoints_round_batch_norm(name):
    run = under_checkpoints(nn.BatchNorm1d, name, 8)
    if name in ("output", "loop"):
        return run(True)
    with pytest.raises(InputError, match="no checkpoint round batch norms in train mode"):
        run(True)


class Reversible(torch.autograd.Function):
    """Has a backward pass of its own for the layer within."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(gradient)
        return x.grad, None


def test_a_function_with_a_backward_pass_of_its_own_is_refused():
    model = network()
    first = nn.Linear(4, 4).double()
    both = nn.Sequential(first, model[0], model[3])
    h = lambda: Reversible.apply(first(BATCH), model[0])  # noqa: E731
    optimizer = ENGM(both, 0.1)
    with pytest.raises(InputError, match="from a backward pass within a function of the model"):
        optimizer.step(lambda: F.cross_entropy(model[3](h()), LABELS, reduction="none"))


@pytest.mark.parametrize("name", ["exact", "input"])
def test_hooks_on_gradients_are_refused(name):
    model = network()
    model[0].weight.register_hook(lambda g: 0 * g)
    with pytest.raises(InputError, match=r"0\.weight has a hook on its gradient"):
        step(model, make(name, model))


@pytest.mark.parametrize("name", ["msgd", "exact", "loop"])
def test_two_parameters_with_one_gradient(name):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = (nn.Parameter(torch.ones(4, 3).double()) for _ in range(2))

        def forward(self, x):
            return x @ (self.p + self.q)

    model = Sum()
    optimizer = make(name, model)
    optimizer.max_norm = 0.05
    losses = losses_of(model)
    factor = torch.ones(N).double()
    if name != "msgd":
        norms = loop_norms(losses, [model.p, model.q])
        factor = norms.mean() / norms
    both = torch.autograd.grad((factor * losses).mean(), [model.p, model.q], retain_graph=True)
    length = torch.stack([g.norm() for g in both]).norm()
    step(model, optimizer)
    for parameter, gradient in zip((model.p, model.q), both, strict=True):
        torch.testing.assert_close(
            parameter.detach(), 1 - 0.1 * gradient * 0.05 / length, rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("how", ["unfrozen", "put in"])
def test_parameters_that_came_later_are_named(how):
    model = network()
    model[3].bias.requires_grad_(how == "put in")
    optimizer = ENGM(model, 0.1)
    if how == "unfrozen":
        model[3].bias.requires_grad_()
    else:
        model[3].bias = nn.Parameter(torch.zeros(3).double())
    with pytest.raises(InputError, match=r"3\.bias became trainable, or was put in, after ENGM"):
        step(model, optimizer)


def test_the_order_of_awps_paper_is_refused():
    model = network()
    optimizer, before = ENGM(model, 0.1), weights_of(model)
    with (
        pytest.raises(InputError, match="the step is undone"),
        AWP(0.01)(model, lambda: losses_of(model)),
    ):
        optimizer.step(lambda: losses_of(model))
    assert torch.equal(model[0].weight.flatten(), before[:20])
    for _ in range(2):
        with AWP(0.01)(model, lambda: losses_of(model)):
            optimizer.accumulate(lambda: losses_of(model))
        optimizer.step()


def test_a_model_that_an_attack_left_in_eval_mode_is_told_once():
    model = network(nn.BatchNorm1d(5))
    optimizer = ENGM(model, 0.1)
    step(model, optimizer)
    model.eval()
    with pytest.warns(UserWarning, match="in eval mode, though it was in train mode"):
        step(model, optimizer)
    step(model, optimizer)  # warnings are errors here


def penalty(model):
    return 0.25 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_a_penalty_in_the_losses_is_told_of_and_the_ways_out_are_sgd(norm):
    model = network(norm(5))
    terms = [
        lambda: penalty(model), lambda: -penalty(model), lambda: penalty(model) + losses_of(model),
    ]  # fmt: skip
    for term in terms:
        optimizer = ENGM(model, 0.1)
        with pytest.warns(UserWarning, match=r"weight_decay instead, or call penalty\.backward"):
            optimizer.step(lambda term=term: 2 * (1 - (losses_of(model) - term())))
        optimizer.step(lambda term=term: losses_of(model) + term())  # it is said once
    # of the losses themselves, or no weights in it
    for loss in (lambda: losses_of(model) + 3.0, lambda: losses_of(model) * model[0].bias.sum()):
        ENGM(model, 0.1, norms="output", refresh_every=None).step(loss)
    # with weights of 1, by both ways out, as SGD
    ways = {name: network(norm(5)) for name in ("sgd", "decay", "backward")}
    for name, model in ways.items():
        if name == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        else:
            decay = 0.5 if name == "decay" else 0.0
            optimizer = ENGM(model, 0.1, weight_decay=decay, scale=1e9, floor=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            if name != "decay":
                penalty(model).backward()
            if name == "sgd":
                losses_of(model).mean().backward()
                optimizer.step()
            else:
                optimizer.step(lambda model=model: losses_of(model))
    for name in ("decay", "backward"):
        torch.testing.assert_close(weights_of(ways[name]), weights_of(ways["sgd"]))


def test_groups():
    model = network(nn.LayerNorm(5))
    plain = network(nn.LayerNorm(5))
    groups = [{"params": ["0.bias", model[1], model[3].bias], "weight_decay": 0.0}]
    optimizer = ENGM(model, 0.1, weight_decay=0.5, groups=groups)
    other = ENGM(plain, 0.1, weight_decay=0.5)
    step(model, optimizer)
    step(plain, other)
    started = dict(network(nn.LayerNorm(5)).named_parameters())
    for (name, own), decayed in zip(model.named_parameters(), plain.parameters(), strict=True):
        free = name not in ("0.weight", "3.weight")
        difference = (own - decayed).detach()
        torch.testing.assert_close(difference, 0.05 * started[name].detach() * free)
    assert len(optimizer.param_groups) == 2
    with pytest.raises(InputError, match="a group lists names of parameters.*got '9.bias'"):
        ENGM(model, 0.1, groups=[{"params": ["9.bias"]}])
    with pytest.raises(InputError, match="that the model does not have"):
        ENGM(model, 0.1, groups=[{"params": [nn.Parameter(torch.ones(1))]}])


def test_a_grad_scaler_is_refused_with_the_way_out():
    model = network()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = ENGM(model, 0.1)
    scaler.scale(losses_of(model).mean()).backward()
    with pytest.raises(InputError, match="use bfloat16"):
        scaler.step(optimizer)


# Estimated norms


@pytest.mark.parametrize("of", ["input", "output", "both"])
def test_without_a_line_norms_are_the_proxy(of):
    model = network()
    x = BATCH.clone().requires_grad_()
    logits = model(x)
    losses = F.cross_entropy(logits, LABELS, reduction="none")
    by_input, by_output = (
        g.norm(dim=1) for g in torch.autograd.grad(losses.sum(), [x, logits], retain_graph=True)
    )
    expected = {
        "input": by_input,
        "output": (logits.softmax(1) - F.one_hot(LABELS, 3)).norm(dim=1).detach(),
        "both": (by_input / by_input.mean() + by_output / by_output.mean()) / 2,
    }[of]
    started = weights_of(model)
    gradient = torch.autograd.grad(
        (losses * expected.mean() / expected).mean(), list(model.parameters())
    )
    optimizer = ENGM(model, 0.1, norms=of, refresh_every=None)
    step(model, optimizer)
    torch.testing.assert_close(optimizer.last.norms, expected)
    moved = (started - weights_of(model)) / 0.1
    torch.testing.assert_close(moved, torch.cat([g.flatten() for g in gradient]))


def test_the_joint_fit_is_that_of_least_squares():
    model = network()
    optimizer = ENGM(model, 0.1, norms="both")
    x = BATCH.clone().requires_grad_()
    logits = model(x)
    losses = F.cross_entropy(logits, LABELS, reduction="none")
    norms = loop_norms(losses, list(model.parameters()))
    outputs, inputs = torch.autograd.grad(losses.sum(), [logits, x])
    columns = torch.stack([outputs.norm(dim=1), inputs.norm(dim=1), torch.ones(N).double()], 1)
    solution = torch.linalg.lstsq(columns, norms[:, None]).solution[:, 0]
    step(model, optimizer)
    (fit,) = optimizer.measure.estimate.fits
    torch.testing.assert_close(torch.tensor([*fit.alpha, fit.beta]).double(), solution.double())
    rest = norms - columns @ solution
    r_squared = 1 - rest.square().sum() / (norms - norms.mean()).square().sum()
    assert fit.r_squared == pytest.approx(float(r_squared))


def test_a_proxy_without_a_line_takes_any_model():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.save_for_backward(x, p)
            return x * p

        @staticmethod
        def backward(ctx, g):
            x, p = ctx.saved_tensors
            return g * p, (g * x).sum(0)

    model = network()
    scale = nn.Parameter(torch.ones(4).double())
    model.register_parameter("scale", scale)
    x = BATCH.clone()
    optimizer = ENGM(model, 0.1, norms="input", refresh_every=None)
    optimizer.step(lambda: losses_of(model, Odd.apply(x, scale)), inputs=x)
    assert not torch.equal(scale.detach(), torch.ones(4).double())


@pytest.mark.parametrize("of", ["input", "output"])
def test_losses_in_another_order_than_the_images_are_refused(of):
    model = network()
    optimizer = ENGM(model, 0.1, norms=of, refresh_every=None)
    with pytest.raises(InputError, match="give losses in the order of the images"):
        optimizer.step(lambda: losses_of(model).sort().values, inputs=BATCH)


def test_the_outputs_have_to_be_those_of_the_model():
    model = network()
    optimizer = ENGM(model, 0.1, norms="output", refresh_every=None)
    with pytest.raises(InputError, match=r"call the model that ENGM was given, by model\(x\)"):
        optimizer.step(lambda: losses_of(model[:]))


# A layer of one's own


class Powers(nn.Module):
    """Has no formula in the graph."""

    def __init__(self, size):
        super().__init__()
        self.exponent = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return (x.square() + 1) ** self.exponent


@pytest.mark.parametrize("right", [True, False])
def test_a_formula_of_ones_own(right, monkeypatch):
    from engm.norms import layers

    monkeypatch.setattr(layers, "_REGISTRY", dict(layers._REGISTRY))
    seen = []

    def gradients(layer, a, b):
        seen.append(a)
        base = a.square() + 1
        return {"exponent": b * base**layer.exponent * (base.log() if right else 1)}

    register_formula(Powers, gradients)
    model = network(Powers(5))
    norms = loop_norms(losses_of(model), list(model.parameters()))
    optimizer = ENGM(model, 0.1)
    if right:
        step(model, optimizer)
    else:  # found out, and not used
        with pytest.warns(UserWarning, match=r"the norms of 1\.exponent are found one example"):
            step(model, optimizer)
    assert seen
    torch.testing.assert_close(optimizer.last.norms, norms)
    with pytest.raises(InputError, match="takes a class of layers"):
        register_formula(Powers(3), gradients)
