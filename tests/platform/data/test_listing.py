"""Files of folders: links are followed, once, and none is lost."""

import pickle
import re
import zipfile

import pytest

from fulgurite.data.listing import FileTree, find_files, list_files
from fulgurite.errors import DataError


def names(folder, *suffixes):
    return [name for name, _ in list_files(folder, suffixes or ("",))]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    (root / "a").mkdir(parents=True)
    (far / "deep").mkdir(parents=True)
    for path in (root / "a" / "x.txt", far / "y.txt", far / "deep" / "z.txt"):
        path.write_text("text")
    (root / "link").symlink_to(far)
    (root / "a" / "up").symlink_to(root)
    (far / "self").symlink_to(far)
    (root / "file.txt").symlink_to(far / "y.txt")
    assert names(root) == ["a/x.txt", "file.txt", "link/deep/z.txt", "link/y.txt"]
    assert names(tmp_path / "root" / "link", ".txt") == ["deep/z.txt", "y.txt"]


def test_a_text_reached_twice_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text")
    (tmp_path / "b").symlink_to("a")
    assert [name for name, _ in find_files([str(tmp_path)], [".txt"])] == ["a/x.txt"]


def test_hidden_names_and_other_suffixes_are_skipped(tmp_path):
    for name in (".git/x.txt", ".x.txt", "x.png", "c/x.txt", "skip/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [n for n, _ in list_files(tmp_path, (".txt",), frozenset(["skip"]))] == ["c/x.txt"]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "lost.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"lost\.txt leads nowhere \(.*gone\)"):
        list_files(tmp_path, (".txt",))
    assert list_files(tmp_path, (".png",)) == []
    with pytest.raises(DataError, match="cannot be read"):
        list_files(tmp_path / "none")


@pytest.mark.parametrize("kind", ["t", "t.zip"])
def test_a_zip_is_read_as_its_folder_in_any_process(tmp_path, kind):
    contents = {"a/x.txt": b"one", "b.txt": b"two"}
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for name, content in (contents | {"__MACOSX/a/._x": b"", "a/.hidden": b""}).items():
            archive.writestr(name, content)
            (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "t" / name).write_bytes(content)
        archive.mkdir("empty")
    (tmp_path / "t" / "__MACOSX" / "a" / "._x").unlink()
    tree = FileTree(tmp_path / kind)
    assert {name: tree.read(name) for name in tree.names} == contents
    sent = pickle.loads(pickle.dumps(tree))
    assert {name: sent.read(name) for name in sent.names} == contents
    before = tree.fingerprint(tree.names)
    (tmp_path / "t" / "b.txt").write_bytes(b"other text")
    with zipfile.ZipFile(tmp_path / "t.zip", "a") as archive:
        archive.writestr("c.txt", "more")
    assert FileTree(tmp_path / kind).fingerprint(tree.names) != before


@pytest.mark.parametrize("name", ["./a.txt", "../a.txt", "b/../a.txt"])
def test_a_zip_with_paths_that_wind_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("plain.txt", "text")
        archive.writestr(name, "text")
    with pytest.raises(DataError, match=f"holds '{re.escape(name)}'"):
        _ = FileTree(tmp_path / "t.zip").names


def test_a_zip_with_two_files_of_one_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("a", "one")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "two")
    with pytest.raises(DataError, match="two files of one name"):
        _ = FileTree(tmp_path / "t.zip").names
