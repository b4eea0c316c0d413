"""Data sets as uint8 tensors, and batches that are cut and augmented on their device."""

import hashlib
import os
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engm.errors import InputError, check_choice, check_count
from engm.runs import read_json

# --- data sets

PADDING = 4  # zero pixels on every side before a random crop


@dataclass(frozen=True)
class Split:
    """Images and their labels, on one device.

    Attributes:
        images: uint8, [n, c, h, w], 0 to 255.
        labels: int64, [n].

    Raises:
        InputError: If the tensors have another type or shape.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        types = images.dtype, labels.dtype, images.ndim
        if types != (torch.uint8, torch.int64, 4) or labels.shape != images.shape[:1]:
            found = f"{images.dtype} {list(images.shape)}, {labels.dtype} {list(labels.shape)}"
            raise InputError(f"a split needs uint8 [n, c, h, w] and int64 [n], these are {found}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> "Split":
        """The images at `indices`, in that order.

        Raises:
            InputError: If `indices` are not whole numbers from 0 to n - 1 in one row.
        """
        index = torch.as_tensor(indices)
        whole = not (index.is_floating_point() or index.dtype == torch.bool) and index.ndim == 1
        if not whole or (len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self))):
            raise InputError(
                f"indices must be a row of whole numbers from 0 to {len(self) - 1}, got {index}"
            )
        index = index.to(self.images.device, torch.int64)
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A data set cut into training, validation and test images.

    Attributes:
        name: Its key in `SPECS`.
        mean: Of each channel, over all official training images, of pixels in [0, 1].
        std: Standard deviation, likewise.
        title: What tables call it, with what sets it apart: "CIFAR-10 (JPEG)".
        digest: SHA-256 of the cache it was read from, which a run keeps: images of the same name
            can be other ones. None for images that are in no cache.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    title: str = ""
    digest: str | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its three splits on `device`."""
        train, validation, test = (s.to(device) for s in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


SMALL = 1000  # images; a smaller subset is a quick try, which few images judge


def load(
    name: str,
    *,
    root: Path | str | None = None,
    classes: int | None = None,
    subset: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    split_seed: int = 0,
) -> Dataset:
    """Loads a data set, on the CPU.

    The validation images come out of the official training images, evenly over the classes; the
    test images have no part in it. By default there are 200 for the digits and 1,000 otherwise
    (this kit): a standard error of at most 1.6 points, and few enough to attack every epoch. Beside
    a subset of fewer than 1,000 images, there are 200 of them, and 1,000 test images (this kit): to
    attack more would take longer than to train.

    Args:
        name: One of `SPECS`.
        root: Folder of the cache; by default that of `data_root`. The digits need none.
        classes: How many classes to keep, the first ones; by default all.
        subset: How many of the remaining training images to keep, evenly over the classes. A
            larger subset holds the smaller ones, and the validation images stay the same.
        validation: How many validation images.
        test: How many test images to keep, evenly over the classes.
        split_seed: Draws the validation images and the subsets.

    Raises:
        InputError: If the name is unknown, the cache is missing or damaged (the message names the
            command that makes it), or a count is not to be had.
    """
    check_choice("data set", name, SPECS)
    arrays, record = read_arrays(SPECS[name], root)
    names, title = tuple(record["class_names"]), record["title"]
    if classes is not None:
        title += f", {classes} classes"
        names = names[: check_count("classes", classes, 2, len(names))]
        for part in ("train", "test"):
            kept_rows = arrays[f"{part}_labels"] < classes
            for kind in ("images", "labels"):
                arrays[f"{part}_{kind}"] = arrays[f"{part}_{kind}"][kept_rows]
    pool = len(arrays["train_labels"])
    small = name != "digits" and subset is not None and subset < SMALL
    default = 200 if name == "digits" else min(200 if small else 1000, pool // 10)
    held_out = default if validation is None else validation
    held_out = check_count("validation_images", held_out, 1, pool - 1)
    left = pool - held_out
    if isinstance(subset, int) and subset > left:
        raise InputError(
            f"subset must be a whole number, 1 to {left}; got {subset} ({held_out} of the {pool} "
            "training images are for validation)"
        )
    kept = check_count("subset", left if subset is None else subset, 1, left)
    order = stratified_order(arrays["train_labels"], check_count("split_seed", split_seed, 0))
    tested: np.ndarray | slice = slice(None)
    if small and test is None:
        test = min(SMALL, len(arrays["test_labels"]))
    if test is not None:
        count = check_count("test_images", test, 1, len(arrays["test_labels"]))
        tested = stratified_order(arrays["test_labels"], split_seed)[:count]

    def split(part: str, index: np.ndarray | slice) -> Split:
        images, labels = arrays[f"{part}_images"][index], arrays[f"{part}_labels"][index]
        return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))

    return Dataset(
        name=name,
        train=split("train", order[held_out : held_out + kept]),
        validation=split("train", order[:held_out]),
        test=split("test", tested),
        class_names=names,
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        title=title,
        digest=record["cache_sha256"],
    )


def with_wrong_labels(split: Split, fraction: float, num_classes: int, *, seed: int) -> Split:
    """Returns a split in which a `fraction`, in [0, 1], of the labels is wrong.

    Which images, and which of the other `num_classes` each gets, is drawn from `seed`, uniformly.
    A larger fraction spoils the images of a smaller one, in the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(split), generator=generator)[: round(fraction * len(split))]
    shifts = torch.randint(1, num_classes, (len(split),), generator=generator)[: len(chosen)]
    chosen, shifts = chosen.to(split.labels.device), shifts.to(split.labels.device)
    labels = split.labels.clone()
    labels[chosen] = (labels[chosen] + shifts) % num_classes
    return Split(split.images, labels)


def to_float(images: Tensor) -> Tensor:
    """Turns uint8 images, 0 to 255, into float32 pixels in [0, 1]; refuses to scale twice."""
    if images.dtype != torch.uint8:
        raise InputError(f"to_float takes uint8 images, 0 to 255; these are {images.dtype}")
    return images.float() / 255


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    augment: bool | str = False,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts one epoch of a split into batches, on the split's device.

    The order, the crops and the mirroring are drawn at the start from `(seed, epoch)` on the CPU,
    so every device sees the same batches, and the global random state is left alone. While the
    batches are made, the device is not waited for.

    Args:
        split: What to cut.
        batch_size: Images a batch; the last one may be smaller.
        seed: 0 or more, as `epoch`.
        epoch: Every epoch of a seed is drawn anew.
        shuffle: Whether the order is drawn, too.
        augment: Crop at random after padding with `PADDING` zero pixels, or with "reflect" what is
            next to the edge, and mirror one in two.
        drop_last: Leave out a last batch that is smaller than `batch_size`.

    Returns:
        An iterator over `x`, float32 [b, c, h, w] in [0, 1], and `y`, int64 [b].

    Raises:
        InputError: At once, if a value is out of range or there would be no batch.
    """
    count = len(split)
    check_count("batch_size", batch_size)
    if count < (batch_size if drop_last else 1):
        raise InputError(f"{count} images make no batch of {batch_size}; lower batch_size")
    mixed = np.random.SeedSequence([check_count("seed", seed, 0), check_count("epoch", epoch, 0)])
    generator = torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    corner = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
    mirror = torch.randint(2, (count, 1), generator=generator)
    device = split.images.device
    # a plain copy to a GPU would wait for the work that is queued there
    order, corner, mirror = (
        drawn.to(device, non_blocking=device.type == "cuda") for drawn in (order, corner, mirror)
    )

    def cut() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count - batch_size + 1 if drop_last else count, batch_size):
            rows = slice(start, start + batch_size)
            images = split.images[order[rows]]
            if augment:
                mode = augment if isinstance(augment, str) else "constant"
                images = _crop_and_mirror(images, corner[rows], mirror[rows], mode)
            yield to_float(images), split.labels[order[rows]]

    return cut()


def _crop_and_mirror(images: Tensor, corner: Tensor, mirror: Tensor, mode: str) -> Tensor:
    count, channels, height, width = images.shape
    device = images.device
    padded = functional.pad(images.float(), (PADDING,) * 4, mode).to(images.dtype)
    rows = corner[:, :1] + torch.arange(height, device=device)
    columns = corner[:, 1:] + torch.arange(width, device=device)
    columns = torch.where(mirror.bool(), columns.flip(1), columns)
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


# --- the cache

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class DatasetSpec:
    """What is fixed about a data set before a byte of it is read.

    Attributes:
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

    In every stretch of it, classes that are not used up differ by at most one image. `seed` draws
    the order within each class and the turn of the classes.
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
    """Reads a data set whole, from its cache in `data_root(root)`; the digits from scikit-learn.

    Returns `train_images`, `train_labels`, `test_images` and `test_labels`, all uint8, and a record
    with `title`, `class_names`, `mean`, `std` and `cache_sha256`.
    """
    if spec.name == "digits":
        return _digits(spec)
    folder = data_root(root)
    record_path, cache_path = folder / f"{spec.name}.json", folder / f"{spec.name}.npz"
    command = f"engm prepare {spec.name}"
    if root is not None:
        command += f" --root {shlex.quote(str(folder))}"
    if folder.is_file():
        raise InputError(f"{folder} is a file; give its folder, {folder.parent}")
    if not record_path.is_file():
        raise InputError(
            f"{spec.title} is not prepared in {folder}; run `{command}`, or "
            "set ENGM_DATA to the folder where it is"
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


def recorded_digest(name: str, root: Path | str | None = None) -> str | None:
    """Returns the digest of a cache from its record alone; `None` for none, and for the digits."""
    with suppress(InputError, OSError, AttributeError):
        digest = read_json(data_root(root) / f"{name}.json").get("cache_sha256")
        return digest if isinstance(digest, str) else None
    return None


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
    return arrays, {
        "title": spec.title,
        "class_names": spec.class_names,
        "mean": [float(pixels.mean())],
        "std": [float(pixels.std())],
        "cache_sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
    }


def _check_cache(spec: DatasetSpec, arrays: Arrays, record: dict[str, Any]) -> None:
    names, channels = list(record["class_names"]), spec.image_shape[0]
    holds = {
        "title": isinstance(record["title"], str),
        "class_names": len(names) == spec.num_classes and names == list(spec.class_names or names),
        "mean": [0 <= value <= 1 for value in record["mean"]] == [True] * channels,
        "std": [0 < value <= 1 for value in record["std"]] == [True] * channels,
        "dtype": {array.dtype for array in arrays.values()} == {np.dtype(np.uint8)},
    }
    for part, count in (("train", spec.train_count), ("test", spec.test_count)):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        holds[f"{part}_images"] = images.shape == (count, *spec.image_shape)
        holds[f"{part}_labels"] = labels.shape == (count,) and labels.max() < spec.num_classes
    wrong = [key for key, right in holds.items() if not right]
    if wrong:
        raise InputError(f"{', '.join(wrong)} cannot be that of {spec.title}")
