"""Streams the attention of any model within a memory budget.

Source: Stream-CQSA, arXiv 2604.20819; its use in Lightning: card section 5.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F

from fulgurite.attention import Streamed
from fulgurite.attention.backend import backend_slots
from fulgurite.attention.planning import Schedule, parse_budget
from fulgurite.errors import ConfigError
from fulgurite.strategies.offloading import saved_in_files

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["StreamCQSADDPStrategy", "StreamCQSAStrategy", "streamed_sdpa"]

_NAME = "stream_cqsa"

Offload = Literal["none", "host", "disk"]
Kernel = Literal["flash", "cudnn", "efficient", "eager"]


class _StreamsAttention(Strategy):
    """Puts a backend in place of a model's attention while a run lasts."""

    backend: Streamed
    intercept_sdpa: bool
    offload_activations: Offload
    offload_folder: Path | None
    _undo: list[Callable[[], None]]

    def _prepare(
        self,
        memory_budget: int | float | str | None,
        schedule: Schedule,
        intercept_sdpa: bool,
        offload_activations: Offload,
        offload_folder: str | Path | None,
        check_finite: bool,
        kernel: Kernel | None,
        distributed: bool,
    ) -> None:
        """Keep the options.

        Raises:
            ConfigError: The budget cannot be read.
        """
        if isinstance(memory_budget, str) and memory_budget.replace(".", "", 1).isdigit():
            # the command line gives a number as text where text is allowed
            memory_budget = float(memory_budget) if "." in memory_budget else int(memory_budget)
        parse_budget(memory_budget, torch.device("cpu"))
        self.backend = Streamed(memory_budget, schedule, distributed, check_finite, kernel)
        self.intercept_sdpa, self.offload_activations = intercept_sdpa, offload_activations
        self.offload_folder = None if offload_folder is None else Path(offload_folder)
        self._undo = []

    def setup(self, trainer: Trainer) -> None:
        """Put the backend in place, after the model has moved."""
        super().setup(trainer)
        assert self.lightning_module is not None
        self._install(self.lightning_module)

    def teardown(self) -> None:
        """Put back what was there before."""
        while self._undo:
            self._undo.pop()()
        super().teardown()

    def _install(self, model: nn.Module) -> None:
        for part in backend_slots(model):
            self._undo.append(_restoring(part, "attention_backend"))
            part.attention_backend = self.backend  # type: ignore[assignment]
        self._install_in_transformers(model)
        if self.intercept_sdpa:
            context = ExitStack()
            context.enter_context(streamed_sdpa(self.backend))
            self._undo.append(context.close)
        if not self._undo:
            raise ConfigError(
                f"The strategy {_NAME} finds no attention in {type(model).__name__} that it can "
                "reach.",
                "Give its attention modules an `attention_backend` (see fulgurite.attention), or "
                "set --trainer.strategy.init_args.intercept_sdpa=true if it calls "
                "torch.nn.functional.scaled_dot_product_attention.",
            )

    def _install_in_transformers(self, model: nn.Module) -> None:
        if "transformers" not in sys.modules:  # then no part of the model is from there
            return
        from transformers import AttentionInterface, PreTrainedModel

        found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        outermost = [part for part in found if not any(part in {*o.modules()} - {o} for o in found)]
        if not outermost:
            return
        AttentionInterface.register(_NAME, self._transformers_attention)
        for part in outermost:
            before = part.config._attn_implementation

            def undo(part: Any = part, before: str = before) -> None:
                part.set_attn_implementation(before)

            part.set_attn_implementation(_NAME)
            self._undo.append(undo)

    def _transformers_attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls. Shape: (B, H, N, D) -> (B, N, H, D)."""
        _refuse(attention_mask, dropout)
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True)) and query.shape[2] > 1
        out = self.backend(
            query, key, value, is_causal=is_causal, scale=scaling, window=sliding_window
        )
        return out.transpose(1, 2).contiguous(), None

    # --- steps ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, with activations offloaded if asked."""
        with self._offloading(), self._watching():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        with self._watching():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        with self._watching():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        with self._watching():
            return super().predict_step(*args, **kwargs)

    def _offloading(self) -> AbstractContextManager[Any]:
        if self.offload_activations == "none":
            return nullcontext()
        if self.offload_activations == "host":
            return save_on_cpu(pin_memory=self.root_device.type == "cuda")
        assert self.lightning_module is not None
        folder = self.offload_folder or self.lightning_module.trainer.default_root_dir
        return saved_in_files(folder, self.lightning_module.parameters())

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Refuse a step in which no attention was streamed.

        Raises:
            ConfigError: The backend was not called.
        """
        before = self.backend.calls
        yield
        if self.backend.calls == before:
            raise ConfigError(
                f"The strategy {_NAME} streamed no attention in this step: the model computes it "
                "in another way.",
                "Use another strategy, or set "
                "--trainer.strategy.init_args.intercept_sdpa=true if the model calls "
                "torch.nn.functional.scaled_dot_product_attention.",
            )


class StreamCQSAStrategy(_StreamsAttention, SingleDeviceStrategy):
    """Runs all attention of a model in a memory budget, with the exact result.

    Attention is reached in three ways, tried together: modules with an ``attention_backend``
    (the protocol of :mod:`fulgurite.attention`); Hugging Face models, through their
    ``AttentionInterface``; and, if asked, every call of
    ``torch.nn.functional.scaled_dot_product_attention`` and ``nn.MultiheadAttention``. What was
    there before comes back when the run ends.

    By name, ``--trainer.strategy=stream_cqsa`` takes the defaults; with arguments it is
    ``--trainer.strategy.class_path=fulgurite.strategies.StreamCQSAStrategy
    --trainer.strategy.init_args.memory_budget=2GiB``.

    Args:
        memory_budget: Most that attention holds at once: bytes, ``"2GiB"``, a fraction of the
            device, ``"auto"`` for what is free at each call, None for no limit.
        schedule: ``auto``, ``whole``, ``heads``, ``rect`` or ``cqs``.
        intercept_sdpa: Also replace PyTorch's own function while the run lasts, for models that
            know none of the protocols. Names bound by ``from torch.nn.functional import …``
            before cannot be reached.
        offload_activations: Where what is saved for backward waits: ``none`` (on the device),
            ``host`` ((pinned) host memory) or ``disk`` (files, for a CPU or a small host).
        offload_folder: Where the files are; the Trainer's ``default_root_dir`` by default.
        check_finite: Refuse queries, keys and values that are NaN or infinite, naming the first.
        kernel: On a GPU, which kernel is tried first.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.

    Raises:
        ConfigError: The budget cannot be read, several devices are asked for, or nothing of the
            model's attention was reached.
    """

    strategy_name = _NAME

    def __init__(
        self,
        memory_budget: int | float | str | None = "auto",
        schedule: Schedule = "auto",
        intercept_sdpa: bool = False,
        offload_activations: Offload = "none",
        offload_folder: str | None = None,
        check_finite: bool = False,
        kernel: Kernel | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin
        )
        self._prepare(
            memory_budget, schedule, intercept_sdpa, offload_activations, offload_folder,
            check_finite, kernel, distributed=False,
        )  # fmt: skip
        self._devices: list[torch.device] = []

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The device, once the Trainer has given it."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        # without this property Lightning would leave the CPU as device and ignore devices=2
        devices = list(devices or [])
        if len(devices) > 1:
            raise ConfigError(
                f"The strategy {_NAME} runs on one device, and {len(devices)} are asked for.",
                "Use --trainer.devices=1, or --trainer.strategy=stream_cqsa_ddp.",
            )
        self._devices = devices
        if devices:
            self._root_device = devices[0]


class StreamCQSADDPStrategy(_StreamsAttention, DDPStrategy):
    """The same over several devices, which share the tasks of each attention.

    All ranks get the same batches and have the same model; only attention is divided, so that
    its time, not the memory of the rest, falls with the number of devices. Results are merged by
    shards, each summed by one device.

    Args:
        memory_budget: See :class:`StreamCQSAStrategy`; of each device. The smallest counts.
        schedule: ``auto``, ``rect`` or ``cqs``.
        intercept_sdpa: See :class:`StreamCQSAStrategy`.
        offload_activations: See :class:`StreamCQSAStrategy`.
        offload_folder: See :class:`StreamCQSAStrategy`.
        check_finite: See :class:`StreamCQSAStrategy`.
        kernel: See :class:`StreamCQSAStrategy`.
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the devices.

    Raises:
        ConfigError: See :class:`StreamCQSAStrategy`.

    Source: card section 1.10; within Lightning: section 5.
    """

    strategy_name = f"{_NAME}_ddp"

    def __init__(
        self,
        memory_budget: int | float | str | None = "auto",
        schedule: Schedule = "auto",
        intercept_sdpa: bool = False,
        offload_activations: Offload = "none",
        offload_folder: str | None = None,
        check_finite: bool = False,
        kernel: Kernel | None = None,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self._prepare(
            memory_budget, schedule, intercept_sdpa, offload_activations, offload_folder,
            check_finite, kernel, distributed=True,
        )  # fmt: skip

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Every rank sees the whole batch."""
        return {"num_replicas": 1, "rank": 0}


def _restoring(module: nn.Module, name: str) -> Callable[[], None]:
    before = getattr(module, name)
    return lambda: setattr(module, name, before)


def _refuse(mask: Tensor | None, dropout: float) -> None:
    """Name what streamed attention cannot do.

    Raises:
        ConfigError: There is a dense mask or dropout.
    """
    if mask is not None:
        raise ConfigError(
            f"The model gives its attention a dense mask of shape {tuple(mask.shape)}, which would "
            "not fit any budget.",
            "Train on sequences without padding, so that the model needs no mask.",
        )
    if dropout:
        raise ConfigError(
            f"The model drops attention weights (p = {dropout}); streamed attention does not.",
            "Set the attention dropout of the model to 0.",
        )


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

    def streamed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        _refuse(attn_mask, dropout_p)
        return backend(query, key, value, is_causal=is_causal, scale=scale)

    multi_head = F.multi_head_attention_forward

    @functools.wraps(multi_head)
    def without_weights(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        given = inspect.signature(multi_head).bind(*args, **kwargs)
        given.arguments["need_weights"] = False
        return multi_head(*given.args, **given.kwargs)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention, F.multi_head_attention_forward = streamed, without_weights
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.multi_head_attention_forward = original, multi_head
        torch.backends.mha.set_fastpath_enabled(fast)
