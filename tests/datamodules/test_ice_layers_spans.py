"""What is measured between picked boundaries: single layers and sums of layers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.ice_layers.flights import FlightTrack
from fulgurite.datamodules.ice_layers.readers.npz import NpzStacks
from fulgurite.datamodules.ice_layers.stack import LayerStack
from fulgurite.datamodules.ice_layers.tracks.blocks import Blocks, assemble
from fulgurite.datamodules.ice_layers.tracks.spans import find_completed_spans, resample_spans
from fulgurite.datamodules.ice_layers.tracks.travel_time import LIGHT
from fulgurite.domains.ice_layers.spans import Spans
from fulgurite.errors import DataError

CASES = {"traces": st.integers(1, 8), "layers": st.integers(1, 7), "seed": st.integers(0, 10_000)}


def draw_depth(traces, layers, seed, missing=0.4):
    generator = np.random.default_rng(seed)
    depth = generator.uniform(0.2, 2.0, (traces, layers + 1)).cumsum(1)
    return np.where(generator.random(depth.shape) < missing, np.nan, depth), generator


def in_torch(spans):
    return Spans(*(torch.from_numpy(x) for x in (spans.start, spans.path, spans.index)))


def same(left, right):
    np.testing.assert_array_equal(np.asarray(left.start), np.asarray(right.start))
    np.testing.assert_allclose(np.asarray(left.path), np.asarray(right.path), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_hiding_a_boundary_is_not_having_picked_it(traces, layers, seed):
    depth, generator = draw_depth(traces, layers, seed)
    hidden = generator.random((traces, layers)) < 0.4
    unpicked = depth.copy()
    unpicked[:, 1:][hidden] = np.nan
    spans = Spans.of_depth(depth)
    same(spans.hide(hidden), Spans.of_depth(unpicked))
    same(in_torch(spans).hide(torch.from_numpy(hidden)), Spans.of_depth(unpicked))
    for name in ("known", "observed", "picked", "length"):
        ours = np.asarray(getattr(in_torch(spans), name))
        np.testing.assert_array_equal(ours, getattr(spans, name))


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_observed_layers_and_picks_are_those_of_the_boundaries(traces, layers, seed):
    depth, _ = draw_depth(traces, layers, seed)
    spans = Spans.of_depth(depth)
    thickness = np.diff(depth, axis=1)
    np.testing.assert_array_equal(spans.observed, np.isfinite(thickness))
    assert not spans.contradicts(thickness).any()
    # a pick says something where there is another one in its trace
    others = np.isfinite(depth).sum(1, keepdims=True) > 1
    np.testing.assert_array_equal(spans.picked, np.isfinite(depth[:, 1:]) & others)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_spans_of_traces_are_those_of_their_picks(traces, layers, seed):
    """At the raw traces themselves nothing is averaged, and the aircraft's height cancels."""
    depth, generator = draw_depth(traces + 1, layers, seed)
    at = generator.uniform(1.0, 1.2, traces + 1).cumsum()
    heights = generator.uniform(0, 1, (traces + 1, 1))
    thickness, spans = resample_spans(at, depth + heights, at)
    expected = Spans.of_depth(depth)
    np.testing.assert_allclose(thickness, np.diff(depth, axis=1), rtol=1e-9)
    np.testing.assert_array_equal(spans.start, expected.start)
    np.testing.assert_allclose(spans.path, expected.path, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_means_over_traces_never_contradict_an_observed_layer(traces, layers, seed):
    depth, _ = draw_depth(6 * traces + 6, layers, seed)
    at = np.arange(len(depth), dtype=float)
    thickness, spans = resample_spans(at, depth, at[::3])
    assert not spans.contradicts(thickness).any()
    assert (np.isnan(spans.path) | (spans.path > 0)).all()


def test_travel_times_become_optical_lengths():
    picks = np.full((8, 4), 1e-6) + np.array([0.0, 1.0, 2.5, 4.0]) * 1e-8
    picks[:, 2] = np.nan
    pos = np.stack([70 + np.arange(8) * 1e-3, np.full(8, -40.0)], 1)
    track = FlightTrack("20120330_01", np.arange(8.0), pos, picks, np.arange(1.0, 4))
    flights = assemble([track], None, Blocks(traces=8, density=0.4), layer_names=["a", "b", "c"])
    (stack,) = flights.stacks
    spans = stack.known_spans
    assert spans.start[0].tolist() == [0, 1, 1]
    index = 1 + 0.845 * 0.4
    np.testing.assert_allclose(spans.index, index)
    np.testing.assert_allclose(spans.path[:, 1], 3e-8 * 299_792_458 / 2)
    np.testing.assert_allclose(stack.thickness[:, 0] * index, spans.path[:, 0])


def make_stack(thickness, spans):
    n, layers = thickness.shape
    return LayerStack(
        "s", "s", thickness, np.zeros((n, layers, 0), np.float32), np.zeros(n, np.uint8),
        np.zeros((n, 2)), np.arange(float(n)), spans=spans,
    )  # fmt: skip


def test_spans_that_contradict_thickness_are_refused():
    depth = np.array([[0.0, 1.0, 3.0]] * 2)
    thickness = np.diff(depth, axis=1)
    make_stack(thickness, Spans.of_depth(depth))
    with pytest.raises(DataError, match=r"not what lies between .* trace 0, layer 2"):
        make_stack(thickness * [1.0, 1.01], Spans.of_depth(depth))
    with pytest.raises(DataError, match="not what lies between"):
        make_stack(thickness, Spans.of_depth(np.array([[0.0, np.nan, 3.0]] * 2)))
    with pytest.raises(DataError, match="shape"):
        make_stack(thickness, Spans.of_depth(depth[:, :2]))
    with pytest.raises(DataError, match="cross or touch"):
        make_stack(np.array([[np.nan] * 2] * 2), Spans.of_depth(np.array([[0.0, np.nan, 0.0]] * 2)))


def test_npz_files_may_hold_boundaries(tmp_path):
    boundary, _ = draw_depth(6, 4, 0)
    boundary[:, 0] = 0.0
    pos = np.stack([70 + np.arange(6) * 1e-3, np.full(6, -40.0)], 1)
    np.savez(tmp_path / "a.npz", boundary=boundary, pos=pos)
    np.savez(tmp_path / "b.npz", boundary=boundary, thickness=np.diff(boundary, axis=1), pos=pos)
    first, second = NpzStacks(str(tmp_path)).load().stacks
    for stack in (first, second):
        same(stack.known_spans, Spans.of_depth(boundary))
    np.testing.assert_array_equal(first.thickness, second.thickness)
    assert first.known_spans.known.sum() > first.observed.sum()
    np.savez(tmp_path / "c.npz", pos=pos)
    with pytest.raises(DataError, match=r"c\.npz has no array 'thickness'.*or boundary"):
        NpzStacks(str(tmp_path)).load()


def test_crossing_boundaries_of_npz_files_are_refused_or_left_out(tmp_path):
    boundary = np.array([[0.0, 2.0, 1.0, 3.0, 4.0]] * 3)
    pos = np.stack([70 + np.arange(3) * 1e-3, np.full(3, -40.0)], 1)
    np.savez(tmp_path / "a.npz", boundary=boundary, pos=pos)
    with pytest.raises(DataError, match=r"not positive.*exclude\+=negative"):
        NpzStacks(str(tmp_path)).load()
    flights = NpzStacks(str(tmp_path), exclude=["negative"]).load()
    assert flights.excluded[0].count == 3
    spans = flights.stacks[0].known_spans
    assert spans.path[0].tolist() == [3.0, 3.0, 3.0, 1.0]


def test_data_of_thickness_alone_know_no_sums():
    thickness = np.array([[1.0, np.nan, np.nan, 2.0, 1.0]] * 2)
    data = make_stack(thickness, None).to_data(0, 0)
    assert "span_path" not in data
    spans = Spans.of_batch(data)
    assert not spans.between.any()
    hidden = torch.tensor([[False, False, False, True, False]] * 2)
    visible_spans = spans.hide(hidden)
    assert visible_spans.observed[0].tolist() == [True, False, False, False, False]
    assert not visible_spans.between.any()


@settings(max_examples=60, deadline=None)
@given(is_time=st.booleans(), **CASES)
def test_what_was_measured_of_a_completed_stack_is_found_again(is_time, traces, layers, seed):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.5, 1.5, (traces, layers))
    picked = rng.random((traces, layers + 1)) < 0.6
    density = rng.uniform(0.3, 0.6, truth.shape) if is_time else None
    index = 1 + 0.845 * density if is_time else np.ones_like(truth)
    depth = np.concatenate([np.zeros((traces, 1)), (index * truth).cumsum(1)], 1)
    expected = Spans.of_depth(np.where(picked, depth, np.nan))
    twtt = 3e-6 + 2 * depth / LIGHT if is_time else None
    spans = find_completed_spans(truth, picked, density, twtt)
    np.testing.assert_array_equal(spans.start, expected.start)
    np.testing.assert_allclose(spans.path, expected.path, rtol=1e-6)
    assert not spans.contradicts(np.where(spans.observed, truth, np.nan)).any()
    if is_time:  # layers that are left missing do not hide what lies around them
        left = np.where(spans.observed, truth, np.nan)
        known = find_completed_spans(left, picked, density, twtt)
        np.testing.assert_allclose(known.path, expected.path, rtol=1e-6)
