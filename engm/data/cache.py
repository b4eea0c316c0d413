"""What is known of each data set, and how it is read: the digits, or the cache of `prepare.py`.

The digits come with scikit-learn. Every other data set is read from what
`data_scripts/prepare.py` writes: `NAME.npz`, four arrays, and `NAME.json`, what is known of them.
"""

import hashlib
import os
import shlex
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engm.errors import InputError
from engm.files import read_json

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class DatasetSpec:
    """What is fixed about a data set before a byte of it is read.

    Attributes:
        title: What tables and figures call it.
        image_shape: Channels, height, width in pixels.
        train_count: Images of the official training split, as many of each class.
        test_count: Images of the split that the kit tests on, likewise (the digits: about).
        augment: Whether training crops and mirrors it: not the digits, which mean something else
            in the mirror, nor Fashion-MNIST, which is centred.
        class_names: In the order of the labels; None where the archive says them.
    """

    name: str
    title: str
    image_shape: tuple[int, int, int]
    num_classes: int
    train_count: int
    test_count: int
    augment: bool
    class_names: tuple[str, ...] | None = None


_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_OBJECTS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", "Digits", (1, 8, 8), 10, 1000, 797, False, tuple("0123456789")),
        DatasetSpec(
            "fashion-mnist", "Fashion-MNIST", (1, 28, 28), 10, 60_000, 10_000, False, _CLOTHES
        ),
        DatasetSpec("cifar10", "CIFAR-10", (3, 32, 32), 10, 50_000, 10_000, True, _OBJECTS),
        DatasetSpec("cifar100", "CIFAR-100", (3, 32, 32), 100, 50_000, 10_000, True),
        DatasetSpec("tiny-imagenet", "TinyImageNet", (3, 64, 64), 200, 100_000, 10_000, True),
    )
}


def data_root(root: Path | str | None = None) -> Path:
    """The folder of the caches: `root`, else the variable ENGM_DATA, else ~/.cache/engm."""
    return Path(root or os.environ.get("ENGM_DATA") or "~/.cache/engm").expanduser()


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of the indices of `labels` that goes round the classes in turn.

    In every stretch of it, classes that are not used up differ by at most one image.

    Args:
        labels: Integers from 0, [n].
        seed: Draws the order within each class and the turn of the classes.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    sizes = np.bincount(labels)
    turn = generator.permutation(len(sizes))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes = labels[by_class]
    # the k-th image of its class goes in round k
    rounds = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[classes]
    return by_class[np.lexsort((turn[classes], rounds))]


def read_arrays(spec: DatasetSpec, root: Path | str | None) -> tuple[Arrays, dict[str, Any]]:
    """Reads a data set whole.

    Args:
        spec: Which one.
        root: As for `data_root`; the digits need none.

    Returns:
        `train_images`, `train_labels`, `test_images` and `test_labels`, all uint8, and a record
        with `title`, `class_names`, `mean` and `std`.

    Raises:
        InputError: If the cache is missing or damaged; the message names the command that makes it.
    """
    return _digits(spec) if spec.name == "digits" else _read_cache(spec, root)


def _digits(spec: DatasetSpec) -> tuple[Arrays, dict[str, Any]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 0..16 -> 0..255
    images = np.rint(bunch.images * 255 / 16).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.uint8)
    order = stratified_order(labels, seed=0)
    arrays = {}
    for part, index in (("test", order[: spec.test_count]), ("train", order[spec.test_count :])):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images[index], labels[index]
    pixels = arrays["train_images"] / 255
    mean, std = [float(pixels.mean())], [float(pixels.std())]
    return arrays, {"title": spec.title, "class_names": spec.class_names, "mean": mean, "std": std}


def _read_cache(spec: DatasetSpec, root: Path | str | None) -> tuple[Arrays, dict[str, Any]]:
    folder = data_root(root)
    record_path, cache_path = folder / f"{spec.name}.json", folder / f"{spec.name}.npz"
    command = f"python data_scripts/prepare.py {spec.name}"
    if root is not None:
        command += f" --root {shlex.quote(str(folder))}"
    if not record_path.is_file():
        raise InputError(
            f"{spec.title} is not prepared in {folder}; run `{command}` in the kit's repository, "
            "or set ENGM_DATA to the folder where it is"
        )
    try:
        record = read_json(record_path)
        with open(cache_path, "rb") as cache:
            if hashlib.file_digest(cache, "sha256").hexdigest() != record["cache_sha256"]:
                raise InputError(f"{cache_path.name} is not what {record_path.name} describes")
            cache.seek(0)
            arrays = dict(np.load(cache, allow_pickle=False))
        _check_cache(spec, arrays, record)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"the cache of {spec.title} in {folder} is damaged ({error}); make it anew: `{command}`"
        ) from None
    return arrays, record


def _check_cache(spec: DatasetSpec, arrays: Arrays, record: dict[str, Any]) -> None:
    names, channels = list(record["class_names"]), spec.image_shape[0]
    holds = {
        "title": isinstance(record["title"], str),
        "class_names": len(names) == spec.num_classes and names == list(spec.class_names or names),
        "mean": [0 <= value <= 1 for value in record["mean"]] == [True] * channels,
        "std": [0 < value <= 1 for value in record["std"]] == [True] * channels,
    }
    for part, count in (("train", spec.train_count), ("test", spec.test_count)):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        holds[f"{part}_images"] = images.shape == (count, *spec.image_shape)
        holds[f"{part}_labels"] = labels.shape == (count,) and labels.max() < spec.num_classes
        holds["dtype"] = holds.get("dtype", True) and images.dtype == labels.dtype == np.uint8
    wrong = [key for key, right in holds.items() if not right]
    if wrong:
        raise InputError(f"{', '.join(wrong)} cannot be that of {spec.title}")
