"""Flights and files of ice layers, and readers, data and models whose options are given flat."""

from dataclasses import fields
from functools import partial

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import (
    Blocks,
    IceLayerDataModule,
    KoenigPicks,
    LayerEvaluationOptions,
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
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file
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
    PredictionOptions,
    RegressionOptions,
    RobustLossOptions,
    SpatialOptions,
    TransformerOptions,
)

#: A world that is generated in a second, with the options of its size by name.
SMALL_WORLD = {"stacks": 60, "traces": 32, "layers": 8, "segments": 12}
NAME = "20120330_01"
START = float(np.datetime64("2012-03-30T12", "s").astype(np.int64))
STEP = 25.0  # [m]
#: Density that turns times of generated picks into thickness, and back [g/cm³].
DENSITY = 0.4
#: A segment of tracks that are written from positions and picks, and when its flight starts [s].
SEGMENT = "20120414_01"
SEGMENT_START = 1_334_361_600.0
#: The day of that flight, since 1970.
FLIGHT_DAY = SEGMENT_START / 86_400


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


#: A network that is trained in seconds, of (layers, fields).
SMALL_NET = partial(completion_net, width=16, heads=2, depth=1)


def ice_data(source=None, completed=None, **options):
    """A data module."""
    nested = nest(
        options,
        split=(SplitOptions, {}),
        selection=(SelectionOptions, {}),
        evaluation=(LayerEvaluationOptions, {"batch_size": "eval_batch_size"}),
    )
    return IceLayerDataModule(source, completed, **nested)


def open_flights(source, **options):
    """A data module of generated flights, read and split."""
    data = ice_data(source, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def first_test_batch(data):
    """The first batch that a test of a model would see."""
    return next(iter(data.test_dataloader()))


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
        loss=(RobustLossOptions, {"kind": "loss_kind"}),
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


def write_picks(folder, *tracks, segment=SEGMENT):
    """Write each (time, position, picks) as a frame of a segment; gives the segment's folder."""
    folder = folder / segment
    folder.mkdir(parents=True, exist_ok=True)
    for number, (time, pos, picks) in enumerate(tracks, 1):
        write_layer_file(folder / f"Data_{segment}_{number:03}.mat", time, pos, picks)
    return folder


def count_excluded(flights):
    """How many of each kind were left out."""
    return {exclusion.kind: exclusion.count for exclusion in flights.excluded}


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


def draw_stack(number, sizes=(14, 18), noise=0.02):
    """A stack as PyG data, of 5 layers and 3 fields.

    Thickness follows physics, the place, and what the whole trace has in common.
    """
    from torch_geometric.data import Data

    layers, field_count = FakeFlights.layers, len(FakeFlights.physics)
    g = torch.Generator().manual_seed(number)
    n = sizes[number % len(sizes)]
    distance = 100.0 * torch.arange(n, dtype=torch.float64)
    shape = (n, layers, field_count)
    physics = torch.randn(1, *shape[1:], generator=g).expand(shape)
    physics = physics + 0.05 * torch.randn(shape, generator=g)
    shared = 0.1 * torch.sin(distance / 300 + 6 * torch.rand((), generator=g).double())
    truth = 1.2 - 0.05 * torch.arange(layers) + 0.15 * physics[..., 0] + shared[:, None]
    truth = truth + 0.05 * (physics[..., 1] * physics[..., 2])
    observed = torch.ones(n, layers, dtype=torch.bool)
    for layer in range(layers):
        draw = torch.rand(3, generator=g)
        if draw[0] < 0.08 * layer:
            observed[:, layer] = False
        elif draw[0] < 0.7:
            first = int(draw[1] * n)
            observed[first : first + 2 + int(draw[2] * n / 3), layer] = False
    picked = truth + noise * torch.randn(n, layers, generator=g)
    return Data(
        thickness=picked.double().where(observed, torch.nan),
        observed=observed,
        physics=(7 + 3 * physics).float(),
        pos=torch.stack([70 + distance / 111_195, torch.full_like(distance, -40.0)], 1),
        distance=distance,
        truth=truth.double(),
        segment=torch.tensor([number // 4]),
        stack=torch.tensor([number]),
        num_nodes=n,
    )


class FakeFlights(LightningDataModule):
    """Stacks as the real data module serves them."""

    layers, physics = 5, ("a", "b", "c")

    def __init__(self, train=24, batch_size=6):
        super().__init__()
        every = [draw_stack(i) for i in range(train + 16)]
        self.parts = {"train": every[:train], "val": every[train:-8], "test": every[-8:]}
        self.batch_size = batch_size
        self.segments = tuple(f"2012{i:04}_01" for i in range(len(every) // 4 + 1))
        self.stacks = tuple(f"stack {i}" for i in range(len(every)))
        self.layer_names, self.layer_age = (
            tuple("abcde"),
            torch.arange(1.0, self.layers + 1).numpy(),
        )
        train_stacks = self.parts["train"]
        mean = torch.stack(
            [
                torch.cat([d.thickness[d.observed[:, k], k] for d in train_stacks]).mean()
                for k in range(self.layers)
            ]
        )
        physics = torch.cat([d.physics.flatten(0, 1) for d in train_stacks]).double()
        pos = torch.cat([d.pos for d in train_stacks])
        self.statistics = {
            "thickness_mean": mean,
            "thickness_std": torch.cat([d.thickness[d.observed] for d in train_stacks]).std(),
            "physics_mean": physics.mean(0),
            "physics_std": physics.std(0),
            "pos_mean": pos.mean(0),
            "pos_std": pos.std(0).clamp_min(1e-6),
        }

    def stacks_of(self, part):
        class Named:
            def __init__(self, segment):
                self.segment = segment

        return [Named(self.segments[int(d.segment)]) for d in self.parts[part]]

    def make_loader(self, part):
        from torch_geometric.loader.dataloader import Collater

        data = self.parts[part]
        return torch.utils.data.DataLoader(
            data, self.batch_size, collate_fn=Collater(data), generator=torch.Generator()
        )

    def train_dataloader(self):
        return self.make_loader("train")

    def val_dataloader(self):
        return self.make_loader("val")

    def test_dataloader(self):
        return self.make_loader("test")

    predict_dataloader = test_dataloader
