"""What a run leaves on disk: config, metrics, checkpoints, result.

    config.json          the resolved config, and the environment it ran in with its data's digest
    metrics.jsonl        one line an epoch
    checkpoint-last.pt   everything that goes on from the last whole epoch
    checkpoint-best.pt   the weights of the best epoch by robust accuracy on the validation split
    result.json          what came out; there when the run is complete, and only then

Each file is whole or absent; of `metrics.jsonl` each line is.
"""

import errno
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from engm.config import RunConfig
from engm.errors import InputError

# --- run directories

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
LOCK = ".lock"
CHECKPOINTS = {"last": "checkpoint-last.pt", "best": "checkpoint-best.pt"}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run directory against other processes; a process that dies lets it go.

    What a kill in the middle of a write left there is cleared away.
    """
    lock = FileLock(folder / LOCK)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is at work in {folder}; wait for it, or stop it and call again"
        ) from None
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        lock.release()


def write_config(
    folder: Path, config: RunConfig, device: torch.device, digest: str | None = None
) -> None:
    """Writes `config.json`, unless the folder has one of the same config and data already.

    The config is a resolved one, `digest` that of the data, see `engm.data.Dataset`.
    """
    if (folder / CONFIG).exists():
        check_config(folder, config)
        check_data(folder, digest)
    else:
        origin = environment(device) | {"data_sha256": digest}
        write_json(folder / CONFIG, {**config.to_dict(), "environment": origin})


def check_config(folder: Path, config: RunConfig) -> None:
    """Refuses a folder that does not hold a run of `config`."""
    if not (folder / CONFIG).exists():
        raise InputError(
            f"{folder} has lost its {CONFIG}; delete it, and the same call runs it again"
        )
    if read_config(folder) != config:
        raise InputError(f"{folder} holds a run of another config; choose another folder")


def check_data(folder: Path, digest: str | None) -> None:
    """Refuses data that are not those of the run in `folder`, though they have the same name.

    Runs from before digests were kept, and images that are in no cache, are not told apart.
    """
    origin = read_json(folder / CONFIG).get("environment")
    recorded = origin.get("data_sha256") if isinstance(origin, dict) else None
    if digest and recorded and recorded != digest:
        raise InputError(
            f"{folder} is a run on other images of that name: {CONFIG} has the sha256 "
            f"{str(recorded)[:12]}, the cache that was read {digest[:12]}; name the folder of the "
            "run's own cache (--data-root, ENGM_DATA), or run again elsewhere"
        )


def read_config(folder: Path) -> RunConfig:
    """Reads the config of the run in `folder`.

    Raises:
        InputError: If there is none, or it is not a config of this version of the kit.
    """
    if not (folder / CONFIG).exists():
        lacks = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        raise InputError(f"{folder} is not a run directory: {lacks}; `engm train` makes one")
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise InputError(f"{folder / CONFIG} must hold an object, not {type(values).__name__}")
    try:
        return RunConfig.from_dict({k: v for k, v in values.items() if k != "environment"})
    except InputError as error:
        raise InputError(f"{folder / CONFIG} is not of this version of the kit: {error}") from None


def read_result(folder: Path) -> dict[str, Any]:
    """Reads the result of the finished run in `folder`.

    Raises:
        InputError: If there is none, or it does not hold what a finished run writes.
    """
    result = read_json(folder / RESULT)
    try:
        numbers = [result[w][f"{k}_accuracy"] for w in CHECKPOINTS for k in ("clean", "robust")]
        numbers.append(result["robust_overfitting_gap"])
        origin = result.get("environment", {})
        texts = [result["data"], origin.get("commit") or "", origin.get("device", "")]
        texts += origin.get("packages", {}).values()
        whole = all(isinstance(text, str) for text in texts)
        whole &= all(type(n) in (int, float) and -1 <= n <= 1 for n in numbers)
    except (KeyError, TypeError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise InputError(
            f"{folder / RESULT} is not the result of a run; delete it, and `engm train` with the "
            "settings of the run makes it again"
        )
    return result


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Adds the metrics of an epoch to `metrics.jsonl`."""
    path = folder / METRICS
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # on the disk before the checkpoint that counts the epoch


def read_metrics(folder: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """Reads the whole lines of `metrics.jsonl`, in order; a line cut off at the end is left out.

    With `epochs`, as many lines, no more and no fewer.

    Raises:
        InputError: If there are fewer, or a line that was written whole is not a JSON object.
    """
    path = folder / METRICS
    # what follows the last newline is either nothing or a line cut off by a kill
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        lines = [json.loads(line) for line in whole]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is not an object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); delete {folder} and run again") from None
    if epochs is not None and len(lines) < epochs:
        raise InputError(
            f"{path} has {len(lines)} of {epochs} epochs; delete {folder} and run again"
        )
    return lines[:epochs]


def keep_metrics(folder: Path, epochs: int) -> None:
    """Cuts `metrics.jsonl` back to its first `epochs` lines, for a run that goes on from there."""
    lines = read_metrics(folder, epochs)
    write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.touch()  # where nobody may write, the system says so better than torch
        try:
            torch.save(state, temporary)
        except RuntimeError as error:
            full = "is the disk full? Make room, and make the same call again"
            raise OSError(f"could not write {path}; {full}") from error


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save_tensors` wrote; no code from the file is run.

    Raises:
        InputError: If the file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        # torch.load does not compare checksums: a flipped bit would be another weight
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum is wrong")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}; logs hold no weights, and where it was lost, delete "
            f"{path.parent} and train again"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # what a parser says of bytes that are not its own
        reason = str(error).split("\n")[0].split(". ")[0][:200]
        raise InputError(
            f"{path} is not a file of this kit, or is damaged ({reason}); delete {path.parent} and "
            "run again"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path} must hold a dictionary, not a {type(state).__name__}")
    return state


@contextmanager
def fits_config(path: Path) -> Iterator[None]:
    """Runs a block that takes the checkpoint `path` apart: what does not fit is an `InputError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path} does not fit the config of its run: {reason}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """Describes versions, commit and hardware, so that a number can be traced to them."""
    packages = ("engm", "torch", "torchvision", "numpy", "scikit-learn")
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        # torch itself knows its build, such as +cpu
        "packages": {name: metadata.version(name) for name in packages}
        | {"torch": torch.__version__},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type}, {_cpu()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _commit() -> str | None:
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    command.append("--exclude=*")  # the commit itself, not the nearest tag
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


# --- files

_REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, and make the same call again"
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOENT),
    "choose a folder that can be written to",
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Runs a block that writes `path`, and adds its name and a remedy to the system's complaint."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        message = f"{error.strerror}; {_REMEDIES[error.errno]}"
        raise OSError(error.errno, message, str(path)) from None


def make_folder(folder: Path, instead: str) -> None:
    """Makes a folder to write to; where that fails, an `InputError` says what to do `instead`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}); {instead}") from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there when the block ends well.

    A reader sees the old file or the new one, never a half: the bytes reach the disk before the
    name does. If the block raises, `path` is as it was. A folder that is missing is created.
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


def link(source: Path, path: Path) -> None:
    """Gives the file `source` a second name, atomically; a copy where there are no hard links."""
    with atomic_path(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as indented JSON, atomically; inf and nan are a `ValueError`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads the JSON file `path`; it is an `InputError` if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (ValueError, RecursionError) as error:  # the latter of brackets without end
        anew = "delete it, and the command that wrote it makes it anew"
        raise InputError(f"{path} is not a JSON file ({error}); {anew}") from None
