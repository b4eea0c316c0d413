"""How fast adversarial training is: the public reference's protocol beside the kit's, in one run.

All train the same model, from the same weights, on the same images and device, for real: the
weights move. They take turns (A B C A B C ...), a round is some steps of one of them, and the
device is waited for before and after it. What is reported is the median over the rounds and the
quartiles; a speed is the ratio of two times of one round.

The reference is described in `engm.bench.reference`. The kit's rows are named by words: the outer
optimizer (MSGD where none is named, "engm" with exact norms, "engm-input"), the precision
("float32" or "bfloat16"), and "channels_last", "compile" and "capture" (CUDA graphs). Each goes
through `train_one_epoch` with batches that are cut and augmented on the device; steps are those of
whole batches, and what the start of an epoch costs is in the kit's time where it comes, what its
end costs in every round.
"engm-input" takes the exact norms in one step of twenty, so that rounds should be of twenty steps.

cuDNN compares its kernels for the kit, as in `engm train`, and not for the reference. Torch keeps
one kernel for each shape, layout and type, so the kit's float32 row without channels_last meets
those that were chosen for the reference, which comes first.

Besides: the attack alone, on one batch, with its floating point operations a second against the
fastest product of matrices that the device does in the same run; memory, on CUDA; and a profile of
the reference and of the kit's fastest row.
"""

import copy
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from engm import data, models
from engm.bench.costs import forget_peak, held, reason, seconds, speed_up
from engm.bench.kit import Kit, Variant, as_named
from engm.bench.profile import profile
from engm.bench.rates import flops, matrix_rates
from engm.bench.reference import Reference
from engm.bench.speeds import REFERENCE
from engm.config import RunConfig
from engm.data import data_root as folder_of
from engm.device import pick_device
from engm.errors import InputError
from engm.runs import environment

_FASTEST = "bfloat16 channels_last compile capture"
METHODS = (
    *(REFERENCE, "float32", "bfloat16", "bfloat16 channels_last"),
    *("bfloat16 channels_last compile", "bfloat16 channels_last capture", _FASTEST),
    *("engm float32", f"engm {_FASTEST}", "engm-input float32", f"engm-input {_FASTEST}"),
)
DATASETS = ("cifar10", "random")
EPOCH = 50_000  # images, whatever the data set has
WARM_UP = 3
PROFILED = 5
_RANDOM_IMAGES = 50_000
_IMAGES_ON_CPU = 2_000
_SHOWN = ("model", "width", "model_norm", "batch_size", "num_steps", "seed")


class _Runner(Protocol):
    def prepare(self, steps: int) -> None: ...

    def train(self, steps: int) -> None: ...

    def attack(self) -> None: ...


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
        dataset: "cifar10", or "random" images of its shape; by default the first where it is
            prepared.
        data_root: Where the datasets live, see `engm.data.load`.
        steps: Steps of a round; by default 20 on CUDA and 2 on the CPU.
        repeats: Rounds.
        names: "reference", which is always one, and names for `Variant.parse`.
        device: As for `engm.training.fit`.
        save: Given the result as it is before the profiles, so that a profiler that ends the
            process, as some have, takes nothing along.

    Returns:
        `what`: "training". `command`, `settings`, `environment` and `data`. For each of `methods`
        either a `reason` why it could not be measured, or all `seconds` of the rounds, and of a
        step `median_seconds`, `low_seconds` and `high_seconds`; `images_per_second`,
        `epochs_per_hour`, the speed's `ratio` to the reference with its quartiles `low` and `high`,
        what it held at most (`peak_bytes`, and `reserved_bytes` with what the allocator and CUDA
        graphs keep; None on the CPU), and the same of the `attack` alone with its `flops`. Besides,
        the rates of `matrix` products and the `profile`.

    Raises:
        InputError: If a name is unknown, a number is out of range or the data is not there.
    """
    target = pick_device(device)
    names = _names(names)
    steps = (20 if target.type == "cuda" else 2) if steps is None else steps
    for title, value in {"steps": steps, "repeats": repeats}.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{title} must be a whole number, 1 or more; got {value!r}")
    config = config.resolved()
    assert config.batch_size is not None
    subset = config.subset
    if subset is None and target.type == "cpu":
        subset = max(_IMAGES_ON_CPU, config.batch_size * (max(steps, WARM_UP) + 1))
    images = _images(dataset, data_root, subset, config.seed)
    config = RunConfig(**config.to_dict() | {"subset": subset})
    settings = dict(
        **{name: getattr(config, name) for name in _SHOWN},
        dataset=images.name,
        subset=subset,
        steps=steps,
        repeats=repeats,
        methods=",".join(names),
    )
    flags = [("--" + k.replace("_", "-"), str(v)) for k, v in settings.items() if v is not None]
    words = [word for pair in [*flags, ("--device", target.type)] for word in pair]
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []), as_named(names):
        torch.manual_seed(config.seed)
        bench = _Bench(config, images, target, steps, repeats)
        try:
            result = {
                "what": "training",
                "command": shlex.join(["engm", "bench", "--what", "training", *words]),
                "settings": settings,
                "environment": environment(target) | _flags(),
                "data": {"title": images.title or "random images", "images": len(images.train)},
                **bench.measure(names),
                "profile": {},
            }
            if save is not None:
                save(result)
            result["profile"] = bench.profiles()
        finally:
            bench.close()
    return result


class _Bench:
    """What is measured, and how often."""

    def __init__(
        self,
        config: RunConfig,
        images: data.Dataset,
        device: torch.device,
        steps: int,
        repeats: int,
    ) -> None:
        self.config, self.images, self.device = config, images, device
        self.steps, self.repeats = steps, repeats
        self.model = models.build(
            config.model or "",
            num_classes=images.num_classes,
            width=config.width,
            norm=config.model_norm,
            mean=images.mean,
            std=images.std,
        )
        self.split = images.train.to(device)
        self.runners: dict[str, _Runner] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.flops: dict[str, int] = {}

    def measure(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the methods and the matrix rates."""
        for name in tqdm(names, "warm-up"):
            self.warm_up(name)
        attacks = max(self.steps // 4, 1)
        times = self.rounds("training", self.train)
        alone = self.rounds("attack alone", lambda runner: self.attack(runner, attacks))
        matrix = _or_reason(partial(matrix_rates, self.device))
        for name in self.runners:
            self.found[name] |= self.speed(times[name], times[REFERENCE])
            attack = speed_up(alone[name], alone[REFERENCE], attacks)
            self.found[name]["attack"] = attack | self.rate(name, attack, matrix)
        return {"methods": self.found, "matrix": matrix}

    def close(self) -> None:
        """Ends the workers of the reference."""
        reference = self.runners.get(REFERENCE)
        if isinstance(reference, Reference):
            reference.close()

    def warm_up(self, name: str) -> None:
        """Builds a method and lets it train, or notes why it cannot."""
        runner: list[_Runner] = []

        def work() -> None:
            runner.append(self.build(name))
            runner[0].train(1)
            runner[0].attack()
            forget_peak(self.device)  # that of cuDNN's search for kernels
            runner[0].train(WARM_UP)
            runner[0].attack()

        try:
            self.found[name] = held(work, self.device)
            self.runners[name] = runner[0]
        except Exception as error:
            if name == REFERENCE:
                raise  # nothing to compare with
            if "cannot be recorded" in str(error):
                raise InputError(
                    f"{name}: {reason(error)}. Torch cannot go on after that; name --methods "
                    "without capture"
                ) from error
            self.found[name] = {"reason": reason(error)}

    def build(self, name: str) -> _Runner:
        """Makes what trains; the weights are the same for all."""
        config, model = self.config, copy.deepcopy(self.model)
        if name != REFERENCE:
            return Kit(model, self.split, config, Variant.parse(name))
        assert config.batch_size and config.eps and config.step_size and config.num_steps
        return Reference(
            model.to(self.device),
            self.images.train,
            batch_size=config.batch_size,
            lr=config.lr,
            epochs=config.epochs,
            seed=config.seed,
            attack=dict(eps=config.eps, step_size=config.step_size, num_steps=config.num_steps),
        )

    def rounds(self, title: str, time: Callable[[_Runner], float]) -> dict[str, list[float]]:
        """Times all methods in turns; one that fails leaves, with its reason."""
        times: dict[str, list[float]] = {name: [] for name in self.runners}
        for _ in tqdm(range(self.repeats), title):
            for name, runner in list(self.runners.items()):
                try:
                    times[name].append(time(runner))
                except Exception as error:
                    if name == REFERENCE:
                        raise
                    self.found[name] = {"reason": reason(error)}
                    del self.runners[name]
        return times

    def train(self, runner: _Runner) -> float:
        """Returns what a round of training takes, in seconds."""
        runner.prepare(self.steps)
        return seconds(lambda: runner.train(self.steps), self.device, wall=True)

    def attack(self, runner: _Runner, attacks: int) -> float:
        """Returns what a round of attacks takes, in seconds."""

        def work() -> None:
            for _ in range(attacks):
                runner.attack()

        return seconds(work, self.device, wall=True)

    def speed(self, times: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
        """Returns the times of a step and the speeds that they are."""
        found = speed_up(times, base, self.steps)
        assert self.config.batch_size is not None
        images = self.config.batch_size / found["median_seconds"]
        return {**found, "images_per_second": images, "epochs_per_hour": 3600 * images / EPOCH}

    def rate(self, name: str, attack: dict[str, Any], matrix: dict[str, Any]) -> dict[str, Any]:
        """Returns the operations of a method's attack, and their rate."""
        # what is compiled or captured does the same work, but cannot be counted
        plain = REFERENCE if name == REFERENCE else "float32"
        if plain not in self.flops:
            runner = self.runners.get(plain) or self.build(plain)
            self.flops[plain] = flops(runner.attack)
        tflops = self.flops[plain] / attack["median_seconds"] / 1e12
        fraction = tflops / max(matrix["bfloat16"].values()) if "bfloat16" in matrix else None
        return {"flops": self.flops[plain], "tflops": tflops, "fraction": fraction}

    def profiles(self) -> dict[str, Any]:
        """Returns the profiles of the reference and of the kit's fastest method."""
        rows = [name for name in self.runners if name != REFERENCE]
        fastest = sorted(rows, key=lambda name: -self.found[name]["ratio"])[:1]
        steps = min(self.steps, PROFILED)
        found = {}
        for name in (REFERENCE, *fastest):
            runner = self.runners[name]
            runner.prepare(steps)
            found[name] = _or_reason(
                partial(
                    profile, runner.train, steps, self.device, self.found[name]["median_seconds"]
                )
            )
        return found


def _names(names: Sequence[str]) -> list[str]:
    given = [name if name == REFERENCE else Variant.parse(name).name for name in names]
    return [REFERENCE, *dict.fromkeys(name for name in given if name != REFERENCE)]


def _images(
    name: str | None, data_root: Path | None, subset: int | None, seed: int
) -> data.Dataset:
    if name is None:
        prepared = (folder_of(data_root) / "cifar10.json").is_file()
        name = "cifar10" if prepared else "random"
    if name == "cifar10":
        return data.load("cifar10", root=data_root, subset=subset)
    if name != "random":
        raise InputError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    generator = torch.Generator().manual_seed(seed)
    count = subset or _RANDOM_IMAGES

    def split(count: int) -> data.Split:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return data.Split(pixels, torch.randint(10, (count,), generator=generator))

    classes = tuple(str(k) for k in range(10))
    # of uniform pixels in [0, 1]
    mean, std = (0.5,) * 3, (12**-0.5,) * 3
    return data.Dataset("random", split(count), split(1), split(1), classes, mean, std)


def _or_reason(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # what was measured before it should not be lost
    try:
        return work()
    except Exception as error:
        return {"reason": reason(error)}


def _flags() -> dict[str, Any]:
    backends = torch.backends
    return {
        "tf32": {
            "convolutions": backends.cudnn.allow_tf32,
            "matrices": backends.cuda.matmul.allow_tf32,
        },
        "cudnn": backends.cudnn.version(),
        # of the reference; the kit lets cuDNN compare its kernels
        "cudnn_benchmark": backends.cudnn.benchmark,
    }
