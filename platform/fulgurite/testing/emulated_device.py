"""An accelerator that is not there: tests of device code on machines without one.

Tensors of the device ``emulated`` hold a tensor of the CPU and compute with it. What a GPU refuses
is refused (operands on two devices, a CPU generator for device tensors, ``numpy()``), and what it
would wait for is recorded, with the line of the project that asks for it. So is each operation
that ``torch.use_deterministic_algorithms(True)`` refuses on CUDA. What is not emulated: kernels,
streams, memory, and code that asks for the device type ``cuda`` by name.

Registering the device changes the process for good (random states, autograd's threads), so
:func:`run_emulated` works in a child process.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from fulgurite.testing.lstm_cell import lstm_cell, lstm_cell_backward

__all__ = [
    "DEVICE",
    "DeviceRecord",
    "StepWaits",
    "refused_when_deterministic",
    "register_device",
    "run_emulated",
]

#: Name of the device, and of the Lightning accelerator and strategy for it.
DEVICE = "emulated"

_aten: Any = torch.ops.aten

# Refused whatever the arguments are; the docstring of torch.use_deterministic_algorithms, and the
# calls of alertNotDeterministic in torch's CUDA sources.
_REFUSED = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "_ctc_loss_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "avg_pool3d_backward",
    "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward", "histc", "index_reduce", "index_reduce_", "kthvalue",
    "max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d", "nll_loss2d_backward",
    "nll_loss2d_forward", "put", "put_", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "reflection_pad3d_backward", "upsample_bicubic2d_backward", "upsample_bilinear2d_backward",
    "upsample_linear1d_backward", "upsample_trilinear3d_backward",
}  # fmt: skip
_WAITS = {
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero",
    "masked_select", "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip
_INDEXED = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}


def refused_when_deterministic(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``torch.use_deterministic_algorithms(True)`` refuses an operation on CUDA.

    Args:
        func: Overload of an operation, such as ``torch.ops.aten.cumsum.default``.
        args: Its positional arguments.
        kwargs: Its other arguments.

    Example:
        >>> cumsum, floats = torch.ops.aten.cumsum.default, torch.ones(2)
        >>> [refused_when_deterministic(cumsum, (x, 0), {}) for x in (floats, floats.long())]
        [True, False]

    Source: docstring of ``torch.use_deterministic_algorithms`` in torch 2.13.
    """
    name, overload = func.overloadpacket.__name__, func._overloadname
    if name in ("cumsum", "cumsum_"):
        return not _is_integer(kwargs.get("dtype") or args[0].dtype)
    if name == "bincount":
        return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    if name in ("median", "nanmedian"):
        return "dim" in overload
    if name in ("scatter_reduce", "scatter_reduce_", "scatter", "scatter_"):
        texts = [x for x in (*args, *kwargs.values()) if isinstance(x, str)]
        return any(x in ("prod", "multiply") for x in texts)
    if name == "_embedding_bag_backward":
        return True  # of mode="max"; nothing here uses another
    return name in _REFUSED


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


@dataclass
class DeviceRecord:
    """What happened on the device.

    Attributes:
        operations: How often each operation ran.
        refused: Operations that deterministic mode refuses, each with the function that asked.
        waits: Operations for which the host waits, each with the function that asked; counted only
            while ``counting``, and without those that Lightning asks for (it logs numbers).
        counting: Whether waits are counted.
    """

    operations: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    counting: bool = True

    def wait(self, name: str) -> None:
        """Count a wait."""
        caller = _calling_function() if self.counting else None
        if caller is not None:
            self.waits[f"{name} in {caller}"] += 1


_record = DeviceRecord()


def _calling_function(beyond_lightning: bool = False) -> str | None:
    """The innermost function of fulgurite on the stack; None where Lightning is further inside."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("lightning.") and not beyond_lightning:
            return None
        if module.startswith("fulgurite.") and module != __name__:
            name = module.removeprefix("fulgurite.")
            return f"{name}.{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "a library" if beyond_lightning else None


class _EmulatedTensor(Tensor):
    """A tensor of the device; ``host`` is that of the CPU which it stands for."""

    host: Tensor

    @staticmethod
    def __new__(cls: type[_EmulatedTensor], inner: Tensor) -> _EmulatedTensor:
        tensor: _EmulatedTensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(DEVICE, 0),
        )  # fmt: skip
        tensor.host = inner
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _emulate(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # what torch asks of a wrapper, so that Module.to() swaps parameters rather than their data
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> _EmulatedTensor:
        return _EmulatedTensor(inner["host"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Tensor = _EmulatedTensor(self.host.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # checkpoints hold what the CPU holds
        return self.host.detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        """Wait for the device, as for one number."""
        _record.wait("tolist")
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError(f"can't convert {DEVICE}:0 device type tensor to numpy; use Tensor.cpu()")


def _emulate(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the inner tensors, as the device would."""
    name = func.overloadpacket.__name__
    options = dict(kwargs)
    tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    here = any(isinstance(x, _EmulatedTensor) for x in tensors)
    target = options.get("device")
    there = here if target is None else torch.device(target).type == DEVICE
    _record.operations[name] += 1
    if refused_when_deterministic(func, args, options):
        _record.refused[f"{name} in {_calling_function(beyond_lightning=True)}"] += 1
    _check_devices(name, args, options, tensors)
    _count_waits(name, args, options, here=here, there=there)
    if there and target is not None:
        options["device"] = torch.device("cpu")
    options.pop("pin_memory", None)
    run = _REPLACED.get(func, func)
    out = run(*tree_map(_inner, args), **tree_map(_inner, options))
    if not there:
        return out
    changed = {id(x.host): x for x in tensors if isinstance(x, _EmulatedTensor)}
    return tree_map(lambda x: _wrap_result(x, changed), out)


def _inner(x: Any) -> Any:
    return x.host if isinstance(x, _EmulatedTensor) else x


def _wrap_result(x: Any, changed: Mapping[int, Tensor]) -> Any:
    """A result as a tensor of the device; one that was changed in place is itself."""
    if not isinstance(x, Tensor) or isinstance(x, _EmulatedTensor):
        return x
    return changed[id(x)] if id(x) in changed else _EmulatedTensor(x)


def _check_devices(
    name: str, args: Sequence[Any], options: Mapping[str, Any], tensors: Sequence[Tensor]
) -> None:
    if isinstance(options.get("generator"), torch.Generator):
        raise RuntimeError(f"{name}: expected a generator of the device {DEVICE}, found one of cpu")
    if name in ("copy_", "_to_copy", "_copy_from") or name in _INDEXED:
        return
    there = [x for x in tensors if isinstance(x, _EmulatedTensor)]
    if there and any(x.ndim and not isinstance(x, _EmulatedTensor) for x in tensors):
        raise RuntimeError(f"{name}: tensors are on {DEVICE}:0 and on the CPU")


def _count_waits(
    name: str, args: Sequence[Any], options: Mapping[str, Any], *, here: bool, there: bool
) -> None:
    blocking = not (options.get("non_blocking") or (name == "copy_" and True in args[2:]))
    if name in ("_to_copy", "copy_"):
        source = isinstance(args[name == "copy_"], _EmulatedTensor)
        target = there if name == "_to_copy" else isinstance(args[0], _EmulatedTensor)
        if source != target and (blocking or source):
            _record.wait("copy to the device" if target else "copy to the host")
    elif name in _WAITS:
        _record.wait(name)
    elif name == "repeat_interleave" and options.get("output_size") is None:
        _record.wait("repeat_interleave without output_size")
    elif name in _INDEXED and here:
        masks = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in masks):
            _record.wait("indexing by a mask")
        if any(x.ndim and not isinstance(x, _EmulatedTensor) for x in masks):
            _record.wait("indexing by a tensor of the host")


# what a CPU has not, and what must not choose a kernel of a GPU
_REPLACED: dict[Any, Callable[..., Any]] = {
    _aten._thnn_fused_lstm_cell.default: lstm_cell,
    _aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
    _aten._fused_sdp_choice.default: lambda *_, **__: 0,
}
# called by torch without regard to Python subclasses
_KERNELS = (
    "_copy_from", "_local_scalar_dense", "_to_copy", "arange", "arange.start", "arange.start_step",
    "copy_", "empty.memory_format", "empty_strided", "eye", "eye.m", "linspace", "randperm",
    "randperm.generator", "resize_", "tril_indices", "triu_indices",
)  # fmt: skip


class _Backend:
    """What torch asks of ``torch.emulated``; random numbers come from the CPU's generator."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def device(self, device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Nothing to set."""

    def manual_seed_all(self, seed: int) -> None:
        """Nothing to seed."""

    def _is_in_bad_fork(self) -> bool:
        return False


class _EmulatedAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""

    def teardown(self) -> None:
        """Nothing to tear down."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE


class _EmulatedStrategy(SingleDeviceStrategy):
    strategy_name = DEVICE

    def __init__(
        self, device: str, accelerator: Any = None, checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:  # fmt: skip
        accelerator = accelerator or _EmulatedAccelerator()
        super().__init__(torch.device(device), accelerator, checkpoint_io, precision_plugin)


class StepWaits(Callback):
    """Lets the record count waits in training only, without the first and last step of an epoch.

    Those do what belongs to the epoch.
    """

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count until the last step but one has ended."""
        _record.counting = batch_idx + 2 < trainer.num_training_batches


@cache
def register_device() -> Any:
    """Make the device, and the Lightning accelerator and strategy of its name, known for good.

    Returns:
        The library that holds its kernels; the device exists as long as it does.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE, backend_module=_Backend())
    AcceleratorRegistry.register(DEVICE, _EmulatedAccelerator)
    StrategyRegistry.register(DEVICE, _EmulatedStrategy, device=f"{DEVICE}:0")
    # backward in this thread: the stack then shows who asked, and threads must not call Python
    torch.autograd.set_multithreading_enabled(False)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for kernel in _KERNELS:
        packet, _, overload = kernel.partition(".")
        func = getattr(getattr(_aten, packet), overload or "default")
        library.impl(kernel, _kernel(func), "PrivateUse1")  # type: ignore[no-untyped-call]
    return library


def _kernel(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _emulate(func, args, kwargs)


def run_emulated(work: Callable[[DeviceRecord], Any]) -> Any:
    """Run a function in a child process that has the device.

    Args:
        work: Takes the record of the device; what it returns must be picklable.

    Raises:
        RuntimeError: The function failed; the message has its traceback.

    Example:
        >>> run_emulated(lambda record: str(torch.ones(2, device="emulated").device))
        'emulated:0'
    """
    context = multiprocessing.get_context("fork")  # the child has all that is imported already
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            register_device()
            outcome = pickle.dumps((True, work(_record)))
        except BaseException:  # also pytest's and SystemExit: the parent reports it
            outcome = pickle.dumps((False, traceback.format_exc()))
        sender.send_bytes(outcome)  # send() would share tensors by files that end with the child

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        succeeded, result = pickle.loads(receiver.recv_bytes())
    except EOFError:
        succeeded, result = False, "the process with the emulated device was ended"
    process.join()
    if not succeeded:
        raise RuntimeError(f"Work on the emulated device failed:\n{result}")
    return result
