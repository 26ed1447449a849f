"""The formats of exported networks: each writes a file, and reads it again to compare it.

Axes: of the network's own inputs and outputs.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.errors import ConfigError, RunError
from fulgurite.export.decompositions import decomposition_table
from fulgurite.export.exportable import ExportableNetwork
from fulgurite.extras import optional_import

__all__ = [
    "FORMATS",
    "METADATA_KEY",
    "TOLERANCE",
    "Format",
    "check_difference",
    "largest_difference",
]

#: Key of the card in the metadata of a file.
METADATA_KEY = "fulgurite"
#: Largest difference to the network that is accepted, in units of its largest output or of 1.
TOLERANCE = 1e-5
_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of an ONNX file
_OTHERWISE = "`--to safetensors` hands over the weights alone, which always works."


@dataclass(frozen=True)
class Format:
    """A format of exported networks.

    Args:
        suffix: Ending of its files.
        packages: What has to be installed, as modules.
        write: Writes a network and the card into a file.
        measure: Reads the file and returns its largest difference to the network.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportableNetwork, Path, Mapping[str, Any]], None]
    measure: Callable[[ExportableNetwork, Path], float]

    def require_packages(self, name: str) -> None:
        """Refuse the format where a package is missing.

        Args:
            name: Its name on the command line.

        Raises:
            MissingExtraError: A package is not installed.
        """
        for package in self.packages:
            optional_import(package, "export", f"`fulgurite export --to {name}`")


def largest_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest difference of outputs, in units of the largest expected value or of 1.

    Infinite where shapes differ, or where only one of two values is not finite.

    Example:
        >>> largest_difference([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 6.0])])
        0.5
        >>> largest_difference([torch.tensor([1.0])], [torch.tensor([float("nan")])])
        inf
    """
    if len(expected) != len(actual):
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, actual, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        first, second = one.double(), other.double()
        finite = first.isfinite()
        same = torch.equal(finite, second.isfinite())
        if not same or not torch.equal(first[~finite].nan_to_num(), second[~finite].nan_to_num()):
            return float("inf")
        if finite.any():
            scale = max(1.0, float(first[finite].abs().max()))
            worst = max(worst, float((first - second)[finite].abs().max()) / scale)
    return worst


def _run(network: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs = network(*inputs)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _compare(exportable: ExportableNetwork, run: Callable[..., Sequence[Tensor]]) -> float:
    """Largest difference between a function and the network, over all examples."""
    return max(
        largest_difference(_run(exportable.network, inputs), run(*inputs))
        for inputs in exportable.examples()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say of their own inside away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    # its own level is that of TORCH_LOGS, which its parent's does not change
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    loggers.append(registration)
    levels.append(registration.level)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trace(exportable: ExportableNetwork, name: str) -> torch.export.ExportedProgram:
    """Trace the network on its example.

    Raises:
        ConfigError: The network cannot be traced.
    """
    example = next(exportable.examples())
    dims = {axis: torch.export.Dim(axis) for axis in exportable.axes}
    shapes = tuple(
        {i: dims[axis] for i, axis in enumerate(port.axes) if isinstance(axis, str)}
        for port in exportable.inputs
    )
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(
                exportable.network, example, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # what a traced network may raise has no end
        raise _refusal(exportable, name, error) from error


def _refusal(exportable: ExportableNetwork, name: str, error: Exception) -> ConfigError:
    inner = type(exportable.weights or exportable.network).__name__
    while isinstance(error.__cause__, Exception):  # exporters wrap what they met in advice
        error = error.__cause__
    reason = " ".join(str(error).split())[:300] or "no reason"
    return ConfigError(
        f"The network {inner} cannot be written as {name} ({type(error).__name__}: {reason}).",
        _OTHERWISE,
    )


# --- torch.export ---------------------------------------------------------------------------------


def _write_torch_export(exportable: ExportableNetwork, path: Path, card: Mapping[str, Any]) -> None:
    program = _trace(exportable, "torch-export")
    buffer = io.BytesIO()  # a full disk ends the process where torch writes to it itself
    with _quiet():
        torch.export.save(program, buffer, extra_files={f"{METADATA_KEY}.json": json.dumps(card)})
    path.write_bytes(buffer.getbuffer())


def _measure_torch_export(exportable: ExportableNetwork, path: Path) -> float:
    with _quiet():
        network = torch.export.load(path).module()
    return _compare(exportable, lambda *inputs: _run(network, inputs))


# --- ONNX -----------------------------------------------------------------------------------------


def _write_onnx(exportable: ExportableNetwork, path: Path, card: Mapping[str, Any]) -> None:
    size = sum(t.nbytes for t in exportable.network.state_dict().values() if isinstance(t, Tensor))
    if size > _PROTOBUF_LIMIT:
        raise ConfigError(
            f"The network has weights of {size / 1e9:.1f} GB, and an ONNX file holds 2 at most.",
            "Use --to torch-export or --to safetensors.",
        )
    program = _trace(exportable, "onnx")
    try:
        with _quiet(), torch.no_grad():
            written = torch.onnx.export(
                program.run_decompositions(dict(decomposition_table())),
                input_names=[port.name for port in exportable.inputs],
                output_names=[port.name for port in exportable.outputs],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # an operator that ONNX lacks, in many forms
        raise _refusal(exportable, "onnx", error) from error
    assert written is not None
    _name_axes(written.model, exportable)
    written.model.metadata_props[METADATA_KEY] = json.dumps(card)
    written.save(str(path), external_data=False)


def _name_axes(model: Any, exportable: ExportableNetwork) -> None:
    """Call axes that may differ by their names, which tracing has replaced by symbols."""
    names: dict[str, str] = {}
    for value, port in zip(model.graph.inputs, exportable.inputs, strict=True):
        names |= {
            str(symbol): axis
            for symbol, axis in zip(value.shape, port.axes, strict=True)
            if isinstance(axis, str)
        }
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for number, symbol in enumerate(value.shape):
            if str(symbol) in names:
                value.shape[number] = names[str(symbol)]


def _measure_onnx(exportable: ExportableNetwork, path: Path) -> float:
    runtime = optional_import("onnxruntime", "export", "`fulgurite export --to onnx`")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; the rest is of its own optimisations
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in exportable.inputs]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return _compare(exportable, run)


# --- safetensors ----------------------------------------------------------------------------------


def _state(exportable: ExportableNetwork) -> dict[str, Tensor]:
    """The weights by name, each with memory of its own.

    Raises:
        ConfigError: The state holds something else than tensors.
    """
    module: nn.Module = exportable.weights or exportable.network
    state = module.state_dict()
    if others := sorted(name for name, value in state.items() if not isinstance(value, Tensor)):
        raise ConfigError(
            f"The state of {type(module).__name__} holds {others[0]}, which is no tensor.",
            "Use --to torch-export.",
        )
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _write_safetensors(exportable: ExportableNetwork, path: Path, card: Mapping[str, Any]) -> None:
    library = optional_import("safetensors.torch", "export", "Writing .safetensors")
    from safetensors import SafetensorError

    metadata = {METADATA_KEY: json.dumps(card), "format": "pt"}
    path.touch()  # safetensors gives its files to their owner alone; the user's umask decides
    permissions = path.stat().st_mode
    try:
        library.save_file(_state(exportable), path, metadata)
    except SafetensorError as error:  # of a disk, too
        raise RunError(
            f"The weights cannot be written ({error}).", "Make room, or name another --out."
        ) from error
    path.chmod(permissions)


def _measure_safetensors(exportable: ExportableNetwork, path: Path) -> float:
    """Return 0 where all weights are equal bit for bit, and infinity elsewhere."""
    library = optional_import("safetensors.torch", "export", "Reading .safetensors")
    stored, state = library.load_file(path), _state(exportable)
    same = stored.keys() == state.keys() and all(
        stored[name].dtype == value.dtype
        and stored[name].shape == value.shape
        and torch.equal(_bits(stored[name]), _bits(value))
        for name, value in state.items()
    )
    return 0.0 if same else float("inf")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def check_difference(difference: float, name: str) -> None:
    """Refuse a file that gives something else than the network.

    Raises:
        RunError: The difference is above the tolerance.
    """
    if not difference <= TOLERANCE:
        raise RunError(
            f"The network that was written as {name} and read again differs from the trained one "
            f"by {difference:.2g}, more than {TOLERANCE:g}; no file was left.",
            _OTHERWISE,
        )


#: The formats by their names on the command line.
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _measure_onnx),
    "safetensors": Format(
        ".safetensors", ("safetensors",), _write_safetensors, _measure_safetensors
    ),
    "torch-export": Format(".pt2", (), _write_torch_export, _measure_torch_export),
}
