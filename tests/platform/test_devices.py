"""What code for a CPU and a GPU needs of both."""

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from fulgurite import devices
from fulgurite.testing.emulated_device import DEVICE, run_emulated


def on_device(function, *tensors):
    """The same function of tensors on the emulated device; its value, and what was refused."""

    def work(record):
        out = function(*(x.to(DEVICE) for x in tensors))
        return out.cpu(), dict(record.refused), record.operations.total()

    value, refused, operations = run_emulated(work)
    assert refused == {}
    assert operations > 1
    return value


def test_running_sums_on_a_device_are_those_of_the_cpu_with_their_gradients():
    x = torch.randn(3, 70, dtype=torch.float64, generator=torch.manual_seed(0))

    def sums_and_gradient(x):
        x = x.detach().requires_grad_()
        sums = devices.running_sum(x)
        (sums * torch.arange(70, device=x.device)).sum().backward()
        return torch.stack([sums.detach(), x.grad])

    ours, theirs = on_device(sums_and_gradient, x), sums_and_gradient(x)
    assert torch.equal(theirs[0], x.cumsum(-1))
    assert torch.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_medians_on_a_device_are_those_of_the_cpu(size):
    x = torch.randn(size, 5, generator=torch.manual_seed(size))
    assert torch.equal(on_device(lambda x: devices.lower_median(x, 0), x), x.median(0).values)


def test_weighted_counts_are_those_of_bincount():
    generator = torch.manual_seed(0)
    cells, weight = torch.randint(0, 9, (100,)), torch.rand(100, generator=generator)
    ours = on_device(lambda cells, weight: devices.count_weighted(cells, weight, 12), cells, weight)
    assert torch.allclose(ours, cells.bincount(weight, 12).float())


def test_moving_waits_for_the_host_only():
    def work(record):
        there = devices.move(torch.arange(4), DEVICE, torch.float32)
        to_device = dict(record.waits)
        record.waits.clear()
        devices.move(there, "cpu")
        return there.cpu(), to_device, sum(record.waits.values())

    value, to_device, _ = run_emulated(work)
    assert torch.equal(value, torch.arange(4.0))
    assert to_device == {}


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    devices.read_clock("cpu")
    assert waited == []
    assert devices.read_clock("cuda:1") > 0
    assert waited == [torch.device("cuda:1")]


def tensors_of(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    if hasattr(batch, "to_dict"):
        batch = batch.to_dict()
    parts = batch.values() if isinstance(batch, dict) else batch
    parts = [part for part in parts if isinstance(part, torch.Tensor | dict | tuple | list)]
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize(
    "system",
    [
        *("fedsir", "cs_arm_bn", "stream_cqsa", "number_probing"),
        pytest.param("ice_layers", marks=pytest.mark.slow),
    ],
)
def test_batches_of_all_systems_are_pinned_where_there_is_a_gpu(fit, monkeypatch, system):
    data = fit("--trainer.max_epochs=0", config=f"{system}/smoke.yaml").datamodule
    makers = [data.val_dataloader, data.test_dataloader]
    if system != "fedsir":  # whose training batches are numbers of slots
        makers.append(data.train_dataloader)
    plain = [make() for make in makers]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        pinned = [make() for make in makers]
    plain, pinned = (
        [x for each in made for x in (each if isinstance(each, list) else [each])]
        for made in (plain, pinned)
    )
    assert [x.pin_memory for x in plain] == [False] * len(plain)
    assert [x.pin_memory for x in pinned] == [True] * len(plain)

    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: seen.append(id(x)) or x)
    for loader in plain:  # one that pins would ask for the GPU
        batch = next(iter(loader))
        expected = {id(x) for x in tensors_of(batch)}
        pin_memory(batch)
        assert expected
        assert expected <= {*seen}


@pytest.mark.parametrize(
    "system", ["cs_arm_bn", pytest.param("ice_layers", marks=pytest.mark.slow)]
)
def test_modules_that_move_their_batches_warn_of_nothing(fit, recwarn, system):
    fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", config=f"{system}/smoke.yaml")
    assert [str(x.message) for x in recwarn if "transfer_batch" in str(x.message)] == []
