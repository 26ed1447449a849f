"""Models made from their architectures, in double precision."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fulgurite.testing.transformers_models.architectures import CLASSES, OPTIONS, Architecture

__all__ = ["build_model", "comes_from_transformers", "use_float64"]


def build_model(architecture: Architecture, seed: int = 0) -> Any:
    """Make a model in float64 whose attention matters.

    The usual small random weights make nearly uniform attention weights, under which a lost mask
    or bias hardly shows. So small matrices are multiplied by 6, and sinks, relative positions,
    zero biases and zero norms are drawn anew.

    Args:
        architecture: Which.
        seed: Seed of the weights.

    Returns:
        The model, in eval mode, without an end-of-sequence token that would stop generation.
    """
    import transformers

    options = {**OPTIONS[architecture.kind], **architecture.options}
    config = transformers.AutoConfig.for_model(
        architecture.model_type or architecture.name,
        **{key: value for key, value in options.items() if key not in architecture.omitted},
    )
    model_class = getattr(transformers, architecture.model_class or CLASSES[architecture.kind])
    make = getattr(model_class, "from_config", None) or model_class._from_config
    # the default for experts, grouped_mm, has no float64
    options = {"experts_implementation": "eager"}
    if architecture.attention:
        options["attn_implementation"] = architecture.attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config, **options).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _strengthen(name, parameter)
    if getattr(model, "generation_config", None) is not None:
        for key in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
            setattr(model.generation_config, key, None)
    return model


def _strengthen(name: str, parameter: Tensor) -> None:
    if any(word in name for word in ("sink", "relative", "position_bias", "rel_pos")):
        parameter.normal_()
    elif parameter.ndim > 1:
        if parameter.numel() > 1 and 0 < parameter.std() < 0.06:
            parameter.mul_(6)
    elif not parameter.any():
        parameter.normal_(0, 0.1)


class _InFloat64(TorchFunctionMode):
    """Lets transformers compute in float64 what it computes in float32 whatever the model's type.

    Its eager attention takes the softmax in float32, and most norms are in float32, so that
    nothing could be compared closer than to 1e-7. Only calls from transformers itself are
    changed, not those of the attention that is judged.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        single = func is torch.Tensor.float or any(
            argument is torch.float32 for argument in (*args, *kwargs.values())
        )
        if single and comes_from_transformers(sys._getframe(1)):
            if func is torch.Tensor.float:
                return args[0].double()
            args = [torch.float64 if x is torch.float32 else x for x in args]
            kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in kwargs.items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def use_float64() -> Iterator[None]:
    """As in a step of a Trainer with ``precision="64-true"``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


def comes_from_transformers(frame: Any) -> bool:
    """Whether transformers called what runs in a frame, itself or through functions of torch."""
    # past torch's own frames, such as functional.softmax, to whoever called them
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("transformers.")
