"""From Python: networks are given in one way everywhere, and models fit their data."""

import lightning.pytorch as L
import pytest
import torch
import yaml
from fakes.ice_layers import completion_net
from fakes.trainers import quiet_trainer
from jsonargparse import ArgumentParser

from fulgurite.callbacks.cs_arm_bn import ControlContext
from fulgurite.callbacks.fedsir import FederatedRounds
from fulgurite.errors import ConfigError
from fulgurite.layers.transformer import TransformerConfig
from fulgurite.models.cs_arm_bn import PlateClassifier, SmallResNet
from fulgurite.models.fedsir import FederatedClassifier
from fulgurite.models.fedsir.network import DigitsNet
from fulgurite.models.ice_layers import CompletionNet, CompletionPrediction, IceCompletion
from fulgurite.models.number_probing import NumberLM
from fulgurite.models.number_probing.backbones import TransformerBackbone
from fulgurite.models.stream_cqsa import Decoder, LanguageModel
from fulgurite.systems import config_path


@pytest.fixture
def data_of(workdir):
    """The DataModule of a system's smallest configuration."""

    def make(system):
        content = yaml.safe_load(config_path(f"{system}/smoke.yaml").read_text())
        parser = ArgumentParser()
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        return parser.instantiate_classes(parser.parse_object({"data": content["data"]})).data

    return make


def backbone():
    return TransformerBackbone(width=16, layers=1, heads=2)


def decoder(vocab_size=256):
    return Decoder(vocab_size, TransformerConfig(16, layers=1, heads=2))


SYSTEMS = {
    # model from a network, the network as an instance, what makes it, callbacks
    "fedsir": (
        lambda n: FederatedClassifier(n, num_classes=10, in_channels=1),
        lambda: DigitsNet(1, 10), DigitsNet, FederatedRounds,
    ),
    "cs_arm_bn": (
        lambda n: PlateClassifier(n, num_classes=8, in_channels=5),
        lambda: SmallResNet(5, 8, width=4), SmallResNet, ControlContext,
    ),
    "stream_cqsa": (LanguageModel, decoder, decoder, None),
    "number_probing": (lambda n: NumberLM(n, vocab_size=32), backbone, backbone, None),
    "ice_layers": (
        IceCompletion, lambda: completion_net(8, 5, width=16, heads=2, depth=1), CompletionNet, None
    ),
}  # fmt: skip


def trainer_with(callback):
    callbacks = [callback()] if callback else []
    return quiet_trainer(max_epochs=1, limit_val_batches=1, callbacks=callbacks)


@pytest.mark.parametrize("form", [pytest.param("instance", marks=pytest.mark.slow), "factory"])
@pytest.mark.parametrize(
    "system",
    [pytest.param(s, marks=pytest.mark.slow if s == "ice_layers" else []) for s in SYSTEMS],
)
def test_a_network_is_an_instance_or_what_makes_it(data_of, system, form):
    make, instance, factory, callback = SYSTEMS[system]
    data = data_of(system)
    model = make(instance() if form == "instance" else factory)
    trainer = trainer_with(callback)
    trainer.fit(model, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert not any("make_network" in name for name in model.state_dict())
    # what the progress bar shows at 80 columns without cutting a name
    shown = trainer.progress_bar_metrics
    assert len(shown) <= 3
    assert all(len(name) <= 15 for name in shown), shown


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_no_network_is_refused_by_name(system, data_of):
    make, _, _, callback = SYSTEMS[system]
    with pytest.raises(ConfigError, match=r"(network|backbone) is a str"):
        trainer_with(callback).fit(make("resnet"), datamodule=data_of(system))


@pytest.mark.parametrize(
    ("system", "model", "words"),
    [
        ("number_probing", lambda: NumberLM(backbone()), r"and the model was made for 1002.*vocab"),
        ("stream_cqsa", lambda: LanguageModel(decoder(100)), "256 different tokens.* knows 100"),
        (
            "fedsir",
            lambda: FederatedClassifier(DigitsNet, num_classes=9),
            "10 classes.* made for 9",
        ),
        (
            "fedsir",
            lambda: FederatedClassifier(DigitsNet, in_channels=3),
            "1 channels.* made for 3",
        ),
        (
            "cs_arm_bn",
            lambda: PlateClassifier(SmallResNet, num_classes=3),
            "made for 3.*num_classes",
        ),
        ("ice_layers", lambda: IceCompletion(CompletionNet(5, 5)), "layers"),
    ],
)
def test_a_model_of_other_sizes_than_the_data_is_refused_before_training(
    data_of, system, model, words
):
    with pytest.raises(ConfigError, match=words):
        trainer_with(SYSTEMS[system][3]).fit(model(), datamodule=data_of(system))


def test_an_ensemble_needs_what_makes_its_networks():
    with pytest.raises(ConfigError, match=r"members=3, and there is one network\. .*CompletionNet"):
        IceCompletion(CompletionNet(8, 5), prediction=CompletionPrediction(members=3))
