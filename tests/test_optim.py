import copy
import io
import statistics
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engm.config import RunConfig
from engm.errors import InputError, NonFiniteLossError
from engm.norms.watch import loop_norms
from engm.optim import ENGM, MSGD, build, example_weights


def network(norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(0)
    middle = [norm(4)] if norm else []
    layers = [nn.Conv2d(1, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)]
    return nn.Sequential(*layers).double()


def batch(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (n,), generator=generator)


def losses_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def one_by_one(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[list[torch.Tensor]]:
    """The oracle: each example alone through the model."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    return rows


def norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def test_loop_norms_are_those_of_each_example_alone():
    model, (x, y) = network(), batch()
    expected = torch.stack([norm_of(row) for row in one_by_one(model, x, y)])
    found = loop_norms(losses_of(model, x, y), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_batch_norm_in_train_mode_couples_examples_and_shares_still_add_up():
    model, (x, y) = network(nn.BatchNorm2d), batch()
    parameters = list(model.parameters())
    losses = losses_of(model, x, y)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    whole = torch.autograd.grad(losses.sum(), parameters, retain_graph=True)
    for index, gradient in enumerate(whole):
        torch.testing.assert_close(sum(row[index] for row in rows), gradient, rtol=1e-9, atol=1e-12)
    expected = torch.stack([norm_of(list(row)) for row in rows])
    torch.testing.assert_close(loop_norms(losses, parameters), expected, rtol=1e-12, atol=0)
    # in eval mode an example is on its own again
    model.eval()
    alone = torch.stack([norm_of(row) for row in one_by_one(model, x, y)])
    torch.testing.assert_close(loop_norms(losses_of(model, x, y), parameters), alone)


@pytest.mark.parametrize("scale", [0.7, "mean"])
@pytest.mark.parametrize("floor", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_engm_takes_the_steps_of_the_equations(scale, floor, nesterov):
    model = network()
    reference = copy.deepcopy(model)
    lr, momentum, decay = 0.05, 0.9, 0.01
    optimizer = ENGM(
        model, lr, momentum, weight_decay=decay, scale=scale, floor=floor, nesterov=nesterov
    )
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    running = 0.0
    for step in range(12):
        x, y = batch(seed=step)
        optimizer.zero_grad()
        optimizer.step(lambda x=x, y=y: losses_of(model, x, y))

        rows = one_by_one(reference, x, y)
        norms = [float(norm_of(row)) for row in rows]
        mean = sum(norms) / len(norms)
        c = (running if step else mean) if scale == "mean" else scale
        running = 0.99 * running + 0.01 * mean if step else mean
        weights = [c / max(norm, floor * c) for norm in norms]
        with torch.no_grad():
            for k, p in enumerate(reference.parameters()):
                g = sum(w * row[k] for w, row in zip(weights, rows, strict=True)) / len(rows)
                g = g + decay * p
                velocity[k] = momentum * velocity[k] + g if step else g
                p -= lr * (g + momentum * velocity[k] if nesterov else velocity[k])
        assert optimizer.last.weights.tolist() == pytest.approx(weights, rel=1e-9)
        assert optimizer.last.scale == pytest.approx(c, rel=1e-9)
        low, middle, high = min(norms), statistics.median(norms), max(norms)
        assert str(optimizer.last).startswith(
            f"{len(weights)} examples, 0 excluded; norms {low:.3g} to {high:.3g}, "
            f"median {middle:.3g}; "
        )
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_clipping_that_never_bites_is_msgd():
    models = [network() for _ in range(2)]
    engm = ENGM(models[0], 0.1, weight_decay=5e-4, scale=1e6, floor=1.0)
    msgd = MSGD(models[1].parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(5):
        x, y = batch(seed=step)
        for model, optimizer in zip(models, (engm, msgd), strict=True):
            optimizer.zero_grad()
            optimizer.step(lambda model=model, x=x, y=y: losses_of(model, x, y))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_an_example_that_shouts_does_not_move_engm():
    def step(factor: float, optimizer_of) -> torch.Tensor:
        model, (x, y) = network(), batch()
        loud = torch.ones(len(x), dtype=x.dtype)
        loud[2] = factor
        optimizer_of(model).step(lambda: loud * losses_of(model, x, y))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def engm(model):
        return ENGM(model, 0.1, scale=1.0, floor=1e-6)

    def msgd(model):
        return MSGD(model.parameters(), 0.1)

    torch.testing.assert_close(step(1.0, engm), step(1e4, engm), rtol=1e-9, atol=1e-12)
    assert (step(1.0, msgd) - step(1e4, msgd)).norm() > 1


def test_a_million_times_the_loss_of_one_example_moves_the_step_no_further_than_the_bound():
    def updated(factor: float) -> torch.Tensor:
        model, (x, y) = network(), batch()
        loud = torch.ones(len(x), dtype=x.dtype)
        loud[2] = factor
        ENGM(model, lr=0.1, scale=0.5, floor=0.3).step(lambda: loud * losses_of(model, x, y))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    # its w_i g_i is at most c long before and after: 2 c / n, times the learning rate
    assert (updated(1e6) - updated(1.0)).norm() <= 0.1 * 2 * 0.5 / 6 * (1 + 1e-9)


def test_a_hundred_steps_of_the_fast_norms_are_a_hundred_of_the_loop():
    models = [network(lambda c: nn.GroupNorm(2, c)) for _ in range(2)]
    pairs = [
        (m, ENGM(m, 0.02, weight_decay=5e-4, norms=n))
        for m, n in zip(models, ("exact", "loop"), strict=True)
    ]
    for step in range(100):
        x, y = batch(n=4, seed=step)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            optimizer.step(lambda model=model, x=x, y=y: losses_of(model, x, y))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@settings(deadline=None)
@given(
    norms=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8),
    scale=st.floats(1e-3, 1e3),
    floor=st.floats(1e-3, 1),
)
def test_no_example_pulls_harder_than_the_scale(norms, scale, floor):
    g = torch.tensor(norms, dtype=torch.float64)
    w = example_weights(g, scale, floor)
    assert (w * g <= scale * (1 + 1e-12)).all()
    assert (w <= 1 / floor * (1 + 1e-12)).all()


def test_msgd_is_torch_sgd_on_the_mean_and_clips_the_whole_gradient():
    for max_norm in (None, 0.05):
        ours, theirs = network(), network()
        optimizer = MSGD(ours.parameters(), 0.1, momentum=0.9, weight_decay=0.01, max_norm=max_norm)
        sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        for step in range(4):
            x, y = batch(seed=step)
            optimizer.zero_grad()
            returned = optimizer.step(lambda x=x, y=y: losses_of(ours, x, y))
            sgd.zero_grad()
            losses = losses_of(theirs, x, y)
            losses.mean().backward()
            if max_norm is not None:
                length = norm_of([p.grad for p in theirs.parameters()])
                assert length > max_norm
                for p in theirs.parameters():
                    p.grad *= max_norm / (length + 1e-6)
            sgd.step()
            assert torch.equal(returned, losses.detach())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_a_state_dict_goes_on_bitwise_where_it_was_taken():
    def steps(optimizer, model, which):
        for step in which:
            x, y = batch(seed=step)
            optimizer.zero_grad()
            optimizer.step(lambda x=x, y=y: losses_of(model, x, y))

    whole = network()
    steps(ENGM(whole, 0.1), whole, range(6))

    first = network()
    optimizer = ENGM(first, 0.1)
    steps(optimizer, first, range(3))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = network()
    second.load_state_dict(state["model"])
    optimizer = ENGM(second, 0.1)
    optimizer.load_state_dict(state["optimizer"])
    steps(optimizer, second, range(3, 6))
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True)
    )


def test_zero_grad_forgets_a_part_whose_batch_came_to_nothing():
    def stepped(first_part: bool) -> list[torch.Tensor]:
        model, (x, y) = network(), batch()
        optimizer = ENGM(model, 0.1, scale=1.0)
        if first_part:
            optimizer.accumulate(lambda: losses_of(model, x[:2], y[:2]))
            with pytest.raises(NonFiniteLossError):
                optimizer.accumulate(lambda: float("nan") * losses_of(model, x[2:], y[2:]))
        optimizer.zero_grad()
        optimizer.step(lambda: losses_of(model, x, y))
        return list(model.parameters())

    assert all(torch.equal(p, q) for p, q in zip(stepped(True), stepped(False), strict=True))


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_parts_of_a_batch_give_msgd_the_step_of_the_whole(max_norm):
    def stepped(parts):
        model, (x, y) = network(), batch()
        settings = dict(momentum=0.9, weight_decay=0.01, max_norm=max_norm)
        optimizer = MSGD(model.parameters(), 0.1, **settings)
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.accumulate(lambda: losses_of(model, x[:1], y[:1]))
            optimizer.zero_grad()  # forgets that part
            for part in parts:
                optimizer.accumulate(lambda part=part: losses_of(model, x[part], y[part]))
            assert optimizer.step() is None
        with pytest.raises(InputError, match="takes a closure"):
            optimizer.step()
        return list(model.parameters())

    whole = stepped([slice(None)])
    uneven = stepped([slice(1), slice(1, 3), slice(3, None)])
    for p, q in zip(whole, uneven, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_a_parameter_that_only_one_part_uses_counts_with_that_part_s_share():
    first, second = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = MSGD([first, second], 1.0)
    optimizer.accumulate(lambda: first.expand(1) * 3)
    optimizer.accumulate(lambda: second.expand(3) * 8)
    optimizer.step()
    assert (first.item(), second.item()) == (-3 / 4, -8 * 3 / 4)


def test_a_gradient_that_is_there_already_is_added_to_as_with_sgd():
    model, (x, y) = network(), batch()
    optimizer = ENGM(model, 0.1, scale=1.0)
    optimizer.step(lambda: losses_of(model, x, y))
    alone = [p.grad.clone() for p in model.parameters()]
    model = network()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    with pytest.warns(UserWarning, match="not empty before the first step.*zero_grad"):
        ENGM(model, 0.1, scale=1.0).step(lambda: losses_of(model, x, y))
    for p, gradient in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(p.grad, gradient + 0.25, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("norms", ["exact", "output"])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3)), (4,)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(0), nn.Linear(72, 3, bias=False)), (1, 8, 8)),
    ],
)
def test_a_single_loss_may_be_of_an_example_without_a_batch_dimension(model, x, norms):
    model = copy.deepcopy(model).double()
    x, y = torch.randn(x, dtype=torch.float64), torch.tensor([1])

    def closure():
        return F.cross_entropy(model(x)[None], y, reduction="none")

    gradients = torch.autograd.grad(closure().sum(), list(model.parameters()))
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
    expected = [p - 0.1 * 2 / norm * g for p, g in zip(model.parameters(), gradients, strict=True)]
    optimizer = ENGM(model, lr=0.1, scale=2.0, norms=norms)
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.last.norms, norm[None], rtol=1e-12, atol=0)
    torch.testing.assert_close([*model.parameters()], [*map(nn.Parameter, expected)])


def test_a_single_loss_may_lie_above_a_checkpoint_or_share_its_graph_with_another():
    model, found = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), {}
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])
    for norms in ("exact", "loop"):
        net = copy.deepcopy(model)
        optimizer = ENGM(net, lr=0.1, norms=norms)

        def under(net=net):
            return F.cross_entropy(checkpoint(net, x, use_reentrant=False), y, reduction="none")

        optimizer.step(under)
        optimizer.zero_grad()
        hidden = net[1](net[0](x))
        for _ in range(2 if norms == "exact" else 1):
            optimizer.accumulate(lambda net=net, h=hidden: losses_of(net[2], h, y))
        optimizer.step()
        found[norms] = [p.detach() for p in net.parameters()]
    torch.testing.assert_close(found["exact"], found["loop"], rtol=1e-12, atol=0)


def test_a_parametrised_weight_is_made_once_a_pass():
    norms = {}
    for how in ("exact", "loop"):
        torch.manual_seed(0)
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
        net = nn.Sequential(first, nn.Linear(5, 3)).double()
        optimizer = ENGM(net, 0.1, norms=how)
        x = torch.randn(3, 4, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(lambda net=net, x=x: losses_of(net, x, torch.arange(3)))
        norms[how] = optimizer.last.norms
    torch.testing.assert_close(norms["exact"], norms["loop"], rtol=1e-9, atol=0)


def test_complex_parameters_count_by_their_size_or_are_refused():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(torch.complex128) @ self.weight).abs() + self.bias

    model, x, y = Spectral(), torch.randn(3, 4, dtype=torch.float64), torch.arange(3)
    gradients = torch.autograd.grad(losses_of(model, x[:1], y[:1]).sum(), [*model.parameters()])
    norm = sum(torch.view_as_real(g + 0j).square().sum() for g in gradients).sqrt()
    for norms in ("exact", "loop"):
        optimizer = ENGM(copy.deepcopy(model), 0.1, norms=norms)
        optimizer.step(lambda o=optimizer: losses_of(o._model, x[:1], y[:1]))
        torch.testing.assert_close(optimizer.last.norms, norm[None], rtol=1e-12, atol=0)
    with pytest.raises(InputError, match="complex.*norms='loop'"):
        ENGM(model, 0.1).step(lambda: losses_of(model, x, y))


def test_sparse_gradients_and_nested_tensors_are_refused_by_name():
    y = torch.arange(3)
    for kind in (nn.Embedding, nn.EmbeddingBag):
        model = nn.Sequential(kind(9, 4, sparse=True), nn.Flatten(), nn.LazyLinear(3))
        x = torch.randint(9, (3, 2))
        model(x)
        for norms in ("exact", "output"):
            with pytest.raises(InputError, match="sparse=False, or use norms='loop'"):
                ENGM(model, 0.1, norms=norms).step(lambda m=model, x=x: losses_of(m, x, y))
    nested = torch.nested.nested_tensor([torch.randn(2, 4)] * 3, layout=torch.strided)
    with pytest.raises(InputError, match="pad them"):
        ENGM(model, 0.1).step(lambda: losses_of(model, nested, y))


@pytest.mark.parametrize("loop", [False, True])
def test_sparse_gradients_of_an_embedding_are_stepped_along_as_dense_ones_are(loop):
    x, y, found = torch.tensor([[1, 2], [3, 1], [4, 4]]), torch.tensor([0, 1, 2]), []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        parameters = model.parameters()
        optimizer = ENGM(model, 0.1, norms="loop") if loop else MSGD(parameters, 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(lambda m=model: losses_of(m, x, y))
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_a_batch_of_one_is_no_mean_of_several(recwarn):
    model, (x, y) = network(), batch(1)

    def trades() -> torch.Tensor:  # the image and the attacked one in one pass
        clean, attacked = model(torch.cat([x, x + 0.1])).chunk(2)
        gap = F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
        return F.cross_entropy(clean, y, reduction="none") + 6.0 * gap

    ENGM(model, 0.1).step(trades)
    ENGM(model, 0.1).step(lambda: losses_of(model, torch.cat([x, x]), y.repeat(2)).chunk(2)[0])
    lstm = nn.LSTM(8, 10)
    steps = torch.rand(7, 1, 8)  # of one example
    ENGM(lstm, 0.1, norms="loop").step(
        lambda: F.cross_entropy(lstm(steps)[0][-1], y, reduction="none")
    )
    assert not [str(w.message) for w in recwarn if "single loss" in str(w.message)]


def test_a_gradient_that_the_last_step_left_is_warned_of_once():
    model, (x, y) = network(), batch()
    optimizer = ENGM(model, 0.1)
    for _ in range(2):
        optimizer.step(lambda: losses_of(model, x, y))
        for clear in (optimizer.zero_grad, model.zero_grad,
                      lambda: optimizer.zero_grad(set_to_none=False)):  # fmt: skip
            clear()
            (0.01 * model[0].weight.square().sum()).backward()  # a penalty is no such gradient
            optimizer.accumulate(lambda: losses_of(model, x[:3], y[:3]))
            optimizer.accumulate(lambda: losses_of(model, x[3:], y[3:]))
            optimizer.step()
        optimizer.zero_grad()
    optimizer.step(lambda: losses_of(model, x, y))
    copied = copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match="holds the gradient of the step before") as told:
        optimizer.step(lambda: losses_of(model, x, y))
    assert told[0].filename == __file__  # not a line of torch's or the kit's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: losses_of(model, x, y))
    assert copied._left is None


def test_gradients_are_laid_out_as_their_parameters_so_that_torch_does_not_warn():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    ENGM(model, 0.1).step(lambda: losses_of(model, x, y))
    for p in model.parameters():
        assert p.grad.stride() == p.stride()


def test_schedulers_and_parameter_groups_work_as_with_sgd():
    model, (x, y) = network(), batch()
    optimizer = ENGM(model, 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(lambda: losses_of(model, x, y))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_frozen_parameters_stay_and_do_not_count():
    model, (x, y) = network(), batch()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = ENGM(model, 0.1)
    optimizer.step(lambda: losses_of(model, x, y))
    assert torch.equal(model[0].weight, before)
    rows = one_by_one_of_last_layer(network(), x, y)
    assert optimizer.last.norms.tolist() == pytest.approx(rows, rel=1e-9)


def one_by_one_of_last_layer(model, x, y):
    last = list(model[-1].parameters())
    norms = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        norms.append(float(norm_of(list(torch.autograd.grad(loss, last)))))
    return norms


def test_all_gradients_zero_is_a_step_of_decay_alone():
    model = nn.Linear(2, 1, bias=False).double()
    before = model.weight.detach().clone()
    x = torch.zeros(3, 2, dtype=torch.float64)
    ENGM(model, 0.1, 0.0, weight_decay=0.5).step(lambda: model(x)[:, 0])
    torch.testing.assert_close(model.weight.detach(), before * 0.95)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_of_msgd_alone(bad):
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    factor = torch.ones(len(x), dtype=x.dtype)
    factor[1] = bad
    with pytest.raises(NonFiniteLossError, match="1 of 6 losses are inf or nan; no step was taken"):
        MSGD(model.parameters(), 0.1).step(lambda: factor * losses_of(model, x, y))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "image"])
def test_a_bad_example_gets_weight_zero_and_does_not_poison_the_others(bad, where):
    others, (x, y) = network(), batch()
    keep = torch.tensor([0, 2, 3, 4, 5])
    engm = ENGM(others, 0.1, scale=1.0)
    engm.step(lambda: losses_of(others, x[keep], y[keep]))

    model = network()
    factor = torch.ones(len(x), dtype=x.dtype)
    seen = x.clone()
    if where == "loss":
        factor[1] = bad
    else:
        seen[1, 0, 3, 3] = bad
    optimizer = ENGM(model, 0.1, scale=1.0)
    optimizer.step(lambda: factor * losses_of(model, seen, y))
    assert optimizer.last.excluded == 1
    assert optimizer.last.weights[1] == 0
    assert " examples, 1 excluded; norms " in str(optimizer.last)
    assert "nan" not in str(optimizer.last) and "inf" not in str(optimizer.last)
    # the step is the mean over all six, the bad one counting as nothing
    for p, q, start in zip(
        model.parameters(), others.parameters(), network().parameters(), strict=True
    ):
        torch.testing.assert_close((p - start) * 6, (q - start) * 5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norms", ["exact", "input", "loop"])
def test_all_examples_bad_is_refused_and_changes_nothing(norms):
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    optimizer = ENGM(model, 0.1, norms=norms)
    with pytest.raises(NonFiniteLossError, match="all losses or their gradients are inf or nan"):
        optimizer.step(lambda: float("nan") * losses_of(model, x, y), inputs=x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale must be a number above 0, or 'mean'; got 0"),
        ({"scale": "max"}, "scale must be a number above 0"),
        ({"floor": 0}, "floor must be a number above 0, at most 1, as 0.05; got 0"),
        ({"floor": 10**400}, "floor must be a number above 0"),
        ({"scale": 10**400}, "scale must be a number above 0"),
        ({"lr": 10**400}, "lr must be a number, 0 or more"),
        ({"floor": -1}, "floor must be a number above 0, at most 1, as 0.05; got -1"),
        ({"floor": "0.1"}, "floor must be a number above 0, at most 1, as 0.05; got '0.1'"),
        ({"lr": "0.1"}, "lr must be a number, 0 or more, as in 0.1; got '0.1'"),
        ({"lr": float("nan")}, "lr must be a number, 0 or more, as in 0.1; got nan"),
        ({"momentum": None}, "momentum must be a number"),
        (
            {"norms": "fast"},
            "unknown norms 'fast'; choose one of exact, input, output, both, loop",
        ),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        ENGM(network(), **{"lr": 0.1} | arguments)


def test_the_mistakes_that_people_make_get_an_answer():
    model, (x, y) = network(), batch()
    optimizer = ENGM(model, 0.1)
    with pytest.raises(InputError, match="ENGM takes the model"):
        ENGM(model.parameters(), 0.1)
    with pytest.raises(InputError, match="takes a closure"):
        optimizer.step(None)
    with pytest.raises(InputError, match="reduction='none'"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(InputError, match="no_grad"):
        optimizer.step(lambda: losses_of(model, x, y).detach())
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        ENGM(network().requires_grad_(False), 0.1)
    other = network()
    with pytest.raises(InputError, match="is it the same model"):
        optimizer.step(lambda: losses_of(other, x, y))
    for repeat in (lambda loss: loss.repeat(4), lambda loss: torch.ones(4) * loss,
                   lambda loss: loss.expand(4), lambda loss: torch.stack([loss] * 4)):  # fmt: skip
        with pytest.raises(InputError, match="all losses are one number.*reduction='none'"):
            ENGM(model, 0.1).step(lambda r=repeat: r(losses_of(model, x, y).mean()))
    with pytest.raises(TypeError, match="positional"):  # where SGD has its dampening
        ENGM(model, 0.1, 0.9, 0.0)
    for single in (lambda losses: losses.mean()[None], lambda losses: losses.mean().reshape(1),
                   lambda losses: 2 * losses.mean(0, keepdim=True)):  # fmt: skip
        with pytest.warns(UserWarning, match="returns a single loss.*length 6: .*reduction='none'"):
            ENGM(model, 0.1).step(lambda s=single: s(losses_of(model, x, y)))
    with pytest.raises(InputError, match="max_norm must be above 0"):
        MSGD(model.parameters(), 0.1, max_norm=0)
    with pytest.raises(InputError, match="weight_decay must be a number.* got -1"):
        MSGD(model.parameters(), 0.1, weight_decay=-1)
    with pytest.raises(InputError, match=r"write MSGD\(model.parameters\(\), lr=...\)"):
        MSGD(model, 0.1)
    with pytest.raises(InputError, match="not tuple; return the losses alone"):
        optimizer.step(lambda: (losses_of(model, x, y), model(x)))
    with pytest.raises(InputError, match=r"not \[4, 5\]; add up those of an example"):
        optimizer.step(lambda: torch.ones(4, 5, requires_grad=True))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"params": ["0.bias"]}, "groups is a list of groups"),
        ([torch.zeros(2)], "groups is a list of groups.*are trained, too"),
        ([("0.bias", torch.zeros(2))], "groups is a list of groups"),
        ([{"param": ["0.bias"]}], "a group has param, but no 'params'"),
        ([{"params": "0.bias"}], r"'params' of a group is a list: \['0.bias'\]"),
        ([{"params": ["0.bias"], "scale": 2.0}], "scale is the same for all groups"),
        ([{"params": ["0.bias"], "lr": -1}], "lr of a group must be a number, 0 or more.* got -1"),
    ],
)
def test_a_group_that_would_not_count_is_refused(groups, message):
    with pytest.raises(InputError, match=message):
        ENGM(network(), 0.1, groups=groups)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": network().parameters()}, "a parameter that the model does not have"),
        ({"lr": -1}, "lr of a group must be a number, 0 or more.* got -1"),
    ],
)
def test_a_group_that_is_added_later_is_held_to_the_same(group, message):
    model = network()
    model[0].requires_grad_(False)
    optimizer = ENGM(model, 0.1)
    with pytest.raises(InputError, match=message):
        optimizer.add_param_group({"params": model[0].parameters()} | group)
    assert len(optimizer.param_groups) == 1


def test_a_run_gets_the_optimizer_it_asks_for():
    model = network()
    settings = dict(lr=0.3, momentum=0.8, weight_decay=1e-3)
    for name, kind in (("msgd", MSGD), ("msgd-clip", MSGD), ("engm", ENGM)):
        optimizer = build(RunConfig(optimizer=name, **settings), model)
        assert type(optimizer) is kind
        assert settings.items() <= optimizer.param_groups[0].items()
    assert build(RunConfig(optimizer="msgd"), model).max_norm is None
    assert build(RunConfig(optimizer="msgd-clip", max_norm=2), model).max_norm == 2
    engm = build(RunConfig(optimizer="engm", scale=2, floor=0.5), model)
    assert (engm.scale, engm.floor) == (2, 0.5)
