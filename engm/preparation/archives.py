"""Reads the files of a folder, a zip or a tar in place: nothing is ever unpacked to the disk."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from engm.errors import InputError

# TinyImageNet, the largest, takes 0.5 GB; what unpacks to far more is a bomb or not a data set
MAX_BYTES = 4 * 2**30
# one file is held in memory as a whole; the largest, of CIFAR-100, takes 0.16 GB
MAX_FILE_BYTES = 2**28
# a member costs memory and time however small it is; TinyImageNet has 0.12 million
MAX_FILES = 1_000_000
# a header holds names and the like; a tar may declare one of any size, and tarfile would read it
MAX_HEADER_BYTES = 2**22

_Entry = tuple[str, int, Callable[[], bytes]]
_OPENERS: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_BROKEN = (
    *(EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError),
    *(tarfile.TarError, zipfile.BadZipFile),
)


def list_files(path: Path) -> list[str]:
    """Names the files of a folder or archive, with `/` between folders; hidden ones are left out.

    Refused is what is no whole zip or tar, unpacks to more than `MAX_BYTES` or `MAX_FILES`, or
    holds links, devices, paths that lead out of it, headers beyond `MAX_HEADER_BYTES`, or a name
    twice.
    """
    names = [name for name, _, _ in _entries(path)]
    twice, times = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise InputError(f"{path} holds {twice!r} more than once; fetch the archive again")
    return names


def read_files(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Gives name and content of the `wanted` files, in the order in which they are stored."""
    missing = set(wanted)
    for name, size, read in _entries(path):
        if name in missing:
            missing.remove(name)
            if size > MAX_FILE_BYTES:
                raise InputError(
                    f"{path} holds {name!r} of {size / 2**30:.3g} GB, no data set of the kit has "
                    "a file of that size; fetch it elsewhere"
                )
            with _explained(path):
                content = read()
            yield name, content
    if missing:
        raise InputError(f"{path} holds no {min(missing)!r}")


def _entries(path: Path) -> Iterator[_Entry]:
    if path.is_dir():
        yield from _folder_entries(path)
        return
    with _explained(path):
        with open(path, "rb") as file:
            head = file.read(512)
        if head.startswith(b"PK\x03\x04"):
            yield from _zip_entries(path)
            return
        openers = [opener for magic, opener in _OPENERS.items() if head.startswith(magic)]
        if not openers and head[257:262] != b"ustar":
            raise InputError(
                f"{path} is neither a zip nor a tar (plain, .gz, .bz2 or .xz); give an archive or "
                "a folder"
            )
        with (openers[0] if openers else open)(path, "rb") as stream:
            yield from _tar_entries(path, stream)


def _folder_entries(path: Path) -> Iterator[_Entry]:
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        for file in sorted(files):
            here = Path(folder) / file
            name = _checked_name(path, here.relative_to(path).as_posix())
            if name is not None and here.is_file():
                yield name, here.stat().st_size, here.read_bytes


def _zip_entries(path: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_extent(path, len(members), sum(member.file_size for member in members))
        for member in members:
            name = _checked_name(path, member.filename)
            mode = stat.S_IFMT(member.external_attr >> 16)
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(path, member.filename)
            if name is not None and not member.is_dir():
                yield name, member.file_size, partial(archive.read, member)


def _tar_entries(path: Path, stream: BinaryIO) -> Iterator[_Entry]:
    counted = _Counted(path, stream)
    buffered = io.BufferedReader(counted, 1 << 20)
    # "r|": strictly forwards, so a compressed tar is unpacked once and never held
    with tarfile.open(fileobj=buffered, mode="r|") as archive:
        count = size = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            name = _checked_name(path, member.name)
            # a sparse file is larger than what the stream holds of it
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise _not_a_file(path, member.name)
            count, size = count + 1, size + member.size
            _check_extent(path, count, size)
            counted.allow(member.size if member.isfile() else 0)
            if name is not None and member.isfile():
                yield name, member.size, partial(_tar_content, archive, member)
        # to the end, where the checksum is: tarfile takes a cut stream for the end of the archive
        counted.allow(MAX_BYTES)
        while buffered.read(1 << 20):
            pass


def _tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


class _Counted(io.RawIOBase):
    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream, self.count = path, stream, 0
        self.allow(0)

    def allow(self, size: int) -> None:
        # the content of a file, and the header of the next
        self.allowed = self.count + size + MAX_HEADER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        _check_extent(self.path, 0, self.count)
        if self.count > self.allowed:
            raise InputError(
                f"{self.path} holds a header of more than {MAX_HEADER_BYTES / 2**20:.3g} MB, which "
                "no data set of the kit has; fetch it elsewhere"
            )
        return len(content)


def _check_extent(path: Path, count: int, size: int) -> None:
    if count > MAX_FILES or size > MAX_BYTES:
        files = f"holds more than {MAX_FILES:,} files"
        found = files if count > MAX_FILES else f"unpacks to more than {MAX_BYTES / 2**30:.3g} GB"
        raise InputError(
            f"{path} {found}, no data set of the kit does; if it is right, unpack it yourself and "
            "give the folder"
        )


def _checked_name(path: Path, name: str) -> str | None:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0][1:2] == ":" or ".." in parts:
        raise InputError(f"{path} holds {name!r}, a path that leads out of it; fetch it elsewhere")
    parts = [part for part in parts if part not in ("", ".")]
    # .DS_Store, ._name and __MACOSX are what a Mac adds
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return None if hidden or not parts else "/".join(parts)


def _not_a_file(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} holds {name!r}, a link or a device or a file with holes, which no data set of "
        "the kit has; fetch it elsewhere"
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from None
        raise InputError(
            f"{path} cannot be read to its end, it is cut short or damaged ({error}); "
            "fetch it again"
        ) from None
