"""Steps on a device that is not waited for: a GPU, and here a CPU that is treated as one."""

import copy

import pytest
import torch
from torch.nn import functional as F

from engm import AWP, ENGM, FGSM, MSGD, PGD, PGDAT, TRADES, models, optim
from engm.device import AttackedModel
from engm.errors import NonFiniteLossError
from engm.training import train_one_epoch

OPTIMIZERS = {
    "msgd": lambda model: MSGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
    "clip": lambda model: MSGD(model.parameters(), 0.1, momentum=0.9, max_norm=0.5),
    "engm": lambda model: ENGM(model, 0.1, weight_decay=0.01),
    "fixed": lambda model: ENGM(model, 0.1, scale=0.5, floor=0.3, nesterov=True),
    "input": lambda model: ENGM(model, 0.1, norms="input", refresh_every=3),
    "input only": lambda model: ENGM(model, 0.1, norms="input", refresh_every=None),
    "output": lambda model: ENGM(model, 0.1, norms="output", refresh_every=None),
}


@pytest.fixture
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(optim, "defers", lambda device: True)


def network(dtype=torch.float64, norm="batch"):
    torch.manual_seed(0)
    model = models.small_cnn(width=4, norm=norm).to(dtype)
    return model.to(memory_format=torch.channels_last)


def batch(seed, n=8, dtype=torch.float64, bad=()):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=dtype)
    factor = torch.ones(n, dtype=dtype)
    factor[list(bad)] = torch.nan
    return x, torch.randint(10, (n,), generator=generator), factor


def step(model, optimizer, x, y, factor):
    optimizer.zero_grad()
    losses = lambda: factor * F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    return optimizer.step(losses, inputs=x)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def buffers(optimizer):
    return [state["momentum_buffer"].clone() for state in optimizer.state.values()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_of_the_cpu(name, monkeypatch):
    ends = []
    for deferred in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(optim, "defers", lambda device, found=deferred: found)
            model = network(norm="group")
            optimizer = OPTIMIZERS[name](model)
            some_bad = [(), (3,), (), (0, 5)] if name in ("engm", "fixed", "input") else [()] * 4
            for seed, bad in enumerate(some_bad):
                step(model, optimizer, *batch(seed, bad=bad))
                if deferred and isinstance(optimizer, ENGM):
                    assert optimizer.last.excluded == len(bad)
            optimizer.settle()
            assert all(group["fused"] is (deferred or None) for group in optimizer.param_groups)
            ends.append([*weights(model), *buffers(optimizer)])
            if isinstance(optimizer, ENGM):
                ends[-1].append(torch.tensor(optimizer.state_dict()["engm"]["mean_norm"]))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_failed_step_and_those_after_it_change_nothing(name, first, like_a_gpu):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    taken = 0 if first else 2
    for seed in range(taken):
        step(model, optimizer, *batch(seed))
    before, momenta = weights(model), buffers(optimizer)
    own = optimizer.state_dict().get("engm")
    everything = tuple(range(8))
    step(model, optimizer, *batch(7, bad=everything))
    for seed in (8, 9):
        step(model, optimizer, *batch(seed))
    for one, other in zip(weights(model), before, strict=True):
        assert torch.equal(one, other)
    for k, momentum in enumerate(buffers(optimizer)):
        assert torch.equal(momentum, momenta[k] if momenta else torch.zeros_like(momentum))
    if own is not None:
        assert optimizer.state_dict()["engm"]["mean_norm"] == own["mean_norm"]
    said = "8 of 8 losses are" if name in ("msgd", "clip") else "all losses or their gradients are"
    with pytest.raises(NonFiniteLossError, match=f"{said} inf or nan; no step was taken") as error:
        optimizer.settle()
    assert error.value.steps_ago == 3
    optimizer.settle()  # said once
    step(model, optimizer, *batch(10))
    optimizer.settle()
    assert not any(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("name", ["output", "input only"])
def test_an_example_that_reaches_the_others_is_not_stepped_along(name, monkeypatch):
    # nan times the 0 of its loss is nan in the gradient of all
    for deferred in (False, True):
        monkeypatch.setattr(optim, "defers", lambda device, found=deferred: found)
        model = network(norm="group")
        optimizer, before = OPTIMIZERS[name](model), weights(model)
        told = pytest.raises(NonFiniteLossError)
        if deferred:
            step(model, optimizer, *batch(0, bad=(3,)))
            with told:
                optimizer.settle()
        else:
            with told:
                step(model, optimizer, *batch(0, bad=(3,)))
        assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("name", ["msgd", "engm"])
def test_what_was_kept_on_a_gpu_goes_on_elsewhere(name, monkeypatch):
    # a fused update runs through memory, so what has other strides has to be laid out anew
    ends = []
    for deferred in ([False, False], [True, False], [False, True]):
        model = network(norm="group")
        kept = None
        for found in deferred:
            monkeypatch.setattr(optim, "defers", lambda device, found=found: found)
            optimizer = OPTIMIZERS[name](model)
            if kept is not None:
                optimizer.load_state_dict(kept)
            for seed in range(2):
                step(model, optimizer, *batch(seed))
            kept = copy.deepcopy(optimizer.state_dict())
        ends.append(weights(model))
    for one, other, third in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one, third, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fails", [True, False])
def test_with_dampening_the_first_step_is_waited_for(fails, like_a_gpu):
    model, plain = network(), network()
    dampened = dict(lr=0.1, momentum=0.9, dampening=0.5)
    optimizer = MSGD(model.parameters(), **dampened)
    if fails:
        with pytest.raises(NonFiniteLossError, match="1 of 8"):
            step(model, optimizer, *batch(0, bad=(1,)))
        assert not any(optimizer.state.values())
    theirs = torch.optim.SGD(plain.parameters(), **dampened)
    for seed in range(2):
        x, y, factor = batch(seed)
        step(model, optimizer, x, y, factor)
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        theirs.step()
    for one, other in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_error_comes_within_so_many_steps_even_if_nobody_asks(like_a_gpu, monkeypatch):
    monkeypatch.setattr(optim, "_ASK_EVERY", 4)
    model = network()
    optimizer = OPTIMIZERS["msgd"](model)
    for seed in range(6):
        step(model, optimizer, *batch(seed, bad=(2, 4) if seed == 5 else ()))
    for seed in (6, 7):
        step(model, optimizer, *batch(seed))
    with pytest.raises(NonFiniteLossError, match="2 of 8 losses") as error:
        step(model, optimizer, *batch(8))
    assert error.value.steps_ago == 3  # the 6th, the 7th and the 8th


@pytest.mark.parametrize("spoilt", [0, 2])
def test_a_bad_part_of_a_batch_fails_the_step(spoilt, like_a_gpu):
    model = network()
    optimizer = OPTIMIZERS["msgd"](model)
    before = weights(model)
    for k in range(3):
        x, y, factor = batch(k, bad=(1,) * (k == spoilt))
        losses = factor * F.cross_entropy(model(x), y, reduction="none")
        optimizer.accumulate(lambda losses=losses: losses)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))
    with pytest.raises(NonFiniteLossError, match="1 of 8 losses"):
        optimizer.settle()


@pytest.mark.parametrize("when", [1, 2, 3])
def test_an_epoch_names_the_step_that_failed(when, like_a_gpu):
    model = network(torch.float32, norm="none")
    examples = [batch(seed, dtype=torch.float32)[:2] for seed in range(3)]
    start = copy.deepcopy(model)

    class Method:
        def attack(self, model, x, y):
            return x

        def losses(self, model, x, x_adv, y):
            losses = F.cross_entropy(model(x_adv), y, reduction="none")
            return losses * torch.nan if x is examples[when - 1][0] else losses

    with pytest.raises(NonFiniteLossError, match=rf"^step {when}: 8 of 8 losses.*smaller lr"):
        train_one_epoch(model, Method(), MSGD(model.parameters(), 0.1), examples)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(same) is (when == 1)


# -- nothing waits: "meta" tensors have no values, so to ask for one is an error -------------------


@pytest.fixture
def without_values(monkeypatch):
    def update(optimizer, closure=None):
        """In place of the fused update, which "meta" does not know."""
        assert optimizer.found_inf.shape == (1,)
        assert all(group["fused"] for group in optimizer.param_groups)

    monkeypatch.setattr(torch.optim.SGD, "step", update)


METHODS = {
    "pgd": PGDAT(PGD(eps=0.1, step_size=0.05, num_steps=3)),
    "l2 restarts": PGDAT(PGD(eps=0.1, step_size=0.05, num_steps=3, norm="l2", restarts=2)),
    "fgsm": PGDAT(FGSM(eps=0.1)),
    "trades": TRADES(PGD(eps=0.1, step_size=0.05, num_steps=2, loss="kl", start_noise=0.001)),
}


@pytest.mark.parametrize(
    ("name", "method", "gamma", "norm"),
    [
        *((name, "pgd", 0.01, "batch") for name in OPTIMIZERS),
        *((name, "trades", 0.0, "group") for name in OPTIMIZERS),
        ("engm", "l2 restarts", 0.01, "group"),
        ("engm", "fgsm", 0.0, "batch"),
    ],
)
def test_a_step_of_training_reads_nothing_from_the_device(
    name, method, gamma, norm, without_values
):
    method = METHODS[method]
    model = network(torch.float32, norm).to("meta").train()
    optimizer = OPTIMIZERS[name](model)
    if name == "input":
        optimizer.measure.load({"calls": 1, "fit": [FIT]})  # between two fits
    attacked = AttackedModel(model)
    attacked.begin = lambda x: False  # the first batch has been looked at
    x, y, _ = (part.to("meta") for part in batch(0, dtype=torch.float32))
    for _ in range(2):
        x_adv = method.attack(attacked, x, y)
        optimizer.zero_grad()
        closure = lambda: method.losses(model, x, x_adv, y)  # noqa: E731
        with AWP(gamma)(model, closure):
            optimizer.accumulate(closure, inputs=x_adv)
        optimizer.step()


FIT = {"step": 1, "alpha": 1.0, "beta": 0.1, "r_squared": 0.9, "rank_correlation": 0.9}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_torch_sees_no_wait_either(name):
    model = network(torch.float32).cuda().train()
    optimizer = OPTIMIZERS[name](model)
    attacked = AttackedModel(model, torch.bfloat16)
    method = PGDAT(PGD(eps=0.1, step_size=0.05, num_steps=2))
    x, y, _ = (part.cuda() for part in batch(0, dtype=torch.float32))

    def train():
        x_adv = method.attack(attacked, x, y)
        optimizer.zero_grad()
        optimizer.step(lambda: method.losses(model, x, x_adv, y), inputs=x_adv)

    train()
    if name == "input":
        optimizer.measure.load({"calls": 1, "fit": [FIT]})  # between two fits
    before = weights(model)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # torch raises where the host would wait
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.settle()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_a_failed_step_changes_nothing(name):
    model = network(torch.float32).cuda()
    optimizer = OPTIMIZERS[name](model)
    step(model, optimizer, *(part.cuda() for part in batch(0, dtype=torch.float32)))
    before = weights(model)
    bad = tuple(range(8))
    broken = [part.cuda() for part in batch(1, dtype=torch.float32, bad=bad)]
    step(model, optimizer, *broken)
    with pytest.raises(NonFiniteLossError, match="inf or nan"):
        optimizer.settle()
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))
