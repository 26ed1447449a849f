"""The wheel on its own: it runs a packaged configuration from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.builds import run_pip
from fakes.repository import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel."""
    place = tmp_path_factory.mktemp("wheel")
    run_pip(place / "source", "install", "--target", str(place / "site"))
    return place / "site"


def run(folder: Path, paths: list[Path], *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("with_root", ["after", "before", "absent"])
def test_a_packaged_configuration_runs_from_an_empty_folder(installed, tmp_path, with_root):
    paths = {"after": [installed, ROOT], "before": [ROOT, installed], "absent": [installed]}[
        with_root
    ]
    code = (
        "import fulgurite, fulgurite.models.fedsir as m, platform;"
        "print(fulgurite.__file__, m.__file__, platform.system())"
    )
    package, model, _ = run(tmp_path, paths, "-c", code).split()
    assert Path(package).is_relative_to(installed)
    assert Path(model).is_relative_to(installed)
    assert "fedsir/smoke.yaml" in run(tmp_path, paths, "-m", "fulgurite", "systems")
    run(tmp_path, paths, "-m", "fulgurite", "fit", "--config", "fedsir/smoke.yaml")
    (folder,) = tmp_path.glob("runs/fedsir/smoke/*")
    assert {"config.yaml", "environment.json", "metrics.csv"} <= {p.name for p in folder.iterdir()}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
