"""Puts streamed attention in place of PyTorch's functions and of attributes of modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.attention import Streamed
from fulgurite.errors import ConfigError

__all__ = ["exchange_attribute", "streamed_sdpa"]


def exchange_attribute(module: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Put a value in place of an attribute, which may be a module; return what puts it back.

    Raises:
        ConfigError: The attribute cannot be set, as a property.
    """
    before = getattr(module, name)
    is_own = name in vars(module) or name in module._modules  # else it is the class's

    def put(new: object) -> None:
        if name in vars(module) or name in module._modules:
            delattr(module, name)  # a module keeps modules elsewhere than other values
        setattr(module, name, new)

    try:
        put(value)
    except AttributeError as error:
        raise ConfigError(
            f"{type(module).__name__}.{name} cannot be set ({error}).",
            f"Make it an attribute: self.{name} = InCore() in __init__.",
        ) from error
    return lambda: put(before) if is_own else delattr(module, name)


@contextmanager
def streamed_sdpa(backend: Streamed) -> Iterator[None]:
    """Replace ``F.scaled_dot_product_attention`` by a backend.

    ``nn.MultiheadAttention`` goes there too: its fast path is switched off meanwhile, and the
    averaged weights that it returns by default, which streamed attention never has, are None.

    Args:
        backend: Called instead.

    Example:
        >>> q, backend = torch.ones(1, 1, 4, 8), Streamed()
        >>> with streamed_sdpa(backend):
        ...     _ = F.scaled_dot_product_attention(q, q, q)
        >>> backend.calls
        1
    """
    original = F.scaled_dot_product_attention

    def streamed(  # noqa: PLR0917 (PyTorch's order)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise ConfigError(
                f"The model drops attention weights (p = {dropout_p}); streamed attention does "
                "not.",
                "Set the attention dropout of the model to 0.",
            )
        return backend(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    multi_head = F.multi_head_attention_forward

    @functools.wraps(multi_head)
    def without_weights(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = inspect.signature(multi_head).bind(*args, **kwargs)
        # with weights PyTorch looks at the mask, not the hint; a hint alone it refuses
        has_mask = call.arguments.get("attn_mask") is not None
        if has_mask and call.arguments.get("need_weights", True):
            call.arguments["is_causal"] = False
        call.arguments["need_weights"] = False
        return multi_head(*call.args, **call.kwargs)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention, F.multi_head_attention_forward = streamed, without_weights
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.multi_head_attention_forward = original, multi_head
        torch.backends.mha.set_fastpath_enabled(fast)
