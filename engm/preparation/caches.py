"""Fetches a data set or takes one that is there, checks it, and writes the cache of the kit."""

import hashlib
import http.client
import math
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from engm.data import DatasetSpec
from engm.errors import InputError
from engm.preparation.layouts import Contents, read_dataset
from engm.runs import atomic_path, make_folder, write_json


def prepare(spec: DatasetSpec, archive: Path | None, root: Path) -> Path:
    """Writes the cache of one data set into `root`; what is there is replaced when all is well.

    `archive` is a zip, a tar or a folder; without one the official files are downloaded. Where
    anything is wrong with them nothing is written. Returns the path of the cache.
    """
    if archive is not None and not archive.exists():
        raise InputError(f"there is no file or folder {archive}")
    make_folder(root, "give another folder with --root")
    if archive is not None:
        return _convert(spec, archive, archive.name, root)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
        files = downloads(spec)
        _download(spec, files, Path(folder))
        source = Path(folder) / files[0][1] if len(files) == 1 else Path(folder)
        return _convert(spec, source, files[0][0], root)


def _convert(spec: DatasetSpec, source: Path, origin: str, root: Path) -> Path:
    click.echo(f"Reading {source}: all names first, then the images")
    return write_cache(spec, read_dataset(spec, source), source, origin, root)


def downloads(spec: DatasetSpec) -> list[tuple[str, str, str]]:
    """The official files of a data set, each as address, file name and md5 checksum."""
    from engm.preparation.vision import torchvision

    datasets = torchvision.datasets
    if spec.name == "tiny-imagenet":
        address = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        return [(address, "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")]
    if spec.name == "fashion-mnist":
        mirror = datasets.FashionMNIST.mirrors[0]
        return [(mirror + file, file, md5) for file, md5 in datasets.FashionMNIST.resources]
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[spec.name]
    return [(cifar.url, cifar.filename, cifar.tgz_md5)]


def write_cache(
    spec: DatasetSpec, contents: Contents, source: Path, origin: str, root: Path
) -> Path:
    """Writes NAME.npz, then NAME.json, which makes it valid; prints what was written."""
    cache = root / f"{spec.name}.npz"
    click.echo(f"Writing {cache} ({cache_size(spec):.2f} GB)")
    with atomic_path(cache) as temporary:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                train_images=contents.arrays["train_images"],
                train_labels=contents.arrays["train_labels"],
                test_images=contents.arrays["test_images"],
                test_labels=contents.arrays["test_labels"],
            )
        cache_sha256 = _sha256(temporary)
    click.echo("Measuring mean and deviation of its pixels, and the checksum of the source")
    mean, std = channel_statistics(contents.arrays["train_images"])
    note = "official layout" if contents.official else "re-encoded as image files by others"
    write_json(
        root / f"{spec.name}.json",
        {
            "name": spec.name,
            "title": contents.title,
            "source": origin,
            "source_note": note,
            "source_sha256": _sha256(source) if source.is_file() else None,
            "cache_sha256": cache_sha256,
            "train_count": spec.train_count,
            "test_count": spec.test_count,
            "image_shape": spec.image_shape,
            "class_names": contents.class_names,
            "mean": mean,
            "std": std,
        },
    )
    click.echo(
        f"{contents.title}: {spec.train_count:,} training and {spec.test_count:,} test images, "
        f"{spec.num_classes} classes\n"
        f"Source: {origin} ({note})\n"
        f"Wrote {cache} ({cache.stat().st_size / 1e6:.0f} MB) and {spec.name}.json"
    )
    return cache


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 [n, c, h, w], of pixels in [0, 1].

    Counted in whole numbers, so that the result does not depend on the order of the images.
    """
    values = np.arange(256)
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 100):  # what fits a processor's cache
            counts += np.bincount(images[start : start + 100, channel].ravel(), minlength=256)
        first, second = (int(counts @ values**power) / int(counts.sum()) for power in (1, 2))
        mean.append(first / 255)
        std.append(math.sqrt(second - first**2) / 255)
    return mean, std


def cache_size(spec: DatasetSpec) -> float:
    """How much a cache takes on the disk, in GB: a byte a pixel and one a label."""
    return (spec.train_count + spec.test_count) * (math.prod(spec.image_shape) + 1) / 1e9


def _download(spec: DatasetSpec, files: list[tuple[str, str, str]], folder: Path) -> None:
    from engm.preparation.vision import torchvision

    path = "FILE" if len(files) == 1 else "FOLDER"
    elsewhere = (
        f"try again, or fetch {', '.join(url for url, _, _ in files)} on another machine and run: "
        f"engm prepare {spec.name} --archive {path}"
    )
    for url, file, md5 in files:
        click.echo(f"Downloading {url}")
        try:
            with _timeout(30):
                torchvision.datasets.utils.download_url(url, folder, filename=file, md5=md5)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{url} cannot be downloaded ({error}); {elsewhere}") from None
        except RuntimeError:
            raise InputError(
                f"what {url} sent is not the official file (its md5 is not {md5}); {elsewhere}"
            ) from None


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
