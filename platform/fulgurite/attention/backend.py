"""How a model leaves the choice of its attention to others.

A module that has an attribute ``attention_backend`` calls it instead of a function of its own; a
strategy puts another backend there. The attribute is plain state of the module, so activation
checkpointing and worker threads of autograd see the same one.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulgurite.attention.budget import Budget
from fulgurite.attention.call_options import Scoring, StreamOptions
from fulgurite.attention.calls import AttentionCall
from fulgurite.attention.engine import attend, attend_masked
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.keywords import CallKeywords, check_keywords, make_record
from fulgurite.attention.masks import Documents, Masking
from fulgurite.attention.request import Schedule
from fulgurite.errors import ConfigError

__all__ = ["AttentionBackend", "Documents", "InCore", "Streamed", "backend_slots"]


class AttentionBackend(Protocol):
    """Computes attention.

    Strategies replace :class:`InCore`, classes that inherit from it, and :class:`Streamed`; any
    other backend may compute something else, and is refused by name.

    Shape:
        - query (B, H, M, D); key, value (B, G, N, D), G a divisor of H -> (B, H, M, D)
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        prefix: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention under the masks of :func:`~fulgurite.attention.stream_attention`."""
        ...


class InCore:
    """PyTorch's attention; the default of models.

    Raises:
        ConfigError: A mask is asked for that only streamed attention has.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        prefix: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        """See :class:`AttentionBackend`."""
        gqa = query.shape[1] != key.shape[1]
        if isinstance(documents, Tensor) and window is None and not prefix:
            mask = documents[:, None, :, None] == documents[:, None, None, :]
            if is_causal:
                mask = mask & mask.new_ones(mask.shape[-2:]).tril()
            with _sound_under_masks(query.device):
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa
                )
        if window is not None or prefix or documents is not None:
            raise ConfigError(
                "PyTorch's attention has no window, prefix or documents without a dense mask.",
                "Use --trainer.strategy=stream_cqsa.",
            )
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa
        )


def _sound_under_masks(device: torch.device) -> AbstractContextManager[Any]:
    """Keep masked attention from cuDNN, whose gradients may be NaN (PyTorch issue 196678)."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Streamed:
    """Streamed attention within a budget.

    Args:
        memory_budget: Bytes that may be held at once, as for
            :func:`~fulgurite.attention.stream_attention`.
        schedule: Schedule by which attention is cut.
        distributed: Deal the work out to the ranks of torch.distributed.
        check_finite: Refuse NaN and infinities in the inputs.
        kernel: On a GPU, kernel to try first.

    Attributes:
        calls: How often it was called, recomputation under checkpointing included.
        moved_bytes: What all forward calls loaded and stored, by their plans.
        plan: Plan of the last call.
        is_running: Whether a call goes on.
    """

    def __init__(
        self,
        memory_budget: Budget = None,
        schedule: Schedule = "auto",
        *,
        distributed: bool = False,
        check_finite: bool = False,
        kernel: str | None = None,
    ) -> None:
        self.memory_budget, self.schedule = memory_budget, schedule
        self.distributed, self.check_finite, self.kernel = distributed, check_finite, kernel
        self.calls = self.moved_bytes = 0
        self.plan: ExecutionPlan | None = None
        self.is_running = False
        self._decided: dict[Any, int | None] = {}

    @property
    def options(self) -> StreamOptions:
        """How attention is computed."""
        return StreamOptions(
            memory_budget=self.memory_budget, schedule=self.schedule,
            check_finite=self.check_finite, kernel=self.kernel, distributed=self.distributed,
            on_plan=self._note, decided=self._decided,
        )  # fmt: skip

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool | None = None,
        **options: Unpack[CallKeywords],
    ) -> Tensor:
        """Attention as :func:`~fulgurite.attention.stream_attention` computes it.

        Args:
            query: Shape: (..., H, M, D).
            key: Shape: (..., G, N, D).
            value: Shape: (..., G, N, E).
            attn_mask: Mask or bias that broadcasts to the scores. Shape: (..., H, M, N).
            is_causal: Query i sees keys up to i.
            scale: Scale of the scores.
            enable_gqa: Allow fewer key/value heads than query heads; by default they are allowed.
            options: ``softcap``, ``sinks``, ``alibi_slopes``, and the other arguments of
                :class:`~fulgurite.attention.masks.Masking`.
        """
        check_keywords("Streamed", options, CallKeywords)
        scoring = make_record(
            Scoring, options, attn_mask=attn_mask, scale=scale,
            enable_gqa=True if enable_gqa is None else enable_gqa,
        )  # fmt: skip
        masking = make_record(Masking, options, is_causal=is_causal)
        with self._count_call():
            return attend_masked(
                query, key, value, masking=masking, scoring=scoring, options=self.options
            )[0]

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention where it is known what is seen; see :func:`.engine.attend`."""
        with self._count_call():
            return attend(call, self.options)[0]

    @contextmanager
    def _count_call(self) -> Iterator[None]:
        self.calls += 1
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False

    def _note(self, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.moved_bytes += plan.cost.moved_bytes


def backend_slots(module: nn.Module) -> Iterator[nn.Module]:
    """The submodules that let their attention be chosen.

    An attribute of this name that cannot be called is another library's, such as a text.

    Example:
        >>> list(backend_slots(nn.Linear(1, 1)))
        []
    """
    for part in module.modules():
        if callable(getattr(part, "attention_backend", None)):
            yield part
