"""``fulgurite export``: files that are read again, cards, and what is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fulgurite.errors import CheckpointError, ConfigError, RunError
from fulgurite.export import ExportableNetwork, Port
from fulgurite.export.command import export_run, main
from fulgurite.export.decompositions import decomposition_table
from fulgurite.export.formats import FORMATS, largest_difference
from fulgurite.io import checksum
from fulgurite.tensor_files import load_plain, save_plain


@pytest.fixture(scope="module")
def exported(short_run, tmp_path_factory):
    """The weights of that run in a file."""
    return export_run(
        short_run, "safetensors", out=tmp_path_factory.mktemp("exported") / "net.safetensors"
    )


def toy(network, **changes):
    """A network of two features, ready to be exported."""
    description = {
        "network": network.eval(),
        "inputs": (Port("x", torch.float32, ("batch", 2), "features"),),
        "outputs": (Port("y", torch.float32, ("batch", 3), "scores"),),
        "axes": {"batch": (2, 1, 5)},
        "make_inputs": lambda lengths, generator: (
            torch.randn(lengths["batch"], 2, generator=generator),
        ),
    }
    return ExportableNetwork(**description | changes)


# --- a run, and its files -------------------------------------------------------------------------


def test_weights_leave_bit_for_bit_with_a_card(short_run, exported):
    path = exported
    stored = load_plain(short_run / "checkpoints" / "best.ckpt", "ckpt")
    with safe_open(path, "pt") as file:
        names, metadata = [*file.keys()], file.metadata()
        for name in names:
            assert torch.equal(file.get_tensor(name), stored["state_dict"][f"network.{name}"])
    assert {f"network.{name}" for name in names} == {
        name for name in stored["state_dict"] if name.startswith("network.")
    }
    card = json.loads(path.with_name("net.safetensors.json").read_text())
    assert card["checkpoint"]["sha256"] == checksum(short_run / "checkpoints" / "best.ckpt")
    assert card["sha256"] == checksum(path)
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert json.loads(metadata["fulgurite"])["classes"] == card["classes"]
    assert card["inputs"][0]["shape"] == ["batch", 1, 8, 8]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_exported_weights_are_a_start_of_another_run(exported, fit):
    weights = f"--model.init_args.weights={exported}"
    cli = fit(weights, "--trainer.fast_dev_run=true", command="predict")
    with safe_open(exported, "pt") as file:
        assert all(
            torch.equal(file.get_tensor(name), value)
            for name, value in cli.model.network.state_dict().items()
        )


def test_the_traced_network_takes_pixels_and_normalises_them(short_run, fulgurite):
    from fulgurite.models.fedsir.network import DigitsNet

    status, out, err = fulgurite(
        "export", str(short_run), "--to", "torch-export", "--ckpt_path=last", "--out", "net.pt2"
    )
    assert status == 0, err
    assert "largest difference" in out
    assert "takes images: uint8 (batch, 1, 8, 8)" in out
    network = torch.export.load("net.pt2").module()
    stored = load_plain(short_run / "checkpoints" / "last.ckpt", "ckpt")
    inner = DigitsNet(1, 10).eval()
    inner.load_state_dict(
        {
            name.removeprefix("network."): value
            for name, value in stored["state_dict"].items()
            if name.startswith("network.")
        }
    )
    data = stored["FederatedDataModule"]
    for batch in (1, 7):
        images = torch.randint(0, 256, (batch, 1, 8, 8), dtype=torch.uint8)
        scaled = images * data["scale"].view(1, 1, 1) + data["offset"].view(1, 1, 1)
        with torch.no_grad():
            torch.testing.assert_close(network(images), inner(scaled), atol=1e-5, rtol=0)


def test_a_file_that_is_there_is_kept(short_run, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"is there already.*--overwrite"):
        export_run(short_run, "safetensors", out=path)
    assert path.read_bytes() == b"mine"
    export_run(short_run, "safetensors", out=path, overwrite=True)
    assert path.stat().st_size > 1000


def test_a_file_that_gives_something_else_is_not_left(short_run, tmp_path, monkeypatch):
    monkeypatch.setattr("fulgurite.export.formats.torch.equal", lambda *_: False)
    with pytest.raises(RunError, match="differs from the trained one by inf"):
        export_run(short_run, "safetensors", out=tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_best_checkpoint_is_taken_unless_another_is_named(short_run, tmp_path, capsys):
    export_run(short_run, "safetensors", out=tmp_path / "a.safetensors")
    assert "best.ckpt" in capsys.readouterr().out
    export_run(
        short_run / "checkpoints" / "last.ckpt", "safetensors", out=tmp_path / "b.safetensors"
    )
    assert "last.ckpt" in capsys.readouterr().out


def test_weights_that_are_no_numbers_or_are_rounded_are_said(short_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    stored = load_plain(checkpoint, "ckpt")
    weights = {n: t.double() for n, t in stored["state_dict"].items() if t.is_floating_point()}
    name = next(n for n in weights if n.startswith("network."))
    weights[name].flatten()[0] = torch.nan
    save_plain({**stored, "state_dict": {**stored["state_dict"], **weights}}, checkpoint)
    path = export_run(run, "safetensors", which="last")
    printed = capsys.readouterr().out
    assert f"note: the checkpoint's {name} is not a number" in printed
    assert "are torch.float64, and are rounded to torch.float32" in printed
    assert len(json.loads(path.with_name(f"{path.name}.json").read_text())["notes"]) == 2
    weights[name] = weights[name] + 1j
    save_plain({**stored, "state_dict": {**stored["state_dict"], **weights}}, checkpoint)
    with pytest.raises(CheckpointError, match="is complex, and the model's is"):
        export_run(run, "safetensors", which="last", overwrite=True)


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    """Where torch's own writer meets one, it ends the process."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space left"):
        FORMATS["torch-export"].write(toy(nn.Linear(2, 3)), tmp_path / "a.pt2", {})

    def refuse_weights(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse_weights)
    with pytest.raises(RunError, match=r"weights cannot be written .*No space left"):
        FORMATS["safetensors"].write(toy(nn.Linear(2, 3)), tmp_path / "a.safetensors", {})


def test_a_file_whose_card_cannot_be_written_is_refused(short_run, tmp_path):
    (tmp_path / "a.safetensors.json").mkdir()
    with pytest.raises(ConfigError, match="where the card of the file goes, is a folder"):
        export_run(short_run, "safetensors", out=tmp_path / "a.safetensors", overwrite=True)
    assert not (tmp_path / "a.safetensors").exists()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plate", "A"], "no option --plate for FederatedClassifier"),
        (["--plate"], "--plate has no value"),
        (["more"], "'more' is no option"),
        (["--out", "net.onnx"], r"does not end in \.safetensors"),
    ],
)
def test_options_that_make_no_sense_are_refused(short_run, words, message):
    with pytest.raises(ConfigError, match=message):
        main([str(short_run), "--to", "safetensors", *words])


def test_what_is_no_run_is_refused(short_run, tmp_path):
    with pytest.raises(CheckpointError, match="no run folder and no checkpoint"):
        export_run(tmp_path, "safetensors")
    stray = shutil.copy(short_run / "checkpoints" / "last.ckpt", tmp_path / "stray.ckpt")
    with pytest.raises(CheckpointError, match="lies in no run folder"):
        export_run(Path(stray), "safetensors")
    with pytest.raises(ConfigError, match="--ckpt_path=best chooses one of a run folder"):
        export_run(short_run / "checkpoints" / "last.ckpt", "safetensors", which="best")


def test_the_record_of_a_test_is_no_training(short_run, tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    shutil.copy(short_run / "config.yaml", folder)
    facts = {"command": "test", "checkpoint": {"path": "/elsewhere/best.ckpt"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"record of `fulgurite test`.*/elsewhere/best\.ckpt"):
        export_run(folder, "safetensors")


def test_a_model_without_a_network_is_refused_by_name(monkeypatch, short_run):
    monkeypatch.setattr("fulgurite.models.fedsir.FederatedClassifier.export_network", None)
    with pytest.raises(ConfigError, match="FederatedClassifier has no network to hand over"):
        export_run(short_run, "safetensors")


# --- formats --------------------------------------------------------------------------------------


class UnfriendlyNet(nn.Module):
    """Operators that ONNX Runtime lacks, some of them in float64."""

    def forward(self, x):
        wide = torch.cat([x, x[:, :1]], 1).double()
        running = torch.cummax(wide, 1).values + torch.cummin(wide, 1).values
        system = (0.1 * running[:, :, None] * wide[:, None]).tril(-1)
        solved = torch.linalg.solve_triangular(
            system, running[..., None], upper=False, unitriangular=True
        )
        return nn.functional.softplus(solved[..., 0]).float()


def test_operators_that_onnx_lacks_are_written_with_others(tmp_path):
    path = tmp_path / "net.onnx"
    exportable = toy(UnfriendlyNet())
    exportable.check()
    FORMATS["onnx"].write(exportable, path, {"answer": 42})
    assert FORMATS["onnx"].measure(exportable, path) < 1e-5
    import onnx

    model = onnx.load(path)
    assert json.loads(model.metadata_props[0].value) == {"answer": 42}
    axes = [
        axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim
    ]
    assert axes == ["batch", 2]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_table_of_operators_says_the_same():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    table = decomposition_table()
    for name, function in (("cummax", torch.cummax), ("cummin", torch.cummin)):
        values, places = table[getattr(torch.ops.aten, name).default](x, 1)
        assert torch.equal(values, function(x, 1).values)
        assert torch.equal(x.gather(1, places), values)


def test_a_network_that_cannot_be_traced_is_refused_by_name(tmp_path):
    class DecidingNet(nn.Module):
        def forward(self, x):
            return torch.cat([x, x[:, :1]], 1) if float(x.sum()) > 0 else x.new_zeros(len(x), 3)

    with pytest.raises(ConfigError, match="DecidingNet cannot be written as torch-export"):
        FORMATS["torch-export"].write(toy(DecidingNet()), tmp_path / "a.pt2", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": (Port("y", torch.float32, ("batch", 4), "scores"),)}, "gives .* as y"),
        ({"outputs": ()}, "gives 1 tensors, and 0 are described"),
        ({"inputs": (Port("x", torch.float64, ("batch", 2), "features"),)}, "takes .* as x"),
    ],
)
def test_a_network_that_is_described_wrongly_is_refused(changes, message):
    with pytest.raises(RunError, match=message):
        toy(nn.Linear(2, 3), **changes).check()


def test_differences_see_what_is_not_finite():
    one = torch.tensor([1.0, float("nan"), float("inf")])
    assert largest_difference([one], [one.clone()]) == 0
    assert largest_difference([one], [-one]) == float("inf")
    assert largest_difference([one], [one.double()]) == float("inf")
    assert largest_difference([one], [one, one]) == float("inf")
    assert np.isclose(largest_difference([torch.tensor([200.0])], [torch.tensor([202.0])]), 0.01)
