"""Streams the attention of any model within a memory budget.

Source: Stream-CQSA, arXiv 2604.20819; its use in Lightning: docs/papers/stream_cqsa.md section 5.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn import functional as F

from fulgurite.attention import InCore, Streamed
from fulgurite.attention.backend import backend_slots
from fulgurite.attention.budget import Budget, parse_budget
from fulgurite.attention.kernel_choice import kernel_for
from fulgurite.attention.request import Schedule, check_schedule
from fulgurite.errors import ConfigError
from fulgurite.options import check_options
from fulgurite.strategies.attention_census import take_census
from fulgurite.strategies.interception import exchange_attribute, streamed_sdpa
from fulgurite.strategies.offloading import saved_in_files, saved_on_host
from fulgurite.strategies.sharded import FullyShardedStrategy
from fulgurite.strategies.transformers_attention import TransformersAttention, unreachable_models

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "OffloadOptions",
    "StreamCQSADDPStrategy",
    "StreamCQSAFullyShardedStrategy",
    "StreamCQSAStrategy",
]

_NAME = "stream_cqsa"

Kernel = Literal["flash", "cudnn", "efficient", "math"]


@dataclass(frozen=True)
class OffloadOptions:
    """Where what is saved for backward waits.

    Args:
        activations: ``none`` (on the device), ``host`` ((pinned) host memory) or ``disk`` (files,
            for a CPU or a small host).
        folder: Where the files are; the Trainer's ``default_root_dir`` by default.

    Raises:
        ConfigError: There is no such place.
    """

    activations: Literal["none", "host", "disk"] = "none"
    folder: str | None = None

    def __post_init__(self) -> None:
        check_options(self, "trainer.strategy.init_args.offload")


@dataclass(frozen=True)
class _StreamingOptions:
    """Options that both strategies have; see :class:`StreamCQSAStrategy`."""

    memory_budget: Budget
    schedule: Schedule
    intercept_sdpa: bool
    offload: OffloadOptions
    check_finite: bool
    kernel: Kernel | None
    strict: bool

    def __post_init__(self) -> None:
        budget = self.memory_budget
        if isinstance(budget, str) and budget.replace(".", "", 1).isdigit():
            # the command line gives a number as text where text is allowed
            budget = float(budget) if "." in budget else int(budget)
            object.__setattr__(self, "memory_budget", budget)  # the record is frozen
        parse_budget(budget, torch.device("cpu"))
        check_schedule(self.schedule)
        kernel_for(torch.device("cpu"), torch.float32, prefer=self.kernel)


def _check_backend(part: nn.Module) -> None:
    """Refuse to replace a backend that may compute something else.

    Raises:
        ConfigError: The backend is neither PyTorch's attention nor streamed.
    """
    backend: object = part.attention_backend
    is_exact = isinstance(backend, InCore | Streamed) or backend is F.scaled_dot_product_attention
    if not is_exact:
        raise ConfigError(
            f"{type(part).__name__}.attention_backend is "
            f"{getattr(backend, '__name__', type(backend).__name__)}, which may compute something "
            "else than streamed attention does.",
            "If it is softmax attention, let its class inherit from fulgurite.attention.InCore; "
            "else use --trainer.strategy=auto.",
        )


class _StreamsAttention(Strategy):
    """Puts a backend in place of a model's attention while a run lasts."""

    backend: Streamed
    options: _StreamingOptions
    _undo: list[Callable[[], None]]
    _counted_steps: set[str]

    def _prepare(self, options: _StreamingOptions, *, distributed: bool) -> None:
        """Keep the options."""
        self.options = options
        self.backend = Streamed(
            options.memory_budget, options.schedule, distributed=distributed,
            check_finite=options.check_finite, kernel=options.kernel,
        )  # fmt: skip
        self._undo, self._counted_steps = [], set()

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
        for part in list(backend_slots(model)):
            _check_backend(part)
            self._undo.append(exchange_attribute(part, "attention_backend", self.backend))
        if "transformers" in sys.modules:  # else no part of the model is from there
            self._undo += TransformersAttention(self.backend, _NAME).install(model)
        unreachable = unreachable_models(model)
        if self.options.intercept_sdpa or unreachable:  # some of these call PyTorch's function
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

    # --- steps ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, with activations offloaded if asked."""
        with self._offloading():
            return self._watch_step(super().training_step, *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        return self._watch_step(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        return self._watch_step(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        return self._watch_step(super().predict_step, *args, **kwargs)

    def _offloading(self) -> AbstractContextManager[Any]:
        offload = self.options.offload
        if offload.activations == "none":
            return nullcontext()
        assert self.lightning_module is not None
        if offload.activations == "host":
            return saved_on_host(self.lightning_module.parameters())
        folder = offload.folder or self.lightning_module.trainer.default_root_dir
        return saved_in_files(folder, self.lightning_module.parameters())

    def _watch_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step, and refuse it if no attention was streamed; name what of it was not.

        All steps are looked at with ``strict``, else of each kind (training, validation, …) the
        first in which attention is streamed. A step that returns None may have skipped its batch.

        Raises:
            ConfigError: The backend was not called, or not always, and ``strict`` is set.
        """
        before = self.backend.calls
        assert self.lightning_module is not None
        if step.__name__ in self._counted_steps and not self.options.strict:
            result = step(*args, **kwargs)
        else:
            with take_census(self.lightning_module, self.backend) as census:
                result = step(*args, **kwargs)
            if self.backend.calls > before:
                self._counted_steps.add(step.__name__)
                self._report(census.unstreamed, self.backend.calls - before)
        if self.backend.calls == before and result is not None:
            names = unreachable_models(self.lightning_module)
            reason = "the model computes it in another way"
            if names:
                reason = f"{', '.join(names)} computes attention in its own code"
            raise ConfigError(
                f"The strategy {_NAME} streamed no attention in this step: {reason}.",
                f"Use another strategy, or {self._way_to_reach('the model calls')}.",
            )
        return result

    def _way_to_reach(self, caller: str) -> str:
        """What may bring attention within reach of the strategy."""
        if self.options.intercept_sdpa:
            return (
                "write torch.nn.functional.scaled_dot_product_attention where another name for it "
                "is called, which was bound before the run"
            )
        return (
            f"set --trainer.strategy.init_args.intercept_sdpa=true if {caller} "
            "torch.nn.functional.scaled_dot_product_attention"
        )

    def _report(self, unstreamed: Counter[str], streamed: int) -> None:
        """Say which modules compute attention outside the budget.

        Raises:
            ConfigError: Some do, and ``strict`` is set.
        """
        if not unstreamed:
            return
        missed = sum(unstreamed.values())
        names = ", ".join(
            f"{name or 'the model itself'} ({count})" for name, count in unstreamed.most_common(8)
        )
        more = f" and {len(unstreamed) - 8} more modules" if len(unstreamed) > 8 else ""
        text = (
            f"The strategy {_NAME} streamed {streamed} of {streamed + missed} calls of attention "
            f"in this step; outside the memory budget are those of {names}{more}."
        )
        way = self._way_to_reach("they call")
        fix = f"{way[0].upper()}{way[1:]}, or give them an `attention_backend`."
        if self.options.strict:
            raise ConfigError(text, fix)
        rank_zero_warn(f"{text} {fix}")


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
        offload: Where what is saved for backward waits.
        check_finite: Refuse queries, keys and values that are NaN or infinite, naming the first.
        kernel: ``math`` for matrix products; on a GPU also which kernel is tried first.
        strict: Refuse models whose attention is only partly streamed, instead of warning.

    Raises:
        ConfigError: The budget cannot be read, several devices are asked for, or nothing of the
            model's attention was reached.
    """

    strategy_name = _NAME

    def __init__(
        self,
        memory_budget: int | float | str | None = "auto",
        schedule: Schedule = "auto",
        *,
        intercept_sdpa: bool = False,
        offload: OffloadOptions = OffloadOptions(),
        check_finite: bool = False,
        kernel: Kernel | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()  # the Trainer sets accelerator, precision and checkpoints itself
        options = _StreamingOptions(
            memory_budget, schedule, intercept_sdpa=intercept_sdpa, offload=offload,
            check_finite=check_finite, kernel=kernel, strict=strict,
        )  # fmt: skip
        self._prepare(options, distributed=False)
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


class _StreamsOnRanks(_StreamsAttention):
    """The same for strategies of several ranks, which follow in the order of bases."""

    _shares_tasks: ClassVar[bool]  # whether ranks share the tasks of each attention

    def __init__(
        self,
        memory_budget: int | float | str | None = "auto",
        schedule: Schedule = "auto",
        *,
        intercept_sdpa: bool = False,
        offload: OffloadOptions = OffloadOptions(),
        check_finite: bool = False,
        kernel: Kernel | None = None,
        strict: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend)  # type: ignore[call-arg]
        options = _StreamingOptions(
            memory_budget, schedule, intercept_sdpa=intercept_sdpa, offload=offload,
            check_finite=check_finite, kernel=kernel, strict=strict,
        )  # fmt: skip
        self._prepare(options, distributed=self._shares_tasks)


class StreamCQSADDPStrategy(_StreamsOnRanks, DDPStrategy):
    """The same over several devices, which share the tasks of each attention.

    All ranks get the same batches and have the same model; only attention is divided, so that
    its time, not the memory of the rest, falls with the number of devices. Results are merged by
    shards, each summed by one device.

    Args:
        memory_budget: See :class:`StreamCQSAStrategy`; of each device. The smallest counts.
        schedule: ``auto``, ``rect`` or ``cqs``.
        intercept_sdpa: Also replace PyTorch's own function while the run lasts.
        offload: Where what is saved for backward waits.
        check_finite: Refuse queries, keys and values that are NaN or infinite, naming the first.
        kernel: ``math`` for matrix products; on a GPU also which kernel is tried first.
        strict: Refuse models whose attention is only partly streamed, instead of warning.
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the devices.

    Raises:
        ConfigError: An option of :class:`StreamCQSAStrategy` is wrong.

    Source: docs/papers/stream_cqsa.md section 1.10; within Lightning: section 5.
    """

    strategy_name = f"{_NAME}_ddp"
    _shares_tasks = True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Every rank sees the whole batch."""
        return {"num_replicas": 1, "rank": 0}


class StreamCQSAFullyShardedStrategy(_StreamsOnRanks, FullyShardedStrategy):
    """The same with parameters, gradients and optimizer states divided among ranks (FSDP2).

    Each rank has batches of its own, whose attention it streams alone.

    Args:
        memory_budget: Most that attention holds at once on each device: bytes, ``"2GiB"``, a
            fraction of the device, ``"auto"`` for what is free, None for no limit.
        schedule: ``auto``, ``whole``, ``heads``, ``rect`` or ``cqs``.
        intercept_sdpa: Also replace PyTorch's own function while the run lasts.
        offload: Where what is saved for backward waits.
        check_finite: Refuse queries, keys and values that are NaN or infinite, naming the first.
        kernel: ``math`` for matrix products; on a GPU also which kernel is tried first.
        strict: Refuse models whose attention is only partly streamed, instead of warning.
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the devices.

    Raises:
        ConfigError: An option of :class:`StreamCQSAStrategy` is wrong.
    """

    strategy_name = f"{_NAME}_fsdp2"
    _shares_tasks = False
