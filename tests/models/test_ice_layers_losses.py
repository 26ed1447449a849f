"""The masked robust loss, preservation and provenance: laws and checks 1 to 4 of its page."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.ice_layers import (
    Track,
    complete,
    masked_robust_loss,
    measure_gaps,
    provenance,
    two_stage,
)
from fulgurite.models.ice_layers.training.schedule import TwoStageLR

NAN, INF = math.nan, math.inf


def batch(seed=0, shape=(12, 5)):
    g = torch.Generator().manual_seed(seed)
    pred = torch.randn(shape, generator=g)
    target = torch.randn(shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.6
    return pred, target, mask


def loss_and_gradient(pred, target, mask, **options):
    pred = pred.clone().requires_grad_()
    loss = masked_robust_loss(pred, target, mask, **options)
    loss.backward()
    return loss.detach(), pred.grad


@pytest.mark.parametrize("missing", [NAN, -1.0, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_observed_values_keep_every_bit(missing, dtype):
    """Check 1."""
    observed, predicted, mask = batch(shape=(200, 20))
    observed = torch.where(mask, observed.to(dtype) * 1e-3, missing)
    final = complete(observed, mask, predicted.double())
    assert final.dtype == dtype
    assert torch.equal(final[mask], observed[mask])
    assert final.isfinite().all()
    assert torch.equal(final[~mask], predicted[~mask].to(dtype))


def test_complete_refuses_what_does_not_fit():
    observed, predicted, mask = batch()
    for wrong in ((observed[:3], mask, predicted), (observed, mask.float(), predicted)):
        with pytest.raises(DataError, match="three arrays of one shape"):
            complete(*wrong)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1", "mse"])
@pytest.mark.parametrize("elsewhere", [NAN, INF, 1e30, -7.0])
def test_what_is_not_valid_reaches_neither_loss_nor_gradient(kind, elsewhere):
    """Check 2, exactly."""
    pred, target, mask = batch()
    base = loss_and_gradient(pred, target, mask, kind=kind)
    other = loss_and_gradient(pred, torch.where(mask, target, elsewhere), mask, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(base, other, strict=True))


def test_an_invalid_prediction_does_not_matter_where_nothing_is_valid():
    pred, target, mask = batch()
    _, gradient = loss_and_gradient(torch.where(mask, pred, NAN), target, mask)
    assert gradient.isfinite().all()


def test_the_number_of_valid_entries_divides():
    """Check 3."""
    pred, target, mask = batch()
    loss = masked_robust_loss(pred, target, mask)
    with_empty = [
        torch.cat(pair) for pair in ((pred, pred), (target, target), (mask, mask & False))
    ]
    assert abs(masked_robust_loss(*with_empty) - loss) <= 1e-7
    assert abs(masked_robust_loss(*(x.repeat(3, 1) for x in (pred, target, mask))) - loss) <= 1e-6
    empty, gradient = loss_and_gradient(pred, target * NAN, mask & False)
    assert empty == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@given(st.floats(-3, 3, width=32), st.floats(0.1, 2), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_constant_error_gives_its_huber_loss_under_any_mask(c, delta, seed):
    """Check 3, last part."""
    _, target, mask = batch(seed)
    mask[0, 0] = True
    expected = 0.5 * c * c if abs(c) <= delta else delta * (abs(c) - delta / 2)
    loss = masked_robust_loss(target + c, target, mask, delta)
    assert abs(float(loss) - expected) <= 2e-6 * max(1, expected)
    smooth = masked_robust_loss(target + c, target, mask, delta, kind="smooth_l1")
    assert float(smooth) == pytest.approx(expected / delta, rel=1e-4, abs=1e-6)


def test_one_wild_entry_pulls_no_harder_than_delta():
    """Check 4."""
    pred, target, mask = batch()
    mask[0, 0] = True
    target[0, 0] += 1e6
    for delta in (0.3, 1.0):
        _, gradient = loss_and_gradient(pred, target, mask, delta=delta)
        assert float(gradient[0, 0].abs()) == pytest.approx(delta / int(mask.sum()), rel=1e-6)


@pytest.mark.parametrize(("options", "word"), [({"delta": 0}, "delta"), ({"kind": "l7"}, "l7")])
def test_a_wrong_loss_is_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        masked_robust_loss(*batch(), **options)


# --- gaps and provenance -------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_gaps_are_those_a_loop_finds(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    track = Track.of(sizes)
    mask = torch.rand(sum(sizes), 3, generator=g) < 0.4
    step = torch.rand(sum(sizes), generator=g) + 0.1
    distance = torch.cat([part.cumsum(0) - part[0] for part in step.split(sizes)])
    found = measure_gaps(mask, distance, track)
    for stack, (m, d) in enumerate(zip(mask.split(sizes), distance.split(sizes), strict=True)):
        rows = slice(int(track.ptr[stack]), int(track.ptr[stack + 1]))
        for layer in range(3):
            picks = d[m[:, layer]]
            assert bool(found.absent[rows][0, layer]) == (len(picks) == 0)
            for i, here in enumerate(d):
                length, nearest = found.length[rows][i, layer], found.nearest[rows][i, layer]
                if len(picks) == 0:
                    assert length == nearest == INF
                    continue
                assert nearest == pytest.approx(float((picks - here).abs().min()), abs=1e-5)
                low = max((float(p) for p in picks if p <= here), default=float(d[0]))
                high = min((float(p) for p in picks if p >= here), default=float(d[-1]))
                expected = 0.0 if m[i, layer] else high - low
                assert length == pytest.approx(expected, abs=1e-5)


def test_provenance_tells_each_origin_and_leaves_long_gaps():
    mask = torch.tensor([[1, 0], [0, 0], [0, 0], [1, 0]], dtype=torch.bool)
    found = measure_gaps(mask, 100.0 * torch.arange(4), Track.of([4]))
    assert provenance(mask, found).T.tolist() == [[0, 1, 1, 0], [2, 2, 2, 2]]
    assert provenance(mask, found, 300.0).T.tolist() == [[0, 1, 1, 0], [3, 3, 3, 3]]
    assert provenance(mask, found, 299.0).T.tolist() == [[0, 3, 3, 0], [3, 3, 3, 3]]


# --- the schedule --------------------------------------------------------------------------------


def test_two_stages_rise_stay_high_and_fall():
    rates = [two_stage(step, 200, first=0.5) for step in range(201)]
    assert rates[0] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert set(rates[20:100]) == {1.0}
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert rates[200] == pytest.approx(0.01)
    low = [two_stage(s, 100, drop=0.1, decay="constant") for s in (60, 99, 300)]
    assert low == [0.1] * 3


def test_the_scheduler_goes_on_where_it_was():
    def made(total):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, TwoStageLR(optimizer, total)

    def rates(optimizer, scheduler, steps):
        out = []
        for _ in range(steps):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return out

    whole = rates(*made(50), 50)
    planned = made(None)
    planned[1].plan(50)
    assert rates(*planned, 50) == whole
    first = made(50)
    begun = rates(*first, 20)
    second = made(None)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    assert begun + rates(*second, 30) == whole


@pytest.mark.parametrize(
    "options", [{"warmup": 0.6, "first": 0.5}, {"total_steps": 0}, {"decay": "steep"}]
)
def test_a_wrong_schedule_is_refused(options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError):
        TwoStageLR(optimizer, **options)
