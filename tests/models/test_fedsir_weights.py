"""Own pretrained weights are where Stage I and the federation start."""

import pytest
import torch
from safetensors.torch import save_file

from fulgurite.callbacks.fedsir import FederatedRounds
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir import DigitsNet, FederatedClassifier
from fulgurite.models.fedsir.methods import SpectralIdentification

WEIGHTS = "--model.init_args.weights="


def test_stage_one_trains_from_the_weights_of_a_file(fit, monkeypatch):
    torch.manual_seed(7)
    network = DigitsNet(1, 10)
    state = network.state_dict()
    save_file(state, "own.safetensors")
    starts = []
    identify = SpectralIdentification.__call__

    def record(self, fed, **options):
        starts.append(fed.global_state.clone())
        return identify(self, fed, **options)

    monkeypatch.setattr(SpectralIdentification, "__call__", record)
    cli = fit(f"{WEIGHTS}own.safetensors", "--trainer.max_epochs=1", "--run.dir=run")
    (rounds,) = (c for c in cli.trainer.callbacks if isinstance(c, FederatedRounds))
    rounds.engine.fed.state.write(starts[0])
    began = cli.model.network.state_dict()
    assert all(torch.equal(began[key], value) for key, value in state.items())


@pytest.mark.slow  # files are starts above, and in tests/platform/test_weights.py
def test_a_checkpoint_of_a_run_is_a_start_for_another(fit):
    first = fit("--trainer.max_epochs=1", "--run.dir=first")
    second = FederatedClassifier(DigitsNet, num_classes=10, weights="first/checkpoints/last.ckpt")
    ends = first.model.network.state_dict()
    assert all(torch.equal(second.network.state_dict()[k], v) for k, v in ends.items())


def test_weights_of_another_network_are_refused_and_a_head_may_differ(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save(DigitsNet(1, 10, hidden=16).state_dict(), path)
    with pytest.raises(ConfigError, match=r"of another shape or kind: body\.1"):
        FederatedClassifier(DigitsNet, num_classes=10, weights=path)
    torch.save(DigitsNet(1, 10).state_dict(), path)
    with pytest.warns(UserWarning, match="starts untrained"):
        model = FederatedClassifier(DigitsNet, num_classes=7, weights=path)
    assert model.network.head.out_features == 7
