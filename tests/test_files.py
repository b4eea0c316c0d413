import os

import pytest

from engm.errors import InputError
from engm.runs import atomic_path, read_json, write_json, write_text


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_a_file_is_whole_or_as_it_was(interruption, tmp_path):
    path = tmp_path / "new folder" / "name.txt"

    def interrupted():
        before = path.exists()
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.exists() is before
            raise interruption

    for before in (None, "old"):
        if before:
            write_text(path, before)
        with pytest.raises(interruption):
            interrupted()
        assert [p.name for p in path.parent.iterdir()] == ["name.txt"] * (before is not None)
    assert path.read_text() == "old"
    write_text(path, "ß")
    assert path.read_bytes() == b"\xc3\x9f"
    assert list(path.parent.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=real, n=name: calls.append(n) or f(*a))
    write_text(tmp_path / "a", "text")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "text")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with atomic_path(path) as first, atomic_path(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last


def test_json_comes_back_and_has_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, 0.1, None, "ü"]})
    assert read_json(path) == {"x": [1, 0.1, None, "ü"]}
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"x": number})
    assert read_json(path) == {"x": [1, 0.1, None, "ü"]}


def test_a_missing_json_file_is_said(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*a\.json"):
        read_json(tmp_path / "a.json")
