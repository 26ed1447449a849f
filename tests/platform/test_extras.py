"""Packages that only some inputs need."""

import sys
import tomllib
from pathlib import Path

import pytest

from fulgurite.errors import MissingExtraError
from fulgurite.extras import list_optional_packages, optional_import

ROOT = Path(__file__).resolve().parents[2]


def test_an_absent_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"Reading a\.mat needs h5py.*'fulgurite\[ice\]'"):
        optional_import("h5py", "ice", "Reading a.mat")


def test_a_package_that_lacks_another_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="absent_dependency") as error:
        optional_import("needs_more", "ice", "Reading a.mat")
    assert not isinstance(error.value, MissingExtraError)


def test_the_extras_are_those_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = list_optional_packages()
    assert {"pyarrow", "cleanlab", "tensorboard", "netCDF4"} <= packages.keys()
    assert "pytest" not in packages
    assert "torch" not in packages
    extras = project["optional-dependencies"]
    for package, names in packages.items():
        assert names
        for name in names:
            assert any(line.startswith(package) for line in extras[name]), (package, name)
