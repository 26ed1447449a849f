"""Flights and files of ice layers, and readers, data and models whose options are given flat."""

from dataclasses import fields

import numpy as np
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import (
    Blocks,
    EvaluationOptions,
    IceLayerDataModule,
    KoenigPicks,
    LayerFiles,
    PickOptions,
    SegmentSelection,
    SelectionOptions,
    SplitOptions,
    SredBins,
    SredFields,
    SredFolders,
    SredMat,
)
from fulgurite.models.ice_layers import (
    BaselineCompletion,
    BaselinePrediction,
    CompletionInputs,
    CompletionLoss,
    CompletionNet,
    CompletionPrediction,
    DeepInputs,
    DeepLayerPredictor,
    IceCompletion,
    InputOptions,
    KrigingFitOptions,
    LineOptions,
    LossOptions,
    PredictionOptions,
    RegressionOptions,
    SpatialOptions,
    TransformerOptions,
)

NAME = "20120330_01"
START = float(np.datetime64("2012-03-30T12", "s").astype(np.int64))
STEP = 25.0  # [m]


def nest(options, **records):
    """Options of which those of records are put into these, by their names."""
    nested = dict(options)
    for name, (kind, renamed) in records.items():
        of_field = {renamed.get(f.name, f.name): f.name for f in fields(kind)}
        its = {of_field[key]: nested.pop(key) for key in list(nested) if key in of_field}
        nested[name] = kind(**its)
    return nested


def layer_files(paths, climate=None, **options):
    """A reader of layer files."""
    records = {"blocks": Blocks, "picks": PickOptions, "selection": SegmentSelection}
    return LayerFiles(paths, climate, **nest(options, **{k: (v, {}) for k, v in records.items()}))


def koenig_picks(paths, **options):
    """A reader of Koenig's tables."""
    return KoenigPicks(paths, **nest(options, blocks=(Blocks, {})))


def sred_mat(root, **options):
    """A reader of SRED's files."""
    nested = nest(
        options,
        bins=(SredBins, {"size": "bin_size", "time": "sample_time"}),
        fields=(SredFields, {"names": "fields", "deeper": "deeper_physics"}),
        folders=(SredFolders, {}),
    )
    return SredMat(root, **nested)


def completion_net(layers, physics, width=32, **options):
    """A completion network."""
    nested = nest(
        options,
        inputs=(InputOptions, {"physics": "use_physics"}),
        spatial=(SpatialOptions, {"depth": "spatial_depth"}),
        transformer=(TransformerOptions, {}),
    )
    return CompletionNet(layers, physics, width, **nested)


def ice_data(source=None, completed=None, **options):
    """A data module."""
    nested = nest(
        options,
        split=(SplitOptions, {}),
        selection=(SelectionOptions, {}),
        evaluation=(EvaluationOptions, {"batch_size": "eval_batch_size"}),
    )
    return IceLayerDataModule(source, completed, **nested)


def completion(network, **options):
    """The module of completion."""
    nested = nest(
        options,
        inputs=(CompletionInputs, {}),
        loss=(CompletionLoss, {"kind": "loss_kind"}),
        prediction=(CompletionPrediction, {}),
    )
    return IceCompletion(network, **nested)


def deep_predictor(network, **options):
    """The predictor of deep layers."""
    nested = nest(
        options,
        inputs=(DeepInputs, {}),
        loss=(LossOptions, {"kind": "loss_kind"}),
        prediction=(PredictionOptions, {}),
    )
    return DeepLayerPredictor(network, **nested)


def baseline(method="kriging", **options):
    """A baseline."""
    nested = nest(
        options,
        lines=(LineOptions, {}),
        regression=(RegressionOptions, {"kind": "drift"}),
        fit=(KrigingFitOptions, {"stacks": "fit_stacks", "entries": "fit_entries"}),
        prediction=(BaselinePrediction, {}),
    )
    return BaselineCompletion(method, **nested)


def make_flight(traces=60, layers=3, is_smooth=False):
    """One flight of raw traces, as arrays of a layer file, every boundary picked.

    The thickness of layers differs from trace to trace, or varies smoothly along the track.
    """
    rng = np.random.default_rng(0)
    along = np.arange(traces) * STEP
    if is_smooth:
        times = rng.uniform(0.8, 1.2, (layers, 1))
        times = 5e-9 * times * (1 + 0.1 * np.sin(along / 200))
    else:
        times = 5e-9 * rng.uniform(0.8, 1.2, (layers, traces))
    surface = 3e-6 + 5e-9 * np.sin(along / 300)
    return {
        "gps_time": START + along / 130.0,
        "lat": 72.0 + along / 111_195.0,
        "lon": np.full(traces, -40.0),
        "elev": 3000.0 + np.sin(along / 100),
        "twtt": np.concatenate([surface[None], surface + np.cumsum(times, 0)]),
    }


def write_frame(folder, number, recorded, rows, ids=None, name=NAME, **more):
    """Write one frame with the traces of some rows; further variables replace its own."""
    content = {key: np.atleast_2d(value[..., rows]) for key, value in recorded.items()}
    boundaries, traces = content["twtt"].shape
    content["id"] = np.arange(1.0, boundaries + 1) if ids is None else np.asarray(ids, float)
    content["quality"] = np.full((boundaries, traces), 2, np.uint8)
    content["type"] = np.ones((boundaries, traces), np.uint8)
    path = folder / name / f"Data_{name}_{number:03}.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content | more)
    return path
