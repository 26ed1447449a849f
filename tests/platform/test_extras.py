"""Packages that only some inputs need."""

import ast
import sys
import tomllib
from importlib import metadata

import pytest
from fakes.repository import ROOT
from packaging.requirements import Requirement

from fulgurite.errors import MissingExtraError
from fulgurite.extras import list_optional_packages, list_unfit_packages, optional_import

#: Where an error is of another kind than a package that an extra would bring.
BY_HAND = {
    "extras.py",  # the one place
    "bolts.py",  # lightning-bolts pins Lightning 1: it is in no extra
    "images.py",  # passes on what the decoder of an image said
    "transformers_attention.py",  # the package is there, in another version
}


def calls_of(name):
    """File and call of each call of a function in the package."""
    for folder in ("platform", "models", "datamodules", "callbacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if name in text:
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                        yield path, node


def test_an_absent_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"Reading a\.mat needs h5py.*'fulgurite\[ice\]'"):
        optional_import("h5py", "ice", "Reading a.mat")
    with pytest.raises(MissingExtraError, match=r"\[ice\]'`, or save it as version 7\.$"):
        optional_import("h5py", "ice", "Reading a.mat", "save it as version 7")


def test_each_extra_brings_the_package_that_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    calls = [*calls_of("optional_import"), *calls_of("missing_package")]
    checked = 0
    for path, call in calls:
        package, extra = call.args[:2]
        if isinstance(package, ast.Constant) and isinstance(extra, ast.Constant):
            name = package.value.partition(".")[0].replace("_", "-")
            assert name in brought[extra.value], f"{path}: {ast.unparse(call)}"
            checked += 1
    assert checked > 20


def test_one_function_raises_for_all_absent_packages():
    assert {path.name for path, _ in calls_of("MissingExtraError")} == BY_HAND


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


def test_versions_that_an_extra_does_not_take_are_named(monkeypatch):
    versions = {"h5py": "0.1", "jsonargparse": "1.0"}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))
    unfit = list_unfit_packages()
    assert {*versions} <= {*unfit}
    assert unfit["h5py"].startswith("fulgurite[ice] takes h5py>=")
    assert unfit["jsonargparse"].startswith("fulgurite takes jsonargparse")
