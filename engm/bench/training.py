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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engm import data
from engm.bench import measuring
from engm.bench.kit import Kit, compiling, row_name
from engm.bench.profile import profile
from engm.bench.reference import Reference
from engm.config import RunConfig
from engm.device import pick_device
from engm.errors import check_choice, check_count
from engm.models import build_model

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
_Runner = Kit | Reference


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
        names: "reference", which is always one, and names for `engm.bench.kit.row_name`.
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
    settings |= {"methods": ",".join(names)}
    with measuring.undisturbed(target), compiling(names):
        torch.manual_seed(config.seed)
        bench = _Bench(config, images.to(target), steps)
        result = measuring.described(settings, target, what="training")
        result["environment"] |= _flags()
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
        warm = measuring.in_turns(
            "warm-up", {name: name for name in names}, self.warm, self.results
        )
        self.able = {name: runner for name, (runner,) in warm.items()}
        attacks = max(self.steps // 4, 1)

        def train(runner: _Runner) -> float:
            return measuring.seconds(lambda: runner.train(self.steps), self.device, wall=True)

        def attack(runner: _Runner) -> float:
            work = partial(runner.attack, attacks)
            return measuring.seconds(work, self.device, wall=True)

        times = measuring.in_turns("training", self.able, train, self.results, repeats)
        alone = measuring.in_turns("attack alone", self.able, attack, self.results, repeats)
        matrix = _or_reason(partial(measuring.matrix_rates, self.device))
        best = max(matrix["bfloat16"].values()) if "bfloat16" in matrix else None
        # what is compiled or captured does the same work, but cannot be counted
        plain = self.able.get("float32") or self.build("float32")
        counts = dict.fromkeys(alone, measuring.flops(plain.attack))
        counts[REFERENCE] = measuring.flops(self.able[REFERENCE].attack)
        for name in alone:
            step = _speed(times[name], times[REFERENCE], self.steps)
            images = (self.config.batch_size or 0) / step["median_seconds"]
            once = _speed(alone[name], alone[REFERENCE], attacks)
            rate = counts[name] / once["median_seconds"] / 1e12
            self.results[name] = {
                **step,
                "images_per_second": images,
                "epochs_per_hour": 3600 * images / EPOCH,
                "attack": {
                    **once,
                    "flops": counts[name],
                    "tflops": rate,
                    "fraction": rate / best if best else None,
                },
            }
        return {"methods": {name: self.results[name] for name in names}, "matrix": matrix}

    def warm(self, name: str) -> _Runner:
        """Builds a method and lets it train."""
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


def _flags() -> dict[str, Any]:
    cudnn, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "tf32": {"convolutions": cudnn.allow_tf32, "matrices": matrices.allow_tf32},
        "cudnn": cudnn.version(),
        "cudnn_benchmark": cudnn.benchmark,  # of the reference; the kit compares kernels
    }
