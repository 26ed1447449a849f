"""The network keeps what was measured: sums of missing layers between two picked boundaries."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes.ice_layers import (
    SMALL_NET,
    completion,
    first_test_batch,
    open_flights,
)
from fakes.trainers import quiet_trainer
from lightning.pytorch import seed_everything

from fulgurite.datamodules.ice_layers import SyntheticFlights, World
from fulgurite.domains.ice_layers.spans import Spans
from fulgurite.errors import ConfigError

pytest.importorskip("torch_geometric")


def test_uncertainty_is_shared_as_errors_that_cancel():
    """Spans of two, three and one layers, an observed one, and one of which nothing is known."""
    path = torch.tensor([[5.0, 5.0, 9.0, 9.0, 9.0, 2.0, torch.nan]])
    index = torch.tensor([[1.0, 2.0, 1.0, 1.5, 1.0, 1.0, 1.0]])
    spans = Spans(torch.tensor([[0, 0, 2, 2, 2, 5, 6]]), path.double(), index.double())
    std = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.4, 0.5, 0.6]], dtype=torch.float64)
    (shared,) = spans.project_std(std)
    assert shared[0] == pytest.approx(2 * float(shared[1]))  # equal optical lengths
    assert torch.equal(shared[5:], std[0, 5:])
    for part in (slice(0, 2), slice(2, 5)):
        weights = index[0, part].double()
        covariance = torch.diag(std[0, part] ** 2)
        gain = covariance @ weights / (weights @ covariance @ weights)
        left = (covariance - torch.outer(gain, covariance @ weights)).diagonal() * weights**2
        optical = (weights * shared[part]) ** 2
        total = ((weights * std[0, part]) ** 2).sum()
        torch.testing.assert_close(optical, left / left.sum() * total)
    assert spans.project_std(torch.full_like(std, torch.nan)).isnan().all()


@pytest.mark.parametrize("kept", ["all", "trusted", "none"])
def test_intervals_follow_the_sums_that_are_kept(flights, kept):
    model, _ = fit(flights, steps=2, keep_boundaries=kept, outlier=2.0)
    model.calibration.weight.copy_(torch.tensor([-5.0, 1.0, 0.5, 0.3, 0.0, 0.2]))
    model.calibration.fitted.fill_(True)
    batch = first_test_batch(flights)
    spans = Spans.of_batch(batch)
    with torch.no_grad():
        std = model.fill(batch)["std"]
    pairs = spans.between & (spans.length == 2)
    upper = pairs & (spans.start == torch.arange(std.shape[1]))
    rows, columns = upper.nonzero().T
    ratio = (spans.index * std)[rows, columns] / (spans.index * std)[rows, columns + 1]
    assert len(ratio) > 20
    equal = (ratio - 1).abs() < 1e-9
    assert {"all": bool(equal.all()), "none": not equal.any(), "trusted": bool(equal.any())}[kept]


@pytest.fixture(scope="module")
def flights(filled_cache):
    return open_flights(SyntheticFlights(World(stacks=40, traces=24, layers=8, segments=10)))


def fit(flights, steps=20, **options):
    seed_everything(0, verbose=False)
    model = completion(**{"network": SMALL_NET, "trap_ratio": None, **options})
    trainer = quiet_trainer(max_epochs=1000, max_steps=steps)
    trainer.fit(model, flights)
    return model.eval(), trainer


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"prior": "relative", "entries": "hidden", "members": 2},
        pytest.param({"prior": "log", "outlier": 2.0}, marks=pytest.mark.slow),
        pytest.param({"thickness": "none"}, marks=pytest.mark.slow),
        pytest.param(
            {"network": partial(SMALL_NET, dropout=0.2), "mc_samples": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"network": partial(SMALL_NET, sums=False)}, marks=pytest.mark.slow),
    ],
)
def test_picked_boundaries_come_out_where_they_were_picked(flights, options):
    model, _ = fit(flights, steps=6, **options)
    batch = first_test_batch(flights)
    spans = Spans.of_batch(batch)
    with torch.no_grad():
        thickness = model.fill(batch)["thickness"]
    assert int(spans.between.sum()) > 50
    torch.testing.assert_close(
        spans.lengths(thickness)[spans.known], spans.path[spans.known], rtol=1e-9, atol=0
    )
    assert (thickness > 0).all()
    model.prediction = replace(model.prediction, keep_boundaries="none")
    with torch.no_grad():
        moved = spans.misfit(model.fill(batch)["thickness"])
    assert float(moved[spans.between].abs().mean()) > 0.01


def test_metrics_say_how_far_picks_were_moved(flights):
    model, trainer = fit(flights)
    (ours,) = trainer.test(model, flights, verbose=False)
    model.prediction = replace(model.prediction, keep_boundaries="none")
    (theirs,) = trainer.test(model, flights, verbose=False)
    assert ours["test/moved_rmse"] < 1e-9 < theirs["test/moved_rmse"]
    assert ours["test/between_rmse"] < theirs["test/between_rmse"]
    assert ours["test/misled_rmse"] > ours["test/between_rmse"]  # a wrong sum is kept, too
    assert ours["test/sound_rmse"] < ours["test/missing_rmse"]


def test_a_hidden_boundary_is_known_by_the_sum_alone(flights):
    """Moving a hidden boundary changes nothing; moving a seen one changes what lies between."""
    model, _ = fit(flights, steps=3)
    batch = first_test_batch(flights)
    x = model.normalise(batch)
    hidden = x.spans.picked & (torch.arange(8) == 1)
    trace = int((x.observed[:, 1] & x.observed[:, 2]).nonzero()[0])
    visible_spans = x.spans.hide(hidden)
    moved = batch.clone()
    moved.span_path[trace, 1] += 0.1  # optical: the boundary lies deeper, the sum is what it was
    moved.span_path[trace, 2] -= 0.1
    moved.thickness[trace] = torch.where(
        moved.observed[trace],
        moved.span_path[trace] / moved.refraction[trace],
        moved.thickness[trace],
    )
    y = model.normalise(moved)
    with torch.no_grad():
        before, _ = model.predict(x, visible_spans)
        after, _ = model.predict(y, y.spans.hide(hidden))
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)
    deeper = Spans(visible_spans.start, visible_spans.path * 1.1, visible_spans.index)
    with torch.no_grad():
        thicker, _ = model.predict(x, deeper)
    assert not torch.allclose(before[visible_spans.between], thicker[visible_spans.between])


def test_a_step_learns_proportions(flights):
    """What layers between two picks have in common does not count, and gradients are finite."""
    model, _ = fit(flights, steps=1)
    x = model.normalise(first_test_batch(flights))
    visible_spans = x.spans.hide(x.spans.picked & (torch.arange(8) == 1))
    out = torch.zeros_like(x.thickness, requires_grad=True)
    constrained = model.keep_sums(out, x, visible_spans)
    thicker = model.standardise(1.3 * model.metres(out.detach(), x), x).float()
    again = model.keep_sums(thicker, x, visible_spans)
    torch.testing.assert_close(
        constrained[visible_spans.between], again[visible_spans.between], rtol=1e-4, atol=1e-4
    )
    assert torch.equal(constrained[~visible_spans.between], out[~visible_spans.between])
    entries = visible_spans.between & x.observed
    constrained[entries].sum().backward()
    assert out.grad is not None
    assert out.grad.isfinite().all()
    assert float(out.grad[entries].abs().max()) > 1e-3


def test_without_sums_the_network_is_the_papers(flights):
    plain, told = SMALL_NET(8, 5, sums=False), SMALL_NET(8, 5)
    count = [sum(p.numel() for p in net.parameters()) for net in (plain, told)]
    assert count[1] > count[0]
    model, trainer = fit(flights, steps=2, keep_boundaries="none")
    (tested,) = trainer.test(model, flights, verbose=False)
    assert tested["test/moved_rmse"] > 0.02


def test_trusted_picks_are_kept_and_contradicted_ones_are_not(flights):
    """Mis-tracked picks bound some sums of the generated flights."""
    model, trainer = fit(flights, steps=40, outlier=2.0, prior="relative")
    (kept,) = trainer.test(model, flights, verbose=False)
    model.prediction = replace(model.prediction, keep_boundaries="trusted")
    (trusted,) = trainer.test(model, flights, verbose=False)
    assert trusted["test/misled_rmse"] < kept["test/misled_rmse"]
    assert trusted["test/moved_rmse"] > 0
    batch = first_test_batch(flights)
    x = model.normalise(batch)
    sums, _ = model.find_consistent_spans(x, x.spans)
    assert 0 < int(sums.between.sum()) < int(x.spans.between.sum())
    with torch.no_grad():
        thickness = model.fill(batch)["thickness"]
    torch.testing.assert_close(
        sums.lengths(thickness)[sums.between], sums.path[sums.between], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (
            {"keep_boundaries": "some"},
            "keep_boundaries of prediction is 'some'.*all, trusted, none",
        ),
        ({"keep_boundaries": "trusted"}, r"inputs\.outlier=null trusts all"),
    ],
)
def test_wrong_options_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        completion(SMALL_NET, **options)
