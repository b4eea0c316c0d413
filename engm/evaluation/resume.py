"""A file that keeps how far a long call is, for the same call and no other."""

import glob
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engm.errors import InputError
from engm.run_directory import load_tensors, save_tensors


def digest(tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and bytes of `tensors`."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_progress(path: Path, call: dict[str, str], progress: dict[str, Any]) -> None:
    """Writes the progress of a call to `path`, atomically.

    Args:
        path: The file.
        call: What tells this call from others: the name of each part, and its value or digest.
        progress: Tensors and plain values.
    """
    save_tensors(path, {"call": call, "progress": progress})


def load_progress(
    path: Path, call: dict[str, str], device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Reads what `save_progress` wrote for the same call, or returns None where there is no file.

    Raises:
        InputError: If the file is damaged or another one, or of a call that differs in some part.
    """
    # a kill in the middle of a write leaves its temporary file
    for leftover in path.parent.glob(glob.escape(f".{path.name}.") + "*.tmp"):
        leftover.unlink()
    if not path.exists():
        return None
    try:
        kept = load_tensors(path, device)
        theirs, progress = dict(kept["call"]), dict(kept["progress"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not a resume file, or is damaged; delete it or choose another path"
        ) from None
    if differ := [name for name in call if theirs.get(name) != call[name]]:
        raise InputError(
            f"{path} was made by another call (not the same: {', '.join(differ)}); delete it or "
            "choose another path"
        )
    return progress
