"""Copies of the project that pip builds, without the network."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib

import pytest
from fakes.repository import ROOT
from packaging.requirements import Requirement


def skip_without_backend(source):
    """Skip a test where this environment cannot build the project of a folder.

    pip is told not to fetch what the project is built with (that needs a network), and then does
    not look at the versions that it asks for: an older setuptools refuses the fields that it does
    not know. An environment of `make venv` has them, since torch asks for a newer one still.
    """
    for line in tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["requires"]:
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the project is built with {requirement}, which is not installed")
        if not requirement.specifier.contains(version, prereleases=True):
            pytest.skip(f"the project is built with {requirement}, and {version} is installed")


def run_pip(source, *command):
    """Run a command of pip on a copy of the project, so that no build folder leaks into it."""
    skip_without_backend(ROOT)
    source.mkdir()
    for name in ("platform", "datamodules", "models", "callbacks", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", *command, *options, str(source)], check=True, timeout=300
    )
