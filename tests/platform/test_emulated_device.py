"""What the systems do on a device: what deterministic mode refuses, and where steps wait for it."""

import re

import pytest
import torch
from fakes.options import QUIET

from fulgurite.testing.emulated_device import DEVICE, run_emulated

# tensors of the device are subclasses, and those know no inference mode
ON_DEVICE = (
    f"--trainer.accelerator={DEVICE}", f"--trainer.strategy={DEVICE}",
    "--trainer.inference_mode=false",
)  # fmt: skip

#: Waits of a steady training step that remain, with their reason.
KNOWN_WAITS = {
    "number_probing": {
        # how many tokens have a target decides how many logits are computed
        "nonzero in models.number_probing.language_models.losses.token_losses",
    },
}


def test_an_operation_that_deterministic_mode_refuses_is_found():
    def work(record):
        x = torch.rand(3, 4).to(DEVICE)
        x.cumsum(0)
        x.median(0)
        x.flatten().long().bincount(x.flatten())
        allowed = [x.long().cumsum(0), x.median(), x.long().flatten().bincount(), x.cpu().cumsum(0)]
        assert len(allowed) == 4
        image = torch.rand(1, 1, 4, 4).to(DEVICE).requires_grad_()
        torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear").sum().backward()
        return dict(record.refused)

    names = sorted(name.split(" in ")[0] for name in run_emulated(work))
    assert names == ["bincount", "cumsum", "median", "upsample_bilinear2d_backward"]


@pytest.mark.parametrize(
    ("ask", "wait"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x[0].tolist(), "tolist"),
        (lambda x: x[x > 0.5], "indexing by a mask"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.tensor([1.0, 2.0], device=DEVICE), "copy to the device"),
        (lambda x: torch.ones(2).to(DEVICE), "copy to the device"),
        (lambda x: torch.ones(2).to(DEVICE, non_blocking=True), None),
        (lambda x: x.matmul(x.mT).relu().argmax(0), None),
    ],
)
def test_waits_are_counted_where_the_host_asks(ask, wait):
    def work(record):
        x = torch.rand(3, 4).to(DEVICE)
        names = []
        record.wait = names.append
        ask(x)
        return names

    assert run_emulated(work) == ([wait] if wait else [])


def test_tensors_of_two_devices_do_not_meet():
    with pytest.raises(RuntimeError, match="on emulated:0 and on the CPU"):
        run_emulated(lambda record: torch.ones(2).to(DEVICE) + torch.ones(2))
    with pytest.raises(RuntimeError, match="to numpy"):
        run_emulated(lambda record: torch.ones(2).to(DEVICE).numpy())


def test_a_network_learns_on_the_device_as_on_the_cpu():
    def losses(device):
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()
        network = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))
        x, labels = torch.randn(16, 4), torch.randint(0, 3, (16,))
        network, x, labels = network.to(device), x.to(device), labels.to(device)
        optimizer = torch.optim.Adam(network.parameters(), 0.1)
        losses_of_steps = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            losses_of_steps.append(loss.item())
        return losses_of_steps

    # a backward pass in this process would settle autograd's devices for those that it forks
    expected = run_emulated(lambda record: losses("cpu"))
    assert run_emulated(lambda record: losses(DEVICE)) == pytest.approx(expected, rel=1e-6)


def run_on_device(config, *options, test=True):
    """Fit and test a configuration; operations, what was refused, and waits of steady steps."""

    def work(record):
        from fulgurite.cli import run

        record.counting = False
        shared = ["--config", config, *QUIET, *ON_DEVICE, *options, "--seed_everything=1"]
        steps = "--trainer.callbacks+=fulgurite.testing.emulated_device.StepWaits"
        run(["fit", *shared, steps])
        record.counting = False
        if test:
            run(["test", *shared, "--ckpt_path=last", "--trainer.limit_test_batches=2"])
        return record.operations.total(), dict(record.refused), {*record.waits}

    operations, refused, waits = run_emulated(work)
    assert operations > 1000  # it ran on the device
    return refused, {re.sub(r":\d+$", "", wait) for wait in waits}


SYSTEMS = ["number_probing"] + [
    pytest.param(system, marks=pytest.mark.slow)
    for system in ("cs_arm_bn", "fedsir", "ice_layers", "stream_cqsa")
]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_is_refused_nothing_in_deterministic_mode_and_its_steps_do_not_wait(workdir, system):
    shorter = ("--trainer.max_epochs=1",) if system in ("cs_arm_bn", "number_probing") else ()
    refused, waits = run_on_device(f"{system}/smoke.yaml", *shorter)
    assert refused == {}
    assert waits == KNOWN_WAITS.get(system, set())


def method(system, name, *options):
    package = {"fedsir": "fedsir.methods"}.get(system, system)
    path = f"fulgurite.models.{package}.{name}"
    return pytest.param(
        f"{system}/smoke.yaml", (f"--model.init_args.method={path}", *options), id=name
    )


def backbone(name):
    path = f"fulgurite.models.number_probing.backbones.{name}"
    return pytest.param(
        "number_probing/smoke.yaml", (f"--model.init_args.backbone={path}",), id=name
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        *(method("cs_arm_bn", name) for name in ("ERM", "ARMBN", "ARMCML", "ARMLL", "Weighted")),
        *(method("fedsir", name) for name in ("FedAvg", "FedCorr", "FedELC", "FedNoRo", "RoFL")),
        *(backbone(name) for name in ("LSTMBackbone", "Mamba2Backbone", "GatedDeltaNetBackbone")),
    ],
)
def test_other_methods_are_refused_nothing_in_deterministic_mode(workdir, config, options):
    refused, _ = run_on_device(config, *options, test=False)
    assert refused == {}
