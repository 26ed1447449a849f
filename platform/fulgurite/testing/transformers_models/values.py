"""What a model computes in a mode, and what its inputs change of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from fulgurite.testing.transformers_models.architectures import (
    BATCH,
    NEW,
    PROMPT,
    TOKENS,
    VOCABULARY,
    Architecture,
)
from fulgurite.testing.transformers_models.batches import (
    _draw_numbers,
    _draw_tokens,
    _mask_padding,
    make_batch,
)
from fulgurite.testing.transformers_models.building import _InFloat64, use_float64

__all__ = ["Values", "compute_values", "measure_influence"]


Values = dict[str, Tensor]


def _pick_output(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    output: Tensor = outputs.last_hidden_state if logits is None else logits
    return output


def _run_step(architecture: Architecture, model: Any, mode: str) -> Values:
    """Loss and outputs of a training step."""
    batch = make_batch(architecture, model, mode)
    outputs = model(**batch.inputs)
    output = _pick_output(outputs)
    rows = output.flatten(0, 1) if batch.real is None else output[batch.real]
    loss = getattr(outputs, "loss", None)
    if loss is None:
        loss = (rows * _draw_numbers(*rows.shape, seed=4)).sum() / math.sqrt(rows.numel())
    return {"loss": loss, "output": rows}


def _run_generation(architecture: Architecture, model: Any, mode: str) -> Values:
    """Tokens and the logits of each step."""
    batch = make_batch(architecture, model, "plain")
    inputs: dict[str, Any] = {
        key: x for key, x in batch.inputs.items() if key not in ("labels", "decoder_input_ids")
    }
    if architecture.kind != "speech2seq":
        inputs = {key: x[:, :PROMPT] for key, x in inputs.items()}
    if mode in ("generate_left_padding", "generate_right_padding"):
        mask = _mask_padding(mode.split("_")[1], PROMPT)
        inputs |= {"input_ids": inputs["input_ids"].where(mask.bool(), 0), "attention_mask": mask}
    if mode == "static_cache":
        inputs |= {"cache_implementation": "static", "disable_compile": True}
    result = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=NEW, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {
        "output": torch.stack(result.logits, 1).flatten(0, 1),
        "tokens": result.sequences[:, -NEW:],
    }


def _run_chunks(architecture: Architecture, model: Any, mode: str) -> Values:
    """Logits of a sequence that comes in three parts, with a cache."""
    import transformers

    tokens = _draw_tokens(BATCH, TOKENS)
    cache = transformers.DynamicCache(config=model.config)
    logits = []
    for part in tokens.tensor_split([19, TOKENS - 1], 1):
        outputs = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return {"output": torch.cat(logits, 1).flatten(0, 1)}


def _run_twice(architecture: Architecture, model: Any, mode: str) -> Values:
    """How far earlier outputs move with the last token, in units of the largest."""
    batch = make_batch(architecture, model, "plain")
    inputs = {key: x for key, x in batch.inputs.items() if key != "labels"}
    key = "input_ids" if architecture.kind == "causal" else "decoder_input_ids"
    other = inputs[key].clone()
    other[:, -1] = (other[:, -1] - 3 + 40) % (VOCABULARY - 3) + 3
    first, second = (
        _pick_output(model(**{**inputs, key: x}))[:, :-1] for x in (inputs[key], other)
    )
    return {"movement": ((second - first).abs().max() / first.abs().max())[None]}


_RUNS: Mapping[str, Callable[[Architecture, Any, str], Values]] = {
    "generate": _run_generation, "generate_left_padding": _run_generation,
    "generate_right_padding": _run_generation, "static_cache": _run_generation,
    "chunked_prefill": _run_chunks, "causality": _run_twice,
}  # fmt: skip


class _Probe(LightningModule):
    """Runs one step of a model, and keeps what it computes."""

    def __init__(self, model: Any, compute: Callable[[], Values]) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        self.values: Values = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = self.compute()
        self.values = {key: value.detach() for key, value in values.items()}
        return values["loss"]

    def on_after_backward(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.values[f"grad {name}"] = parameter.grad.detach().clone()

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.values = self.compute()

    def train_dataloader(self) -> list[int]:
        return [0]

    def predict_dataloader(self) -> list[int]:
        return [0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@contextlib.contextmanager
def _checkpoint_layers(model: Any) -> Iterator[None]:
    """Compute layers again in backward, when the forward pass is long over."""
    # autograd leaves modes behind, so that what is computed again needs one of its own
    contexts = {"context_fn": lambda: (contextlib.nullcontext(), _InFloat64())}
    model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the Trainer and transformers from logging once a cell."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def compute_values(
    architecture: Architecture, model: Any, mode: str, strategy: Strategy | str = "auto"
) -> Values:
    """Run a model in a mode through the Trainer.

    Args:
        architecture: Which.
        model: Its model.
        mode: One of :data:`MODES` or :data:`EXTRA_MODES`.
        strategy: Strategy of the Trainer.

    Returns:
        What is compared, by name: ``output`` with one real token a row, ``loss``, ``tokens``, and
        ``grad …`` for each parameter that has a gradient.
    """
    run = _RUNS.get(mode, _run_step)
    probe = _Probe(model, functools.partial(run, architecture, model, mode))
    model.zero_grad(set_to_none=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(_InFloat64())
        if mode == "checkpointing":
            stack.enter_context(_checkpoint_layers(model))
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, precision="64-true", max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        if run is _run_step:
            trainer.fit(probe)
        else:
            trainer.predict(probe)
    model.zero_grad(set_to_none=True)
    return probe.values


def measure_influence(architecture: Architecture, model: Any) -> float:
    """Measure how far outputs move with the input at another position.

    If this is not far above the tolerance of the judge, attention hardly matters and the judge is
    blind.

    Args:
        architecture: Which.
        model: Its model.

    Returns:
        The largest movement, relative to the largest output; of an encoder-decoder the smaller of
        those with its encoder's and with its decoder's input.
    """
    batch = make_batch(architecture, model, "plain")
    inputs = {key: x for key, x in batch.inputs.items() if key != "labels"}
    movements = []
    for key, x in inputs.items():
        if key == "token_type_ids":
            continue
        other, start = x.clone(), 4
        if key == "pixel_values":
            other[..., : x.shape[-1] // 7, : x.shape[-1] // 7] *= -1  # the first patch
            start = 8
        elif x.is_floating_point():
            time = 1 if x.shape[1] > x.shape[-1] else -1
            other.narrow(time, 0, x.shape[time] // 12).mul_(-1)
            start = 16
        else:
            other[:, 3] = (other[:, 3] - 3 + 40) % (VOCABULARY - 3) + 3
        if key != "decoder_input_ids" and "decoder_input_ids" in inputs:
            start = 0
        with torch.no_grad(), use_float64():
            first, second = (_pick_output(model(**{**inputs, key: value})) for value in (x, other))
        moved = (second - first)[:, start:].abs().max() / first.abs().max()
        movements.append(float(moved))
    return min(movements)
