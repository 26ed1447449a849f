"""Every command of docs/complete_your_own_flight.md, on small files of the layout that it shows."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from fulgurite.cli import parse
from fulgurite.datamodules.ice_layers import SyntheticFlights, World

PAGE = Path(__file__).parents[2] / "docs" / "complete_your_own_flight.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="needs the repository")

# small enough to be tried: few traces, a narrow network, one epoch
SIZES = ["--data.init_args.source.blocks.traces=16"]
NETWORK = ["--model.init_args.network.init_args.width=8", "--trainer.max_epochs=1"]
NETWORK += ["--trainer.check_val_every_n_epoch=1"]


def blocks(language):
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def arguments(line):
    program, *words = shlex.split(line)
    assert program == "fulgurite"
    return words


def test_commands_parse():
    """Those with most options; the slow test runs all."""
    longest = sorted(commands(), key=len)[-2:]
    for line in [*longest, commands()[-1]]:
        assert parse(arguments(line)).model.class_path.startswith("fulgurite.models.ice_layers.")


@pytest.mark.slow
def test_every_command_runs(fulgurite, workdir):
    """In the page's order, from a folder of layer files and a climate to NetCDF and back."""
    pytest.importorskip("h5py")
    netcdf = pytest.importorskip("netCDF4")
    pytest.importorskip("torch_geometric")
    SyntheticFlights(World(stacks=32, traces=16, layers=8, segments=8)).write(workdir)
    names = sorted(path.name for path in (workdir / "CSARP_layer").iterdir())
    before = {p: p.read_bytes() for p in (workdir / "CSARP_layer").rglob("*.mat")}
    own = names[0]  # stands for the page's flight
    for line in commands():
        words = [word.replace("20120410_01", own) for word in arguments(line)]
        more = SIZES if any("Baseline" in word for word in words) else [*SIZES, *NETWORK]
        status, out, err = fulgurite(*words, *more, "--trainer.enable_progress_bar=false")
        assert status == 0, f"{line}\n{out}\n{err}"
        run = next(
            word.removeprefix("--run.dir=") for word in words if word.startswith("--run.dir")
        )
        if words[0] == "predict":
            (folder, *_) = sorted(Path(run).glob("predict*"), reverse=True)
            files = sorted((folder / "completed").glob("*.nc"))
            expected = 4 if "CSARP_layer/" in line else 32
            assert len(files) == expected, line
            with netcdf.Dataset(files[0]) as file:
                assert np.isfinite(np.ma.filled(file["thickness"][:], np.nan)).all()
                assert ("climate_smb" in file.variables) == ("climate=null" not in line)
                has_error = bool(np.ma.count(file["thickness_standard_deviation"][:]))
                assert has_error == ("run.dir=alone" not in line)
    assert before == {p: p.read_bytes() for p in (workdir / "CSARP_layer").rglob("*.mat")}
    written = sorted(p.name for p in Path("own/predict-2/completed/CSARP_layer").rglob("*.mat"))
    assert written == sorted(p.name for p in before)
    runner = pytest.importorskip("compliance_checker.runner")
    runner.CheckSuite.load_all_available_checkers()
    for run in ("own", "plain"):
        path = next(Path(run, "predict", "completed").glob("*.nc"))
        runner.ComplianceChecker.run_checker(
            str(path), ["cf:1.11"], 0, "strict", output_filename="cf.json", output_format="json"
        )
        found = json.loads(Path("cf.json").read_text())["cf:1.11"]
        assert found["scored_points"] == found["possible_points"] > 100
    for block in blocks("python"):
        exec(block.replace("20120410_01", own), {})  # the page's own code
