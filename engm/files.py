"""Writes that are whole or absent, and the JSON that goes with them."""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engm.errors import InputError

_REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, and make the same call again"
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written to"
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Runs a block that writes `path`, and adds to the system's complaint what to do.

    Raises:
        OSError: As the block does, with the name of `path` and a remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        message = f"{error.strerror}; {_REMEDIES[error.errno]}"
        raise OSError(error.errno, message, str(path)) from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there when the block ends well.

    A reader sees the old file or the new one, never a half: the bytes reach the disk before the
    name does. If the block raises, the temporary file is removed and `path` is as it was.

    Args:
        path: The file to write. Its folder is created where it is missing.

    Yields:
        The path to write to, on the same file system.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as indented JSON, atomically; inf and nan are a `ValueError`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads the JSON file `path`.

    Raises:
        InputError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (ValueError, RecursionError) as error:  # the latter of brackets without end
        raise InputError(
            f"{path} is not a JSON file ({error}); delete it and make it again"
        ) from None
