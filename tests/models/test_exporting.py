"""The network that each system hands over: described rightly, and what prediction computes."""

import json

import numpy as np
import pytest
import torch

import fulgurite
from fulgurite.errors import ConfigError
from fulgurite.export import ExportRequest
from fulgurite.export.command import export_run
from fulgurite.export.formats import FORMATS, TOLERANCE
from fulgurite.models.cs_arm_bn import ControlsOnly
from fulgurite.predictions import read_predictions

SYSTEMS = ("cs_arm_bn", "fedsir", "ice_layers", "number_probing", "stream_cqsa")
TRAINED = ("--run.dir=run", "--trainer.max_epochs=1")


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request, train_once):
    """A short run of each system."""
    name = request.param
    cli, folder = train_once("fit", "--config", f"{name}/smoke.yaml", *TRAINED)
    return name, cli, folder


def hand_over(name, **options):
    """What the module of a configuration hands over, untrained."""
    loaded = fulgurite.load(name, **options)
    return loaded.model.eval().export_network(ExportRequest(loaded.data))


# --- language models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["number_probing/smoke", "stream_cqsa/smoke"])
def test_language_models_are_described_rightly(name):
    exportable = hand_over(name)
    exportable.check()
    assert exportable.inputs[0].axes == ("batch", "length")


def test_streamed_attention_is_pytorchs_in_the_exported_network():
    """Chunks and windows too: the logits are those of the module."""
    loaded = fulgurite.load("stream_cqsa/smoke", model={"network.transformer.chunk": 3})
    exportable = loaded.model.eval().export_network(ExportRequest(loaded.data))
    tokens = torch.randint(0, 256, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(exportable.network(tokens), loaded.model(tokens))
    assert loaded.model.network.transformer.chunk == 3  # a copy was changed
    windowed = hand_over("stream_cqsa/smoke", model={"network.transformer.window": 4})
    with torch.no_grad():
        whole, last = windowed.network(tokens), windowed.network(tokens[:, 4:])
    # two blocks see 1 + 2 (4 - 1) tokens
    torch.testing.assert_close(whole[:, -1], last[:, -1])
    windowed.check()


@pytest.mark.parametrize(
    "backbone",
    [
        "LSTMBackbone",
        pytest.param("GatedDeltaNetBackbone", marks=pytest.mark.slow),
        pytest.param("Mamba2Backbone", marks=pytest.mark.slow),
    ],
)
def test_recurrent_backbones_are_described_for_one_length(backbone):
    options = {"class_path": f"fulgurite.models.number_probing.backbones.{backbone}"}
    exportable = hand_over("number_probing/smoke", model={"backbone": options})
    exportable.check()
    assert exportable.inputs[0].axes == ("batch", 7)


def test_vectors_are_no_network():
    with pytest.raises(ConfigError, match=r"PPMI has no network to hand over.*numbers\.txt"):
        hand_over("number_probing/ppmi")


# --- plates ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plates(train_once):
    """A short run on plates, with its predictions."""
    _, folder = train_once("fit", "--config", "cs_arm_bn/smoke.yaml", *TRAINED)
    run = folder / "run"
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    config = str(run / "config.yaml")
    cli, _ = train_once("predict", "--config", config, checkpoint, f"--run.dir={run}")
    return cli, run


def test_a_plate_leaves_with_the_statistics_of_its_controls(plates, workdir):
    """An ordinary network gives what `fulgurite predict` wrote."""
    cli, run = plates
    data = cli.datamodule
    rows = read_predictions(run / "predict" / "predictions.npz")
    plate = int(rows["domain"][0])
    name = data.domains[plate]
    path = export_run(run, "safetensors", own_options={"plate": name})
    assert path.parent == run / "exported"
    from safetensors.torch import load_file

    from fulgurite.models.cs_arm_bn import SmallResNet

    network = SmallResNet(5, 8, width=4).eval()
    network.load_state_dict(load_file(path))
    statistics = data.state_dict()
    mean, std = statistics["mean"], statistics["std"]
    of_plate = np.flatnonzero(rows["domain"] == plate)
    images = np.stack([data.images[int(row)] for row in rows["index"][of_plate]])
    pixels = torch.from_numpy(images / data.images.unit(0)).float()
    with torch.no_grad():
        logits = network((pixels - mean[:, None, None]) / std[:, None, None])
    np.testing.assert_allclose(
        logits.softmax(1).numpy(), rows["probabilities"][of_plate], atol=1e-5
    )


def test_plates_are_asked_for_by_name(plates, workdir):
    _, run = plates
    with pytest.raises(ConfigError, match=r"no plate is named.*Give --plate="):
        export_run(run, "safetensors")
    with pytest.raises(ConfigError, match="no plate 'nowhere'"):
        export_run(run, "safetensors", own_options={"plate": "nowhere"})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("AdaBN", "AdaBN has no network.*predicted together"),
        pytest.param("TENT", "TENT has no network.*predicted together", marks=pytest.mark.slow),
        pytest.param("ARMLL", "ARMLL has no network.*predicted together", marks=pytest.mark.slow),
        ("LinearProbe", "LinearProbe has no network.*not those of the network alone"),
    ],
)
def test_methods_that_need_other_images_are_refused(method, message, workdir):
    path = f"fulgurite.models.cs_arm_bn.{method}"
    with pytest.raises(ConfigError, match=message):
        hand_over("cs_arm_bn/smoke", model={"method": {"class_path": path}})


class Softened(ControlsOnly):
    """A method of one's own, whose logits are not those of the network."""

    def logits(self, network, batch, context):
        return super().logits(network, batch, context) / 2


def test_methods_that_change_the_networks_logits_are_refused(workdir):
    loaded = fulgurite.load("cs_arm_bn/smoke")
    loaded.model.method = Softened()
    with pytest.raises(ConfigError, match=r"Softened has no network.*of the network alone"):
        loaded.model.eval().export_network(ExportRequest(loaded.data))


def test_running_statistics_need_no_plate(workdir):
    erm = {"class_path": "fulgurite.models.cs_arm_bn.ERM"}
    exportable = hand_over("cs_arm_bn/smoke", model={"method": erm})
    exportable.check()
    loaded = fulgurite.load("cs_arm_bn/smoke", model={"method": erm})
    request = ExportRequest(loaded.data, options={"plate": "A"})
    with pytest.raises(ConfigError, match="--plate=A makes no difference"):
        loaded.model.export_network(request)


@pytest.mark.parametrize("normalise", [pytest.param("image", marks=pytest.mark.slow), "plate"])
def test_images_are_standardised_inside_the_network(normalise, workdir):
    loaded = fulgurite.load("cs_arm_bn/smoke", data={"pixels.normalise": normalise})
    loaded.data.prepare_data()
    loaded.data.setup()
    batch = loaded.data.plate_episodes([0])[0]
    request = ExportRequest(loaded.data, options={"plate": loaded.data.domains[0]})
    exportable = loaded.model.eval().export_network(request)
    pixels = batch.images[: batch.n_query].float() / loaded.data.images.unit(0)
    standardised = loaded.data.on_after_batch_transfer(batch, 0).query
    with torch.no_grad():
        torch.testing.assert_close(
            exportable.network(pixels), exportable.weights(standardised), atol=1e-4, rtol=1e-4
        )


# --- ice layers -----------------------------------------------------------------------------------


@pytest.mark.slow  # a plate, above, does in the default suite
def test_a_stack_leaves_as_it_is_predicted(train_once, workdir):
    _, folder = train_once("fit", "--config", "ice_layers/smoke.yaml", *TRAINED)
    run = folder / "run"
    loaded = fulgurite.load("ice_layers/smoke")
    from fulgurite.export.trained import load_trained_run

    trained = load_trained_run(run)
    request = ExportRequest(trained.data, trained.data_state)
    exportable = trained.module.export_network(request)
    exportable.check()
    assert exportable.facts["physics"] == ["smb", "st", "refreeze", "melt", "snowpack"]
    loaded.data.prepare_data()
    loaded.data.setup("predict")
    batch = next(iter(loaded.data.test_dataloader()))
    with torch.no_grad():
        expected = trained.module(batch)
        for first, stop in zip(batch.ptr[:-1], batch.ptr[1:], strict=True):
            fields = (
                batch.thickness.where(batch.observed, torch.nan), batch.physics, batch.pos,
                batch.distance, batch.span_start, batch.span_path, batch.refraction,
            )  # fmt: skip
            predicted = exportable.network(*(field[first:stop] for field in fields))
            torch.testing.assert_close(predicted, expected[first:stop], atol=1e-6, rtol=0)


def test_a_baseline_of_ice_layers_has_no_network(workdir):
    loaded = fulgurite.load("ice_layers/baseline")
    with pytest.raises(ConfigError, match="BaselineCompletion has no network to hand over"):
        loaded.model.export_network(ExportRequest(loaded.data))


# --- all systems, in the formats that trace -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_every_system_leaves_as_a_traced_network(trained, to, workdir):
    """Files are read again by other libraries, and compared for several lengths of each axis."""
    name, cli, folder = trained
    options = {"plate": cli.datamodule.domains[-1]} if name == "cs_arm_bn" else {}
    path = export_run(folder / "run", to, own_options=options)
    assert path.suffix == FORMATS[to].suffix
    card = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert 0 <= card["difference"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["LSTMBackbone", "GatedDeltaNetBackbone", "Mamba2Backbone"])
def test_recurrent_backbones_leave_as_onnx(backbone, tmp_path):
    options = {"class_path": f"fulgurite.models.number_probing.backbones.{backbone}"}
    if backbone != "LSTMBackbone":
        options["init_args"] = {"chunk": 4}  # several of them
    exportable = hand_over("number_probing/smoke", model={"backbone": options})
    path = tmp_path / "net.onnx"
    FORMATS["onnx"].write(exportable, path, {})
    assert FORMATS["onnx"].measure(exportable, path) <= TOLERANCE
