"""Turns what people have of a data set into four arrays: official files, or a folder a class."""

import gzip
import io
import pickle
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from engm.data import DatasetSpec, stratified_order
from engm.errors import InputError
from engm.preparation.archives import list_files, read_files

_CIFAR10 = {
    "train": [f"data_batch_{number}" for number in range(1, 6)],
    "test": ["test_batch"],
}
_IDX = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_IMAGE_FILE = re.compile(
    r"(?P<top>(?:.*/)?)(?P<part>train|test|val)/(?P<name>[^/]+)/(?:images/)?"
    r"[^/]+\.(?P<kind>(?i:jpe?g|png|bmp|webp))"
)
_UNDERSTOOD = {
    "fashion-mnist": "train-images-idx3-ubyte(.gz) and its three companions",
    "cifar10": "data_batch_1 to data_batch_5 and test_batch",
    "cifar100": "train, test and meta",
    "tiny-imagenet": "wnids.txt, train/<class>/images/*.JPEG, val/images and val_annotations.txt",
}


@dataclass(frozen=True)
class Contents:
    """A data set as it was found.

    `arrays` has `train_images` and `test_images`, uint8 [n, c, h, w], with `train_labels` and
    `test_labels`, uint8 [n]. `title` tells a re-encoding apart from the `official` files.
    """

    arrays: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    title: str
    official: bool = True


def read_dataset(spec: DatasetSpec, path: Path) -> Contents:
    """Reads a data set from a zip, a tar or a folder, and checks it against its `spec`.

    There are the official files, or `train/<class>/*.png` (or other image files) with
    `test/<class>/*.png` or `val/<class>/*.png`.
    """
    names = list_files(path)
    official: dict[str, Callable[[DatasetSpec, Path, list[str]], Contents | None]] = {
        "fashion-mnist": _read_idx,
        "cifar10": _read_cifar,
        "cifar100": _read_cifar,
        "tiny-imagenet": _read_tiny_imagenet,
    }
    contents = official[spec.name](spec, path, names) or _read_class_folders(spec, path, names)
    if contents is None:
        found = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise InputError(
            f"{path} does not look like {spec.title}. Understood are the official files "
            f"({_UNDERSTOOD[spec.name]}), and its images as train/<class>/*.png with "
            "test/<class>/*.png; images of one's own are no data set of the kit. "
            f"Found {len(names)} files: {found or 'none'}"
        )
    labels = {part: contents.arrays[f"{part}_labels"] for part in ("train", "test")}
    _check_counts(spec, path, contents.class_names, labels)
    return contents


def _check_counts(
    spec: DatasetSpec, path: Path, class_names: Sequence[str], by_part: Mapping[str, np.ndarray]
) -> None:
    _check_class_count(spec, path, len(class_names))
    for part, count in (("train", spec.train_count), ("test", spec.test_count)):
        labels = by_part[part]
        if labels.max() >= spec.num_classes:
            raise InputError(
                f"{path} has a {part} image of label {labels.max()}, the labels of {spec.title} "
                f"go from 0 to {spec.num_classes - 1}"
            )
        found = np.bincount(labels, minlength=spec.num_classes)
        each = count // spec.num_classes
        wrong = np.flatnonzero(found != each)
        if len(wrong):
            raise InputError(
                f"{path} has {found[wrong[0]]:,} {part} images of the class "
                f"{class_names[wrong[0]]!r}, {spec.title} has {each:,} of each class"
            )


def _check_class_count(spec: DatasetSpec, path: Path, count: int) -> None:
    if count != spec.num_classes:
        raise InputError(f"{path} names {count} classes, {spec.title} has {spec.num_classes}")


def _read_cifar(spec: DatasetSpec, path: Path, names: list[str]) -> Contents | None:
    ten = spec.name == "cifar10"
    parts = _CIFAR10 if ten else {"train": ["train"], "test": ["test"]}
    wanted = [*parts["train"], *parts["test"], *([] if ten else ["meta"])]
    folder = _folder_of(path, names, wanted)
    if folder is None:
        return None
    read = read_files(path, [folder + name for name in wanted])
    entries = {
        name.removeprefix(folder): _unpickled(name, content)
        for name, content in tqdm(read, total=len(wanted), desc=path.name)
    }
    key = "labels" if ten else "fine_labels"
    arrays = {}
    for part, files in parts.items():
        batches = [_cifar_batch(spec, folder + name, entries[name], key) for name in files]
        arrays[f"{part}_images"] = np.concatenate([images for images, _ in batches])
        arrays[f"{part}_labels"] = np.concatenate([labels for _, labels in batches])
    class_names = spec.class_names or entries["meta"].get("fine_label_names")
    if class_names is None:
        raise InputError(f"{folder}meta in {path} names no classes (fine_label_names)")
    return Contents(arrays, tuple(str(name) for name in class_names), spec.title)


def _cifar_batch(
    spec: DatasetSpec, name: str, entry: dict[str, Any], key: str
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = entry.get("data"), entry.get(key)
    if not isinstance(images, np.ndarray) or not isinstance(labels, list):
        raise InputError(f"{name} is not a CIFAR batch: it needs the entries 'data' and {key!r}")
    if images.dtype != np.uint8 or images.shape != (len(labels), int(np.prod(spec.image_shape))):
        raise InputError(
            f"{name} must hold uint8 [{len(labels)}, {np.prod(spec.image_shape)}], "
            f"found {images.dtype} {list(images.shape)}"
        )
    if not all(isinstance(label, int) and 0 <= label < spec.num_classes for label in labels):
        raise InputError(f"{name} holds labels outside 0 to {spec.num_classes - 1}")
    return images.reshape(-1, *spec.image_shape), np.array(labels, np.uint8)


class _ArraysOnly(pickle.Unpickler):
    # A pickle names what is called to build it. The CIFAR files need a dtype and an empty array,
    # which its state then fills; nothing else is handed out, so nothing else can be called.
    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "_reconstruct": lambda *_: np.empty(0, np.uint8),
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.split(".")[0] != "numpy" or name not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[name]


def _unpickled(name: str, content: bytes) -> dict[str, Any]:
    try:
        entry = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(
            f"{name} was not read: it is not a pickle of plain arrays, as the CIFAR files are "
            f"({error}); fetch the official archive"
        ) from None
    if not isinstance(entry, dict):
        raise InputError(f"{name} holds a {type(entry).__name__}, not the dictionary of a batch")
    return entry


def _read_idx(spec: DatasetSpec, path: Path, names: list[str]) -> Contents | None:
    plain = {name.removesuffix(".gz"): name for name in names}
    folder = _folder_of(path, list(plain), list(_IDX.values()))
    if folder is None:
        return None
    keys = {plain[folder + name]: key for key, name in _IDX.items()}
    arrays = {}
    for name, content in tqdm(read_files(path, keys), total=len(keys), desc=path.name):
        images = keys[name].endswith("images")
        count = spec.train_count if keys[name].startswith("train") else spec.test_count
        arrays[keys[name]] = _idx_array(name, content, (count, *spec.image_shape[1:]), images)
    assert spec.class_names is not None
    return Contents(arrays, spec.class_names, spec.title)


def _idx_array(name: str, content: bytes, shape: tuple[int, ...], images: bool) -> np.ndarray:
    shape = shape if images else shape[:1]
    # two zeros, 8 for uint8, the number of dimensions; then each dimension in four bytes
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    size = len(header) + int(np.prod(shape))
    if name.endswith(".gz"):
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(size + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{name} is cut short or damaged ({error}); fetch it again") from None
    if content[: len(header)] != header or len(content) != size:
        raise InputError(
            f"{name} must be an idx file of uint8 {list(shape)}, {size:,} bytes; "
            "it has another header or size. Fetch it again"
        )
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
    return array[:, None] if images else array


def _read_tiny_imagenet(spec: DatasetSpec, path: Path, names: list[str]) -> Contents | None:
    found = [name for name in names if f"/{name}".endswith("/val/val_annotations.txt")]
    top = found[0].removesuffix("val/val_annotations.txt") if found else ""
    # many sort val/images into class folders, and leave the annotations behind
    if not found or not any(name.startswith(f"{top}val/images/") for name in names):
        return None
    texts = {found[0], f"{top}wnids.txt"} & set(names)
    text = {
        name.removeprefix(top): content.decode("utf-8", "replace")
        for name, content in read_files(path, texts)
    }
    pattern = re.compile(re.escape(top) + r"train/([^/]+)/images/[^/]+\.jpeg", re.IGNORECASE)
    train = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
    rows = [line.split("\t") for line in text["val/val_annotations.txt"].splitlines()]
    test = {f"{top}val/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    class_names = text.get("wnids.txt", "").split() or sorted(set(train.values()))
    return Contents(
        _read_images(spec, path, {"train": train, "test": test}, class_names),
        tuple(class_names),
        spec.title,
    )


def _read_class_folders(spec: DatasetSpec, path: Path, names: list[str]) -> Contents | None:
    matches = {name: match for name in names if (match := _IMAGE_FILE.fullmatch(name))}
    parts = {match["part"] for match in matches.values()}
    # the official test images of TinyImageNet have no labels; they are often still there
    order = ("val", "test") if spec.name == "tiny-imagenet" else ("test", "val")
    second = next((part for part in order if part in parts), None)
    if "train" not in parts or second is None:
        return None
    used = {name: match for name, match in matches.items() if match["part"] in ("train", second)}
    tops = sorted({match["top"] for match in used.values()})
    if len(tops) > 1:
        raise InputError(f"{path} holds more than one data set: {', '.join(tops)}; give one alone")
    official = {_plain(name): name for name in spec.class_names or ()}
    folders = sorted({match["name"] for match in used.values()})
    listed = f"{tops[0]}wnids.txt"  # TinyImageNet's own order, where the archive kept it
    if spec.name == "tiny-imagenet" and listed in names:
        ((_, content),) = read_files(path, [listed])
        official_order = content.decode("utf-8", "replace").split()
        if sorted(official_order) != folders:
            raise InputError(f"{path} has class folders that {listed} does not list, or lacks some")
        folders = official_order
    class_names = list(spec.class_names or folders)
    unknown = [name for name in folders if official and _plain(name) not in official]
    if unknown or len(folders) != spec.num_classes:
        raise InputError(
            f"{path} has {len(folders)} class folders ({', '.join(unknown or folders)[:200]}), "
            f"{spec.title} has {spec.num_classes} classes"
            + (f": {', '.join(class_names)}" if official else "")
        )
    labels: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for name, match in used.items():
        part = "train" if match["part"] == "train" else "test"
        labels[part][name] = official.get(_plain(match["name"]), match["name"])
    kinds = {match["kind"].upper().replace("JPG", "JPEG") for match in used.values()}
    return Contents(
        _read_images(spec, path, labels, class_names),
        tuple(class_names),
        f"{spec.title} ({' and '.join(sorted(kinds))})",
        official=False,
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _read_images(
    spec: DatasetSpec, path: Path, parts: Mapping[str, Mapping[str, str]], class_names: list[str]
) -> dict[str, np.ndarray]:
    _check_class_count(spec, path, len(class_names))
    label_of = {name: label for label, name in enumerate(class_names)}
    files: dict[str, list[str]] = {}
    labels: dict[str, np.ndarray] = {}
    for part, count in (("train", spec.train_count), ("test", spec.test_count)):
        unknown = sorted(set(parts[part].values()) - set(label_of))
        if unknown:
            raise InputError(f"{path} has {part} images of {unknown[0]!r}, which is not a class")
        files[part] = sorted(parts[part], key=lambda name: (label_of[parts[part][name]], name))
        labels[part] = np.array([label_of[parts[part][name]] for name in files[part]], np.uint8)
        if len(files[part]) != count:
            raise InputError(
                f"{path} has {len(files[part]):,} {part} images, {spec.title} has {count:,}; "
                "it is not whole, or it is another data set"
            )
    _check_counts(spec, path, class_names, labels)  # before minutes of decoding
    arrays: dict[str, np.ndarray] = {}
    row_of: dict[str, tuple[np.ndarray, int]] = {}
    for part in files:
        images = np.empty((len(files[part]), *spec.image_shape), np.uint8)
        # files lie class by class; stored in turns, the first images of a split are of all classes
        order = stratified_order(labels[part], seed=0)
        row_of.update({files[part][index]: (images, row) for row, index in enumerate(order)})
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels[part][order]
    for name, content in tqdm(read_files(path, row_of), total=len(row_of), desc=path.name):
        images, row = row_of[name]
        images[row] = _decoded(spec, name, content)
    return arrays


def _decoded(spec: DatasetSpec, name: str, content: bytes) -> np.ndarray:
    channels, height, width = spec.image_shape
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "BMP", "WEBP")) as image:
            size, mode = image.size, image.mode
            if image.format == "PNG" and content[24] == 16:  # the bit depth; Pillow would drop half
                mode = f"{mode} of 16 bits"
            if size == (width, height) and mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
                pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
                return pixels.reshape(height, width, channels).transpose(2, 0, 1)
    except UnidentifiedImageError:
        raise InputError(f"{name} is no JPEG, PNG, BMP or WEBP file, whatever its name") from None
    except Exception as error:  # a broken image raises nearly anything
        raise InputError(f"{name} is not an image that can be read ({error})") from None
    raise InputError(
        f"{name} is {size[0]} x {size[1]} pixels of mode {mode}; the images of {spec.title} are "
        f"{width} x {height} pixels of 8 bits"
    )


def _folder_of(path: Path, names: list[str], wanted: list[str]) -> str | None:
    there = set(names)
    folders = []
    for name in sorted(there):
        if PurePosixPath(name).name in wanted:
            folder = name.removesuffix(PurePosixPath(name).name)
            missing = [file for file in wanted if folder + file not in there]
            if not missing:
                return folder
            folders.append((len(missing), folder, missing))
    # a stray file called "train" or "test" is no sign of an official data set
    if not folders or min(folders)[0] > len(wanted) / 2:
        return None
    raise InputError(f"{path} lacks {', '.join(min(folders)[2])} in {min(folders)[1] or 'its top'}")
