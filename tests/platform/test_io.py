"""Atomic writes, checksums, data paths."""

from pathlib import Path

import pytest

from fulgurite.errors import DataError
from fulgurite.io import (
    atomic_write,
    cache_folder,
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


def test_data_path(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(b"")
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path))
    assert data_path("a.zip") == tmp_path / "a.zip"
    assert data_path(tmp_path / "a.zip") == tmp_path / "a.zip"
    with pytest.raises(DataError, match=r"no data at .*b\.zip"):
        data_path("b.zip")
    monkeypatch.delenv("FULGURITE_DATA")
    with pytest.raises(DataError, match="FULGURITE_DATA is not set"):
        data_path("a.zip")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FULGURITE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "fulgurite"
