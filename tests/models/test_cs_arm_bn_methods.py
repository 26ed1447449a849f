"""What the methods do with a batch of one plate."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fakes.cs_arm_bn import small_classifier
from torch import nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.layers import ResNet18 as ResNet18Plain
from fulgurite.models.cs_arm_bn import (
    ARMBN,
    ARMCML,
    ARMLL,
    CSARMBN,
    ERM,
    TENT,
    TVN,
    AdaBN,
    AdaptiveWeight,
    Backbone,
    ControlsOnly,
    EmbeddingHead,
    LinearProbe,
    PlateClassifier,
    PlateResNet18,
    PlateResNet50,
    SmallResNet,
    Weighted,
    context,
    convert_batchnorm,
    fit_tvn,
    tvn,
)
from fulgurite.models.cs_arm_bn.batchnorm import use_context
from fulgurite.models.cs_arm_bn.embedding import embed
from fulgurite.testing.plates import change_images

L, N, K = 6, 9, 4
ALL = [
    ERM, AdaBN, ARMBN, CSARMBN, AdaptiveWeight, Weighted, ControlsOnly, ARMCML, ARMLL, TENT, TVN,
    LinearProbe,
]  # fmt: skip


def make_batch(seed=0, domain=0, queries=L, controls=N):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, 3, 12, 12, generator=g)
    control = 0.5 + 0.8 * torch.randn(controls, 3, 12, 12, generator=g)
    return PlateBatch.from_images(query, control, torch.arange(queries) % K, domain)


def logits(module, batch, training=False):
    if training:
        module.method.begin(module.network, [batch], training=True)
        return module.train().logits(batch, training=True)
    module.eval().method.begin(module.network, (), training=False)
    out = module.logits(batch)
    module.method.end(module.network)
    return out


def fitted(method):
    """A module whose method had a look at training plates, where it needs one."""
    module = small_classifier(method)
    if isinstance(method, LinearProbe):
        with use_context(module.network, method.context(training=True)):
            plates = [make_batch(i, i) for i in range(3)]
            method.begin(module.network, plates, training=True)
    return module


@pytest.mark.parametrize("method", ALL)
def test_every_method_learns_from_a_batch(method):
    module = small_classifier(method())
    batch = make_batch()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(logits(module, batch, training=True), batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", ALL)
def test_control_labels_do_not_exist_and_queries_are_all_that_is_returned(method):
    module = fitted(method())
    batch = make_batch()
    out = logits(module, batch)
    assert out.shape == (L, K)
    garbage = batch._replace(control_row=torch.full((N,), 99))
    assert torch.equal(logits(module, garbage), out)


@pytest.mark.parametrize(
    ("method", "uses_queries", "uses_controls"),
    [
        (ERM(), False, False),
        (AdaBN(), True, False),
        (ARMBN(), True, False),
        (CSARMBN(), True, True),
        (CSARMBN(test_source="controls"), False, True),
        (CSARMBN(test_weight=0.0), False, True),
        (AdaptiveWeight(), True, True),
        (Weighted(0.3), True, True),
        (ControlsOnly(), False, True),
        (ARMCML(), True, False),
        (ARMCML(rows="controls"), False, True),
        (ARMLL(), True, False),
        (TENT(), True, False),
        (TVN(), False, True),
    ],
)
def test_what_a_prediction_depends_on(method, uses_queries, uses_controls):
    module = fitted(method)
    batch = make_batch()
    first = logits(module, batch)[0]
    other = change_images(batch, torch.cat([batch.query[:1], make_batch(5).query[1:]]))
    assert (not torch.allclose(logits(module, other)[0], first, atol=1e-6)) == uses_queries
    other = change_images(batch, control=2 * make_batch(5).control)
    assert (not torch.allclose(logits(module, other)[0], first, atol=1e-6)) == uses_controls


@pytest.mark.parametrize("method", [CSARMBN, AdaptiveWeight])
def test_training_is_the_papers(method):
    """One joint pass, BatchNorm on the concatenation, loss on the queries."""
    module = small_classifier(method())
    plain = SmallResNet(3, K, width=4)
    plain.load_state_dict(module.network.state_dict())
    batch = make_batch()
    expected = F.cross_entropy(plain.train()(batch.images)[:L], batch.label)
    loss = F.cross_entropy(logits(module, batch, training=True), batch.label)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(module.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_gradient_through_the_controls_is_a_choice():
    for gradient in (True, False):
        batch = make_batch()
        batch.images.requires_grad_()
        module = small_classifier(ControlsOnly(gradient=gradient))
        logits(module, batch, training=True).square().sum().backward()
        assert bool(batch.images.grad[L:].any()) == gradient


def test_one_query_without_controls_says_nothing_about_the_plate():
    """ARM-BN on one image sees only its own contrast; CS-ARM-BN sees the plate."""
    batch = make_batch(queries=1)
    gains = [batch._replace(images=g * batch.images) for g in (1.0, 4.0)]
    for method in (ARMBN(), CSARMBN()):
        one, other = (logits(small_classifier(method), b) for b in gains)
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)  # a common gain cancels
    brighter = change_images(batch, 4 * batch.query)  # the query alone differs from its plate
    for method, seen in ((ARMBN(), False), (CSARMBN(), True)):
        change = logits(small_classifier(method), brighter) - logits(
            small_classifier(method), batch
        )
        assert bool(change.abs().max() > 0.02) == seen


def test_tent_predicts_then_steps_and_resets_by_plate():
    module = small_classifier(TENT(lr=0.05))
    method, batch, later = module.method, make_batch(0), make_batch(1)
    before = copy.deepcopy(module.network.state_dict())
    with torch.inference_mode():
        method.begin(module.network, (), training=False)
        first, second = module.logits(batch), module.logits(batch)
        assert not torch.allclose(first, second)
        torch.testing.assert_close(module.logits(batch._replace(domain=1)), first)
        module.logits(later)
        method.end(module.network)

    def entropy(out):
        return float(-(out.softmax(1) * out.log_softmax(1)).sum(1).mean())

    assert entropy(second) < entropy(first)
    torch.testing.assert_close(module.network.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(first, logits(small_classifier(AdaBN()), batch))
    assert all(p.grad is None for p in module.network.parameters())


def test_the_learned_loss_adapts_and_is_learned():
    module = small_classifier(ARMLL(inner_lr=0.5))
    batch = make_batch()
    with torch.no_grad():
        adapted = logits(module, batch)
        assert adapted.requires_grad is False
    still = small_classifier(ARMLL(inner_lr=0.0))
    assert not torch.allclose(adapted, logits(still, batch))
    torch.testing.assert_close(logits(still, batch), logits(small_classifier(ARMBN()), batch))
    with torch.inference_mode():
        torch.testing.assert_close(logits(module, make_batch()), adapted)
    F.cross_entropy(logits(module, batch, training=True), batch.label).backward()
    assert all(
        p.grad is not None and p.grad.any() for p in module.method.loss_net[:-1].parameters()
    )


def test_the_inner_step_is_gradient_descent():
    module = small_classifier(ARMLL(inner_lr=0.3))
    batch = make_batch()
    expected = copy.deepcopy(module.network)
    with use_context(expected, module.method.context(training=False)):
        torch.linalg.vector_norm(module.method.loss_net(expected(batch.query))).backward()
        with torch.no_grad():
            for p in expected.parameters():
                p -= 0.3 * p.grad
        out = expected(batch.query)
    torch.testing.assert_close(logits(module, batch), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapt_bn", [True, False])
def test_context_channels_join_the_input(adapt_bn):
    """With ``adapt_bn`` both networks are as ordinary ones in training mode, at test too."""
    module = small_classifier(ARMCML(channels=5, hidden=8, adapt_bn=adapt_bn))
    assert module.network.conv1.in_channels == 8
    batch = make_batch()
    with torch.no_grad():
        plain = copy.deepcopy(module).train(adapt_bn)
        mean = plain.method.context_net(batch.query).mean(0, keepdim=True)
        rows = torch.cat([batch.query, mean.expand(L, -1, -1, -1)], 1)
        expected = plain.network(rows)
        torch.testing.assert_close(logits(module, batch), expected)


# --- TVN ------------------------------------------------------------------------------------------


def test_tvn_aligns_plates():
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 6, 6, generator=g).double()
    clean = torch.randn(2, 200, 6, generator=g).double()
    plates = [clean[i] @ mixing[i] + 3 * i for i in range(2)]
    reference = fit_tvn(torch.cat(plates), torch.arange(2).repeat_interleave(200), ridge=1e-9)
    aligned = [tvn(reference, x, x, ridge=1e-9) for x in plates]
    for images, bound in ((plates, (0.5, 9.0)), (aligned, (0.0, 0.01))):
        covariances = [torch.cov(x.T) for x in images]
        difference = (covariances[0] - covariances[1]).norm() / covariances[0].norm()
        assert bound[0] <= difference <= bound[1]
    torch.testing.assert_close(aligned[0].mean(0), aligned[1].mean(0))


def test_tvn_is_its_definition():
    """Against a direct computation, for one plate, where alignment is the identity."""
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).double()
    reference = fit_tvn(z, torch.zeros(50))
    own = tvn(reference, z, z)
    standard = (z - z.mean(0)) / z.std(0, correction=0)
    _, axes = torch.linalg.eigh(torch.cov(standard.T))
    u = standard @ axes
    torch.testing.assert_close(own.abs(), (u / u.std(0, correction=0)).abs(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [2, 30])
def test_tvn_survives_few_controls_and_constant_features(size):
    g = torch.Generator().manual_seed(2)
    controls = torch.randn(size, 40, generator=g)
    controls[:, 3] = 1.0
    reference = fit_tvn(controls, torch.arange(size) % 2)
    out = tvn(reference, torch.randn(5, 40, generator=g), controls[:1])
    assert out.isfinite().all()
    with pytest.raises(DataError, match="without controls"):
        tvn(reference, controls, controls[:0])
    with pytest.raises(DataError, match="1 control"):
        fit_tvn(controls[:1], torch.zeros(1))


def test_tvn_trains_a_linear_head_only():
    module = fitted(TVN())
    learning = {n for n, p in module.named_parameters() if p.requires_grad}
    assert learning == {"method.head.weight", "method.head.bias"}
    with pytest.raises(ConfigError, match="not fitted"):
        logits(small_classifier(TVN()), make_batch())


# --- networks without BatchNorm -------------------------------------------------------------------


class PatchTransformer(nn.Module):
    """A vision transformer in small: patches, attention with dropout, LayerNorm, a head."""

    def __init__(self, channels, classes):
        super().__init__()
        self.patches = nn.Conv2d(channels, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x):
        tokens = self.layer(self.patches(x).flatten(2).transpose(1, 2))
        return self.classifier(self.norm(tokens).mean(1))


def make_transformer(method):
    torch.manual_seed(0)
    return PlateClassifier(PatchTransformer, method, num_classes=K, in_channels=3)


@pytest.mark.parametrize("kind", [TVN, LinearProbe])
def test_embeddings_of_a_transformer_are_frozen_and_without_dropout(kind):
    module = make_transformer(kind())
    plates = [make_batch(i, i) for i in range(3)]
    module.method.begin(module.network, plates, training=True)
    assert module.train().network.training is False
    batch = make_batch()
    first, second = (logits(module, batch, training=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    learned = {name for name, p in module.named_parameters() if p.requires_grad}
    assert learned == {"method.head.weight", "method.head.bias"}
    with torch.no_grad():
        features = embed(module.network, batch.query)
    assert torch.equal(module.network.classifier(features), module.network(batch.query))


class LazyNetwork(nn.Sequential):
    def __init__(self, channels, classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(8), nn.LayerNorm(8), nn.Linear(8, classes))


@pytest.mark.parametrize("kind", [TVN, LinearProbe])
def test_layers_that_take_their_size_from_the_first_batch_are_frozen_too(kind):
    module = PlateClassifier(LazyNetwork, kind(), num_classes=K, in_channels=3)
    plates = [make_batch(i, i) for i in range(3)]
    module.method.begin(module.network, plates, training=True)
    assert logits(module, plates[0]).shape == (L, K)
    assert not any(parameter.requires_grad for parameter in module.network.parameters())


def test_a_linear_probe_is_a_linear_layer_on_standardised_embeddings():
    module = make_transformer(LinearProbe())
    plates = [make_batch(i, i) for i in range(3)]
    module.method.begin(module.network, plates, training=True)
    with torch.no_grad():
        rows = torch.cat([embed(module.network, b.query) for b in plates]).double()
        z = (rows - rows.mean(0)) / rows.std(0, correction=0)
        expected = module.method.head(z[:L].float())
    torch.testing.assert_close(logits(module, plates[0]), expected)
    without = change_images(plates[0], control=plates[0].control[:0])
    torch.testing.assert_close(logits(module, without), expected)


def test_a_number_that_never_varies_in_training_does_not_drown_the_others_at_test():
    module = PlateClassifier(EmbeddingHead(6, K), LinearProbe(), num_classes=K, in_channels=6)
    plates = [make_batch(i, i) for i in range(3)]
    plates = [b._replace(images=b.images.flatten(1)[:, :6, None, None]) for b in plates]
    for batch in plates:
        batch.images[:, 0] = 0  # as of a ReLU that is dead on the plates of the training
    module.method.begin(module.network, plates, training=True)
    before = logits(module, plates[0])
    plates[0].images[:, 0] = 0.1
    assert 0 < (logits(module, plates[0]) - before).abs().max() < 1


@pytest.mark.parametrize("method", ALL)
def test_methods_say_whether_they_need_batchnorm(method):
    needs = {AdaBN, ARMBN, CSARMBN, AdaptiveWeight, Weighted, ControlsOnly, TENT}
    assert method().needs_batchnorm == (method in needs)
    if method in needs:
        with pytest.raises(ConfigError, match=r"has LayerNorm.*TVN or LinearProbe"):
            make_transformer(method())
        return
    module = make_transformer(method())
    if isinstance(module.method, LinearProbe):
        module.method.begin(module.network, [make_batch(i, i) for i in range(2)], training=True)
    assert logits(module, make_batch()).shape == (L, K)


def test_a_network_whose_head_sees_tokens_has_no_embedding():
    network = nn.Sequential(nn.Flatten(2), nn.Linear(144, K))
    with pytest.raises(ConfigError, match="not one vector for each"):
        embed(network, torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize("hidden", [0, 6])
def test_embeddings_of_elsewhere_have_a_head(hidden):
    network = EmbeddingHead(5, K, hidden)
    x = torch.randn(6, 5, 1, 1)
    assert network(x).shape == network(x.flatten(1)).shape == (6, K)
    if hidden:
        converted = convert_batchnorm(network)
        with context(converted, "controls", n_query=2):
            alone = converted(x)[:1]
        with context(converted, "controls", n_query=1):
            other = converted(torch.cat([x[:1], x[2:]]))[:1]
        torch.testing.assert_close(other, alone)


def test_one_value_of_each_channel_is_refused_in_training():
    converted = convert_batchnorm(EmbeddingHead(5, K, hidden=6)).train()
    with (
        context(converted, "ordinary", n_query=1),
        pytest.raises(ConfigError, match=r"one value of each channel.*episodes.queries"),
    ):
        converted(torch.randn(1, 5))


# --- networks of other libraries ------------------------------------------------------------------


def test_a_network_of_transformers_takes_part_in_all(tmp_path):
    """Its outputs are objects with logits, and its first layer has three channels."""
    config = pytest.importorskip("transformers").ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    factory = "transformers.ResNetForImageClassification"
    network = Backbone(5, K, factory, {"config": config}, input_norm="context")
    assert network(torch.randn(6, 5, 32, 32)).shape == (6, K)
    assert network.features(torch.randn(6, 5, 32, 32)).flatten(1).shape == (6, 8)
    assert network.head.out_features == K
    converted = convert_batchnorm(network)
    x = torch.randn(6, 5, 32, 32)
    with context(converted, "union", n_query=2):
        together = converted(x)
    with context(converted, "union", n_query=2):
        scaled = converted(3 * x + 2)  # of all channels alike, which the input norm undoes
    torch.testing.assert_close(scaled, together, rtol=1e-3, atol=1e-3)


def test_exchanged_layers_keep_what_they_can():
    sizes = {"in_channels": 3, "num_classes": 10}
    torch.manual_seed(0)
    network = Backbone(5, K, "fulgurite.layers.ResNet18", sizes)
    torch.manual_seed(0)
    plain = ResNet18Plain(**sizes)
    grey = torch.randn(2, 1, 16, 16)
    with torch.no_grad():  # an image whose channels are equal looks the same
        torch.testing.assert_close(
            network.inner.conv1(grey.expand(-1, 5, -1, -1)), plain.conv1(grey.expand(-1, 3, -1, -1))
        )
    assert network.inner.fc.out_features == K
    same = Backbone(3, 10, "fulgurite.layers.ResNet18", sizes)
    assert same.inner.conv1.weight.shape == plain.conv1.weight.shape


@pytest.mark.parametrize(
    ("factory", "arguments", "says"),
    [
        ("no_such_library.create_model", {}, "cannot be found"),
        ("fulgurite.layers.ResNet19", {}, "cannot be found"),
        ("fulgurite.layers.ResNet18", {"channels": 3}, "cannot make a network"),
        ("torch.nn.Linear", {"in_features": 1, "out_features": 1}, "no Conv2d layer"),
        ("torch.zeros", {"size": [1]}, "makes a Tensor"),
    ],
)
def test_what_is_no_network_of_another_library_is_refused(factory, arguments, says):
    with pytest.raises(ConfigError, match=says):
        Backbone(5, 8, factory, arguments)


class TwoHeads(nn.Module):
    """Its logits are the mean of two heads, as those of a distilled network."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head, self.teacher = nn.Linear(4, classes), nn.Linear(4, classes)

    def forward(self, x):
        x = self.bn(self.conv(x)).mean((2, 3))
        return (self.head(x) + self.teacher(x)) / 2


def test_of_several_heads_all_must_fit():
    factory = f"{__name__}.TwoHeads"
    with pytest.raises(ConfigError, match=r"2 linear layers with 10 outputs.*head, teacher"):
        Backbone(5, K, factory)
    network = Backbone(5, K, factory, {"classes": K})
    assert network(torch.randn(6, 5, 8, 8)).shape == (6, K)


class Unreachable(nn.Module):
    def __init__(self):
        raise OSError("We could not connect\nto the hub")


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        y = self.fc(self.conv(x).mean((2, 3)))
        return y, y


def test_unreachable_weights_are_one_line():
    with pytest.raises(ConfigError, match="We could not connect to the hub") as caught:
        Backbone(5, K, f"{__name__}.Unreachable")
    assert "\n" not in caught.value.problem


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(ConfigError, match="gives tuple for 6 images and 4 classes"):
        Backbone(5, 4, f"{__name__}.TwoOutputs")(torch.randn(6, 5, 8, 8))


# --- the module -----------------------------------------------------------------------------------


def test_one_checkpoint_fits_all_methods_without_parameters():
    state = small_classifier(ERM()).state_dict()
    for method in (AdaBN(), ARMBN(), CSARMBN(), AdaptiveWeight(), ControlsOnly(), TENT()):
        assert small_classifier(method).load_state_dict(state) == ([], [])  # nothing else


def test_a_network_starts_from_a_checkpoint(tmp_path):
    trained = small_classifier(ERM())
    with torch.no_grad():
        trained.network.conv1.weight.zero_()
    file = tmp_path / "erm.ckpt"
    torch.save({"state_dict": trained.state_dict()}, file)
    assert not small_classifier(TVN(), weights=str(file)).network.conv1.weight.any()
    torch.save(trained.network.state_dict(), file)
    assert not small_classifier(weights=str(file)).network.conv1.weight.any()
    with pytest.raises(CheckpointError, match="not a file"):
        small_classifier(weights=str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {"network.conv1.weight": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match="does not fit"):
        small_classifier(weights=str(file))
    file.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        small_classifier(weights=str(file))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PlateClassifier(SmallResNet, num_classes=1), "num_classes=1"),
        (lambda: CSARMBN(test_source="stored"), "test_source"),
        (lambda: CSARMBN(test_weight=2.0), "weight=2.0"),
        (lambda: Weighted(-0.1), "weight=-0.1"),
        (lambda: ARMCML(rows="all"), "rows"),
        (lambda: ARMLL(rows="controls"), "rows"),
        (lambda: TENT(steps=0), "steps=0"),
        (lambda: SmallResNet(3, 4, input_norm="plate"), "input_norm"),
        (lambda: PlateClassifier(lambda c, k: nn.Linear(c, k)), "no BatchNorm"),
        (lambda: PlateClassifier(NoHead, TVN(), num_classes=K, in_channels=3), "no linear layer"),
    ],
)
def test_wrong_settings_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


class NoHead(nn.Sequential):
    def __init__(self, channels, classes):
        super().__init__(nn.Conv2d(channels, classes, 1), nn.BatchNorm2d(classes))


@pytest.mark.parametrize("label", [-1, K])
def test_labels_outside_the_classes_are_refused_in_training(label):
    batch = make_batch()
    batch.label[2] = label
    with pytest.raises(DataError, match="labels from"):
        small_classifier().training_step(batch, 0)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape", "dim"),
    [
        (lambda: SmallResNet(5, 3, width=4), (2, 5, 8, 8), 16),
        (lambda: PlateResNet18(5, 3), (2, 5, 8, 8), 512),
        (lambda: PlateResNet50(5, 3), (2, 5, 65, 40), 2048),
        (lambda: PlateResNet50(5, 3, stem="cifar", input_norm="context"), (2, 5, 8, 8), 2048),
    ],
)
def test_networks(make, shape, dim):
    network = convert_batchnorm(make()).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        assert network.features(x).shape == (2, dim)
        torch.testing.assert_close(
            network(x), (getattr(network, "head", None) or network.fc)(network.features(x))
        )


def test_the_papers_network_shrinks_by_pooling_only():
    network = PlateResNet50(5, 8)
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n for n, m in convolutions.items() if m.stride != (1, 1)} == {"conv1"}
    assert sum(isinstance(m, nn.AvgPool2d) for m in network.modules()) == 6
    x = torch.randn(1, 5, 96, 96)
    with torch.no_grad():
        x = F.max_pool2d(network.conv1(x), 3, 2, padding=1)
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = stage.eval()(x)
    assert x.shape == (1, 2048, 3, 3)
