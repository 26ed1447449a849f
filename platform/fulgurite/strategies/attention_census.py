"""Counts the attention of a model by module, streamed or not.

Axes: B batch, H heads, M queries, N keys.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulgurite.attention import Streamed

__all__ = ["AttentionCensus", "take_census"]

_FUSED = (
    "_scaled_dot_product", "_flash_attention", "_efficient_attention", "_native_multi_head",
    "_transformer_encoder_layer",
)  # fmt: skip
_SOFTMAX = ("_softmax", "_safe_softmax")
_PRODUCTS = ("bmm", "baddbmm", "mm", "addbmm")
# Operations whose result is attention weights still if what they are given is.
_KEEPS = (
    "_to_copy", "clone", "native_dropout", "mul", "div", "copy", "constant_pad_nd", "where", "add",
    "sub", "masked_fill", "nan_to_num", "repeat", "cat", "index", "index_select",
)  # fmt: skip


class AttentionCensus(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a step: each call of a fused kernel, or product of a softmax with values, counts.

    Attention that has no softmax (linear attention, state spaces) is not seen.

    Args:
        backend: What it computes is streamed, and is not looked at.
    """

    def __init__(self, backend: Streamed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backend = backend
        self.unstreamed: Counter[str] = Counter()
        self.modules: list[str] = []
        self._weights: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note what an operation is, and do it."""
        result = func(*args, **(kwargs or {}))
        if self.backend.is_running:
            return result
        name = func.overloadpacket.__name__
        if name.startswith(_FUSED) and "backward" not in name:
            self._count()
        elif self._gives_weights(name, args):
            self._remember(result)
        elif name in _PRODUCTS and self._are_weights(args[:2]):
            self._count()
        return result

    def _gives_weights(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether an operation gives attention weights, as far as one can tell."""
        if name in _SOFTMAX:
            return bool(args[0].ndim >= 3 and args[0].shape[-1] > 1)
        return name in _KEEPS and self._are_weights(args)

    def _count(self) -> None:
        self.unstreamed[self.modules[-1] if self.modules else ""] += 1

    def _remember(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._weights[_storage(tensor)] = weakref.ref(tensor)

    def _are_weights(self, args: Any) -> bool:
        """Whether a tensor shares its numbers with a softmax that is alive."""
        for tensor in tree_leaves(args):
            if isinstance(tensor, Tensor) and tensor.ndim >= 3:
                alive = self._weights.get(_storage(tensor))
                if alive is not None:
                    return True
        return False


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.device.type != "meta" else id(tensor)


@contextmanager
def take_census(model: nn.Module, backend: Streamed) -> Iterator[AttentionCensus]:
    """Watch what runs within, by module of a model.

    Args:
        model: Whose modules are named.
        backend: The backend that streams; what it computes is not looked at.
    """
    names = {id(module): name for name, module in model.named_modules()}
    census = AttentionCensus(backend)

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            census.modules.append(names[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names and census.modules:
            census.modules.pop()

    removers: list[Callable[[], None]] = [
        register_module_forward_pre_hook(enter).remove,
        register_module_forward_hook(leave, always_call=True).remove,
    ]
    try:
        with census:
            yield census
    finally:
        for remove in removers:
            remove()
