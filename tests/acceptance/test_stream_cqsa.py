"""Language models on text that repeats, which they must learn."""

from functools import partial

import pytest
import torch
from fakes.stream_cqsa import load_batches, repeating_batches, small_network
from fakes.trainers import quiet_trainer

from fulgurite.models.stream_cqsa import Encoder, MaskedLanguageModel

pytestmark = pytest.mark.slow


def test_a_masked_language_model_learns():
    torch.manual_seed(0)
    model = MaskedLanguageModel(
        small_network(Encoder, width=32), partial(torch.optim.Adam, lr=0.003), loss_chunk=10
    )
    data = load_batches([{"tokens": batch["tokens"]} for batch in repeating_batches(size=8)])
    (first,) = quiet_trainer().validate(model, data, verbose=False)
    (again,) = quiet_trainer().validate(model, data, verbose=False)
    assert first == again
    run = quiet_trainer(max_steps=200)
    run.fit(model, data)
    (after,) = run.validate(model, data, verbose=False)
    assert after["val/loss"] < 0.5  # without context: log(5)
