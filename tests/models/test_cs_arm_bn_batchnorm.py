"""The laws of context BatchNorm.

Source: docs/papers/cs_arm_bn.md section 6.1, and items 1, 2 and 8 of 6.4.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fulgurite.models.cs_arm_bn as cs_arm_bn
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.models.cs_arm_bn import (
    Context,
    ContextBatchNorm1d,
    ContextBatchNorm2d,
    SmallResNet,
    adapt,
    adaptive_weight,
    context,
    convert_batchnorm,
    load_statistics,
    merge_groups,
    revert_batchnorm,
    stored_statistics,
)
from fulgurite.models.cs_arm_bn.batch_statistics import Group
from fulgurite.models.cs_arm_bn.batchnorm import context_layers
from fulgurite.models.cs_arm_bn.checkpointing import run_checkpointed
from fulgurite.models.cs_arm_bn.references import load_reference, reference_state

L, N = 6, 10


@pytest.fixture
def network():
    torch.manual_seed(0)
    return convert_batchnorm(SmallResNet(3, 5, width=8)).double()


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(1)
    query = torch.randn(L, 3, 12, 12, generator=g, dtype=torch.float64)
    control = 0.5 + 0.8 * torch.randn(N, 3, 12, 12, generator=g, dtype=torch.float64)
    return query, control


def logits(network, query, control, source, weight=None):
    with context(network, source, n_query=len(query), weight=weight):
        return network(torch.cat([query, control]))[: len(query)]


# --- one layer against the definition ------------------------------------------------------------


def layer_and_rows(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    layer = ContextBatchNorm2d(4).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4, generator=g) + 0.5)
        layer.bias.copy_(torch.randn(4, generator=g))
    return layer, 3 + 2 * torch.randn(L + N, 4, 5, 5, generator=g).to(dtype)


@pytest.mark.parametrize("weight", [None, L / (L + N)])
def test_union_is_batchnorm_on_the_concatenation(weight):
    layer, rows = layer_and_rows()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(layer.state_dict())
    with context(layer, "union", n_query=L, weight=weight):
        found = layer(rows)
    torch.testing.assert_close(found, plain.train()(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("weight", "source", "own"),
    [(0.0, "controls", slice(L, None)), (1.0, "batch", slice(0, L))],
)
def test_extreme_weights_are_the_pure_sources(weight, source, own):
    layer, rows = layer_and_rows(torch.float64)
    with context(layer, "union", n_query=L, weight=weight):
        mixed = layer(rows)
    with context(layer, source, n_query=L):
        pure = layer(rows)
    var, mean = torch.var_mean(rows[own], (0, 2, 3), correction=0)
    expected = F.batch_norm(rows, mean, var, layer.weight, layer.bias, eps=layer.eps)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(pure, expected)


def test_the_training_flag_and_running_statistics_play_no_part():
    layer, rows = layer_and_rows()
    for source in ("union", "batch", "controls"):
        with context(layer, source, n_query=L):
            torch.testing.assert_close(layer.train()(rows), layer.eval()(rows), rtol=0, atol=0)
    assert int(layer.num_batches_tracked) == 0
    assert not layer.running_mean.any()


@pytest.mark.parametrize("held", [False, True])
def test_without_a_context_it_is_batchnorm(held):
    layer, rows = layer_and_rows()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(layer.state_dict())
    for training in (True, False):
        layer.train(training), plain.train(training)
        if held:
            with context(layer, "ordinary"):
                torch.testing.assert_close(layer(rows), plain(rows), rtol=0, atol=0)
        else:
            torch.testing.assert_close(layer(rows), plain(rows), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    with context(layer.train(), "source"):
        torch.testing.assert_close(layer(rows), plain.eval()(rows))


def test_a_prior_mixes_in_running_statistics():
    layer, rows = layer_and_rows()
    layer.running_mean += 2
    with context(layer, "union", n_query=L, prior=1.0):
        only = layer(rows)
    with context(layer, "source"):
        torch.testing.assert_close(only, layer(rows))
    with context(layer, "union", n_query=L, prior=0.25):
        some = layer(rows)
    var, mean = torch.var_mean(rows, (0, 2, 3), correction=0)
    mean, var = 0.75 * mean + 0.25 * 2, 0.75 * var + 0.25
    torch.testing.assert_close(
        some, F.batch_norm(rows, mean, var, layer.weight, layer.bias, eps=layer.eps)
    )


def test_gradients_are_those_of_batchnorm():
    layer, rows = layer_and_rows(torch.float64)
    plain = nn.BatchNorm2d(4).double()
    plain.load_state_dict(layer.state_dict())
    target = torch.randn(L, 4, 5, 5, generator=torch.Generator().manual_seed(3)).double()
    gradients = []
    for module, settings in ((plain, [None]), (layer, [None, L / (L + N)])):
        for weight in settings:
            x = rows.clone().requires_grad_()
            if module is plain:
                out = module(x)
            else:
                with context(module, "union", n_query=L, weight=weight):
                    out = module(x)
            (out[:L] * target).sum().backward()
            gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_feature_vectors_have_contexts_too():
    layer = convert_batchnorm(nn.BatchNorm1d(3))
    assert type(layer) is ContextBatchNorm1d
    rows = torch.randn(8, 3)
    with context(layer, "union", n_query=2):
        torch.testing.assert_close(layer(rows), nn.BatchNorm1d(3)(rows))


def test_one_value_per_channel_is_no_crash():
    layer = ContextBatchNorm2d(4)
    with context(layer, "batch"):
        assert torch.equal(layer(torch.randn(1, 4, 1, 1)), torch.zeros(1, 4, 1, 1))


# --- the laws of a network ------------------------------------------------------------------------


def test_controls_only_ignores_other_queries(network, images):
    query, control = images
    changes = {"controls": 0.0, "union": 0.0, "batch": 0.0}
    for _ in range(8):
        other = torch.cat([query[:1], 0.5 + 1.5 * torch.randn_like(query[1:])])
        for source in changes:
            before, after = (logits(network, q, control, source)[0] for q in (query, other))
            changes[source] += float((after - before).norm().detach())
    assert changes["controls"] == 0.0
    assert 1e-3 < changes["union"] < changes["batch"]


@pytest.mark.parametrize("source", ["union", "controls"])
def test_order_does_not_matter(network, images, source):
    query, control = images
    found = logits(network, query, control, source)
    order, other = torch.randperm(L), torch.randperm(N)
    torch.testing.assert_close(
        logits(network, query[order], control[other], source), found[order], atol=1e-12, rtol=0
    )


def test_a_second_copy_of_the_controls_changes_nothing(network, images):
    query, control = images
    once = logits(network, query, control, "controls")
    twice = logits(network, query, torch.cat([control, control]), "controls")
    torch.testing.assert_close(twice, once, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "source"), [("context", "union"), ("context", "controls"), ("none", "union")]
)
def test_input_standardisation_undoes_gain_and_offset_of_a_plate(images, kind, source):
    torch.manual_seed(0)
    network = convert_batchnorm(SmallResNet(3, 5, width=8, input_norm=kind)).double()
    query, control = images
    gain = torch.tensor([0.4, 1.7, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    offset = torch.tensor([-1.0, 0.3, 4.0], dtype=torch.float64).view(1, 3, 1, 1)
    before = logits(network, query, control, source)
    after = logits(network, gain * query + offset, gain * control + offset, source)
    change = (after - before).abs().max()
    # a mixing stem with zero padding does not undo it; that is why the option exists
    assert change < 1e-6 if kind == "context" else change > 1e-2


def test_gradient_reaches_the_controls_unless_it_is_stopped(network, images):
    query, control = images
    labels = torch.arange(L) % 5
    cases = [("union", False, True), ("controls", False, True)]
    cases += [("controls", True, False), ("batch", False, False)]
    for source, detach, reached in cases:
        control.requires_grad_().grad = None
        with context(network, source, n_query=L, detach=detach):
            F.cross_entropy(network(torch.cat([query, control]))[:L], labels).backward()
        assert bool(control.grad.abs().max() > 1e-6) == reached, source
        if not reached:
            assert not control.grad.any()


@pytest.mark.parametrize("source", ["union", "controls"])
def test_half_precision_takes_statistics_in_full(network, images, source):
    network = network.float()
    query, control = (x.float() for x in images)
    full = logits(network, query, control, source)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(network, query, control, source).float()
    assert (half - full).abs().max() < 0.03 * full.std()
    layer, rows = layer_and_rows()
    far = (1000 + rows).bfloat16()  # E[x²] − E[x]² in half precision would lose everything
    with context(layer, source, n_query=L):
        out = layer(far).float()
    own = far.float() if source == "union" else far[L:].float()
    var, mean = torch.var_mean(own, (0, 2, 3), correction=0)
    expected = F.batch_norm(far.float(), mean, var, layer.weight, layer.bias, eps=layer.eps)
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.01)


def test_contexts_nest_and_end(network, images):
    layers = [*context_layers(network).values()]
    with context(network, "union", n_query=L) as outer:
        with pytest.raises(ZeroDivisionError), context(network, "controls", n_query=L):
            _ = 1 / 0
        assert all(layer.context is outer for layer in layers)
    assert all(layer.context is None for layer in layers)


@pytest.mark.parametrize("source", ["union", "controls", "ordinary"])
def test_recomputed_activations_change_nothing(images, source):
    query, control = (x.float() for x in images)
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        network = convert_batchnorm(SmallResNet(3, 5, width=8, checkpoint=checkpoint))
        with context(network, source, n_query=L):
            out = network(torch.cat([query, control]))[:L]
        out.square().sum().backward()  # the context has ended by now
        found.append(([p.grad for p in network.parameters()], network.state_dict()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert int(found[0][1]["bn1.num_batches_tracked"]) == (source == "ordinary")


def test_recomputation_saves_memory():
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    block = convert_batchnorm(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(6))))
    x = torch.randn(8, 4, 6, 6, requires_grad=True)
    sizes = []
    for run in (block, lambda x: run_checkpointed(block, x)):
        kept.clear()
        with (
            context(block, "union", n_query=2),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            run(x)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 4


# --- conversion -----------------------------------------------------------------------------------


def test_conversion_keeps_the_network_and_reverts(images):
    torch.manual_seed(0)
    plain = SmallResNet(3, 5, width=8).double()
    state = copy.deepcopy(plain.state_dict())
    parameters = [*plain.parameters()]
    network = convert_batchnorm(plain)
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert list(network.state_dict()) == list(state)
    copied = copy.deepcopy(network)
    with context(network, "union"):
        network(images[0])
    assert copied.bn1.context is None
    back = revert_batchnorm(copied.to(torch.float32))
    assert not any(isinstance(m, ContextBatchNorm2d) for m in back.modules())
    assert back.bn1.running_mean.dtype == back.bn1.weight.dtype == torch.float32
    torch.testing.assert_close(back.double().state_dict(), state)


def test_a_reverted_network_is_an_ordinary_one_for_its_plate(network, images):
    query, control = images
    adapt(network, [control], "plate 3")
    with context(network, "stored", domain="plate 3"):
        expected = network(query)
    plain = revert_batchnorm(network, "plate 3").eval()
    torch.testing.assert_close(plain(query), expected)


class Fused(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: dropout and an activation inside."""

    def __init__(self, features):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_batchnorm_with_an_activation_inside_keeps_it():
    network = convert_batchnorm(nn.Sequential(Fused(2)))
    assert list(network.state_dict()) == list(nn.Sequential(Fused(2)).state_dict())
    x = torch.randn(4, 2, 3, 3)
    with context(network, "union"):
        torch.testing.assert_close(network(x), nn.BatchNorm2d(2)(x).relu())
    assert type(revert_batchnorm(network)[0]) is Fused


class Strange(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2)), "no BatchNorm.*it has GroupNorm"),
        (nn.Linear(2, 2), "no BatchNorm"),
        (nn.Sequential(nn.SyncBatchNorm(2)), "SyncBatchNorm"),
        (nn.Sequential(nn.BatchNorm3d(2)), "BatchNorm3d"),
        (nn.Sequential(Strange(2)), "forward pass of its own"),
    ],
)
def test_networks_that_cannot_be_adapted_are_refused(network, match):
    with pytest.raises(ConfigError, match=match):
        convert_batchnorm(network)


def test_wrong_contexts_are_refused(network, images):
    query, control = images
    for wrong in ({"source": "target"}, {"weight": 1.5}, {"weight": "auto"}, {"prior": -1}):
        with pytest.raises(ConfigError):
            Context(**wrong)
    with pytest.raises(ConfigError, match="convert"), context(nn.Linear(1, 1)):
        pass
    with pytest.raises(DataError, match="without controls"):
        logits(network, query, control[:0], "controls")
    with pytest.raises(DataError, match="n_query"), context(network, "union", n_query=99):
        network(query)
    with pytest.raises(DataError, match="plate 9"), context(network, "stored", domain="plate 9"):
        network(query)


# --- stored statistics ----------------------------------------------------------------------------


def test_stored_statistics_are_those_of_the_batch(network, images):
    _, control = images
    adapt(network, [control], "a")
    with torch.no_grad():
        first = network.conv1(network.input_norm(control))
    var, mean = torch.var_mean(first, (0, 2, 3), correction=0)
    stored = stored_statistics(network, "a")
    torch.testing.assert_close(stored["bn1.mean"], mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(stored["bn1.var"], var, rtol=0, atol=1e-14)  # not 0.9 + 0.1 v


def test_after_adapting_queries_are_predicted_alone_or_together(network, images):
    query, control = images
    network = network.float()
    query, control = query.float(), control.float()
    adapt(network, [control], "a")
    with context(network, "stored", domain="a"):
        together = network(query)
        alone = torch.cat([network(q[None]) for q in query])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        together, logits(network, query, control, "controls"), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("weight", [None, 0.2, "adaptive"])
def test_chunks_give_the_statistics_of_the_whole(network, images, weight):
    query, control = images
    control = control + torch.linspace(-2, 2, N, dtype=torch.float64).view(-1, 1, 1, 1)  # a drift
    whole = adapt(network, [control], "whole", queries=[query], weight=weight)
    parts = adapt(network, control.split(3), "parts", queries=query.split(4), weight=weight)
    assert whole.keys() == parts.keys()
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], atol=1e-10, rtol=1e-10)
    with context(network, "union", n_query=L, weight=weight):
        joint = network(torch.cat([query, control]))[:L]
    with context(network, "stored", domain="parts"):
        torch.testing.assert_close(network(query), joint)


def test_statistics_can_be_written_and_read(network, images):
    query, control = images
    tensors = adapt(network, [control], "a")
    other = copy.deepcopy(network)
    other.bn1.stored.clear()
    load_statistics(other, "again", tensors)
    with context(network, "stored", domain="a"), context(other, "stored", domain="again"):
        assert torch.equal(network(query), other(query))
    with pytest.raises(CheckpointError, match="another network"):
        load_statistics(other, "b", {"bn9.mean": torch.zeros(1), "bn9.var": torch.zeros(1)})
    with pytest.raises(DataError, match="never"):
        stored_statistics(network, "never")
    with pytest.raises(DataError, match="no images"):
        adapt(network, [control[:0]], "b")


def test_a_layer_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(1)

        def forward(self, x):
            return self.bn(2 + self.bn(x))

    with pytest.raises(ConfigError, match="twice"):
        adapt(convert_batchnorm(Twice()), [torch.randn(3, 1, 2, 2)], "a")


def test_other_ranks_buffers_cannot_change_a_plate(network, images):
    query, control = images
    adapt(network, [control], "a")
    with context(network, "stored", domain="a"):
        before = network(query)
        for buffer in network.buffers():
            buffer.zero_()  # what DDP's broadcast may do
        assert torch.equal(network(query), before)


# --- the adaptive weight --------------------------------------------------------------------------


def group(count, mean, spread, channels=64):
    one = torch.ones(channels)
    return Group(count, mean * one, one, spread * one)


def test_without_shift_the_adaptive_weight_is_the_count_weight():
    for count in (1, 8, 24, 100):
        found = adaptive_weight(group(count, 0, 0.2), group(48, 0, 0.2), torch.ones(64), None)
        assert float(found) == pytest.approx(count / (count + 48), rel=1e-4)


def test_the_adaptive_weight_minimises_the_error_it_estimates():
    """Over simulated plates, its squared error is near that of the best fixed weight."""
    g = torch.Generator().manual_seed(0)
    plates, channels, one = 400, 64, torch.ones(64)
    for bias, queries, controls in ((0.0, 24, 48), (0.7, 24, 48), (0.3, 4, 48), (0.0, 24, 4)):
        errors = []
        for _ in range(plates):
            shift = bias * torch.randn(channels, generator=g)
            q = shift + torch.randn(queries, channels, generator=g)
            c = torch.randn(controls, channels, generator=g)
            weight = adaptive_weight(
                Group(queries, q.mean(0), one, q.var(0)),
                Group(controls, c.mean(0), one, c.var(0)),
                one,
                None,
            )
            grid = torch.cat([weight[None], torch.linspace(0, 1, 21)])[:, None]
            errors.append(torch.lerp(c.mean(0), q.mean(0), grid).square().mean(1))
        mean = torch.stack(errors).mean(0)
        assert mean[0] <= 1.15 * mean[1:].min(), (bias, queries, controls)


def test_a_known_shift_counts_as_none(network, images):
    query, control = images
    query = query + 1  # queries always differ from controls by this
    g = torch.Generator().manual_seed(4)
    for _ in range(30):  # fresh samples of training plates
        q = query[torch.randint(L, (L,), generator=g)]
        c = control[torch.randint(N, (N,), generator=g)]
        with context(network, "union", n_query=L, record=True):
            network(torch.cat([q, c]))
    weights = {}
    for name, shift in (("usual", 0.0), ("other", 2.0)):
        with context(network, "union", n_query=L, weight="adaptive") as held:
            network(torch.cat([query + shift, control]))
        weights[name] = held.used[0]
    assert weights["usual"] > 3 * weights["other"]
    fresh = convert_batchnorm(SmallResNet(3, 5, width=8)).double()
    load_reference(fresh, reference_state(network))
    assert float(fresh.bn1.reference.weight) == pytest.approx(L / (L + N))
    torch.testing.assert_close(fresh.bn1.reference, network.bn1.reference)
    with pytest.raises(CheckpointError, match="reference"):
        load_reference(fresh, {"elsewhere": [*network.bn1.reference]})


def test_recording_does_not_change_the_forward_pass(network, images):
    rows = torch.cat(images)
    outs = []
    for record in (False, True):
        with context(network, "union", n_query=L, record=record):
            outs.append(network(rows))
    assert torch.equal(*outs)


@pytest.mark.parametrize("controls", [0, 1])
@pytest.mark.parametrize("queries", [1, 2])
def test_tiny_groups_give_finite_predictions(network, images, queries, controls):
    query, control = images[0][:queries], images[1][:controls]
    assert logits(network, query, control, "union", "adaptive").isfinite().all()


def test_merging_is_the_law_of_total_variance():
    g = torch.Generator().manual_seed(5)
    q, c = torch.randn(7, 3, generator=g), 2 + torch.randn(5, 3, generator=g)
    stats = [(x.mean(0), x.var(0, correction=0)) for x in (q, c)]
    mean, var = merge_groups(*stats, 7 / 12)
    both = torch.cat([q, c])
    torch.testing.assert_close(mean, both.mean(0))
    torch.testing.assert_close(var, both.var(0, correction=0))


# --- the package ----------------------------------------------------------------------------------


def test_public_names_exist():
    for name in cs_arm_bn.__all__:
        assert getattr(cs_arm_bn, name).__name__ == name
    assert set(cs_arm_bn.__all__) <= set(dir(cs_arm_bn))
    with pytest.raises(AttributeError, match="DeYO"):
        _ = cs_arm_bn.DeYO
