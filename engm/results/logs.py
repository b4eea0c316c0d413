"""The small files of runs, copied to where they can be committed."""

from collections.abc import Sequence
from pathlib import Path

from engm.errors import InputError
from engm.files import atomic_path
from engm.results import Record, refuse_copies
from engm.results.evaluations import file_name
from engm.run_directory import CONFIG, METRICS, RESULT


def copy_logs(records: Sequence[Record], folder: Path) -> list[Path]:
    """Copies what `engm report` reads of each run to `folder / NAME`, NAME as `engm train` has it.

    That is the config, metrics, result and evaluations, some 10 to 30 KB; weights and images stay
    where they are. A run that is there already gets what it lacks, and the newest evaluations.

    Args:
        records: Finished runs.
        folder: Where the logs go, such as `results/cifar10`.

    Returns:
        The folder of each run.

    Raises:
        InputError: Before anything is written, if one of these folders holds another run, even one
            of the same config, or two of the runs would share one.
    """
    refuse_copies(records)
    targets = {folder / record.config.name: record for record in records}
    for record in records:
        target = folder / record.config.name
        same = targets[target] is record
        for name in (CONFIG, METRICS, RESULT):
            there, own = target / name, record.folder / name
            same &= not there.exists() or (own.exists() and there.read_bytes() == own.read_bytes())
        if not same:
            raise InputError(
                f"{target} is, or would be, the place of another run than {record.folder}; choose "
                "another folder for the logs"
            )
    for target, record in targets.items():
        # the result last: a run is complete when it is there
        for name in (CONFIG, METRICS, file_name("best"), file_name("last"), RESULT):
            if (record.folder / name).exists():
                content = (record.folder / name).read_bytes()
                with atomic_path(target / name) as temporary:
                    temporary.write_bytes(content)
    return list(targets)
