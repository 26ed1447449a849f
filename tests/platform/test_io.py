"""Atomic writes, checksums, data paths."""

import errno
from pathlib import Path

import pytest

from fulgurite.data.listing import FileTree, find_files
from fulgurite.errors import DataError
from fulgurite.io import (
    atomic_write,
    checksum,
    data_path,
    verify_checksum,
)


def test_atomic_write_replaces_only_when_the_block_succeeds(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("old")
        assert not target.exists()

    def interrupted():
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_a_file_that_cannot_be_made_is_told_by_its_own_name(tmp_path):
    (tmp_path / "c").mkdir()

    def write():
        with atomic_write(tmp_path / "c" / "d.txt") as temporary:
            (tmp_path / "c").rmdir()
            temporary.write_text("x")

    with pytest.raises(OSError, match="No such file") as error:
        write()
    assert error.value.filename == str(tmp_path / "c" / "d.txt")


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space.*a\.txt"), atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_of_a_folder_leaves_nothing_behind_on_error(tmp_path):
    target = tmp_path / "folder"

    def broken():
        with atomic_write(target) as temporary:
            (temporary / "sub").mkdir(parents=True)
            (temporary / "sub" / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert list(tmp_path.iterdir()) == []
    with atomic_write(target) as temporary:
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "a").write_text("whole")
    assert (target / "sub" / "a").read_text() == "whole"


def test_checksums(tmp_path):
    file = tmp_path / "abc"
    file.write_bytes(b"abc")
    good = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum(file) == good
    verify_checksum(file, good.upper())
    verify_checksum(file, "900150983cd24fb0d6963f7d28e17f72")
    with pytest.raises(DataError, match=r"sha256 of .*abc is ba78.* not 0000"):
        verify_checksum(file, "0" * 64)
    with pytest.raises(DataError, match="neither an MD5"):
        verify_checksum(file, "abc")
    with pytest.raises(DataError, match="cannot be read"):
        checksum(tmp_path / "missing")


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """The folder of FULGURITE_DATA, beside an empty current folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("FULGURITE_DATA", str(there))
    return there


def test_data_path_looks_here_and_then_in_the_folder_of_data(data_folder, monkeypatch):
    (data_folder / "a.zip").write_bytes(b"")
    assert data_path("a.zip") == data_folder / "a.zip"
    assert data_path(data_folder / "a.zip") == data_folder / "a.zip"
    Path("texts").mkdir()
    assert data_path("texts") == Path("texts").absolute()
    assert data_path("./texts") == Path("texts").absolute()
    with pytest.raises(DataError, match=r"no data at .*there/b\.zip, nor at .*here/b\.zip"):
        data_path("b.zip")
    monkeypatch.delenv("FULGURITE_DATA")
    assert data_path("texts") == Path("texts").absolute()
    with pytest.raises(DataError, match=r"no data at .*here/a\.zip, and FULGURITE_DATA is not set"):
        data_path("a.zip")


def test_data_path_says_which_of_two_it_takes(data_folder):
    for folder in (Path(), data_folder):
        (folder / "a.zip").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"a\.zip is both in the current folder"):
        assert data_path("a.zip") == Path("a.zip").absolute()
    Path("a.zip").unlink()
    Path("a.zip").symlink_to(data_folder / "a.zip")
    assert data_path("a.zip") == Path("a.zip").absolute()  # the same file: nothing to say


def test_a_pattern_is_a_path_where_something_matches_it(data_folder, monkeypatch):
    (data_folder / "b.txt").write_text("there")
    assert data_path("*.txt") == data_folder / "*.txt"
    for must_exist in (True, False):
        assert data_path(data_folder / "?.txt", must_exist) == data_folder / "?.txt"
        assert data_path(data_folder / "**" / "b.*", must_exist) == data_folder / "**" / "b.*"
    for pattern in ("*.csv", str(data_folder / "*.csv")):
        with pytest.raises(DataError, match=r"no data at .*there/\*\.csv"):
            data_path(pattern)
    monkeypatch.delenv("FULGURITE_DATA")
    assert data_path(data_folder / "*.txt") == data_folder / "*.txt"
    with pytest.raises(DataError, match=r"no folder or zip .*\*\.txt"):
        _ = FileTree(data_path(data_folder / "*.txt")).names


def test_patterns_are_looked_for_in_the_same_places(data_folder):
    (data_folder / "b.txt").write_text("there")
    assert [path for _, path in find_files(["*.txt"], [])] == [data_folder / "b.txt"]
    Path("a.txt").write_text("here")
    with pytest.warns(UserWarning, match="both"):
        assert [name for name, _ in find_files(["*.txt"], [])] == ["a.txt"]
