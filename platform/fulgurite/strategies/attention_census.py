"""Counts the attention of a model by module, streamed or not.

Axes: B batch, H heads, M queries, N keys.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fulgurite.attention import Streamed

__all__ = ["AttentionCensus", "take_census"]

# Parts of the names of fused kernels, of PyTorch and of flash-attn, xFormers and others
_FUSED = ("attention", "attn", "flash_fwd", "_transformer_encoder_layer")
_GRADIENTS = ("backward", "bwd")
_SOFTMAX = ("_softmax", "_safe_softmax")
_EXP = ("_log_softmax", "exp", "exp2", "sigmoid")  # by which softmax is written out
_PRODUCTS = ("bmm", "baddbmm", "mm", "addbmm")
# Operations whose result is scores or attention weights still if what they are given is.
_KEEPS = (
    "_to_copy", "clone", "native_dropout", "mul", "div", "copy", "constant_pad_nd", "where", "add",
    "sub", "masked_fill", "nan_to_num", "repeat", "cat", "index", "index_select", "tril", "triu",
)  # fmt: skip


class _Storages:
    """Memory of tensors, known by its address, which is not used again while it is listed."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._references: dict[int, StorageWeakRef] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, result: Any) -> None:
        """List the memory of all tensors in a result."""
        for tensor in tree_leaves(result):
            if (storage := _storage(tensor)) is not None:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._references[storage._cdata] = reference

    def has_any(self, args: Any, least_axes: int = 0) -> bool:
        """Whether a tensor of so many axes among arguments lies in listed memory."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.ndim >= least_axes]
        storages = filter(None, map(_storage, tensors))
        return any(storage._cdata in self._references for storage in storages)


def _storage(value: Any) -> UntypedStorage | None:
    """Memory of a tensor; None for what has none of its own, such as a sparse one."""
    try:
        return value.untyped_storage() if isinstance(value, Tensor) else None
    except RuntimeError:
        return None


class AttentionCensus(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a step: each call of a fused kernel, or product of a softmax with values, counts.

    A softmax of two axes counts if it is of a product of two tensors that are no parameters, which
    the scores of a classifier are not; so does one that is written out by exponentials. Attention
    without either (linear attention, state spaces) is not seen.

    Args:
        backend: What it computes is streamed, and is not looked at.
        parameters: Those of the model.
    """

    supports_higher_order_operators = True  # or PyTorch refuses them, flex_attention among them

    def __init__(self, backend: Streamed, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backend = backend
        self.unstreamed: Counter[str] = Counter()
        self.modules: list[str] = []
        self._parameters = _Storages(parameters)
        self._scores, self._weights = _Storages(), _Storages()

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
        name, full_name = getattr(func, "overloadpacket", func).__name__, func.name()
        is_fused = any(part in full_name for part in _FUSED)
        if is_fused and not any(part in full_name for part in _GRADIENTS):
            self._count()
        elif name in _PRODUCTS:
            of_parameters = self._parameters.has_any(args[-2:])
            if self._weights.has_any(args, least_axes=3 if of_parameters else 2):
                self._count()
            elif not of_parameters:
                self._scores.add(result)
        elif name == "_to_copy" and self._parameters.has_any(args):
            self._parameters.add(result)  # as autocast makes them
        elif self._gives_weights(name, args):
            self._weights.add(result)
        elif name in _KEEPS and self._scores.has_any(args):
            self._scores.add(result)
        return result

    def _gives_weights(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether an operation gives attention weights, as far as one can tell."""
        if name in _SOFTMAX and args[0].ndim >= 3:
            return bool(args[0].shape[-1] > 1)
        if name in (*_SOFTMAX, *_EXP) and self._scores.has_any(args):
            return bool(args[0].shape[-1] > 1)
        return name in (*_KEEPS, *_EXP) and self._weights.has_any(args)

    def _count(self) -> None:
        self.unstreamed[self.modules[-1] if self.modules else ""] += 1


@contextmanager
def take_census(model: nn.Module, backend: Streamed) -> Iterator[AttentionCensus]:
    """Watch what runs within, by module of a model; what was compiled runs as it was written.

    Args:
        model: Whose modules are named.
        backend: The backend that streams; what it computes is not looked at.
    """
    names = {id(module): name for name, module in model.named_modules()}
    census = AttentionCensus(backend, model.parameters())

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
        # PyTorch compiles nothing under a dispatch mode, and where fullgraph=True it is an error
        with torch.compiler.set_stance("force_eager"), _making_causal_biases(), census:
            yield census
    finally:
        for remove in removers:
            remove()


@contextmanager
def _making_causal_biases() -> Iterator[None]:
    """Let PyTorch's own causal biases be made, whose constructor fails under any dispatch mode."""
    module = sys.modules.get("torch.nn.attention.bias")  # a second to import
    if module is None:
        yield
        return

    def make_blank(kind: type[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        with _disable_current_modes():
            return Tensor.__new__(kind)

    module.CausalBias.__new__ = staticmethod(make_blank)
    try:
        yield
    finally:
        del module.CausalBias.__new__
