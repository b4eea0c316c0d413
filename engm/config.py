"""What a run is: one frozen record, checked before anything is computed. Needs no torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from operator import ge, gt, le, lt
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from engm.errors import InputError, offered
from engm.values import fit, read

DatasetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet"]
ModelName = Literal["small_cnn", "preact_resnet18", "wide_resnet34_10"]
MethodName = Literal["natural", "pgd_at", "trades", "mart", "fast_at"]
OptimizerName = Literal[
    "msgd", "msgd-clip", "engm", "engm-input", "engm-input-only", "engm-output", "engm-both"
]
ScheduleName = Literal["piecewise", "trades", "cosine", "one-cycle", "cyclic", "constant"]
RecipeName = Literal["trades", "mart", "robust-overfitting", "fast-at", "awp"]

# What a dataset asks for where the user does not say (source: this kit; CIFAR's are the field's
# usual ones, as in Rice et al. 2020, arXiv 2002.11569).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": dict(model="small_cnn", eps=0.15, num_steps=5, batch_size=50),
    "fashion-mnist": dict(model="small_cnn", eps=0.1, num_steps=7, batch_size=128),
    "cifar10": dict(model="preact_resnet18", eps=8 / 255, num_steps=10, batch_size=128),
    "cifar100": dict(model="preact_resnet18", eps=8 / 255, num_steps=10, batch_size=128),
    "tiny-imagenet": dict(model="preact_resnet18", eps=8 / 255, num_steps=10, batch_size=128),
}
_WIDTHS = {"small_cnn": 32, "preact_resnet18": 64, "wide_resnet34_10": 160}
_MODEL_NORMS = {"small_cnn": "none", "preact_resnet18": "batch", "wide_resnet34_10": "batch"}
# l2 budgets per dataset, used where norm="l2" and eps is left out
_L2_EPS = {"digits": 0.5, "fashion-mnist": 1.5}
_L2_EPS_COLOUR = 128 / 255
# as in the papers of the methods
_BETAS = {"trades": 6.0, "mart": 5.0}

_CIFAR10 = dict(dataset="cifar10", norm="linf", batch_size=128, lr=0.1, momentum=0.9)
_RICE = _CIFAR10 | dict(
    model="preact_resnet18", augment="reflect-crop-and-mirror", method="pgd_at", eps=8 / 255,
    step_size=2 / 255, num_steps=10, attack_mode="train", weight_decay=5e-4, epochs=200,
    schedule="piecewise",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Published hyperparameters: what the file `source` on GitHub does when run as it is.

    Where the kit cannot follow it, results/methods-as-published.md says so.
    """

    source: str
    settings: dict[str, Any]


RECIPES = {
    "trades": Recipe(
        "yaodongyu/TRADES, train_trades_cifar10.py",
        _CIFAR10 | dict(
            model="wide_resnet34_10", augment="crop-and-mirror", method="trades", eps=0.031,
            step_size=0.007, num_steps=10, beta=6.0, start_noise=0.001, attack_mode="eval",
            weight_decay=2e-4, epochs=76, schedule="trades",
        ),
    ),
    "mart": Recipe(
        "YisenWang/MART, train_resnet.py",
        _CIFAR10 | dict(
            model="preact_resnet18", augment="crop-and-mirror", method="mart", eps=0.031,
            step_size=0.007, num_steps=10, beta=5.0, start_noise=0.001, attack_mode="eval",
            lr=0.01, weight_decay=3.5e-3, epochs=120, schedule="trades",
        ),
    ),
    "robust-overfitting": Recipe("locuslab/robust_overfitting, train_cifar.py", _RICE),
    "fast-at": Recipe(
        "locuslab/fast_adversarial, CIFAR10/train_fgsm.py",
        _CIFAR10 | dict(
            model="preact_resnet18", augment="crop-and-mirror", method="fast_at", eps=8 / 255,
            step_size=10 / 255, num_steps=1, attack_mode="train", lr=0.2, weight_decay=5e-4,
            epochs=15, schedule="cyclic",
        ),
    ),
    "awp": Recipe("csdongxian/AWP, AT_AWP/train_cifar10.py", _RICE | dict(awp=0.01, awp_warmup=0)),
}  # fmt: skip


def _option(default: Any, help: str, **bounds: float) -> Any:
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. `None` means: what suits the dataset; `resolved()` fills it in.

    Pixels are in [0, 1], so `eps` and `step_size` are too (write `8 / 255`). A `recipe` sets what
    is not given: `RunConfig(recipe="trades", epochs=10)` is as in `RECIPES` but for the epochs.

    Raises:
        InputError: If a value has a wrong type, is out of range or not one of the known names.
    """

    recipe: RecipeName | None = _option(
        None, "published settings to start from; other options override them, see "
        "results/methods-as-published.md"
    )  # fmt: skip
    dataset: DatasetName = _option("digits", "data to train on")
    classes: int | None = _option(
        None, "use the images of the first so many classes only; default: all", at_least=2
    )
    subset: int | None = _option(None, "train on this many images only; default: all", at_least=1)
    validation_images: int | None = _option(
        None,
        "images that choose the epoch, taken off the training set; default: by dataset and subset",
        at_least=1,
    )
    test_images: int | None = _option(
        None,
        "test on this many images, evenly over the classes; default: all, or 1000 where the "
        "subset is smaller",
        at_least=1,
    )
    augment: Literal["crop-and-mirror", "reflect-crop-and-mirror", "none"] | None = _option(
        None, "what training does to its images; crops are padded by zeros, or by reflection; "
        "default: by dataset"
    )  # fmt: skip
    label_noise: float = _option(
        0.0, "fraction of the training images whose label is made wrong", at_least=0, below=1
    )
    model: ModelName | None = _option(None, "architecture; default: by dataset")
    width: int | None = _option(
        None, "channels of the first stage; default: by model", at_least=1, at_most=4096
    )
    model_norm: Literal["batch", "group", "none"] | None = _option(
        None, "normalisation layers of the model; default: by model"
    )
    method: MethodName = _option("pgd_at", "training method: inner attack and loss")
    eps: float | None = _option(None, "attack budget in pixel units, such as 8/255", above=0)
    norm: Literal["linf", "l2"] = _option("linf", "norm of the attack budget")
    num_steps: int | None = _option(
        None, "attack steps in training; default: by dataset", at_least=1
    )
    step_size: float | None = _option(
        None, "step of the training attack; default: 2.5 * eps / num_steps", above=0
    )
    start_noise: float | None = _option(
        None, "the training attack starts with normal noise of this deviation, 0: uniformly; "
        "default: 0.001 with trades, else 0; mart's code has 0.001, too", at_least=0, at_most=1
    )  # fmt: skip
    attack_mode: Literal["eval", "train"] = _option(
        "eval", "mode of the model under the training attack: of its BatchNorm and dropout"
    )
    beta: float | None = _option(
        None, "trades, mart: weight of the divergence; default: 6 and 5", at_least=0
    )
    awp: float = _option(
        0.0, "AWP: weight perturbation relative to the weights, such as 0.01; 0: none",
        at_least=0, at_most=1,
    )  # fmt: skip
    awp_warmup: int = _option(0, "AWP: epochs before it starts", at_least=0)
    label_smoothing: float = _option(
        0.0, "fraction of the label spread over all classes; not with mart", at_least=0, below=1
    )
    optimizer: OptimizerName = _option("msgd", "outer optimizer")
    lr: float = _option(0.1, "learning rate at its highest", above=0)
    momentum: float = _option(0.9, "momentum", at_least=0, below=1)
    weight_decay: float = _option(5e-4, "weight decay", at_least=0)
    scale: float | Literal["mean"] = _option(
        "mean", "ENGM: the pull c of an example, a number or 'mean'", above=0
    )
    floor: float = _option(0.05, "ENGM: near 0 normalises, 1 clips", above=0, at_most=1)
    max_norm: float = _option(1.0, "msgd-clip: the longest batch gradient", above=0)
    schedule: ScheduleName = _option("piecewise", "learning rate over time")
    epochs: int = _option(30, "passes over the training data", at_least=1)
    batch_size: int | None = _option(None, "examples a step; default: by dataset", at_least=1)
    eval_steps: int = _option(20, "PGD steps of the evaluation", at_least=1)
    seed: int = _option(0, "seed of weights, batches and attacks", at_least=0, at_most=2**32 - 1)
    precision: Literal["float32", "bfloat16"] = _option("float32", "arithmetic of model passes")
    channels_last: bool = _option(False, "memory layout that GPUs prefer for convolutions")
    compile: bool = _option(False, "compile the model for the attack steps (torch.compile)")
    capture: bool = _option(False, "record the attack steps as a CUDA graph, and replay it")

    def __new__(cls, **given: Any) -> "RunConfig":
        """Notes what is given, which a recipe leaves alone."""
        config = super().__new__(cls)
        object.__setattr__(config, "_given", frozenset(given))
        return config

    def __post_init__(self) -> None:
        """Checks every field, so that a config that exists is a config that can run."""
        for item in fields(self):
            value = _checked(item.name, getattr(self, item.name), item.metadata["bounds"])
            object.__setattr__(self, item.name, value)  # 1 and 1.0 are one config
        if self.recipe is not None:
            for name, value in RECIPES[self.recipe].settings.items():
                if name not in vars(self)["_given"]:
                    object.__setattr__(self, name, value)
        if self.norm == "linf" and self.eps is not None and self.eps > 1:
            raise InputError(
                f"eps must be at most 1 (pixels are in [0, 1]), got {self.eps}; write 8/255"
            )
        if self.beta is not None and self.method not in _BETAS:
            raise InputError(f"beta is a setting of trades and mart; {self.method} has none")
        if self.label_smoothing and self.method == "mart":
            raise InputError("label_smoothing has no meaning in mart's loss; leave it at 0")
        if self.awp_warmup and not self.awp:
            raise InputError(f"awp_warmup is {self.awp_warmup}, but there is no awp; try awp=0.01")
        if self.awp_warmup >= self.epochs:
            raise InputError(
                f"awp_warmup is {self.awp_warmup}, and epochs {self.epochs}: AWP would not start; "
                "give a smaller awp_warmup"
            )
        if self.method == "natural" and (self.attack_mode, self.start_noise) != ("eval", None):
            raise InputError("natural has no attack: leave attack_mode and start_noise out")
        if self.attack_mode == "train" and self.capture:
            raise InputError("capture records attacks in eval mode; leave it or attack_mode out")
        if self.method == "fast_at" and self.num_steps not in (None, 1):
            raise InputError(
                f"fast_at takes a single step, got num_steps={self.num_steps}; pgd_at takes more"
            )

    def resolved(self) -> "RunConfig":
        """Returns the config filled in for its dataset, model and method.

        Numbers of classes and images stay `None` for all of them or the usual ones, `augment` and
        `start_noise` for what suits the dataset and the method, `beta` where the method has none,
        and `recipe` where there is none.
        """
        values = {**_DEFAULTS[self.dataset]}
        if self.norm == "l2":
            values["eps"] = _L2_EPS.get(self.dataset, _L2_EPS_COLOUR)
        if self.method == "fast_at":
            values["num_steps"] = 1
        values |= {k: v for k, v in self.to_dict().items() if v is not None}
        model = values["model"]
        # Madry et al. 2018: 2.5 radii in all, enough to cross the ball whatever the step count;
        # Wong et al. 2020: a single step of 1.25 radii
        radii = 1.25 if self.method == "fast_at" else 2.5
        step_size = radii * values["eps"] / values["num_steps"]
        derived = dict(width=_WIDTHS[model], model_norm=_MODEL_NORMS[model], step_size=step_size)
        derived["beta"] = _BETAS.get(self.method)
        # all of them are given, so that the recipe has no say any more
        return RunConfig(**self.to_dict() | derived | values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Makes a config from a mapping such as a parsed `config.json`.

        Raises:
            InputError: If a name is unknown (the message lists the known ones) or a value is wrong.
        """
        unknown = [str(name) for name in values if name not in TYPES]
        if unknown:
            known = offered(unknown[0], TYPES, "the settings are")
            raise InputError(f"unknown setting {', '.join(unknown)}{known}")
        return cls(**values)

    @property
    def unread(self) -> set[str]:
        """The settings that the optimizer does not read."""
        return {*OF_OPTIMIZERS}.difference(READ_BY[self.optimizer])

    @property
    def name(self) -> str:
        """A folder name: what a person looks for first, then a digest of the whole config."""
        config = self.resolved()
        # without what has its default, so that a new setting renames no run of old
        values = {item: getattr(config, item.name) for item in fields(config)}
        chosen = {item.name: value for item, value in values.items() if value != item.default}
        text = json.dumps(chosen, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{config.dataset}-{config.method}-{config.optimizer}-seed{config.seed}-{digest}"


TYPES: dict[str, Any] = get_type_hints(RunConfig)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union type, or the type itself as a tuple of one."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def choices(kind: Any) -> list[str]:
    """Returns the literal values that a field of type `kind` may take; empty where it is open."""
    return [v for k in alternatives(kind) if get_origin(k) is Literal for v in get_args(k)]


# settings that one optimizer reads and another does not
OF_OPTIMIZERS = ("scale", "floor", "max_norm")
READ_BY = {"msgd": (), "msgd-clip": ("max_norm",)} | {
    name: ("scale", "floor") for name in choices(TYPES["optimizer"]) if name.startswith("engm")
}


def parse_number(text: str) -> float:
    """Reads a float or a fraction such as `8/255`; anything else is an `InputError`."""
    try:
        return float(read(text, float))
    except ValueError:
        raise InputError(f"{text!r} is not a number; write 0.03 or 8/255") from None


_BOUNDS = {"above": gt, "at_least": ge, "below": lt, "at_most": le}
_IN_WORDS = {float: "a finite number", int: "a whole number", bool: "true or false"}


def _checked(name: str, value: Any, bounds: dict[str, float]) -> Any:
    kind = TYPES[name]
    try:
        value = fit(value, kind)
    except ValueError:
        names = choices(kind)
        wanted = [f"one of {', '.join(names)}"] if names else []
        wanted += [_IN_WORDS.get(k, "nothing") for k in alternatives(kind) if get_origin(k) is None]
        raise InputError(f"{name} must be {' or '.join(wanted)}, got {value!r}") from None
    for word, limit in bounds.items():
        if isinstance(value, float | int) and not _BOUNDS[word](value, limit):
            raise InputError(f"{name} must be {word.replace('_', ' ')} {limit}, got {value!r}")
    return value
