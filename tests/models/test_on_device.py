"""Parts of the models on a device: the numbers of the CPU, without waiting and refused nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fulgurite.callbacks.stream_cqsa import AttentionMonitor
from fulgurite.models.cs_arm_bn.batchnorm import ContextBatchNorm2d, context
from fulgurite.models.cs_arm_bn.references import load_reference, reference_state
from fulgurite.models.fedsir import choose_k
from fulgurite.models.fedsir.aggregation import distance_to_clean
from fulgurite.models.fedsir.federation.randomness import keyed_randomness
from fulgurite.models.ice_layers import PhysicsPrior
from fulgurite.models.ice_layers.data.graph import Track, note_sizes
from fulgurite.models.number_probing import NumberLM, cohen_kappa, spectrum
from fulgurite.models.number_probing.backbones.lstm import pack_documents
from fulgurite.models.number_probing.language_models.losses import (
    average_right_rows,
    rows_all_right,
    token_losses,
)
from fulgurite.models.stream_cqsa import token_scores
from fulgurite.testing.emulated_device import DEVICE, run_emulated


def check_on_device(function, *tensors, rtol=1e-6):
    """Compare with the CPU; gives the names of the operations that waited."""

    def work(record):
        there = [x.to(DEVICE) for x in tensors]
        record.waits.clear()
        out = function(*there)
        waits = [re.sub(r":\d+$", "", wait) for wait in record.waits.elements()]
        return [x.cpu() for x in out], waits, dict(record.refused)

    result, waits, refused = run_emulated(work)
    assert refused == {}
    for ours, theirs in zip(result, function(*tensors), strict=True):
        assert torch.allclose(ours, theirs, rtol=rtol, equal_nan=True)
    return waits


def test_number_of_directions():
    values = torch.rand(5, 30, generator=torch.manual_seed(0)).sort(descending=True).values
    values[2, 4:] = 0
    assert check_on_device(lambda x: [choose_k(x)], values) == []


def test_distance_to_clean_models():
    states = torch.rand(3, 10, generator=torch.manual_seed(0))
    states[2, 4] = torch.nan

    def distances(states):
        clean = states[:1], states[:0]
        return [distance_to_clean(state, c, [4, 6]) for state in states for c in clean]

    assert check_on_device(distances, states) == []
    result = distances(states)
    assert result[2] > 0
    assert [float(result[i]) for i in (0, 1, 3, 4, 5)] == [0, 0, 0, torch.inf, torch.inf]
    assert all(x.dtype == torch.float64 for x in result)


@pytest.mark.parametrize("size", [20, 37, 400])
def test_spectrum(size):
    x = torch.rand(size, 3, generator=torch.manual_seed(0), dtype=torch.float64)

    def parts(x):
        result = spectrum(x)
        return [result.magnitude, result.normalised, result.local_ratio]

    check_on_device(parts, x, rtol=1e-12)
    magnitude, _, ratio = parts(x)
    bins = torch.arange(len(magnitude))
    apart = (bins[:, None] - bins).abs()
    around = (apart > 2) & (apart <= max(0.02 * size, 5))
    medians = magnitude.expand_as(apart).where(around, torch.nan).nanmedian(1).values
    assert torch.equal(ratio, magnitude / medians)


def test_kappa_with_weights():
    generator = torch.manual_seed(0)
    labels, answers = torch.arange(30) % 3, torch.randint(0, 3, (4, 30), generator=generator)
    weight = torch.rand(4, 30, generator=generator, dtype=torch.float64)
    check_on_device(lambda a, b, w: [cohen_kappa(a, b, 3, w)], labels, answers, weight, rtol=1e-12)


def test_losses_of_tokens_wait_once():
    generator = torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, 4, generator=generator), torch.randn(7, 4)
    targets = torch.tensor([[0, 1, -100, 3, -100, 5], [-100] * 6])

    def losses(hidden, weight, targets):
        result, hits = token_losses(hidden, weight, targets, chunk=3)
        return result, hits, average_right_rows(hits, targets)

    waits = check_on_device(losses, hidden, weight, targets)
    assert waits == ["nonzero in models.number_probing.language_models.losses.token_losses"]
    result, hits, average = losses(hidden, weight, targets)
    expected = F.cross_entropy(hidden[0] @ weight.T, targets[0], reduction="none")
    assert torch.allclose(result, expected[targets[0] != -100])
    assert average == rows_all_right(hits, targets).float().mean()


def test_scores_of_tokens():
    hidden, weight = torch.randn(2, 6, 4, generator=torch.manual_seed(0)), torch.randn(7, 4)
    targets = torch.tensor([[0, 1, -100, 3, -100, 5], [1] * 6])
    waits = check_on_device(lambda *x: token_scores(*x, 4), hidden, weight, targets)
    assert waits == []
    losses, _ = token_scores(hidden, weight, targets, 4)
    assert torch.allclose(
        losses, F.cross_entropy((hidden @ weight.T).mT, targets, reduction="none")
    )


def test_packing_documents_waits_once():
    documents = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]])
    waits = check_on_device(pack_documents, documents)
    assert waits == ["copy to the host in models.number_probing.backbones.lstm.pack_documents"]


@pytest.mark.parametrize("kind", ["ridge", "relative", "log"])
def test_a_prior_of_physics_with_folds(kind):
    generator = torch.manual_seed(0)
    physics = 1 + torch.rand(60, 3, 2, generator=generator, dtype=torch.float64)
    thickness = 1 + torch.rand(60, 3, generator=generator, dtype=torch.float64)
    segment = torch.arange(60) // 6
    prior = PhysicsPrior(3, 2, kind)
    prior.fit(thickness, torch.ones(60, 3, dtype=torch.bool), physics, segment)

    def expected(physics, segment):
        return [prior.to(physics.device)(physics, segment)]

    waits = check_on_device(expected, physics[:40], segment[:40], rtol=1e-12)
    assert [wait for wait in waits if "features" in wait] == []


def test_a_batch_that_knows_its_sizes_is_not_asked_for_them():
    batch = SimpleNamespace(ptr=torch.tensor([0, 2, 5]))
    assert Track.of_batch(batch).sizes == [2, 3]
    note_sizes(batch)

    def tracks(ptr):
        track = Track.of_batch(SimpleNamespace(ptr=ptr, traces=batch.traces))
        return track.stack, track.offset, track.valid

    assert check_on_device(tracks, batch.ptr) == []


def learn_reference(layer, plates, device="cpu"):
    for plate in plates:
        with context(layer, "union", n_query=4) as setting:
            setting.record = True
            layer(plate.to(device))
    return reference_state(layer)


def test_references_are_learned_without_a_wait_and_saved_exactly():
    plates = torch.randn(4, 9, 3, 4, 4, generator=torch.manual_seed(0))
    torch.manual_seed(1)
    layer = ContextBatchNorm2d(3)
    state = learn_reference(layer, plates)
    values = next(iter(state.values()))
    assert values[0] == 4
    assert values[1] == pytest.approx(4 / 9)

    def work(record):
        there = ContextBatchNorm2d(3).to(DEVICE)
        moved = [plate.to(DEVICE) for plate in plates]
        record.waits.clear()
        for plate in moved:
            with context(there, "union", n_query=4) as setting:
                setting.record = True
                there(plate)
        return dict(record.waits), reference_state(there)

    waits, result = run_emulated(work)
    assert waits == {}
    for ours, theirs in zip(next(iter(result.values())), values, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)

    resumed = ContextBatchNorm2d(3)
    load_reference(resumed, state)
    assert resumed.reference[:2] == layer.reference[:2]
    again, onward = learn_reference(resumed, plates[:2]), learn_reference(layer, plates[:2])
    for ours, theirs in zip(*(next(iter(x.values())) for x in (again, onward)), strict=True):
        assert torch.equal(ours, theirs)


def test_references_of_older_checkpoints_are_read():
    layer = ContextBatchNorm2d(3)
    older = [torch.tensor(5.0), torch.tensor(0.25), *torch.rand(5, 3)]
    name = next(iter(learn_reference(ContextBatchNorm2d(3), torch.randn(1, 9, 3, 4, 4))))
    load_reference(layer, {name: older})
    assert layer.reference[:2] == (5.0, 0.25)


def test_local_training_seeds_its_own_gpu_alone(monkeypatch):
    calls = []

    class Recorded:
        def __init__(self, *args):
            self.args = args

        def __enter__(self):
            calls.append(("enter", *self.args))

        def __exit__(self, *_):
            calls.append(("leave", *self.args))

    device = torch.device("cuda:1")
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: Recorded("fork", *devices))
    monkeypatch.setattr(torch.cuda, "device", lambda which: Recorded("device", which))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append("seed"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: calls.append("all"))
    state = torch.get_rng_state()
    with keyed_randomness(device, 0, "network", 3):
        calls.append("work")
    torch.set_rng_state(state)
    inside = [("enter", "device", device), "seed", ("leave", "device", device)]
    fork = ("enter", "fork", device), ("leave", "fork", device)
    assert calls == [fork[0], *inside, "work", fork[1]]


def test_clocks_of_steps_wait_for_the_device(monkeypatch):
    asked = []

    def clock(device):
        asked.append(device)
        return float(len(asked))

    monkeypatch.setattr("fulgurite.callbacks.stream_cqsa.read_clock", clock)
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda facts, **_: None)
    trainer, monitor = SimpleNamespace(strategy=None), AttentionMonitor()
    monitor.on_train_batch_start(trainer, module, None, 0)
    monitor.on_train_batch_end(trainer, module, None, None, 0)
    assert monitor.history[0]["time/step"] == 1.0
    assert asked == [module.device] * 2

    monkeypatch.setattr("fulgurite.models.number_probing.language_models.module.read_clock", clock)
    logged = {}
    model = SimpleNamespace(
        device=module.device, trainer=SimpleNamespace(log_every_n_steps=1, world_size=2),
        log=lambda name, value, **_: logged.update({name: value}),
    )  # fmt: skip
    NumberLM.on_train_epoch_start(model)
    model.token_count = 30
    NumberLM.on_validation_start(model)
    NumberLM.on_validation_end(model)
    NumberLM.on_train_batch_end(model, None, None, 0)
    assert logged == {"train/tokens_per_s": 30.0}  # two ranks; 2 s, without validation's 1 s
    assert len(asked) == 6
