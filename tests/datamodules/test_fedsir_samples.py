"""What partitions and noise see of samples: order of the source, groups, natural clients."""

import hashlib

import numpy as np
import pytest
import torch
from fakes.fedsir import NumberedImages
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.fedsir import (
    UNKNOWN,
    AsymmetricMap,
    Digits,
    Dirichlet,
    FederatedDataModule,
    FederationNoise,
    Grouped,
    Iid,
    ImageArrays,
    InstanceDependent,
    LabelNoise,
    Listing,
    Natural,
    NoisyClients,
    Npz,
    Pair,
    Partition,
    Samples,
    Shards,
    Symmetric,
)
from fulgurite.datamodules.fedsir.noisy_clients import Corruption
from fulgurite.datamodules.fedsir.options import FederatedEvaluationOptions, ImageOptions
from fulgurite.datamodules.fedsir.selection import make_generator
from fulgurite.errors import DataError
from fulgurite.testing.files import write_npz


def make_samples(labels, **columns):
    labels = torch.tensor(labels)
    listing = Listing(len(labels), columns={k: tuple(v) for k, v in columns.items()})
    names = tuple("abcdefghij"[: int(labels.max()) + 1])
    return Samples(labels, labels, torch.arange(len(labels)), listing, names)


# Of the release before samples knew their row: same seeds must give the same data.
DIGESTS = {
    "e1a54ecd4c52236b": (
        Digits(copies=3), Dirichlet(0.5), NoisyClients(Symmetric(), 0.7, clean_cover=0.09)
    ),
    "c22dd4b643ec888f": (
        Digits(copies=1), Iid(), NoisyClients(Pair(), (0.2, 0.5), clean_cover=None)
    ),
    "3de659162e1ca25a": (
        Digits(copies=2, train_limit=500), Shards(2),
        NoisyClients(AsymmetricMap({1: 7, 7: 1}), 0.4, count=3, clean_cover=None),
    ),
    "f4895f1bea9a9c48": (
        Digits(copies=1, test_limit=100), Dirichlet(5.0, 0.8),
        NoisyClients(InstanceDependent(), 0.4, clean_cover=0.05),
    ),
    "1c73adede1f643d2": (Digits(copies=2), Dirichlet(2.0), None),
}  # fmt: skip


@pytest.mark.parametrize("digest", DIGESTS)
def test_same_seeds_give_the_data_of_earlier_releases(digest):
    data = FederatedDataModule(*DIGESTS[digest], clients=5, images=ImageOptions("shift"), seed=3)
    data.setup()
    truth = data.evaluation
    tensors = [data.labels.given, truth.true, truth.noisy_clients, truth.noise_rates]
    tensors += [data.client_index(k) for k in range(5)]
    tensors += [data.client_images(k) for k in range(5)]
    tensors.append(data.val_dataloader().dataset.labels)
    content = b"".join(t.contiguous().numpy().tobytes() for t in tensors)
    assert hashlib.sha256(content).hexdigest()[:16] == digest


class ByRow(Partition):
    """Deals rows in turn, and keeps the samples that it is shown."""

    def assign(self, samples, clients, num_classes, generator):
        self.seen = samples
        return samples.rows % clients


class Silent(LabelNoise):
    """No noise, which keeps the samples and images that it is shown."""

    needs_images = True

    def __init__(self):
        self.seen = []

    def corrupt(self, samples, rate, num_classes, generator, images):
        self.seen.append((samples, images))
        return samples.labels


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("limit", [None, 30])
def test_partitions_and_noise_see_the_row_in_the_source_of_each_sample(copies, limit):
    partition, noise = ByRow(), Silent()
    data = FederatedDataModule(
        NumberedImages(copies=copies, train_limit=limit), partition,
        NoisyClients(noise, 0.5, count=3, clean_cover=None), clients=3,
    )  # fmt: skip
    data.setup()
    images = torch.cat([data.client_images(k) for k in range(3)])
    positions = torch.cat([data.client_index(k) for k in range(3)])
    samples = partition.seen
    assert samples.rows[positions].equal(images[:, 0, 0, 0].long())
    assert samples.listing.total == 60
    assert samples.describe(torch.tensor([0])) == f"'{int(samples.rows[0])}.png'"
    assert len(noise.seen) == 3
    for samples, pixels in noise.seen:
        assert samples.rows.equal(pixels[:, 0, 0, 0].long())


def test_a_source_of_arrays_has_the_order_of_the_file(tmp_path):
    values = np.arange(50, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None], (50, 2, 2))
    path = write_npz(
        tmp_path / "a.npz", train_images=images, train_labels=values % 2, test_images=images,
        test_labels=values % 2,
    )  # fmt: skip
    partition = ByRow()
    data = FederatedDataModule(Npz(str(path)), partition, clients=3)
    data.setup()
    for k in range(3):
        assert data.client_images(k)[:, 0, 0, 0].tolist() == [
            row for row in partition.seen.rows.tolist() if row % 3 == k
        ]


def test_copies_of_a_source_that_shuffles_them_are_refused():
    class Shuffled(NumberedImages):
        def copy_images(self, images, labels):
            return images.repeat_interleave(2, 0), labels.repeat_interleave(2)

    data = FederatedDataModule(Shuffled(copies=2), Iid(), clients=3)
    with pytest.raises(DataError, match="Shuffled does not say which copy is of which"):
        data.setup()


# --- natural clients


def test_natural_clients_are_the_writers_of_the_source():
    data = FederatedDataModule(NumberedImages(), Natural(), clients=5)
    data.setup()
    for k in range(5):
        assert {row % 5 for row in data.client_images(k)[:, 0, 0, 0].tolist()} == {k}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"clients": 4},
            "names 5 clients, and there are to be 4. Set `--data.init_args.clients=5`",
        ),
        ({"clients": 5, "partition": Natural("author")}, "nothing called 'author'.*are client"),
        ({"clients": 5, "source": Digits()}, "nothing called 'client'.*it has no columns"),
        (
            {
                "clients": 5,
                "source": NumberedImages(train_limit=6),
                "evaluation": FederatedEvaluationOptions(0),
            },
            r"client 'w\d', of whose images none is left for training \([1-4] of 5",
        ),
    ],
)
def test_natural_clients_that_do_not_fit_are_named(options, message):
    data = FederatedDataModule(**{"source": NumberedImages(), "partition": Natural()} | options)
    with pytest.raises(DataError, match=message):
        data.setup()


def test_clients_are_numbered_by_value_and_none_is_nameless():
    samples = make_samples([0, 1, 0, 1], client=["10", "9", "10", "100"])
    parts = Natural()(samples, 3, 2, make_generator(0))
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]
    with pytest.raises(DataError, match="'client' of the source is empty for row 1, row 3"):
        Natural()(make_samples([0, 1, 0, 1], client=["a", "", "b", ""]), 2, 2, make_generator(0))


# --- groups


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=40, max_size=80),
    st.integers(0, 99),
)
def test_no_group_is_at_two_clients_and_each_sample_at_one(rows, seed):
    patients = [f"p{patient}" for patient, _ in rows]
    samples = make_samples([label for _, label in rows], patient=patients)
    few = len(set(patients)) < 3
    for inner in (Iid(), Shards(1)):
        if few:
            with pytest.raises(DataError, match=r"3 clients and only [12] groups"):
                Grouped(inner, "patient")(samples, 3, 4, make_generator(seed))
            continue
        parts = Grouped(inner, "patient")(samples, 3, 4, make_generator(seed))
        owners = [{patients[i] for i in part.tolist()} for part in parts]
        assert sum(map(len, owners)) == len(set(patients))
        assert torch.cat(parts).sort().values.equal(torch.arange(len(rows)))


def test_groups_of_one_sample_are_dealt_as_without_groups():
    samples = make_samples([i % 3 for i in range(90)])
    for inner in (Iid(), Dirichlet(1.0), Shards(2)):
        alone = inner(samples, 4, 3, make_generator(1))
        grouped = Grouped(inner)(samples, 4, 3, make_generator(1))
        assert all(a.equal(b) for a, b in zip(alone, grouped, strict=True))


def test_a_group_has_the_class_of_most_of_its_samples():
    inner = ByRow()
    samples = make_samples([0, 1, 1, 0, 2, 2], patient=["p", "p", "p", "q", "q", "q"])
    Grouped(inner, "patient")(samples, 2, 3, make_generator(0))
    assert inner.seen.labels.tolist() == [1, 2]


def test_all_copies_of_an_original_are_at_one_client():
    data = FederatedDataModule(Digits(copies=3), Grouped(Dirichlet(0.5)), clients=5)
    data.setup()
    owners = [set(data.samples.rows[data.client_index(k)].tolist()) for k in range(5)]
    assert sum(map(len, owners)) == len(set.union(*owners)) == data.num_samples // 3


# --- truth that is not known


class Unsure(FederationNoise):
    """Knows the true labels of every second image, or of none."""

    def __init__(self, none=False):
        self.none = none

    def annotate(self, samples):
        known = (samples.rows % 4 < 2) & (not self.none)
        return Samples(
            (samples.labels + 1) % 2, torch.where(known, samples.true, UNKNOWN), samples.rows,
            samples.listing, samples.class_names,
        )  # fmt: skip

    def __call__(self, samples, parts, num_classes, generator, images=None):
        clients = torch.ones(len(parts), dtype=torch.bool)
        return Corruption(samples.labels, clients, clients.double())


@pytest.mark.parametrize("none", [False, True])
def test_unknown_truth_is_said_and_left_out(none, log):
    data = FederatedDataModule(NumberedImages(), Iid(), Unsure(none), clients=3)
    data.setup()
    unknown = 54 if none else r"\d\d"
    assert f"The true labels of {unknown if none else ''}" in log.text
    assert "validation labels are the given ones" in log.text
    if none:
        assert data.evaluation is None
    else:
        assert set(data.evaluation.true.tolist()) == {UNKNOWN, 0, 1}
        known = data.evaluation.true != UNKNOWN
        assert (data.evaluation.true != data.labels.given)[known].all()


def test_the_oracle_needs_every_true_label():
    data = FederatedDataModule(
        NumberedImages(), Iid(), Unsure(), clients=3, reveal_true_labels=True
    )
    with pytest.raises(DataError, match=r"of \d+ of 54 training samples are unknown \('\d+.png'"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 2, "keys": ("a", "a")}, "called 'a'"),
        ({"total": 2, "keys": ("a",)}, "1 values of 'key' for 2"),
        ({"total": 2, "columns": {"client": ("a",)}}, "1 values of 'client' for 2"),
    ],
)
def test_a_listing_is_checked(options, message):
    with pytest.raises(DataError, match=message):
        Listing(**options)


def test_rows_are_checked():
    images, labels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    arrays = (images, labels, images, labels, ("a", "b"))
    with pytest.raises(DataError, match="row labels run from 0 to 5"):
        ImageArrays(*arrays, Listing(3), torch.tensor([0, 5]))
    with pytest.raises(DataError, match="3 rows of 2 train images"):
        ImageArrays(*arrays, Listing(3), torch.tensor([0, 1, 2]))
