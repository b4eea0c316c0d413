"""Two real processes, each with a part of the batch, take the step of one that has the whole."""

import copy
import warnings

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

from engm import distributed as processes
from engm.errors import InputError, NonFiniteLossError
from engm.optim import ENGM, MSGD

N = 6
# halves; unequal parts, each on either side
SPLITS = [(3, 3), (2, 4), (5, 1)]
# No BatchNorm: in train mode each process takes the statistics of its own examples, so the step is
# that of `accumulate` over the same parts, and not that of the whole batch.
MODELS = {"none": lambda: nn.Identity(), "group": lambda: nn.GroupNorm(2, 4)}
OPTIMIZERS = {
    "msgd": lambda model: MSGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
    "msgd-clip": lambda model: MSGD(model.parameters(), 0.1, momentum=0.9, max_norm=0.05),
    "exact, mean": lambda model: ENGM(model, 0.1, weight_decay=0.01),
    "exact, number": lambda model: ENGM(model, 0.1, scale=0.7, floor=0.5),
    "loop, mean": lambda model: ENGM(model, 0.1, norms="loop"),
    "loop, number": lambda model: ENGM(model, 0.1, norms="loop", scale=0.7),
    # each process has a line of its own; with a refresh in each step it is not used
    "input, mean": lambda model: ENGM(model, 0.1, norms="input", refresh_every=1),
    "input, number": lambda model: ENGM(model, 0.1, norms="input", refresh_every=1, scale=0.7),
}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, 1, 6, 6, generator=generator, dtype=torch.float64)
    # examples of different lengths, so that the means of the parts differ
    x *= torch.linspace(0.5, 3, N).double().view(-1, 1, 1, 1)
    return x, torch.arange(N) % 3


def run(model_name, optimizer_name, rows, bad=None):
    """Returns parameters, losses and scale after three steps on `rows` of the batches."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), MODELS[model_name](), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).double()
    optimizer = OPTIMIZERS[optimizer_name](model)
    seen = []
    for step in range(3):
        x, y = batch(step)
        if bad is not None:
            x[bad] = float("nan")
        x, y = x[rows], y[rows]
        optimizer.zero_grad()
        losses = optimizer.step(
            lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"), inputs=x
        )
        seen.append(losses)
    return {
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters()]),
        "losses": torch.stack(seen),
        "scale": optimizer.last.scale if isinstance(optimizer, ENGM) else None,
    }


def cases():
    for split in SPLITS:
        for model in MODELS:
            for optimizer in OPTIMIZERS:
                yield split, model, optimizer, None
    # an image that is not finite, in the first process alone, which then has no good one in one
    # of the splits
    for split in [(3, 3), (1, 5)]:
        yield split, "group", "exact, mean", 0


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that input gradients explain little of six examples
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found = {}
    for case in cases():
        split, model, optimizer, bad = case
        rows = torch.arange(N).split(split)[rank]
        found[case] = run(model, optimizer, rows, bad)
    found["mean"] = processes.mean(torch.arange(3.0) if rank == 0 else torch.tensor([7.0]))
    found["mean of nothing"] = processes.mean(torch.tensor([]))
    found["apart"] = {name: apart(rank, name) for name in ("start", "parts", "layer")}
    found["errors"] = errors()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def apart(rank, what):
    """Weights after two steps of processes that differ in their start, parts or layers."""
    torch.manual_seed(rank if what == "start" else 0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = ENGM(model, 0.1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=draw, dtype=torch.float64)
    x, y = x[3 * rank : 3 * rank + 3], torch.arange(3)
    layers = model[1:] if what == "layer" and rank else model
    counts = [1, 2] if what == "parts" and rank else [3]
    for _ in range(2):
        optimizer.zero_grad()
        for rows in torch.arange(3).split(counts):
            optimizer.accumulate(
                lambda rows=rows: F.cross_entropy(layers(x[rows]), y[rows], reduction="none")
            )
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def errors():
    said = []
    model = nn.Linear(2, 2)
    with pytest.raises(InputError) as caught:
        ENGM(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), 0.1)
    said.append(str(caught.value))
    optimizer = ENGM(model, 0.1)
    with pytest.raises(NonFiniteLossError) as caught:
        optimizer.step(lambda: float("nan") * model(torch.ones(3, 2)).sum(1))
    said.append(str(caught.value))
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:at step")
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_two_processes_take_the_step_of_one(found, case):
    _, model, optimizer, bad = case
    whole = run(model, optimizer, torch.arange(N), bad)
    parts = [results[case] for results in found]
    assert torch.equal(parts[0]["parameters"], parts[1]["parameters"])
    for name in ("parameters", "gradient"):
        torch.testing.assert_close(parts[0][name], whole[name], rtol=1e-10, atol=1e-13)
    assert parts[0]["scale"] == parts[1]["scale"]
    if whole["scale"] is not None:
        assert parts[0]["scale"] == pytest.approx(whole["scale"], rel=1e-10)
    losses = torch.cat([part["losses"] for part in parts], 1)
    torch.testing.assert_close(losses, whole["losses"], rtol=1e-10, atol=0, equal_nan=True)


def test_means_run_over_the_values_and_not_over_the_processes(found):
    for results in found:
        assert results["mean"] == pytest.approx(10 / 4)
        assert results["mean of nothing"] == 0


@pytest.mark.parametrize("what", ["start", "parts", "layer"])
def test_processes_that_differ_end_with_the_same_weights(found, what):
    one, other = (results["apart"][what] for results in found)
    assert torch.equal(one, other)


def test_what_is_refused_with_several_processes(found):
    for wrapped, nothing in (results["errors"] for results in found):
        assert "ENGM takes the bare model, and averages over processes itself" in wrapped
        assert "all losses or their gradients are inf or nan" in nothing


def test_one_process_alone():
    gradient = torch.tensor([1.0, 2.0])
    processes.average([gradient], 3)
    assert gradient.tolist() == [1, 2]
    assert processes.mean(torch.tensor([1.0, 2.0, 6.0])) == 3
    assert processes.mean(torch.tensor([])) == 0
