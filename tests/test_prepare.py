import bz2
import gzip
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from engm import data
from engm.cli import main
from engm.preparation import archives, caches

REPOSITORY = Path(__file__).resolve().parent.parent
REAL = REPOSITORY.parent / "shared" / "data" / "cifar10-jpeg.tar.xz"

OBJECTS = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
SMALL = {  # training images, test images, classes
    "fashion-mnist": (40, 20, 10),
    "cifar10": (40, 10, 10),
    "cifar100": (24, 12, 12),
    "tiny-imagenet": (12, 6, 3),
}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Small counts in place of the official ones, and a folder for the cache."""
    for name, (train, test, classes) in SMALL.items():
        spec = replace(data.SPECS[name], train_count=train, test_count=test, num_classes=classes)
        monkeypatch.setitem(data.SPECS, name, spec)
    return tmp_path / "cache"


def run(name: str, archive: Path | None, root: Path) -> str:
    """Runs the command; gives what it printed."""
    options = [] if archive is None else ["--archive", str(archive)]
    result = CliRunner().invoke(main, ["prepare", name, *options, "--root", str(root)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(name: str, archive: Path | None, root: Path) -> str:
    """Runs the command, which has to fail well: one message, nothing left; gives the message."""
    options = [] if archive is None else ["--archive", str(archive)]
    before = sorted(root.rglob("*")) if root.is_dir() else []
    result = CliRunner().invoke(main, ["prepare", name, *options, "--root", str(root)])
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.output.count("Error: ") == 1
    assert (sorted(root.rglob("*")) if root.is_dir() else []) == before
    return result.output[result.output.index("Error: ") :]


def truth(name: str, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images [n, h, w, c] and labels, as many of each class."""
    spec, generator = data.SPECS[name], np.random.default_rng(seed)
    channels, height, width = spec.image_shape
    made = {}
    for part, count in (("train", spec.train_count), ("test", spec.test_count)):
        images = generator.integers(0, 256, (count, height, width, channels), np.uint8)
        made[part] = images, generator.permutation(np.arange(count) % spec.num_classes)
    return made


def stored(root: Path, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the cache holds, images as [n, h, w, c]."""
    arrays = np.load(root / f"{name}.npz", allow_pickle=False)
    return {
        part: (arrays[f"{part}_images"].transpose(0, 2, 3, 1), arrays[f"{part}_labels"])
        for part in ("train", "test")
    }


def pairs(images: np.ndarray, labels: np.ndarray) -> Counter:
    return Counter((image.tobytes(), int(y)) for image, y in zip(images, labels, strict=True))


# --- making folders and archives


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind)
    return file.getvalue()


def class_folders(name: str, folders: list[str], second: str = "test") -> dict[str, bytes]:
    files = {}
    for part, (images, labels) in truth(name).items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            where = part if part == "train" else second
            files[f"{where}/{folders[label]}/{index:04}.png"] = encoded(image)
    return files


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    kind = path.suffix[1:] if path.suffix != ".tar" else ""
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return path


def python2_pickle(value) -> bytes:
    """Pickles as Python 2 did for the official files: byte strings, protocol 2, old numpy names."""

    def emit(value) -> bytes:
        if isinstance(value, str):
            return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(emit, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(emit(key) + emit(value[key]) for key in value) + b"u"
        rows, columns = value.shape
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
            + (emit(0) + b"\x85" + emit("b") + b"tR(" + emit(1))
            + (emit(rows) + emit(columns) + b"\x86cnumpy\ndtype\n(" + emit("u1") + emit(0))
            + (emit(1) + b"tR(" + emit(3) + emit("|") + b"NNN" + emit(-1) + emit(-1) + emit(0))
            + (b"tb\x89" + emit(value.tobytes().decode("latin1")) + b"tb")
        )

    return b"\x80\x02" + emit(value) + b"."


def cifar_files(name: str, seed: int = 0) -> dict[str, bytes]:
    parts = {
        part: (images.transpose(0, 3, 1, 2).reshape(len(images), -1), labels.tolist())
        for part, (images, labels) in truth(name, seed).items()
    }

    def batch(part: str, rows: slice) -> bytes:
        images, labels = parts[part]
        key = "labels" if name == "cifar10" else "fine_labels"
        entry = {"batch_label": part, key: labels[rows], "data": images[rows], "filenames": ["x"]}
        if name == "cifar100":
            entry["coarse_labels"] = [0] * len(labels[rows])
        return python2_pickle(entry)

    whole = slice(None)
    if name == "cifar10":
        top = "cifar-10-batches-py"
        files = {f"data_batch_{k + 1}": batch("train", slice(8 * k, 8 * k + 8)) for k in range(5)}
        files |= {"test_batch": batch("test", whole), "readme.html": b"hello"}
    else:
        top = "cifar-100-python"
        meta = python2_pickle({"fine_label_names": [f"class {k}" for k in range(12)]})
        files = {"meta": meta, "test": batch("test", whole), "train": batch("train", whole)}
    return {f"{top}/{file}": content for file, content in files.items()}


def idx_files() -> dict[str, bytes]:
    files = {}
    for part, (images, labels) in truth("fashion-mnist").items():
        stem = part.replace("test", "t10k")
        header = struct.pack(">IIII", 0x803, len(images), 28, 28)
        files[f"{stem}-images-idx3-ubyte"] = header + images.tobytes()
        header = struct.pack(">II", 0x801, len(labels))
        files[f"{stem}-labels-idx1-ubyte"] = header + labels.astype(np.uint8).tobytes()
    return files


WNIDS = ["n03", "n01", "n02"]  # the official order is not the alphabetical one either


def tiny_files() -> dict[str, bytes]:
    files, rows = {"wnids.txt": "\n".join(WNIDS).encode()}, []
    for part, (images, labels) in truth("tiny-imagenet").items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if part == "train":
                file = f"train/{WNIDS[label]}/images/{WNIDS[label]}_{index}.JPEG"
            else:
                file = f"val/images/val_{index}.JPEG"
                rows.append(f"val_{index}.JPEG\t{WNIDS[label]}\t0\t0\t63\t63")
            # the real one holds some grey images, too
            files[file] = encoded(image[..., 0] if index == 0 else image, "JPEG")
    files["val/val_annotations.txt"] = "\n".join(rows).encode()
    files["test/images/test_0.JPEG"] = b"never read"
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


# --- what is understood


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [write_tar, write_folder], ids=["tar", "folder"])
def test_official_cifar_files(root, tmp_path, name, write):
    source = write(tmp_path / "cifar-python.tar.gz", cifar_files(name))
    run(name, source, root)
    for part, (images, labels) in truth(name).items():
        assert np.array_equal(stored(root, name)[part][0], images)
        assert np.array_equal(stored(root, name)[part][1], labels)
    names = OBJECTS if name == "cifar10" else [f"class {k}" for k in range(12)]
    assert list(data.load(name, root=root).class_names) == names
    assert (
        data.load(name, root=root).title == {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    )


@pytest.mark.parametrize("packed", [False, True])
def test_official_fashion_mnist_files(root, tmp_path, packed):
    files = idx_files()
    if packed:
        files = {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
    run("fashion-mnist", write_folder(tmp_path / "fashion", files), root)
    for part, (images, labels) in truth("fashion-mnist").items():
        assert np.array_equal(stored(root, "fashion-mnist")[part][0], images)
        assert np.array_equal(stored(root, "fashion-mnist")[part][1], labels)
    assert data.load("fashion-mnist", root=root).image_shape == (1, 28, 28)


@pytest.mark.parametrize("write", [write_zip, write_folder], ids=["zip", "folder"])
def test_official_tiny_imagenet_files(root, tmp_path, write):
    run("tiny-imagenet", write(tmp_path / "tiny-imagenet-200.zip", tiny_files()), root)
    expected = {"train": Counter(), "test": Counter()}
    for part, (images, labels) in truth("tiny-imagenet").items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            content = encoded(image[..., 0] if index == 0 else image, "JPEG")
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            expected[part][pixels.tobytes(), int(label)] += 1
    for part, found in stored(root, "tiny-imagenet").items():
        assert pairs(*found) == expected[part]
    assert data.load("tiny-imagenet", root=root).class_names == tuple(WNIDS)


@pytest.mark.parametrize("ending", ["", ".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_a_folder_for_every_class(root, tmp_path, ending):
    spelled = [name.upper() if index % 2 else name for index, name in enumerate(OBJECTS)]
    files = class_folders("cifar10", spelled, second="val" if ending == ".zip" else "test")
    files = dict(sorted(files.items(), reverse=True))
    files |= {"train/bird/._0000.png": b"x", "__MACOSX/train/bird/0000.png": b"x", "README": b"x"}
    top = "./" if ending == ".tar" else "CIFAR-10-images/data/"
    files = {top + name: content for name, content in files.items()}
    write = {"": write_folder, ".zip": write_zip}.get(ending, write_tar)
    source = write(tmp_path / f"images{ending}", files)
    output = run("cifar10", source, root)
    for part, found in stored(root, "cifar10").items():
        assert pairs(*found) == pairs(*truth("cifar10")[part])
        # any first stretch is of all classes
        assert sorted(found[1][:10]) == list(range(10))
    record = json.loads((root / "cifar10.json").read_text())
    assert record["title"] == "CIFAR-10 (PNG)"
    assert "CIFAR-10 (PNG): 40 training and 10 test images, 10 classes" in output
    expected = None if not ending else hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["source_sha256"] == expected
    assert record["source"] == source.name


def test_fashion_mnist_from_a_folder_for_every_class(root, tmp_path):
    folders = [name.replace("/", "_") for name in data.SPECS["fashion-mnist"].class_names]
    run(
        "fashion-mnist", write_folder(tmp_path / "f", class_folders("fashion-mnist", folders)), root
    )
    for part, found in stored(root, "fashion-mnist").items():
        assert pairs(*found) == pairs(*truth("fashion-mnist")[part])


def test_tiny_imagenet_with_its_validation_images_sorted_into_folders(root, tmp_path):
    folders = ["n01", "n02", "n03"]
    files = class_folders("tiny-imagenet", folders, second="val")
    files["test/images/test_0.png"] = b"no label, never read"
    files["val/val_annotations.txt"] = b"val_0.JPEG\tn01\n"
    run("tiny-imagenet", write_folder(tmp_path / "tiny", files), root)
    for part, found in stored(root, "tiny-imagenet").items():
        assert pairs(*found) == pairs(*truth("tiny-imagenet")[part])


def test_sorted_tiny_imagenet_keeps_the_official_order_of_its_classes(root, tmp_path):
    files = class_folders("tiny-imagenet", WNIDS, second="val")
    files["wnids.txt"] = "\n".join(WNIDS).encode()
    run("tiny-imagenet", write_folder(tmp_path / "tiny", files), root)
    assert data.load("tiny-imagenet", root=root).class_names == tuple(WNIDS)
    for part, found in stored(root, "tiny-imagenet").items():
        assert pairs(*found) == pairs(*truth("tiny-imagenet")[part])
    files["wnids.txt"] = b"n01 n02 n04"
    message = refused("tiny-imagenet", write_folder(tmp_path / "other", files), root)
    assert "wnids.txt" in message


def test_what_is_recorded_and_printed(root, tmp_path):
    output = run("cifar10", write_tar(tmp_path / "c.tar.gz", cifar_files("cifar10")), root)
    images = truth("cifar10")["train"][0] / 255
    dataset = data.load("cifar10", root=root)
    assert dataset.mean == pytest.approx(images.mean((0, 1, 2)), rel=1e-12)
    assert dataset.std == pytest.approx(images.std((0, 1, 2)), rel=1e-12)
    assert f"Wrote {root / 'cifar10.npz'}" in output
    assert f"ENGM_DATA={root} engm train --dataset cifar10" in output
    assert sorted(path.name for path in root.iterdir()) == ["cifar10.json", "cifar10.npz"]
    with zipfile.ZipFile(root / "cifar10.npz") as cache:  # made again it is the same
        assert {member.date_time for member in cache.infolist()} == {(1980, 1, 1, 0, 0, 0)}


# --- the command


def test_without_a_name_it_lists_them():
    result = CliRunner().invoke(main, ["prepare"])
    assert result.exit_code == 0
    for name in SMALL:
        assert name in result.output
    assert re.search("100,000 \\+ 10,000 images, 3 x 64 x 64 +1.35 GB on the disk", result.output)


def test_an_unknown_name_lists_the_valid_ones():
    result = CliRunner().invoke(main, ["prepare", "mnist"])
    assert result.exit_code == 2
    for name in SMALL:
        assert name in result.output.split("Error: ")[1]


def test_it_runs_as_a_script_and_asks_for_the_official_counts(tmp_path):
    folder = write_folder(tmp_path / "few", {"train/cat/0.png": b"", "test/dog/0.png": b""})
    for name in OBJECTS:
        for part in ("train", "test"):
            write_folder(folder, {f"{part}/{name}/1.png": encoded(np.zeros((32, 32, 3), np.uint8))})
    script = REPOSITORY / "data_scripts" / "prepare.py"
    environment = {**os.environ, "ENGM_DATA": str(tmp_path / "cache")}
    found = subprocess.run(
        [sys.executable, str(script), "cifar10", "--archive", str(folder)],
        **{"capture_output": True, "text": True, "env": environment, "check": False},
    )
    assert found.returncode == 1
    assert found.stdout == f"Reading {folder}: all names first, then the images\n"
    assert found.stderr.startswith(f"Error: {folder} has 11 train images, CIFAR-10 has 50,000;")
    assert found.stderr.count("\n") == 1
    assert list((tmp_path / "cache").iterdir()) == []


# --- archives that are refused


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize("name", ["../x", "train/../../x", "/etc/x", "C:\\x", "..\\x", "\\x"])
@pytest.mark.parametrize("write", [write_zip, write_tar], ids=["zip", "tar"])
def test_paths_that_lead_out_are_refused(root, tmp_path, write, name):
    ending = {write_zip: "zip", write_tar: "tar.gz"}[write]
    files = {**class_folders("cifar10", OBJECTS), name: b"x"}
    message = refused("cifar10", write(tmp_path / f"a.{ending}", files), root)
    assert f"holds {name!r}, a path that leads out of it" in message
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(root, tmp_path, kind):
    extra = (link("train/bird/9.png", kind),)
    source = write_tar(tmp_path / "a.tar", class_folders("cifar10", OBJECTS), extra)
    assert "'train/bird/9.png', a link or a device" in refused("cifar10", source, root)


def test_links_in_a_zip_are_refused(root, tmp_path):
    source = write_zip(tmp_path / "a.zip", class_folders("cifar10", OBJECTS))
    with zipfile.ZipFile(source, "a") as archive:
        member = zipfile.ZipInfo("train/bird/9.png")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    assert "'train/bird/9.png', a link or a device" in refused("cifar10", source, root)


def test_an_archive_that_is_cut_short(root, tmp_path):
    # every file is there, only the checksum of the stream is not; any other cut: test_fuzz.py
    source = write_tar(tmp_path / "a.tar.gz", cifar_files("cifar10"))
    source.write_bytes(source.read_bytes()[:-4])
    assert "cut short or damaged" in refused("cifar10", source, root)


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_an_archive_that_unpacks_to_too_much(root, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(archives, "MAX_BYTES", 1_000_000)
    write = write_zip if ending == ".zip" else write_tar
    source = write(tmp_path / f"a{ending}", {"train/bird/1.png": bytes(2_000_000)})
    assert source.stat().st_size < 10_000
    assert "unpacks to more than" in refused("cifar10", source, root)


def test_a_tar_that_declares_a_huge_file(root, tmp_path):
    member = tarfile.TarInfo("train/bird/1.png")
    member.size = 5 * 2**30
    source = tmp_path / "a.tar"
    source.write_bytes(member.tobuf() + bytes(10240))
    assert "unpacks to more than 4 GB" in refused("cifar10", source, root)


def test_zeros_after_the_end_of_a_tar_count(root, tmp_path, monkeypatch):
    source = write_tar(tmp_path / "a.tar", {"train/bird/1.png": b"x"})
    packed = tmp_path / "a.tar.bz2"
    packed.write_bytes(bz2.compress(source.read_bytes() + bytes(9_000_000)))
    monkeypatch.setattr(archives, "MAX_BYTES", 6_000_000)
    assert "unpacks to more than" in refused("cifar10", packed, root)


def test_a_name_that_is_there_twice(root, tmp_path):
    files = class_folders("cifar10", OBJECTS)
    source = write_zip(tmp_path / "a.zip", files)
    name = next(iter(files))
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(name, files[name])
    assert f"{name!r} more than once" in refused("cifar10", source, root)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(root, tmp_path):
    import pickle

    trap, files = tmp_path / "trap", cifar_files("cifar10")
    files["cifar-10-batches-py/test_batch"] = pickle.dumps({"data": Malicious(trap)}, 2)
    message = refused("cifar10", write_tar(tmp_path / "a.tar.gz", files), root)
    assert "test_batch was not read" in message
    assert "mkdir" in message
    assert not trap.exists()
    pickle.loads(files["cifar-10-batches-py/test_batch"])
    assert trap.exists()  # the trap works


# --- contents that are refused


def with_change(files: dict[str, bytes], name: str, content: bytes | None) -> dict[str, bytes]:
    assert name in files
    changed = {**files, name: content}
    return {name: content for name, content in changed.items() if content is not None}


def bad_batch(**entries) -> bytes:
    images, labels = truth("cifar10")["test"]
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return python2_pickle({"data": flat, "labels": labels.tolist(), **entries})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lacks test_batch"),
        (b"", "test_batch was not read"),
        (b"hello", "test_batch was not read"),
        (python2_pickle(["x"]), "holds a list, not the dictionary"),
        (python2_pickle({"labels": [1]}), "is not a CIFAR batch"),
        (lambda: bad_batch(labels=[0] * 9), r"must hold uint8 \[9, 3072\]"),
        (lambda: bad_batch(data=np.zeros((10, 3071), np.uint8)), r"found uint8 \[10, 3071\]"),
        (lambda: bad_batch(labels=[*range(9), 10]), "labels outside 0 to 9"),
        (lambda: bad_batch(labels=[*range(9), "a"]), "labels outside 0 to 9"),
        (lambda: bad_batch(labels=[0] * 10), "has 10 test images of the class 'airplane'"),
    ],
)
def test_cifar_files_that_are_wrong(root, tmp_path, content, message):
    content = content() if callable(content) else content
    files = with_change(cifar_files("cifar10"), "cifar-10-batches-py/test_batch", content)
    found = refused("cifar10", write_tar(tmp_path / "a.tar.gz", files), root)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("t10k-labels-idx1-ubyte", lambda content: None, "lacks t10k-labels-idx1-ubyte"),
        (
            "t10k-labels-idx1-ubyte",
            lambda content: content[:-1],
            "must be an idx file of uint8 [20]",
        ),
        ("t10k-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a", "image of label 10"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:8] + bytes(20), "'T-shirt/top'"),
        ("train-images-idx3-ubyte", lambda content: content + b"x", "must be an idx file"),
        ("train-images-idx3-ubyte", lambda content: b"\x01" + content[1:], "must be an idx file"),
    ],
)
def test_idx_files_that_are_wrong(root, tmp_path, file, change, message):
    files = idx_files()
    files = with_change(files, file, change(files[file]))
    assert message in refused("fashion-mnist", write_folder(tmp_path / "f", files), root)


def test_packed_idx_files_that_are_wrong(root, tmp_path):
    files = {f"{file}.gz": gzip.compress(content) for file, content in idx_files().items()}
    name = "train-images-idx3-ubyte.gz"
    short = with_change(files, name, files[name][:-20])
    assert "cut short" in refused("fashion-mnist", write_folder(tmp_path / "short", short), root)
    long = with_change(files, name, gzip.compress(gzip.decompress(files[name]) + b"x"))
    assert "must be an idx" in refused("fashion-mnist", write_folder(tmp_path / "long", long), root)
    bomb = with_change(files, name, gzip.compress(bytes(10_000_000)))
    assert "must be an idx" in refused("fashion-mnist", write_folder(tmp_path / "bomb", bomb), root)


def deep_png(channels: int) -> bytes:
    """A PNG of 32 x 32 pixels and 16 bits, grey or RGB, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 32, 32, 16, 0 if channels == 1 else 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(64)) * channels) * 32)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def first_image(files: dict[str, bytes]) -> str:
    return next(name for name in files if name.startswith("train/"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(np.zeros((64, 64, 3), np.uint8)), "is 64 x 64 pixels of mode RGB; the images of"),
        (encoded(np.zeros((32, 31, 3), np.uint8)), "is 31 x 32 pixels"),
        (deep_png(1), "of mode I;16 of 16 bits; the images of CIFAR-10 are 32 x 32 pixels of 8 b"),
        (deep_png(3), "of mode RGB of 16 bits; the images of CIFAR-10 are 32 x 32 pixels of 8 bit"),
        (b"<html>not found</html>", "is no JPEG, PNG, BMP or WEBP file, whatever its name"),
        (b"", "is no JPEG, PNG, BMP or WEBP file"),
        (encoded(np.zeros((32, 32, 3), np.uint8))[:60], "is not an image that can be read"),
        (None, "has 39 train images, CIFAR-10 has 40"),
    ],
)
def test_images_that_are_wrong(root, tmp_path, content, message):
    files = class_folders("cifar10", OBJECTS)
    name = first_image(files)
    source = write_folder(tmp_path / "f", with_change(files, name, content))
    found = refused("cifar10", source, root)
    assert message in found
    assert name in found or content is None


def test_an_image_in_the_wrong_folder(root, tmp_path):
    files = class_folders("cifar10", OBJECTS)
    name = first_image(files)
    other = "train/ship/x.png" if "/ship/" not in name else "train/frog/x.png"
    del files[name]
    files[other] = b"never decoded: counts come first"
    found = refused("cifar10", write_folder(tmp_path / "f", files), root)
    assert "CIFAR-10 has 4 of each class" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name: name.replace("/ship/", "/boat/"),
            "has 10 class folders (boat), CIFAR-10 has",
        ),
        (lambda name: name.replace("/ship/", "/frog/"), "has 9 class folders (airplane, automob"),
        (lambda name: name.replace("/", "a/train/", name.startswith("test")), "does not look like"),
        (lambda name: "b/" * ("/ship/" in name) + name, "holds more than one data set: , b/"),
        (lambda name: "x" + name, "Found 50 files: x"),
    ],
)
def test_layouts_that_are_not_understood(root, tmp_path, change, message):
    files = class_folders("cifar10", OBJECTS)
    renamed = {
        change(name).replace("frog/", f"frog/{name[:2]}{index}"): content
        for index, (name, content) in enumerate(files.items())
    }
    assert message in refused("cifar10", write_folder(tmp_path / "f", renamed), root)


def test_nothing_to_read(root, tmp_path):
    assert "there is no file or folder" in refused("cifar10", tmp_path / "none", root)
    (tmp_path / "empty").mkdir()
    assert "Found 0 files: none" in refused("cifar10", tmp_path / "empty", root)
    (tmp_path / "text.tar.gz").write_text("hello")
    assert "neither a zip nor a tar" in refused("cifar10", tmp_path / "text.tar.gz", root)
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"hello" * 1000))
    assert "damaged" in refused("cifar10", tmp_path / "text.gz", root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/n01/images/x.JPEG", b"x", "has 13 train images, TinyImageNet has 12"),
        ("wnids.txt", b"n01 n02 n04", "has train images of 'n03', which is not a class"),
        (
            "wnids.txt",
            " ".join(map(str, range(300))).encode(),
            "names 300 classes, TinyImageNet has 3",
        ),
        ("val/val_annotations.txt", b"val_0.JPEG\tn01\n", "has 1 test images"),
        ("val/images/val_0.JPEG", None, "holds no 'tiny-imagenet-200/val/images/val_0.JPEG'"),
    ],
)
def test_tiny_imagenet_files_that_are_wrong(root, tmp_path, name, content, message):
    files = {**tiny_files(), f"tiny-imagenet-200/{name}": content}
    files = {name: content for name, content in files.items() if content is not None}
    assert message in refused("tiny-imagenet", write_zip(tmp_path / "t.zip", files), root)


# --- writing


def test_a_folder_that_cannot_be_written_to(root, tmp_path):
    source = write_tar(tmp_path / "c.tar.gz", cifar_files("cifar10"))
    (tmp_path / "file").write_text("")
    # nobody writes to /proc, not even root
    for folder in (tmp_path / "file" / "cache", tmp_path / "file", Path("/proc/sys")):
        result = CliRunner().invoke(
            main, ["prepare", "cifar10", "--archive", str(source), "--root", str(folder)]
        )
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {folder} cannot be written to")
        assert "--root" in result.output


@pytest.mark.parametrize("step", ["np.savez", "write_json"])
def test_a_full_disk_leaves_no_valid_cache(root, tmp_path, monkeypatch, step):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"engm.preparation.caches.{step}", full)
    source = write_tar(tmp_path / "c.tar.gz", cifar_files("cifar10"))
    result = CliRunner().invoke(
        main, ["prepare", "cifar10", "--archive", str(source), "--root", root]
    )
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert not (root / "cifar10.json").exists()
    assert not [path for path in root.iterdir() if path.name != "cifar10.npz"]


def test_a_set_that_is_prepared_is_not_downloaded_again_and_other_images_are_said(root, tmp_path):
    archive = write_tar(tmp_path / "c.tar.gz", cifar_files("cifar10"))
    assert "others than before" not in run("cifar10", archive, root) + run("cifar10", archive, root)
    assert "cifar10 is prepared" in run("cifar10", None, root)  # and nothing is fetched
    other = write_tar(tmp_path / "d.tar.gz", cifar_files("cifar10", seed=1))
    assert "its images are others than before" in run("cifar10", other, root)


def test_a_failure_leaves_the_earlier_cache_in_use(root, tmp_path):
    run("cifar10", write_tar(tmp_path / "c.tar.gz", cifar_files("cifar10")), root)
    before = data.load("cifar10", root=root)
    refused("cifar10", write_tar(tmp_path / "d.tar.gz", {"x": b"x"}), root)
    assert np.array_equal(data.load("cifar10", root=root).test.images, before.test.images)


# --- downloads


@pytest.fixture
def download(monkeypatch):
    """Puts a function in place of the checked download of torchvision."""
    from engm.preparation.vision import torchvision

    def put(function) -> None:
        monkeypatch.setattr(torchvision.datasets.utils, "download_url", function)

    return put


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            urllib.error.URLError("no route to host"),
            "cannot be downloaded (<urlopen error no route",
        ),
        (TimeoutError("timed out"), "cannot be downloaded (timed out)"),
        (RuntimeError("File not found or corrupted."), "is not the official file (its md5 is not"),
    ],
)
def test_a_download_that_fails_says_how_to_go_on(root, download, name, error, message):
    def fail(url, folder, filename, md5):
        (Path(folder) / filename).write_bytes(b"half")
        raise error

    download(fail)
    found = refused(name, None, root)
    assert message in found
    assert f"engm prepare {name} --archive F" in found
    for url, _, _ in caches.downloads(data.SPECS[name]):
        assert url in found


def test_downloaded_files_are_checked_read_and_removed(root, tmp_path, download):
    asked = []
    sources = {
        "cifar-10-python.tar.gz": write_tar(tmp_path / "c.tar.gz", cifar_files("cifar10")),
        "tiny-imagenet-200.zip": write_zip(tmp_path / "t.zip", tiny_files()),
    }

    def fetch(url, folder, filename, md5):
        asked.append((url, md5))
        content = sources[filename].read_bytes() if filename in sources else idx[filename]
        (Path(folder) / filename).write_bytes(content)

    idx = {f"{file}.gz": gzip.compress(content) for file, content in idx_files().items()}
    download(fetch)
    for name in ("cifar10", "tiny-imagenet", "fashion-mnist"):
        run(name, None, root)
        assert data.load(name, root=root).title == data.SPECS[name].title
        record = json.loads((root / f"{name}.json").read_text())
        assert record["source"].startswith("http")
    assert len(list(root.iterdir())) == 6
    assert len(asked) == 6
    cifar = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    official = {
        cifar: "c58f30108f718f92721af3b95e74349a",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de",
    }
    assert dict(asked[:2]) == official
    assert all(len(md5) == 32 for _, md5 in asked)


# --- the real thing


@pytest.mark.skipif(not REAL.exists(), reason="the CIFAR-10 images are not here")
def test_the_real_cifar10_images(tmp_path):
    """Decodes all 60,000 once; 15 to 20 seconds."""
    output = run("cifar10", REAL, tmp_path)
    assert "CIFAR-10 (JPEG): 50,000 training and 10,000 test images" in output
    dataset = data.load("cifar10", root=tmp_path)
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [
        49_000,
        1000,
        10_000,
    ]
    assert dataset.validation.labels.bincount().tolist() == [100] * 10
    # the published values of the original; JPEG loses a little contrast
    assert dataset.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-4)
    assert dataset.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)
    known = {part: pairs(*found) for part, found in stored(tmp_path, "cifar10").items()}
    with tarfile.open(REAL) as archive:
        for index, member in enumerate(archive):
            if member.isfile() and index % 100 == 0:
                part, folder, _ = member.name.split("/")
                image = np.asarray(Image.open(archive.extractfile(member)))
                assert (image.tobytes(), OBJECTS.index(folder)) in known[part]
