"""Where eigenvectors of many matrices are found."""

import pytest
import torch

from fulgurite.models.fedsir import eigen
from fulgurite.testing.emulated_device import DEVICE, run_emulated


def symmetric(count, size):
    rows = torch.randn(count, 2 * size, size, dtype=torch.float64, generator=torch.manual_seed(0))
    return rows.mT @ rows


def clock_of(*durations):
    """A clock by which the solutions take so long, one after the other."""
    times = iter([time for duration in durations for time in (0.0, duration)])
    return lambda device: next(times)


def chosen_device(durations):
    def work(record):
        matrices = symmetric(3, 40).to(DEVICE)
        solver = eigen.fastest_device(matrices, clock_of(*durations))
        return str(solver)

    return run_emulated(work)


@pytest.mark.parametrize(
    ("on_device", "on_cpu", "solver"), [(1.0, 2.0, f"{DEVICE}:0"), (2.0, 1.0, "cpu")]
)
def test_the_faster_device_is_chosen(on_device, on_cpu, solver):
    assert chosen_device((on_device, on_cpu)) == solver


def test_eigenvectors_of_a_device_are_those_of_the_cpu_and_are_timed_once_per_size():
    matrices = symmetric(5, 40)

    def work(record):
        measured = []

        def measure(sample):
            measured.append(sample.shape[-1])
            return torch.device("cpu")

        eigen.fastest_device = measure
        solved, *_ = (eigen.eigh(symmetric(5, size).to(DEVICE)) for size in (40, 50, 100, 20))
        torch.use_deterministic_algorithms(True)
        eigen.eigh(symmetric(5, 200).to(DEVICE))
        single = eigen.eigh(matrices[0].to(DEVICE))
        return measured, [x.cpu() for x in (*solved, *single)], str(solved[0].device)

    measured, (values, vectors, value, vector), device = run_emulated(work)
    assert measured == [40, 100]  # 50 is of the size of 40, 20 is small, and no clock decides 200
    assert device == f"{DEVICE}:0"
    assert torch.allclose(vectors @ values.diag_embed() @ vectors.mT, matrices)
    assert torch.allclose(vector @ value.diag() @ vector.mT, matrices[0])
    assert torch.equal(values, torch.linalg.eigh(matrices)[0])


def test_nothing_changes_on_the_cpu():
    matrices = symmetric(3, 40)
    for ours, theirs in zip(eigen.eigh(matrices), torch.linalg.eigh(matrices), strict=True):
        assert torch.equal(ours, theirs)
