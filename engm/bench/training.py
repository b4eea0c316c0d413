"""How fast adversarial training is: the public reference's protocol beside the kit's, in one run.

All train the same model, from the same weights, on the same images and device, for real: the
weights move. They take turns, some steps of one of them a round. What is reported is the median
over the rounds and the quartiles; a speed is the ratio of two times of one round.

The reference is described in `engm.bench.reference`. The kit's rows are named by words: the outer
optimizer (MSGD where none is named, "engm" with exact norms, "engm-input"), the precision
("float32" or "bfloat16"), and "channels_last", "compile" and "capture" (CUDA graphs). Each goes
through `train_one_epoch`, with whole batches that are cut and augmented on the device; the start of
an epoch is in the kit's time where it comes, its end in every round. "engm-input" takes the exact
norms in one step of twenty, so that rounds should be of twenty steps.

cuDNN compares its kernels for the kit, as in `engm train`, and not for the reference. Torch keeps
one kernel for each shape, layout and type, so the kit's float32 row without channels_last meets
those that were chosen for the reference, which comes first.

Besides: the attack alone, on one batch, with its floating point operations a second against the
fastest product of matrices that the device does in the same run; and a profile of the reference and
of the kit's fastest row.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engm import data
from engm.bench import measuring
from engm.bench.profile import profile
from engm.bench.reference import Reference
from engm.config import RunConfig
from engm.device import kernels_compared, pick_device
from engm.errors import InputError, check_choice, check_count
from engm.models import build_model
from engm.training import Trainer

REFERENCE = "reference"
_FASTEST = "bfloat16 channels_last compile capture"
METHODS = (
    *(REFERENCE, "float32", "bfloat16", "bfloat16 channels_last"),
    *("bfloat16 channels_last compile", "bfloat16 channels_last capture", _FASTEST),
    *("engm float32", f"engm {_FASTEST}", "engm-input float32", f"engm-input {_FASTEST}"),
)
EPOCH = 50_000  # images, whatever the data set has
WARM_UP = 3
PROFILED = 5
_IMAGES_ON_CPU = 2_000
_SETTINGS = ("model", "width", "model_norm", "batch_size", "num_steps", "seed")
# The words of a name, in their order, and the setting that each of them is.
_WORDS: dict[str, tuple[str, Any]] = {
    **{name: ("optimizer", name) for name in ("msgd", "engm", "engm-input")},
    **{name: ("precision", name) for name in ("float32", "bfloat16")},
    **{name: (name, True) for name in ("channels_last", "compile", "capture")},
}


def run(
    config: RunConfig,
    *,
    dataset: str | None = None,
    data_root: Path | None = None,
    steps: int | None = None,
    repeats: int = 15,
    names: Sequence[str] = METHODS,
    device: str = "auto",
    save: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Measures how fast the reference and the kit train.

    Args:
        config: Model, batch size and attack; `subset` is how many images to train on, by default
            all on CUDA and a few on the CPU.
        dataset: "cifar10", or "random" images of its shape; by default what is prepared.
        data_root: As for `engm.data.load`.
        steps: Steps of a round; by default 20 on CUDA and 2 on the CPU.
        repeats: Rounds.
        names: "reference", which is always one, and names for `row_name`.
        device: As for `engm.training.fit`.
        save: Given the result before the profiles, which may end the process.

    Returns:
        What `bench.run` returns, with the speed's `ratio` to the reference, `images_per_second` and
        `epochs_per_hour`, and the same of the `attack` alone with its `flops`. Besides `what`:
        "training", the `data`, the rates of `matrix` products and the `profile`.

    Raises:
        InputError: If a name is unknown, a number is out of range or the data is not there.
    """
    target = pick_device(device)
    names = [row_name(name) for name in names if name != REFERENCE]
    names = [REFERENCE, *dict.fromkeys(names)]
    steps = (20 if target.type == "cuda" else 2) if steps is None else steps
    check_count("steps", steps)
    check_count("repeats", repeats)
    config = config.resolved()
    if config.subset is None and target.type == "cpu":
        config = replace(config, subset=max(_IMAGES_ON_CPU, config.batch_size or 0))
    if dataset is None:
        dataset = "cifar10" if (data.data_root(data_root) / "cifar10.json").is_file() else "random"
    check_choice("dataset", dataset, ("cifar10", "random"))
    if dataset == "random":
        images = random_images(config.subset or EPOCH, config.seed)
    else:
        images = data.load("cifar10", root=data_root, subset=config.subset)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings |= {"dataset": dataset, "subset": config.subset, "steps": steps, "repeats": repeats}
    settings["methods"] = ",".join(names)
    with measuring.undisturbed(target), compiling(names):
        torch.manual_seed(config.seed)
        bench = _Bench(config, images.to(target), steps)
        result = measuring.described(settings, target, what="training")
        cudnn, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
        result["environment"] |= {
            "tf32": {"convolutions": cudnn.allow_tf32, "matrices": matrices.allow_tf32},
            "cudnn": cudnn.version(),
            "cudnn_benchmark": cudnn.benchmark,  # of the reference; the kit compares kernels
        }
        result["data"] = {"title": images.title, "images": len(images.train)}
        result |= {**bench.measure(names, repeats), "profile": {}}
        if save is not None:
            save(result)
        result["profile"] = bench.profiles()
    return result


def random_images(count: int, seed: int) -> data.Dataset:
    """Returns random images of the shape of CIFAR-10, which are its training images to a run."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = data.Split(pixels, torch.randint(10, (count,), generator=generator))
    classes = tuple(map(str, range(10)))
    mean, std = (0.5,) * 3, (12**-0.5,) * 3  # of uniform pixels in [0, 1]
    return data.Dataset("cifar10", split, split, split, classes, mean, std, "random images")


def row_name(name: str) -> str:
    """Returns a name with its words in their order, "engm float32 compile" for "compile engm"."""
    words = name.split()
    settings = [_WORDS[word][0] for word in words if word in _WORDS]
    if not words or len(settings) < len(words):
        raise InputError(
            f"unknown method {name!r}; name 'reference', or a few of the words "
            f"{', '.join(_WORDS)}, such as 'bfloat16 channels_last'"
        )
    if len(set(settings)) < len(settings):
        raise InputError(f"{name!r} names a setting twice; name it once")
    if "precision" not in settings:
        words.append("float32")
    return " ".join(word for word in _WORDS if word in words and word != "msgd")


@contextmanager
def compiling(names: Sequence[str]) -> Iterator[None]:
    """Sees to it that rows that are to be compiled are, or fail."""
    if not any("compile" in name.split() for name in names):
        yield
        return
    from torch._dynamo import config

    # after 8 models of one class torch would go on without compiling
    wanted = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with config.patch({name: value for name, value in wanted.items() if hasattr(config, name)}):
        yield


class Kit:
    """The kit's training loop, held between steps; the images are on the device.

    `name` says how to train, see `row_name`; attack and batch size are those of `config`.
    """

    def __init__(
        self, model: nn.Module, dataset: data.Dataset, config: RunConfig, name: str
    ) -> None:
        plain = {setting: getattr(RunConfig, setting) for setting, _ in _WORDS.values()}
        settings = plain | dict(_WORDS[word] for word in row_name(name).split())
        self.trainer = Trainer(replace(config, **settings), dataset, model=model)
        size, seed = self.trainer.config.batch_size or 0, config.seed
        epochs = (
            data.batches(dataset.train, size, seed=seed, epoch=epoch, augment=True, drop_last=True)
            for epoch in count(1)
        )
        self.batches = chain.from_iterable(epochs)
        x, self.y = next(self.batches)  # that is attacked alone
        self.x = x.contiguous(memory_format=self.trainer.precision.memory_format)

    def train(self, steps: int) -> None:
        """Takes `steps` steps."""
        self.trainer.train_on(islice(self.batches, steps))

    def attack(self, times: int = 1) -> None:
        """Attacks one batch, always the same, and throws the result away."""
        trainer = self.trainer
        with kernels_compared(), trainer.precision.autocast(self.x.device):
            for _ in range(times):
                trainer.method.attack(trainer.attacked or trainer.model, self.x, self.y)


_Runner = Kit | Reference


class _Bench:
    """The methods that are `able` to train, and of each what was measured, or a `reason`."""

    def __init__(self, config: RunConfig, images: data.Dataset, steps: int) -> None:
        self.config, self.images, self.steps = config, images, steps
        self.device = images.train.images.device
        self.model = build_model(config, images)
        self.able: dict[str, _Runner] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def measure(self, names: Sequence[str], repeats: int) -> dict[str, Any]:
        """Returns the methods and the matrix rates."""
        in_turns = partial(measuring.in_turns, failed=self.results)
        warm = in_turns("warm-up", {name: name for name in names}, self.warm)
        self.able = {name: runner for name, (runner,) in warm.items()}
        attacks = max(self.steps // 4, 1)

        def timed(work: Callable[[], object]) -> float:
            return measuring.seconds(work, self.device, wall=True)

        times = in_turns(
            "training", self.able, lambda r: timed(lambda: r.train(self.steps)), repeats=repeats
        )
        alone = in_turns(
            "attack alone", self.able, lambda r: timed(lambda: r.attack(attacks)), repeats=repeats
        )
        matrix = _or_reason(partial(measuring.matrix_rates, self.device))
        best = max(matrix["bfloat16"].values()) if "bfloat16" in matrix else None
        # what is compiled or captured does the same work, but cannot be counted
        plain = self.able.get("float32") or self.build("float32")
        counts = dict.fromkeys(alone, measuring.flops(plain.attack))
        counts[REFERENCE] = measuring.flops(self.able[REFERENCE].attack)
        for name in alone:
            step = _speed(times[name], times[REFERENCE], self.steps)
            step["images_per_second"] = (self.config.batch_size or 0) / step["median_seconds"]
            step["epochs_per_hour"] = 3600 * step["images_per_second"] / EPOCH
            attack = _speed(alone[name], alone[REFERENCE], attacks) | {"flops": counts[name]}
            attack["tflops"] = counts[name] / attack["median_seconds"] / 1e12
            attack["fraction"] = attack["tflops"] / best if best else None
            self.results[name] = {**step, "attack": attack}
        return {"methods": {name: self.results[name] for name in names}, "matrix": matrix}

    def warm(self, name: str) -> _Runner:
        runner = self.build(name)
        runner.train(WARM_UP)
        runner.attack()
        return runner

    def build(self, name: str) -> _Runner:
        """Makes what trains; the weights are the same for all."""
        model = copy.deepcopy(self.model)
        if name == REFERENCE:
            return Reference(model.to(self.device), self.images.train, self.config)
        return Kit(model, self.images, self.config, name)

    def profiles(self) -> dict[str, Any]:
        """Returns the profiles of the reference and of the kit's fastest method."""
        rows = [name for name in self.able if name != REFERENCE]
        rows.sort(key=lambda name: self.results[name]["median_seconds"])
        steps = min(self.steps, PROFILED)
        profiles = {}
        for name in (REFERENCE, *rows[:1]):
            train, once = self.able[name].train, self.results[name]["median_seconds"]
            profiles[name] = _or_reason(partial(profile, train, steps, self.device, once))
        return profiles


def _speed(times: Sequence[float], base: Sequence[float], count: int) -> dict[str, Any]:
    """Returns rounds of `count` steps, a step's median, and the speed's ratio to the base."""
    median = statistics.median(times) / count
    return {"seconds": list(times), "median_seconds": median, **measuring.ratios(base, times)}


def _or_reason(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # what was measured before it should not be lost
    try:
        return work()
    except Exception as error:
        return {"reason": measuring.reason(error)}
