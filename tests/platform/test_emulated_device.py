"""What all systems do on a device: what deterministic mode refuses, and where the host waits."""

import re

import pytest

from fulgurite.testing.emulated_device import DEVICE, run_emulated

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")

# Waits of a steady training step that stay, by function, with the reason.
ALLOWED: dict[str, dict[str, str]] = {}


def smoke_run(system, *options):
    """Fit and test a smoke configuration on the device; what was refused, and waits of steps."""
    # tensors of the device are subclasses, and those know no inference mode
    on_device = (
        f"--trainer.accelerator={DEVICE}",
        f"--trainer.strategy={DEVICE}",
        "--trainer.inference_mode=false",
    )

    def work(record):
        from fulgurite.cli import run

        record.counting = False
        config = f"{system}/smoke.yaml"
        steps = "--trainer.callbacks+=fulgurite.testing.emulated_device.StepWaits"
        run(["fit", "--config", config, *QUIET, *on_device, "--seed_everything=1", steps, *options])
        run(["test", "--config", config, *QUIET, *on_device, "--ckpt_path=last", *options])
        return record.operations.total(), dict(record.refused), dict(record.waits)

    return run_emulated(work)


def slow(system, *options):
    return pytest.param(system, options, marks=pytest.mark.slow, id=system)


SYSTEMS = [
    pytest.param("cs_arm_bn", (), id="cs_arm_bn"),
    pytest.param("number_probing", (), id="number_probing"),
    slow("fedsir"),
    slow("ice_layers"),
    slow("stream_cqsa"),
]


@pytest.mark.parametrize(("system", "options"), SYSTEMS)
def test_a_smoke_run_needs_no_refused_operation_and_no_wait_in_its_steps(workdir, system, options):
    operations, refused, waits = smoke_run(system, *options)
    assert operations > 1000  # it ran on the device
    assert refused == {}
    allowed = ALLOWED.get(system, {})
    places = {re.sub(r":\d+$", "", place): count for place, count in waits.items()}
    assert {k: v for k, v in places.items() if k not in allowed} == {}
