"""Whatever comes from outside is read rightly or refused with an `InputError`, nothing else.

The other property tests stand beside what they test: grids and plans of sweeps in
test_sweep_plan.py, lines of metrics cut at any byte also in test_training.py.
"""

import bz2
import gzip
import io
import json
import math
import posixpath
import re
import tarfile
import tracemalloc
import zipfile

import nbformat
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engm import training
from engm.cli import main
from engm.config import TYPES, RunConfig, choices, parse_number
from engm.errors import InputError
from engm.lab import parameters as notebook_parameters
from engm.lab.batch import find
from engm.preparation import archives
from engm.preparation.archives import list_files, read_files
from engm.report import records as results
from engm.runs import (
    keep_metrics,
    load_tensors,
    read_config,
    read_metrics,
    read_result,
    save_tensors,
)


def examples(number):
    """The same examples every time; folders of pytest are shared by the examples of a test."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
WORDS = st.sampled_from([name for kind in TYPES.values() for name in choices(kind)])
NUMBERS = st.integers(-2, 40) | st.floats(0, 2) | st.sampled_from([0.0, -0.0, 1e-320, 1e308])
VALUES = WORDS | NUMBERS | JSON


def outcome(function, *arguments):
    """What a function returns, or None where it refuses."""
    try:
        return function(*arguments)
    except InputError:
        return None


# --- settings


@given(st.dictionaries(st.sampled_from([*TYPES, "lrr", ""]), VALUES, max_size=4))
@examples(400)
@example({"lr": 10**400})
@example({"optimizer": ["engm"]})
@example({"step_size": 5e-324, "eps": 1e-323})
def test_a_config_is_valid_and_survives_its_file_or_is_refused(values):
    config = outcome(RunConfig.from_dict, values)
    if config is None:
        return
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    resolved = outcome(config.resolved)  # 2.5 eps / num_steps can round to 0
    if resolved is not None:
        assert resolved.resolved() == resolved
        assert config.name == resolved.name
        missing = {name for name, value in resolved.to_dict().items() if value is None}
        open_ends = {"recipe", "classes", "subset", "validation_images", "test_images", "augment"}
        assert missing <= open_ends | {"start_noise", "beta"}
        assert all(math.isfinite(v) for v in resolved.to_dict().values() if type(v) is float)


@given(st.text(max_size=12) | st.from_regex(r"\A\s?-?[0-9_.e+-]{1,6}(/-?[0-9]{1,4})?\s?\Z"))
@examples(300)
@example("1/" + "9" * 5000)
@example("٣/4")
@example("1e-2")
@example("-0.5")
def test_a_number_is_what_python_says_or_refused(text):
    found, (numerator, _, denominator) = outcome(parse_number, text), text.strip().partition("/")
    if found is not None:
        expected = float(numerator) / float(denominator or 1)
        assert found == expected
    # nothing that a person would write as a number is refused
    elif re.fullmatch(r"-?(0|[1-9][0-9]{0,5})(\.[0-9]+)?(e-?[0-9]{1,2})?", text):
        raise AssertionError(text)


OPTIONS = st.sampled_from(
    [f"--{name.replace('_', '-')}" for name in TYPES] + ["--no-compile", "--device", "--nonsense"]
)
TEXTS = st.text(max_size=10) | VALUES.map(str) | st.sampled_from(["8/255", "1/0", "--lr", "-1"])


@given(st.lists(st.tuples(OPTIONS, TEXTS), max_size=3))
@examples(150)
def test_any_option_of_train_is_taken_or_refused_in_one_line(arguments):
    reached = []

    def fit(config, out, *, device, **_):
        reached.append(config)
        training.pick_device(device)
        raise InputError("here the run would start")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", fit)
        command = ["train", *(f"{option}={text}" for option, text in arguments)]
        result = CliRunner().invoke(main, command)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1 if reached else result.exit_code in (1, 2)
    assert result.output.count("Error: ") - "".join(t for _, t in arguments).count("Error: ") == 1
    message = result.output[result.output.rindex("Error: ") :]
    assert message.count("\n") == 1 and "Traceback" not in message


@pytest.mark.parametrize("name", ["privateuseone", "hpu", "xpu:0", "cuda:-1", "", "cpu:x", "é"])
def test_a_device_of_any_name_is_refused(name):
    with pytest.raises(InputError, match="cannot use device .*use 'cpu' or 'auto'"):
        training.pick_device(name)


PARAMETERS = """\
lr: float = 0.05
seeds: list[int] = [0]
size: tuple[int, int] = (1, 2)
mode: Literal["fast", "slow"] = "fast"
steps: int | None = None
flag: bool = False
title: str = "a"
"""
KINDS = {
    "lr": lambda v: type(v) is float and math.isfinite(v),
    "seeds": lambda v: type(v) is list and all(type(i) is int for i in v),
    "size": lambda v: type(v) is tuple and [type(i) for i in v] == [int, int],
    "mode": lambda v: v in ("fast", "slow"),
    "steps": lambda v: v is None or type(v) is int,
    "flag": lambda v: type(v) is bool,
    "title": lambda v: type(v) is str,
}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    path = tmp_path_factory.mktemp("notebooks") / "00_any.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


@given(
    st.sampled_from([*KINDS, "other"]),
    st.text(max_size=10)
    | VALUES.map(repr)
    | st.from_regex(r"\A[-+(\[{0-9a-f'/,.*:\\]{1,12}\Z")
    | st.sampled_from(["true", " None ", "(1, 2)", "[3]", "'slow'", "8/255", "1e999", "[1/1]"]),
)
@examples(250)
def test_the_text_of_a_parameter_is_of_its_type_or_refused(notebook, name, text):
    found = outcome(notebook_parameters.parse, notebook, {name: text})
    if found is not None:
        assert list(found) == [name]
        assert KINDS[name](found[name])


# --- archives

PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.png", "C:", "\\", "..\\x", ".hidden", "é", "x" * 300, "__MACOSX", "a\n"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
TAR_TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 12
    + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE]
    + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"]
)
MEMBERS = st.lists(st.tuples(NAMES, TAR_TYPES, st.binary(max_size=600)), max_size=4)


def tar_of(members, kind="", form=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{kind}", format=form) as archive:
        for name, type_, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = type_, len(content), "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, type_, content in members:
            member = zipfile.ZipInfo(name)
            link = type_ in (tarfile.SYMTYPE, tarfile.LNKTYPE)
            member.external_attr = (0o120777 if link else 0o100644) << 16
            archive.writestr(member, content)
    return file.getvalue()


def harmless(path):
    """What an archive holds, or None where it is refused; no name may lead anywhere."""
    names = outcome(list_files, path)
    if names is None:
        return None
    for name in names:
        assert name == posixpath.normpath(name) and name not in (".", "")
        assert not name.startswith(("/", "../")) and name[1:2] != ":" and "\\" not in name
    assert len(set(names)) == len(names)
    return outcome(lambda: dict(read_files(path, names)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(MEMBERS, st.sampled_from(["", "gz", "gnu", "zip"]))
@examples(300)
@example([("a.png", tarfile.SYMTYPE, b"/etc/passwd")], "zip")
@example([("a.png", tarfile.SYMTYPE, b"")], "gz")
@example([("a/../../b.png", tarfile.REGTYPE, b"x")], "zip")
@example([("..", tarfile.REGTYPE, b"x")], "gnu")
def test_any_archive_is_read_whole_or_refused(tmp_path_factory, members, kind):
    path = tmp_path_factory.getbasetemp() / "any"
    if kind == "zip":
        path.write_bytes(zip_of(members))
    else:
        form = tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT
        path.write_bytes(tar_of(members, "gz" if kind == "gz" else "", form))
    found = harmless(path)
    if found is None:
        return
    links = {tarfile.SYMTYPE, tarfile.LNKTYPE}
    specials = {tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE}
    assert not {type_ for _, type_, _ in members} & (links if kind == "zip" else links | specials)
    contents = {content for _, _, content in members}
    assert all(content in contents for content in found.values())


SOUND = [(f"train/cat/{n}.png", tarfile.REGTYPE, bytes([n]) * 700) for n in range(4)]


@pytest.fixture(scope="module")
def sound():
    tar = tar_of(SOUND)
    packed = {"gz": gzip.compress(tar, mtime=0), "bz2": bz2.compress(tar), "zip": zip_of(SOUND)}
    return {"tar": tar, "xz": tar_of(SOUND, "xz")} | packed


@given(st.data(), st.sampled_from(["tar", "gz", "xz", "bz2", "zip"]))
@examples(400)
def test_a_damaged_archive_is_never_taken_for_another(tmp_path_factory, sound, data, kind):
    content, path = bytearray(sound[kind]), tmp_path_factory.getbasetemp() / "damaged"
    expected = {name: content for name, _, content in SOUND}
    cut = data.draw(st.booleans(), "cut")
    if cut:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    found = harmless(path)
    if kind in ("gz", "bz2", "xz") and found is not None:  # the bytes that changed mean nothing
        assert found == expected
    if kind == "tar" and cut and found is not None:  # the bytes that are gone are padding
        assert found.items() <= expected.items()
    if kind == "zip" and found is not None:  # names have no checksum, what they name has
        assert set(found.values()) <= set(expected.values())


def test_the_checksum_far_behind_the_last_file_counts(tmp_path):
    path = tmp_path / "a.tar.gz"
    content = bytearray(gzip.compress(tar_of(SOUND) + bytes(3 * 2**20)))
    path.write_bytes(content)
    assert len(list_files(path)) == 4
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="cut short or damaged .*; fetch it again"):
        list_files(path)


def header(type_, size, name="a", linkname=""):
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = type_, size, linkname
    return member.tobuf(tarfile.GNU_FORMAT)


BOMBS = {
    "long name": header(tarfile.GNUTYPE_LONGNAME, 2**26) + bytes(2**26),
    "long link": header(tarfile.GNUTYPE_LONGLINK, 2**26) + bytes(2**26),
    "extended": header(tarfile.XHDTYPE, 2**26) + bytes(2**26),
    "global": header(tarfile.XGLTYPE, 2**26) + bytes(2**26),
    "after a folder": header(tarfile.DIRTYPE, 2**27)
    + header(tarfile.GNUTYPE_LONGNAME, 2**26)
    + bytes(2**26),
    "after a sparse file": header(tarfile.GNUTYPE_SPARSE, 2**27)
    + header(tarfile.GNUTYPE_LONGNAME, 2**26)
    + bytes(2**26),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_unpacks_to_much_is_not_held_in_memory(bomb, tmp_path):
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(BOMBS[bomb], 1))
    assert path.stat().st_size < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="a header of more than 4 MB|with holes"):
            list_files(path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_headers_are_not_kept(tmp_path):
    path, text = tmp_path / "many.tar.gz", "x" * 2**20
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(40):
            member = tarfile.TarInfo(f"train/cat/{number}.png")
            member.pax_headers = {"comment": text}
            archive.addfile(member, io.BytesIO())
    path.write_bytes(gzip.compress(file.getvalue(), 1))
    del file
    tracemalloc.start()
    try:
        assert len(list_files(path)) == 40
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_there_is_a_limit_to_the_number_of_files_and_to_the_size_of_one(
    pack, tmp_path, monkeypatch
):
    path = tmp_path / "a"
    path.write_bytes(pack([(f"{n}", tarfile.REGTYPE, b"") for n in range(101)]))
    assert len(list_files(path)) == 101
    monkeypatch.setattr(archives, "MAX_FILES", 100)
    with pytest.raises(InputError, match="holds more than 100 files.* unpack it yourself"):
        list_files(path)

    large = [("small.png", tarfile.REGTYPE, b"x"), ("large.png", tarfile.REGTYPE, bytes(5000))]
    path.write_bytes(pack(large))
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 4999)
    assert dict(read_files(path, ["small.png"])) == {"small.png": b"x"}
    with pytest.raises(InputError, match=r"holds 'large.png' of .* GB.*; fetch it elsewhere"):
        dict(read_files(path, ["large.png"]))
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 5000)
    assert len(dict(read_files(path, ["large.png"]))["large.png"]) == 5000


# --- what a run leaves on disk


def test_metrics_cut_at_any_byte_keep_their_whole_lines(tmp_path):
    lines = [{"epoch": n, "train_loss": 1 / n, "what": 'é "\n"'} for n in range(1, 4)]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    path = tmp_path / "metrics.jsonl"
    for size in range(len(whole) + 1):
        for epochs in (1, 3):
            path.write_bytes(whole[:size])
            there = whole[:size].count(b"\n")
            if there < epochs:
                with pytest.raises(InputError, match=f"has {there} of {epochs} epochs; delete"):
                    keep_metrics(tmp_path, epochs)
                assert path.read_bytes() == whole[:size]
            else:
                keep_metrics(tmp_path, epochs)
                assert read_metrics(tmp_path) == lines[:epochs]
                assert path.read_bytes().endswith(b"\n")


@given(st.binary(max_size=60) | st.lists(JSON.map(json.dumps)).map(lambda v: "\n".join(v).encode()))
@examples(200)
@example(b"[" * 100_000 + b"\n")
@example(b"1" * 5000 + b"\n")
@example(b"3\n")
def test_any_metrics_file_gives_objects_or_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "metrics"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(content)
    found = outcome(read_metrics, folder)
    if found is not None:
        assert len(found) == content.count(b"\n")
        assert all(isinstance(line, dict) for line in found)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint-last.pt"
    torch.manual_seed(0)
    state = {
        "epoch": 3,
        "best": {"epoch": 1},
        "model": {"a": torch.randn(9, 7), "b": torch.ones(3)},
    }
    save_tensors(path, state)
    return path, path.read_bytes(), state


def equal(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_checkpoint_cut_at_any_byte_is_refused(checkpoint, tmp_path):
    _, whole, state = checkpoint
    path = tmp_path / "checkpoint-last.pt"
    for size in [*range(0, len(whole), 23), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"is not a file of this kit.*; delete .* and run aga"):
            load_tensors(path)
    path.write_bytes(whole)
    assert equal(load_tensors(path), state)


@given(st.data())
@examples(500)
def test_a_checkpoint_with_other_bytes_is_refused_or_the_same(checkpoint, tmp_path_factory, data):
    _, whole, state = checkpoint
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        other = data.draw(st.binary(min_size=1, max_size=8))[: len(content) - start]
        content[start : start + len(other)] = other
    path = tmp_path_factory.getbasetemp() / "checkpoint.pt"
    path.write_bytes(content)
    found = outcome(load_tensors, path)
    assert found is None or equal(found, state)  # the padding of a zip means nothing


RESULT = {
    "data": "Digits",
    "last": {"clean_accuracy": 0.5, "robust_accuracy": 0.25, "num_examples": 4, "attack": "PGD"},
    "best": {"clean_accuracy": 0.5, "robust_accuracy": 0.5, "num_examples": 4, "attack": "PGD"},
    "robust_overfitting_gap": 0.25,
    "environment": {"commit": None, "device": "cpu", "packages": {"engm": "1", "torch": "2"}},
}


def replaced(value, path, other):
    """A copy of nested dictionaries with another value at `path`; without it for `path[-1]`."""
    key, *rest = path
    copy = dict(value)
    if rest:
        copy[key] = replaced(value[key], rest, other)
    elif other is replaced:
        del copy[key]
    else:
        copy[key] = other
    return copy


def places(value, path=()):
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    return folder


@given(
    JSON
    | st.builds(replaced, st.just(RESULT), st.sampled_from([*places(RESULT)]), VALUES)
    | st.builds(replaced, st.just(RESULT), st.sampled_from([*places(RESULT)]), st.just(replaced))
)
@examples(300)
@example(RESULT)
@example(replaced(RESULT, ("last", "clean_accuracy"), True))
@example(replaced(RESULT, ("last", "clean_accuracy"), math.nan))
@example(replaced(RESULT, ("best", "robust_accuracy"), 50.0))
@example(replaced(RESULT, ("environment",), 3))
@example(replaced(RESULT, ("environment", "packages"), {"torch": 2}))
def test_any_result_is_refused_or_can_be_put_into_a_table(run_folder, result):
    config = RunConfig(subset=20).resolved().to_dict()
    (run_folder / "config.json").write_text(json.dumps(config))
    (run_folder / "result.json").write_text(json.dumps(result))
    found = outcome(read_result, run_folder)
    if found is None:
        assert result != RESULT
        return
    accuracies = [found[w][f"{k}_accuracy"] for w in ("last", "best") for k in ("clean", "robust")]
    assert all(type(n) in (int, float) and -1 <= n <= 1 for n in accuracies)
    records, _ = results.collect(run_folder)
    results.check_protocol(records)
    assert results.provenance(records) == []
    assert results.to_markdown(results.summarise(records)).count("\n") == 3


@given(
    JSON
    | st.builds(
        replaced,
        st.just(RunConfig().resolved().to_dict()),
        st.sampled_from([*((name,) for name in TYPES), ("environment",), ("other",)]),
        VALUES,
    )
)
@examples(200)
def test_any_config_file_is_a_config_or_refused(run_folder, values):
    (run_folder / "config.json").write_text(json.dumps(values))
    found = outcome(read_config, run_folder)
    if found is not None:
        expected = {name: value for name, value in values.items() if name != "environment"}
        assert {name: found.to_dict()[name] for name in expected} == expected


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5000, b'{"a": ' * 50_000, b"\xff", b""])
def test_json_that_no_parser_likes_is_refused(content, run_folder):
    for name, read in (("config.json", read_config), ("result.json", read_result)):
        (run_folder / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not a JSON file .*; delete it"):
            read(run_folder)


def test_numbers_of_a_length_that_nobody_means_are_refused():
    with pytest.raises(InputError, match="num_steps must be"):
        RunConfig(num_steps=10**400)
    with pytest.raises(InputError, match="is not of type"):
        notebook_parameters.parse(find("00_tour"), {"eps": "+".join(["1"] * 20_000)})
