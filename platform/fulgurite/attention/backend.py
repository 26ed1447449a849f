"""How a model leaves the choice of its attention to others.

A module that has an attribute ``attention_backend`` calls it instead of a function of its own; a
strategy puts another backend there. The attribute is plain state of the module, so activation
checkpointing and worker threads of autograd see the same one.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.attention.functional import stream_attention
from fulgurite.attention.planning import Budget, Plan, Schedule
from fulgurite.errors import ConfigError

__all__ = ["AttentionBackend", "Documents", "InCore", "Streamed", "backend_slots"]


#: First tokens of documents that all sequences share; or ids of each sequence's own, (B, N).
Documents = Sequence[int] | Tensor


class AttentionBackend(Protocol):
    """Computes attention.

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
        """Attention under the masks of :func:`~fulgurite.attention.stream_attention`.

        Ids of each sequence's own documents are a mask that only :class:`InCore` has.
        """
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


class Streamed:
    """Streamed attention within a budget.

    Args:
        memory_budget: See :func:`~fulgurite.attention.stream_attention`.
        schedule: See there.
        distributed: See there.
        check_finite: See there.
        kernel: See there.

    Attributes:
        calls: How often it was called, recomputation under checkpointing included.
        moved_bytes: What all forward calls loaded and stored, by their plans.
        plan: Of the last call.
    """

    def __init__(
        self,
        memory_budget: Budget = None,
        schedule: Schedule = "auto",
        distributed: bool = False,
        check_finite: bool = False,
        kernel: str | None = None,
    ) -> None:
        self.memory_budget, self.schedule = memory_budget, schedule
        self.distributed, self.check_finite, self.kernel = distributed, check_finite, kernel
        self.calls = self.moved_bytes = 0
        self.plan: Plan | None = None

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
        """See :class:`AttentionBackend`.

        Raises:
            ConfigError: Each sequence has documents of its own.
        """
        if isinstance(documents, Tensor):
            raise ConfigError(
                "Streamed attention keeps apart documents that all sequences of a batch share, and "
                "these data have others in each.",
                "Use --trainer.strategy=auto.",
            )
        self.calls += 1
        return stream_attention(
            query, key, value, None, 0.0, is_causal, scale, query.shape[1] != key.shape[1],
            memory_budget=self.memory_budget, schedule=self.schedule, window=window,
            prefix=prefix, documents=documents, distributed=self.distributed, on_plan=self._note,
            check_finite=self.check_finite, kernel=self.kernel,
        )  # fmt: skip

    def _note(self, plan: Plan) -> None:
        self.plan = plan
        self.moved_bytes += plan.moved_bytes


def backend_slots(module: nn.Module) -> Iterator[nn.Module]:
    """The submodules that let their attention be chosen.

    Example:
        >>> list(backend_slots(nn.Linear(1, 1)))
        []
    """
    for part in module.modules():
        if hasattr(part, "attention_backend"):
            yield part
