import copy
from dataclasses import replace

import pytest
import torch
from recorded import record
from torch import nn
from torch.nn import functional as F

from engm import MSGD, PGD, RunConfig, fit, models
from engm.device import AttackedModel
from engm.errors import InputError

SHORT = PGD(eps=0.1, step_size=0.04, num_steps=3)
ATTACKS = {
    "linf": SHORT,
    "l2": replace(SHORT, norm="l2", eps=0.5, step_size=0.2),
    "trades": replace(SHORT, loss="kl", start_noise=0.001),
    "restarts": replace(SHORT, restarts=3),
    "decay": replace(SHORT, decay=True),
    "until fooled": replace(SHORT, stop_early=True, restarts=2),
}


def network(norm="batch"):
    torch.manual_seed(0)
    model = models.small_cnn(width=4, norm=norm, mean=[0.4] * 3, std=[0.2] * 3).train()
    for _ in range(3):
        model(torch.rand(16, 3, 8, 8))  # gives BatchNorm statistics of its own
    return model


def batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=generator)
    return x, torch.randint(10, (n,), generator=generator)


def attacked_by_hand(attack, model, dtype, x, y, seed, **rows):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return attack(model, x, y, generator=torch.Generator().manual_seed(seed), **rows)


def changed(model, seed):
    """A step of training: all weights and the statistics of BatchNorm move, in place."""
    x, y = batch(seed=seed)
    MSGD(model.parameters(), lr=0.5).step(lambda: F.cross_entropy(model(x), y, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_finds_bitwise_what_it_finds_on_the_model(kind, recorded, dtype):
    model, attack = network(), ATTACKS[kind]
    attacked = AttackedModel(model, dtype)
    attacked._record = record if recorded else None
    for seed in range(4):
        x, y = batch(5 if seed == 2 else 6, seed)
        expected = attacked_by_hand(attack, model, dtype, x, y, seed)
        start = torch.Generator().manual_seed(seed)
        found = attack(attacked, x, y, generator=start)
        assert torch.equal(found, expected), seed
        assert not torch.equal(found, x)
        part = slice(1, 3)
        start.manual_seed(seed)
        some = attack(attacked, x, y, generator=start, rows=part)
        # with fewer rows a library may choose other kernels
        torch.testing.assert_close(some, expected[part], rtol=0, atol=1e-2 if recorded else 1e-1)
        changed(model, seed)
    recordings = 0 if not recorded or attack.stop_early else 4  # 6 rows, 5 rows, 2 rows (of both)
    assert len(attacked._replays) in (recordings, max(recordings - 1, 0))


@pytest.mark.parametrize("way", ["data", "assign", "new buffer"])
@pytest.mark.parametrize("kind", ["plain", "recorded", "compiled", "cast"])
def test_tensors_that_the_model_was_given_are_taken_over(kind, way):
    model, other, (x, y) = network(), network(), batch()
    changed(other, seed=1)
    dtype = torch.bfloat16 if kind == "cast" else torch.float32
    attacked = AttackedModel(model, dtype)
    attacked._record = record if kind == "recorded" else None
    if kind == "compiled":
        attacked._compiled = torch.compile(attacked._frozen, backend="eager")
    stale = SHORT(attacked, x, y, generator=torch.Generator().manual_seed(0))
    for step in range(2):  # in one way, and then in place
        if step:
            changed(model, seed=2)
        elif way == "data":
            for p, new in zip(model.parameters(), other.parameters(), strict=True):
                p.data = new.data.clone()
        elif way == "assign":
            model.load_state_dict(other.state_dict(), assign=True)
        else:
            model.norm1.running_mean = model.norm1.running_mean + 1
        if step == 0 and kind != "cast":
            torch.testing.assert_close(attacked(x), copy.deepcopy(model).eval()(x))
        found = SHORT(attacked, x, y, generator=torch.Generator().manual_seed(0))
        assert torch.equal(found, attacked_by_hand(SHORT, model, dtype, x, y, 0))
        assert not torch.equal(found, stale)
    model.norm1 = nn.BatchNorm2d(4)
    with pytest.raises(InputError, match="layers were replaced; make its AttackedModel anew"):
        SHORT(attacked, x, y)


def test_the_model_is_left_as_it_was():
    model = network()
    before = copy.deepcopy(model.state_dict())
    attacked = AttackedModel(model, torch.bfloat16)
    SHORT(attacked, *batch())
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in attacked.train().modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in attacked.parameters())


def test_only_what_is_cast_takes_memory():
    model = network()
    mine = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    for dtype, copied in ((torch.float32, 0), (torch.bfloat16, 5)):  # 3 convolutions, linear + bias
        attacked = AttackedModel(model, dtype)
        held = [*attacked.parameters(), *attacked.buffers()]
        assert sum(t.data_ptr() not in mine for t in held) == copied


def test_a_recording_that_goes_wrong_is_refused():
    def stale(work, inputs):
        expected, _ = record(work, inputs)
        return expected, lambda *values: inputs[0].clone()

    def refused(work, inputs):
        raise RuntimeError("operation not permitted\nmore of it")

    steps_differ = r"they take the loss from .* to .*, a replay to .*; leave capture out"
    steps_fail = r"cannot be recorded: operation not permitted; leave capture out"
    for recorder, said in ((stale, steps_differ), (refused, steps_fail)):
        attacked = AttackedModel(network())
        attacked._record = recorder
        for _ in range(2):
            with pytest.raises(InputError, match=said):
                SHORT(attacked, *batch())


def test_a_model_that_waits_cannot_be_recorded():
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x) * (1.0 if float(x.detach().mean()) > 0 else 2.0)

    attacked = AttackedModel(Waits())
    attacked._record = record
    with pytest.raises(InputError, match="not permitted when stream is capturing"):
        SHORT(attacked, *batch())


def test_values_are_looked_at_in_the_first_batch_of_a_shape():
    attacked, (x, y) = AttackedModel(network()), batch()
    for _ in range(2):  # what was refused is looked at again
        with pytest.raises(InputError, match="pixels are in"):
            SHORT(attacked, x + 1, y)
    SHORT(attacked, x, y)
    SHORT(attacked, x + 1, y)
    with pytest.raises(InputError, match="pixels are in"):
        SHORT(attacked, x[:2] + 1, y[:2])
    SHORT(attacked, *batch(4), rows=slice(0, 2))  # as processes do that share a batch
    SHORT(attacked, batch(4)[0] + 1, y[:4], rows=slice(0, 2))
    with pytest.raises(InputError, match="int64"):  # costs no wait
        SHORT(attacked, x, y.float())


def test_a_compiled_backward_pass_computes_no_gradient_of_weights():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs, masks = [], []

    def look(graph, inputs):
        graphs.append(graph)
        for node in graph.graph.nodes:
            if "convolution_backward" in str(node.target):
                masks.append(node.args[-1])
        return make_boxed_func(graph.forward)

    model = network()
    attacked = AttackedModel(model)
    backend = aot_autograd(fw_compiler=look)
    attacked._compiled = torch.compile(attacked._frozen, backend=backend, dynamic=False)
    x, y = batch()
    found = SHORT(attacked, x, y, generator=torch.Generator().manual_seed(0))
    expected = attacked_by_hand(SHORT, model, torch.float32, x, y, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert len(masks) == 3 and all(list(mask) == [True, False, False] for mask in masks)
    compiled = len(graphs)
    SHORT(attacked, *batch(4))  # a smaller last batch is not compiled for
    assert len(graphs) == compiled


def test_what_cannot_be_done_here_is_said():
    with pytest.raises(InputError, match="capture records CUDA graphs, but the model is on cpu"):
        AttackedModel(network(), capture=True)

    def broken(graph, inputs):
        raise OSError("no compiler")

    attacked = AttackedModel(network())
    attacked._compiled = torch.compile(attacked._frozen, backend=broken)
    with pytest.raises(InputError, match="torch.compile failed: .*; leave compile out"):
        SHORT(attacked, *batch())


def test_a_run_that_cannot_be_captured_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="leave it out"):
        fit(RunConfig(capture=True, epochs=1), tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_do_what_the_steps_do(compile, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # kernels round alike
    model = network().cuda()
    attacked = AttackedModel(model, compile=compile, capture=True)
    for seed in range(3):
        x, y = (part.cuda() for part in batch(seed=seed))
        expected = attacked_by_hand(SHORT, model, torch.float32, x, y, seed)
        found = SHORT(attacked, x, y, generator=torch.Generator().manual_seed(seed))
        # a gradient of about 0 may have either sign
        assert (found - expected).abs().gt(0.01).float().mean() < 0.05
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert len(attacked._replays) == 1
