"""Graphs, spatial backends, hiding and the network: checks 5 to 8 and 10 of its page."""

import math

import pytest
import torch
from fakes.ice_layers import completion_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers import (
    LayerTransformer,
    Neighbourhood,
    PhysicsPrior,
    SpatialEncoder,
    StructuredHiding,
    TraceAttention,
    Track,
    adjacency,
    edges,
    find_contradicted,
    haversine,
    held_out,
    nearby_means,
    side_features,
)

L, P = 6, 3
KINDS = ["full", "knn", "partition", "inverse", "none"]
GO_BEYOND = {"scales": (150.0, 600.0), "attention": 1}
OURS = {"attention": 2, "mixing": "free", "reach": [100.0, 400.0]}


def lines(sizes, seed=0, spacing=100.0):
    """Inputs of a network: random thickness and physics on straight flight lines."""
    g = torch.Generator().manual_seed(seed)
    track = Track.of(sizes)
    n = sum(sizes)
    distance = spacing * track.offset.double()
    degrees = torch.stack([70 + track.stack + distance / 111_195, -40 + 0.1 * track.stack], 1)
    return {
        "thickness": torch.randn(n, L, generator=g),
        "visible": torch.rand(n, L, generator=g) < 0.7,
        "physics": torch.randn(n, L, P, generator=g),
        "pos": torch.randn(n, 2, generator=g),
        "degrees": degrees.double(),
        "distance": distance.float(),
        "track": track,
    }


def made(seed=0, **options):
    torch.manual_seed(seed)
    return completion_net(L, P, **{"width": 16, **options}).eval()


@torch.no_grad()
def run(network, inputs, **changed):
    return network(**{**inputs, **changed})


# --- haversine and graphs ------------------------------------------------------------------------


def test_distances_on_the_sphere():
    """Check 10."""
    a, b = torch.tensor([70.0, -40.0]), torch.tensor([71.0, -40.0])
    assert float(haversine(a, b)) / 1000 == pytest.approx(111.19, abs=0.01)
    east, west = torch.tensor([0.0, 179.9]), torch.tensor([0.0, -179.9])
    assert float(haversine(east, west)) / 1000 == pytest.approx(0.2 * 111.195, abs=0.01)
    points = torch.rand(20, 2, dtype=torch.float64) * 60
    table = haversine(points[:, None], points)
    assert torch.equal(table, table.T)
    assert torch.equal(table.diagonal(), torch.zeros(20, dtype=torch.float64))
    assert float(haversine(torch.tensor([90.0, 0.0]), torch.tensor([-90.0, 0.0]))) == (
        pytest.approx(math.pi * 6_371_000)
    )


def test_a_metre_is_a_metre():
    """In float32 degrees, traces a few metres apart would be off by up to 0.8 m."""
    a = torch.tensor([70.0, -40.0], dtype=torch.float64)
    for metres in (1.0, 5.0):
        b = a + torch.tensor([metres / 111_194.93, 0.0])
        assert float(haversine(a, b)) == pytest.approx(metres, abs=1e-3)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.integers(1, 6),
    st.integers(2, 9),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_a_graph_are_means_over_neighbours_of_the_own_stack(sizes, kind, k, part):
    track = Track.of(sizes)
    pos = torch.rand(sum(sizes), 2, dtype=torch.float64)
    weights = adjacency(track, pos, kind, neighbours=k, part=part, overlap=part // 2)
    total = weights.sum(-1)
    alone = kind == "none"
    for stack, size in enumerate(sizes):
        expected = torch.zeros(track.longest)
        if size > 1 and not alone:
            expected[:size] = 1
        torch.testing.assert_close(total[stack], expected)
        assert not weights[stack, :, size:].any()
        assert not weights[stack].diagonal().any()
        reach = (weights[stack] > 0).nonzero().diff(dim=1).abs()
        if kind == "knn":
            assert not len(reach) or int(reach.max()) <= k
        if kind == "partition":
            assert not len(reach) or int(reach.max()) < part
    pairs, weight = edges(track, weights)
    assert bool((track.stack[pairs[0]] == track.stack[pairs[1]]).all())
    assert torch.isclose(weight.sum(), total.sum())


def test_neighbours_by_inverse_distance_are_near():
    track = Track.of([48])
    pos = torch.stack([70 + torch.arange(48).double() * 100 / 111_195, torch.zeros(48)], 1)
    weights = adjacency(track, pos, "inverse")[0]
    assert weights[10, 9] == pytest.approx(float(weights[10, 11]), rel=1e-5)
    assert weights[10, 9] == pytest.approx(3 * float(weights[10, 7]), rel=1e-4)
    effective = 1 / weights.square().sum(-1)
    # docs/papers/ice_layers.md section 1.2
    assert float(effective.mean()) == pytest.approx(15.7, abs=0.5)


def test_partitions_overlap_and_cover():
    weights = adjacency(Track.of([30]), torch.zeros(30, 2), "partition", part=10, overlap=4)[0]
    assert bool((weights[5] > 0)[:10].sum() == 9)  # of the first part only
    assert (weights[7] > 0).nonzero().flatten().tolist() == [i for i in range(16) if i != 7]


# --- backends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[12, 12], [7, 1, 12]])
@pytest.mark.parametrize(
    ("graph", "backend"),
    [(kind, "pyg") for kind in KINDS] + [("full", "closed")],
)
def test_backends_give_the_same(graph, backend, sizes):
    """Check 7, values and gradients."""
    pytest.importorskip("torch_geometric")
    inputs = lines(sizes)
    outs, gradients = [], []
    for name in ("dense", backend):
        network = made(graph=graph, backend=name)
        out = network(**inputs)
        out.square().sum().backward()
        outs.append(out.detach())
        gradients.append([p.grad for p in network.parameters()])
    assert float((outs[0] - outs[1]).abs().max()) <= 1e-5
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_mean_is_that_of_pygs_layer_on_each_layer_alone():
    nn_pyg = pytest.importorskip("torch_geometric.nn")
    inputs = lines([9, 5])
    track, degrees = inputs["track"], inputs["degrees"]
    encoder = SpatialEncoder(P, 8, depth=1, graph="knn", neighbours=2)
    pairs, _ = edges(track, adjacency(track, degrees, "knn", neighbours=2))
    conv = nn_pyg.SAGEConv(P, 8)
    conv.load_state_dict(encoder.layers[0].state_dict())
    ours = encoder(inputs["physics"], track, degrees)
    each = [conv(inputs["physics"][:, layer], pairs) for layer in range(L)]
    torch.testing.assert_close(
        ours, nn.functional.hardswish(torch.stack(each, 1)), atol=1e-5, rtol=0
    )


def test_backends_are_refused_where_they_do_not_exist():
    with pytest.raises(ConfigError, match=r"backend=dense, or graph=full|graph=full"):
        made(graph="knn", backend="closed")
    for options in ({"backend": "sparse"}, {"graph": "torus"}, {"neighbours": 0}, {"overlap": 16}):
        with pytest.raises(
            ConfigError, match=rf"{next(iter(options)).removeprefix('spatial_')}(=| of )"
        ):
            made(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_neighbours_of_ones_is_one(kind):
    track = Track.of([6, 1])
    around = Neighbourhood(track, torch.rand(7, 2), kind)
    mean = around.mean(torch.ones(7, 2, 3))
    expected = 0.0 if kind == "none" else 1.0
    torch.testing.assert_close(mean[:6], torch.full((6, 2, 3), expected))
    assert not mean[6].any()


# --- the network ---------------------------------------------------------------------------------


def shuffled(inputs, order):
    return {k: v if k == "track" else v[order] for k, v in inputs.items()}


@pytest.mark.parametrize("options", [{"graph": "inverse"}, {"graph": "full"}])
def test_the_order_of_traces_does_not_matter(options):
    """Check 5: these graphs know positions, not numbers."""
    inputs = lines([20])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    network = made(**options, **GO_BEYOND)
    there = run(network, inputs)[order]
    assert float((run(network, shuffled(inputs, order)) - there).abs().max()) <= 1e-5


@pytest.mark.parametrize("encoding", ["sin", "learned", "none"])
def test_the_order_of_layers_matters_by_the_encoding_alone(encoding):
    """Check 5, second part."""
    inputs = lines([12])
    order = torch.randperm(L, generator=torch.Generator().manual_seed(3))
    network = made(encoding=encoding)
    if encoding == "learned":
        nn.init.normal_(network.temporal.order)
    changed = {k: inputs[k][:, order] for k in ("thickness", "visible", "physics")}
    apart = (run(network, inputs, **changed) - run(network, inputs)[:, order]).abs().max()
    assert apart <= 1e-5 if encoding == "none" else apart > 1e-2


def test_a_trace_is_felt_as_far_as_the_graph_reaches():
    """Check 6."""
    k, depth, at = 2, 2, 10
    inputs = lines([24, 24])
    network = made(graph="knn", neighbours=k, spatial_depth=depth)
    thickness, visible = inputs["thickness"].clone(), inputs["visible"].clone()
    visible[at] = True
    base = run(network, inputs, visible=visible)
    thickness[at, 0] += 1
    change = (run(network, inputs, thickness=thickness, visible=visible) - base).abs()
    far = (inputs["track"].offset[:24] - at).abs() > k * depth
    assert torch.equal(change[:24][far], torch.zeros_like(change[:24][far]))
    assert torch.equal(change[24:], torch.zeros_like(change[24:]))
    assert float(change[at, 1:].max()) > 1e-5  # other layers of the trace
    full = made(graph="full")
    base = run(full, inputs, visible=visible)
    change = (run(full, inputs, thickness=thickness, visible=visible) - base).abs()
    assert bool((change[:24].amax(1) > 0).all())
    assert torch.equal(change[24:], torch.zeros_like(change[24:]))


@pytest.mark.parametrize("options", [{}, GO_BEYOND, OURS, {"graph": "inverse"}])
def test_stacks_of_a_batch_do_not_see_each_other(options):
    sizes = [12, 7, 1]
    inputs = lines(sizes)
    network = made(**options)
    together = run(network, inputs).split(sizes)
    start = 0
    for size, there in zip(sizes, together, strict=True):
        rows = torch.arange(start, start + size)
        alone = shuffled({k: v for k, v in inputs.items() if k != "track"}, rows)
        torch.testing.assert_close(
            run(network, {**alone, "track": Track.of([size])}), there, atol=1e-5, rtol=1e-5
        )
        start += size


@pytest.mark.parametrize("options", [{}, GO_BEYOND, OURS])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, -7.0])
def test_what_is_not_visible_does_not_reach_the_network(options, value):
    """Checks 2 and 8."""
    inputs = lines([12, 9])
    network = made(**options)
    other = torch.where(inputs["visible"], inputs["thickness"], value)
    assert torch.equal(run(network, inputs, thickness=other), run(network, inputs))


def test_physics_and_position_can_be_left_out():
    inputs = lines([12])
    more = torch.randn(12, L, P)
    assert torch.equal(
        run(made(use_physics=False), inputs, physics=more), run(made(use_physics=False), inputs)
    )
    assert not torch.equal(run(made(), inputs, physics=more), run(made(), inputs))
    moved = {"pos": torch.randn(12, 2)}
    assert torch.equal(
        run(made(position=False), inputs, **moved), run(made(position=False), inputs)
    )


def test_long_range_skips_join_mirrored_blocks():
    x = torch.randn(3, L, 16)
    torch.manual_seed(0)
    plain = LayerTransformer(L, 16, depth=3)
    skipped = LayerTransformer(L, 16, depth=3, skip="long_range")
    skipped.load_state_dict(plain.state_dict())
    first, middle, last = plain.blocks
    a = first(x + plain.order)
    torch.testing.assert_close(skipped(x), last(middle(a) + a))


@pytest.mark.parametrize(
    "options",
    [
        {"width": 1},
        {"depth": -1},
        {"heads": 3},
        {"scales": [0.0]},
        {"reach": [-1.0]},
        {"mixing": "x"},
        {"encoding": "x"},
        {"skip": "x"},
    ],
)
def test_a_wrong_network_is_refused(options):
    with pytest.raises(
        ConfigError, match=rf"{next(iter(options)).removeprefix('spatial_')}(=| of )"
    ):
        made(**options)


# --- features ------------------------------------------------------------------------------------


def test_nearby_means_are_sums_by_hand():
    inputs = lines([7, 4])
    thickness = torch.where(inputs["visible"], inputs["thickness"], 0.0)
    means = nearby_means(
        thickness, inputs["visible"], inputs["track"], inputs["distance"], scales=(200.0, 50.0)
    )
    rows = range(7, 11)
    for i in rows:
        w = torch.tensor([math.exp(-0.5 * (100 * (i - j) / 200) ** 2) for j in rows])
        seen = inputs["visible"][7:11].float()
        weight = (w[:, None] * seen).sum(0)
        mean = (w[:, None] * seen * thickness[7:11]).sum(0) / (weight + 0.05)
        torch.testing.assert_close(means[i, :, 0], mean)
        torch.testing.assert_close(means[i, :, 1], weight.log1p())


def test_sides_are_means_by_hand():
    inputs = lines([7, 4])
    shown = torch.where(inputs["visible"], inputs["thickness"], 0.0)
    found = side_features(
        shown, inputs["visible"], inputs["track"], inputs["distance"], reach=(150.0, 400.0)
    )
    assert found.shape == (11, L, 9)
    for i in range(7, 11):
        for layer in range(L):
            line = []
            for side, rows in enumerate((range(7, i + 1), range(i, 11))):
                seen = [j for j in rows if inputs["visible"][j, layer]]
                weight = [math.exp(-100 * abs(i - j) / 150) for j in seen]
                total = sum(w * float(shown[j, layer]) for w, j in zip(weight, seen, strict=True))
                mean = total / sum(weight) if seen else 0.0
                away = 100 * min((abs(i - j) for j in seen), default=math.inf)
                assert float(found[i, layer, side]) == pytest.approx(mean, abs=1e-5)
                near = float(found[i, layer, 2 + side])
                assert near == pytest.approx(math.exp(-away / 1200), abs=1e-5)
                line.append((1 / max(away, 1.0), mean))
            total = sum(w for w, _ in line)
            mean = sum(w * m for w, m in line) / total if total else 0.0
            assert float(found[i, layer, -1]) == pytest.approx(mean, abs=1e-5)


def test_a_pick_on_another_boundary_is_found_and_no_other():
    track = Track.of([30, 30])
    distance = 50.0 * track.offset
    g = torch.Generator().manual_seed(0)
    smooth = 2 * torch.sin(distance / 800)[:, None] + torch.arange(3.0)
    thickness = smooth + 0.1 * torch.randn(60, 3, generator=g)
    visible = torch.rand(60, 3, generator=g) < 0.8
    wrong = torch.zeros_like(visible)
    wrong[[4, 17, 40], [0, 1, 2]] = visible[[4, 17, 40], [0, 1, 2]] = True
    thickness[wrong] += 10
    thickness[~visible] = math.nan
    assert torch.equal(find_contradicted(thickness, visible, track, distance, limit=3.0), wrong)
    alone = torch.zeros_like(visible)
    alone[17, 1] = True  # nobody contradicts
    assert not find_contradicted(thickness, alone, track, distance, limit=3.0).any()


@pytest.mark.parametrize("mixing", ["softmax", "free"])
def test_layers_look_at_each_other_within_their_trace_alone(mixing):
    torch.manual_seed(0)
    network = LayerTransformer(L, 8, heads=2, mixing=mixing)
    x = torch.randn(6, L, 8)
    changed = x.clone()
    changed[2, 1] += torch.randn(8)  # the same for all features would be normed away
    with torch.no_grad():
        change = (network(changed) - network(x)).abs().amax(-1)
    assert bool((change[2] > 1e-3).all())
    change[2] = 0
    assert float(change.max()) < 1e-6


@pytest.mark.parametrize("kind", ["ridge", "relative", "log"])
def test_a_prior_finds_what_physics_says_and_goes_both_ways(kind):
    g = torch.Generator().manual_seed(0)
    physics = torch.rand(400, L, P, generator=g).double() + 0.5
    slope, level = torch.rand(L, P, generator=g).double(), torch.rand(L, generator=g).double()
    thickness = (physics * slope).sum(-1) + level + 0.2
    thickness = thickness.exp() if kind == "log" else thickness
    noise = torch.exp(0.05 * torch.randn(400, L, generator=g).double())
    observed = torch.rand(400, L, generator=g) < 0.6
    prior = PhysicsPrior(L, P, kind)
    segment = torch.arange(400) // 40
    picked = (thickness * noise).where(observed, math.nan)
    prior.fit(picked, observed, physics.float(), segment)
    for expected in (prior(physics), prior(physics, segment)):
        assert float((expected / thickness - 1).abs().mean()) < 0.02
        away = prior.deviation(thickness * noise, expected)
        torch.testing.assert_close(prior.metres(away, expected), thickness * noise)
        assert 0.8 < float(away.std()) < 1.2
    if kind != "ridge":
        assert float(prior.spread) == pytest.approx(0.05, rel=0.1)
    if kind == "log":
        assert (prior.metres(-1e6 * torch.ones(400, L), expected) > 0).all()


def test_training_takes_a_prior_that_does_not_know_the_segment():
    g = torch.Generator().manual_seed(0)
    physics = torch.rand(60, L, P, generator=g).double()
    segment = torch.arange(60) // 10
    thickness = 1 + physics.sum(-1) + 0.1 * segment[:, None]
    seen = torch.ones(60, L, dtype=torch.bool)
    prior, other = PhysicsPrior(L, P), PhysicsPrior(L, P)
    prior.fit(thickness, seen, physics, segment)
    changed = torch.where((segment == 2)[:, None], thickness + 1, thickness)
    other.fit(changed, seen, physics, segment)
    rows = segment == 2
    assert torch.equal(prior(physics, segment)[rows], other(physics, segment)[rows])
    assert not torch.equal(prior(physics)[rows], other(physics)[rows])
    # what is left of segments that were not known is larger
    left = [(e - thickness).square().mean() for e in (prior(physics), prior(physics, segment))]
    assert left[1] > left[0]
    # one segment only: there is no other to fit on
    prior.fit(thickness, seen, physics, torch.zeros_like(segment))
    assert torch.equal(prior(physics), prior(physics, torch.zeros_like(segment)))


# --- hiding --------------------------------------------------------------------------------------


def test_hidden_share_and_shape_are_those_of_the_card():
    track = Track.of([48] * 200)
    observed = torch.ones(48 * 200, 10, dtype=torch.bool)
    hidden = StructuredHiding()(observed, track, torch.Generator().manual_seed(0))
    stacks = hidden.view(200, 48, 10)
    assert 0.25 < float(hidden.float().mean()) < 0.31  # the paper's page: 28 %
    whole = stacks.all(1)
    assert 0.13 < float(whole.float().mean()) < 0.17
    part = stacks.any(1) & ~whole
    runs = (stacks != stacks.roll(1, 1)).sum(1)[part]
    assert bool((runs == 2).all())  # one cyclic segment
    lengths = stacks.sum(1)[part]
    assert 6 - 1 <= int(lengths.min()) <= int(lengths.max()) <= 24 + 1


def test_only_observed_entries_are_hidden_and_by_the_seed():
    observed = torch.rand(40, 5) < 0.5
    track = Track.of([15, 25])
    draws = [
        StructuredHiding(donor=0.5)(observed, track, torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not (draws[0] & ~observed).any()


def test_a_donor_gives_its_own_gaps():
    track = Track.of([4, 8])
    observed = torch.ones(12, 1, dtype=torch.bool)
    observed[1] = observed[4:6] = False  # the second of four; the first two of eight
    hiding = StructuredHiding(layer=0, segment=0, donor=1.0)
    hidden = hiding(observed, track, torch.Generator().manual_seed(0)).squeeze()
    assert hidden.nonzero().flatten().tolist() == [0, 6, 7]


def test_what_is_held_out_is_fixed_for_each_stack():
    """Check 13: whole segments and layers, 10 to 20 %, whatever the batch."""
    sizes = [30, 48, 20, 64] * 20
    names = torch.arange(len(sizes)) * 7
    observed = torch.rand(sum(sizes), 10) < 0.8
    hidden = held_out(observed, Track.of(sizes), names)
    assert 0.10 < int(hidden.sum()) / int(observed.sum()) < 0.20
    backwards = [
        held_out(rows, Track.of([len(rows)]), names[i : i + 1])
        for i, rows in enumerate(observed.split(sizes))
    ]
    assert torch.equal(torch.cat(backwards), hidden)
    assert not torch.equal(held_out(observed, Track.of(sizes), names, seed=1), hidden)


@pytest.mark.parametrize(("traces", "layers"), [(2, 1), (3, 2), (40, 1), (200, 6)])
def test_stacks_of_few_layers_hold_something_out(traces, layers):
    names = torch.arange(50)
    picked = torch.ones(traces, layers, dtype=torch.bool)
    picked[traces // 2 :, -1] = False
    for k in range(50):
        hidden = held_out(picked, Track.of([traces]), names[k : k + 1])
        assert hidden.any()
        assert not (hidden & ~picked).any()


def test_a_stack_holds_out_a_pick_beside_an_observed_layer():
    """A boundary without neighbours has no observed layer beside it: hiding it asks for nothing."""
    picked = torch.zeros(40, 6, dtype=torch.bool)
    picked[:, [0, 3]] = True  # the first layer alone is observed
    for name in torch.arange(50):
        assert held_out(picked, Track.of([40]), name[None])[:, 0].any()


@pytest.mark.parametrize("options", [{"layer": 1.5}, {"donor": -1}, {"shortest": 0.9}])
def test_wrong_hiding_is_refused(options):
    with pytest.raises(ConfigError):
        StructuredHiding(**options)


# --- attention by distance -----------------------------------------------------------------------


def test_attention_between_traces_falls_off_with_distance():
    inputs = lines([40], spacing=200.0)
    torch.manual_seed(0)
    block = TraceAttention(8, heads=2, reach=(100.0, 200.0))
    x = torch.randn(40, L, 8)
    changed = x.clone()
    changed[0] += 1
    arguments = (inputs["track"], inputs["distance"], inputs["visible"])
    with torch.no_grad():
        change = (block(changed, *arguments) - block(x, *arguments)).abs().amax((1, 2))
    assert float(change[1]) > 100 * float(change[10])
    assert float(change[20:].max()) < 1e-5
