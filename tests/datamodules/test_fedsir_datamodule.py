"""The data module: splits, views of a client, evaluation loaders, secrecy of true labels."""

import textwrap

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

import fulgurite.sampling
from fulgurite.datamodules.fedsir import (
    Digits,
    Dirichlet,
    FederatedDataModule,
    Iid,
    ImageFolder,
    InstanceDependent,
    NoisyClients,
    Npz,
    Symmetric,
)
from fulgurite.datamodules.fedsir.augment import shift_crop
from fulgurite.datamodules.fedsir.options import FederatedEvaluationOptions, ImageOptions
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.files import class_images, write_image_files, write_npz


def build(**changes):
    arguments = {
        "source": Digits(copies=2),
        "partition": Dirichlet(2.0),
        "noise": NoisyClients(Symmetric(), 0.5, clean_cover=0.05),
        "clients": 5,
        "images": ImageOptions("shift"),
    }
    return FederatedDataModule(**(arguments | changes))


@pytest.fixture(scope="module")
def data():
    module = build()
    module.setup("fit")
    return module


def test_sizes_are_known_before_setup():
    data = build()
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, (8, 8))
    assert data.num_clients == 5


def test_clients_share_out_the_training_images(data):
    index = torch.cat([data.client_index(k) for k in range(5)])
    assert index.sort().values.equal(torch.arange(data.num_samples))
    assert len(data.labels) == len(data.evaluation.true) == data.num_samples
    for k in range(5):
        images = data.client_images(k)
        assert images.dtype == torch.uint8
        assert tuple(images.shape) == (len(data.client_index(k)), 1, 8, 8)


def test_setup_twice_keeps_what_was_written():
    data = build()
    data.setup("fit")
    data.labels.write(torch.tensor([0]), (data.labels.given[:1] + 1) % 10)
    labels = data.labels
    data.setup("test")
    assert data.labels is labels
    assert data.labels.changed == 1


def test_noise_is_where_the_evaluation_says(data):
    wrong = data.labels.given != data.evaluation.true
    assert 1 <= int(data.evaluation.noisy_clients.sum()) <= 4
    for k in range(5):
        part = data.client_index(k)
        rate = float(wrong[part].double().mean())
        assert rate == pytest.approx(float(data.evaluation.noise_rates[k]), abs=0.02)
        assert bool(data.evaluation.noisy_clients[k]) == (rate > 0)


def test_the_seed_decides_and_the_run_seed_does_not(data):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = build()
    again.setup()
    assert torch.get_rng_state().equal(state)
    assert again.labels.given.equal(data.labels.given)
    assert all(again.client_index(k).equal(data.client_index(k)) for k in range(5))
    assert again.client_images(3).equal(data.client_images(3))
    other = build(seed=1)
    other.setup()
    assert not other.client_index(0).equal(data.client_index(0))


def test_images_belong_to_their_labels(tmp_path):
    """Each class has one grey value here, so a mix-up anywhere would show."""
    labels = torch.arange(4).repeat_interleave(25)
    images = (labels * 60).byte().view(-1, 1, 1).expand(-1, 4, 4).numpy()
    path = write_npz(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=labels.numpy(),
        test_images=images,
        test_labels=labels.numpy(),
    )
    data = build(source=Npz(str(path)), noise=None, clients=3, images=ImageOptions())
    data.setup()
    for k in range(3):
        values = data.client_images(k)[:, 0, 0, 0] // 60
        assert values.long().equal(data.labels.given[data.client_index(k)])
    for loader, count in ((data.val_dataloader(), 8), (data.test_dataloader(), 100)):
        batches = list(loader)
        order = torch.cat([labels for _, labels, _ in batches])
        grey = torch.cat([images[:, 0, 0, 0] for images, _, _ in batches])
        assert len(order) == count
        assert torch.corrcoef(torch.stack([grey, order.float()]))[0, 1] > 0.9999
    # sorted in the file, shuffled in the store: neither number nor neighbour tells the class
    true = data.evaluation.true
    numbers = torch.arange(len(true)).float()
    assert torch.corrcoef(torch.stack([numbers, true.float()]))[0, 1].abs() < 0.3
    assert (true[1:] == true[:-1]).float().mean() < 0.5


def test_true_labels_are_out_of_reach_of_a_method(data):
    given = data.labels.given
    seen = [data.labels.current, given, *(data.client_index(k) for k in range(5))]
    secret = data.evaluation.true.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() != secret for tensor in seen)
    assert all(
        not (isinstance(value, torch.Tensor) and value.equal(data.evaluation.true))
        for value in vars(data.labels).values()
    )


def test_without_noise_the_store_still_shares_nothing():
    data = build(noise=None)
    data.setup()
    assert data.labels.given.equal(data.evaluation.true)
    data.labels.write(torch.tensor([0]), (data.labels.given[:1] + 1) % 10)
    for tensor in vars(data.labels).values():  # whatever it holds is its own
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    assert data.evaluation.true.bincount(minlength=10).min() > 200
    assert not data.evaluation.noisy_clients.any()


def test_the_oracle_sees_the_truth_and_nothing_else_changes(data):
    oracle = build(reveal_true_labels=True)
    oracle.setup()
    assert oracle.labels.given.equal(oracle.evaluation.true)
    assert oracle.evaluation.true.equal(data.evaluation.true)
    assert oracle.evaluation.noisy_clients.equal(data.evaluation.noisy_clients)
    assert oracle.client_index(2).equal(data.client_index(2))


def test_instance_dependent_noise_gets_the_right_images():
    data = build(noise=NoisyClients(InstanceDependent(), 0.4, clean_cover=None, count=5))
    data.setup()
    share = (data.labels.given != data.evaluation.true).double().mean()
    assert share == pytest.approx(0.4, abs=0.01)


# --- validation


def test_no_copy_of_a_validation_image_is_trained_on():
    data = build(
        source=Digits(copies=3, max_shift=0, max_rotation=0, pixel_noise=0),
        evaluation=FederatedEvaluationOptions(0.2),
    )
    data.setup()
    trained = [tuple(i) for k in range(5) for i in data.client_images(k).flatten(1).tolist()]
    val = data.val_dataloader().dataset
    train, held = set(trained), val.images[val.rows]
    validation = {tuple(i) for i in held.flatten(1).tolist()}
    assert len(trained) == 3 * (1437 - len(held))
    assert len(held) == pytest.approx(0.2 * 1437, abs=5)
    assert not train & validation


def test_no_validation():
    data = build(evaluation=FederatedEvaluationOptions(0.0))
    data.setup()
    assert data.val_dataloader() == []
    assert data.num_samples == 2 * 1437


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_see_every_test_image_once(data, monkeypatch, world):
    seen = []
    for rank in range(world):
        monkeypatch.setattr(fulgurite.sampling, "rank_and_world", lambda r=rank: (r, world))
        for images, labels, index in data.test_dataloader():
            assert images.dtype == torch.float32
            assert len(images) == len(labels) == len(index)
            seen += index.tolist()
    assert sorted(seen) == list(range(360))


class Probe(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen = []

    def test_step(self, batch, batch_idx):
        self.seen += batch[2].tolist()

    validation_step = test_step

    def predict_step(self, batch, batch_idx):
        return batch[2]


def test_lightning_runs_the_evaluation_loaders(data, tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    probe = Probe()
    trainer.test(probe, data)
    assert probe.seen == list(range(360))
    probe.seen.clear()
    trainer.validate(probe, data)
    assert probe.seen == list(range(len(data.val_dataloader().dataset)))
    assert torch.cat(trainer.predict(probe, data)).tolist() == list(range(360))


# --- batches


def reference_crop(images, pad, generator, flip):
    """One image at a time."""
    down, right = torch.randint(0, 2 * pad + 1, (2, len(images), 1), generator=generator)
    mirror = torch.randint(0, 2, (len(images), 1), generator=generator) if flip else None
    padded = nn.functional.pad(images, (pad,) * 4)
    height, width = images.shape[-2:]
    out = []
    for i, image in enumerate(padded):
        crop = image[:, down[i, 0] : down[i, 0] + height, right[i, 0] : right[i, 0] + width]
        out.append(crop.flip(2) if mirror is not None and mirror[i, 0] else crop)
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(40, 3, 32, 32), (40, 1, 8, 8), (7, 3, 5, 9), (1, 1, 4, 4)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_shift_crop_is_the_plain_crop(shape, flip, pad):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    fast = shift_crop(images, pad, torch.Generator().manual_seed(7), flip=flip)
    assert fast.equal(reference_crop(images, pad, torch.Generator().manual_seed(7), flip))


def test_batches_are_normalised_and_repeat(data):
    images = torch.cat([data.client_images(k) for k in range(5)])
    plain = data.plain_batch(images)
    assert plain.mean().item() == pytest.approx(0, abs=1e-4)
    assert plain.std().item() == pytest.approx(1, abs=1e-3)
    first = data.augment_batch(images[:64], torch.Generator().manual_seed(0))
    assert first.equal(data.augment_batch(images[:64], torch.Generator().manual_seed(0)))
    assert not first.equal(plain[:64])
    assert first.dtype == torch.float32


def test_given_mean_and_deviation(tmp_path):
    path = write_npz(tmp_path / "a.npz", channels=3)
    data = build(
        source=Npz(str(path)),
        clients=2,
        noise=None,
        images=ImageOptions(mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0]),
    )
    data.setup()
    images = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert data.plain_batch(images).flatten().tolist() == pytest.approx([1.0, 0.75, 0.5])
    wrong = build(
        source=Npz(str(path)), clients=2, noise=None, images=ImageOptions(mean=[0.5], std=[0.5])
    )
    with pytest.raises(ConfigError, match="1 means and 1 standard deviations for 3"):
        wrong.setup()


def test_a_channel_that_is_the_same_everywhere_stays_harmless_where_it_is_not(tmp_path):
    path = write_npz(tmp_path / "a.npz", channels=3)
    arrays = dict(np.load(path))
    arrays["train_images"][..., 2] = 9
    np.savez(path, **arrays)
    data = build(source=Npz(str(path)), clients=2, noise=None)
    data.setup()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert 0 < data.plain_batch(images)[:, 2].abs().max() < 1


def test_classes_without_a_validation_image_are_counted(tmp_path, log):
    labels = np.array([0] * 40 + [1] * 3 + [2] * 4)
    images = np.random.default_rng(0).integers(0, 256, (47, 4, 4), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz",
        **{f"{part}_images": images for part in ("train", "test")},
        **{f"{part}_labels": labels for part in ("train", "test")},
    )
    for fraction, says in ((0.1, True), (0.3, False), (0.0, False)):
        log.clear()
        evaluation = FederatedEvaluationOptions(fraction)
        build(
            source=Npz(str(tmp_path / "a.npz")), clients=2, noise=None, evaluation=evaluation
        ).setup()
        assert ("2 of 3 classes have no validation image" in log.text) == says


def test_memory_mapped_images(tmp_path, cache):
    path = write_image_files(tmp_path / "i.zip", per_class=20)
    data = build(
        source=ImageFolder(str(path)), clients=3, noise=None, images=ImageOptions("crop_flip")
    )
    data.prepare_data()
    data.setup()
    known = {i.tobytes() for i in class_images(20, 3, size=8)[0]}
    for k in range(3):
        images = data.client_images(k)
        assert {i.tobytes() for i in images.numpy()} <= known
        assert data.augment_batch(images, torch.Generator()).shape == images.shape


# --- errors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FederatedEvaluationOptions, {"val_fraction": 1.0}, "evaluation.val_fraction"),
        (FederatedEvaluationOptions, {"batch_size": 0}, "evaluation.batch_size"),
        (ImageOptions, {"augment": "flip"}, "augment of images is 'flip'"),
        (ImageOptions, {"mean": [0.5]}, "mean"),
        (ImageOptions, {"mean": [0.5], "std": [0.0]}, "positive"),
        (ImageOptions, {"mean": [125.3], "std": [63.0]}, "from 0 to 255, over 255"),
        (ImageOptions, {"mean": [float("nan")], "std": [0.5]}, "mean is .nan"),
        (ImageOptions, {"mean": [0.5], "std": [float("nan")]}, "deviation .nan"),
    ],
)
def test_bad_options_are_one_error(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"clients": 0}, ConfigError, "clients is 0"),
        ({"clients": 5_000, "partition": Iid()}, DataError, "5000 clients but only 2588"),
        ({"clients": 2_000}, DataError, "without samples"),
    ],
)
def test_bad_arguments_are_one_error(changes, error, message):
    def run():
        build(**changes).setup()

    with pytest.raises(error, match=message):
        run()


# --- configuration


@pytest.mark.filterwarnings(r"ignore:\s+(``instantiate_classes|By default only one)")
def test_the_command_line_builds_it_and_its_hyperparameters_are_plain(tmp_path):
    from lightning.pytorch.cli import LightningArgumentParser

    name = "fulgurite.datamodules.fedsir"
    config = f"""
        data:
          class_path: {name}.FederatedDataModule
          init_args:
            source: {{class_path: {name}.Digits, init_args: {{copies: 1}}}}
            partition: {{class_path: {name}.Dirichlet, init_args: {{alpha: 0.7}}}}
            noise:
              class_path: {name}.NoisyClients
              init_args:
                noise: {{class_path: {name}.AsymmetricMap, init_args: {{mapping: {{1: 7, 7: 1}}}}}}
                rate: [0.2, 0.4]
                clean_cover: 0.05
            clients: 4
    """
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(FederatedDataModule, "data", subclass_mode=True, required=True)
    parsed = parser.parse_string(textwrap.dedent(config))
    data = parser.instantiate_classes(parsed).data
    data.setup()
    assert data.num_clients == 4
    assert data.partition.alpha == 0.7
    assert data.noise.noise.mapping == {1: 7, 7: 1}
    assert (data.noise.low, data.noise.high, data.noise.clean_cover) == (0.2, 0.4, 0.05)
    torch.save(dict(data.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["clients"] == 4


def test_hyperparameters_given_from_python_are_plain(data, tmp_path):
    torch.save(dict(data.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["images"]["augment"] == "shift"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"noise": Symmetric()}, r"which clients have it.*NoisyClients\(Symmetric"),
        ({"noise": NoisyClients}, "noise is the class NoisyClients"),
        ({"partition": Iid}, "partition is the class Iid"),
    ],
)
def test_parts_that_are_none_are_refused(parts, words):
    with pytest.raises(ConfigError, match=words):
        FederatedDataModule(Digits(), **{"partition": Iid()} | parts)
