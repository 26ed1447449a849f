"""What a LightningModule hands over to be exported, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from fulgurite.errors import ConfigError, RunError

__all__ = ["ExportRequest", "ExportableNetwork", "Port", "no_network_error"]


def no_network_error(module: object, reason: str = "") -> ConfigError:
    """Return the error of a module that has no network to hand over.

    Args:
        module: The module.
        reason: Why not, as the end of a sentence.

    Example:
        >>> print(no_network_error(1, "which is a number"))
        int has no network to hand over, which is a number. Modules with one have a method \
export_network: see docs/how_to/export.md.
    """
    why = f", {reason}" if reason else ""
    return ConfigError(
        f"{type(module).__name__} has no network to hand over{why}.",
        "Modules with one have a method export_network: see docs/how_to/export.md.",
    )


@dataclass(frozen=True)
class Port:
    """An input or an output of an exported network.

    Args:
        name: Its name in the file.
        dtype: Type of its values.
        axes: A number where the length is fixed, the name of the axis where it may differ.
        meaning: What it is, with units.

    Example:
        >>> str(Port("images", torch.uint8, ("batch", 1, 8, 8), "pixels as stored"))
        'images: uint8 (batch, 1, 8, 8), pixels as stored'
    """

    name: str
    dtype: torch.dtype
    axes: tuple[int | str, ...]
    meaning: str

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.axes))
        comma = "," if len(self.axes) == 1 else ""
        return f"{self.name}: {self.type_name} ({shape}{comma}), {self.meaning}"

    @property
    def type_name(self) -> str:
        """The type as text, such as ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> dict[str, Any]:
        """Return the port as plain values."""
        return {
            "name": self.name,
            "type": self.type_name,
            "shape": list(self.axes),
            "meaning": self.meaning,
        }


@dataclass(frozen=True)
class ExportableNetwork:
    """A network that can do without its LightningModule.

    Args:
        network: What is exported, in evaluation mode and on the CPU; it is called with the inputs
            in their order, and returns the outputs (a tensor, or a tuple of them).
        inputs: What it takes.
        outputs: What it gives.
        axes: Lengths of each axis that may differ, for the comparison of the exported network with
            this one: the first is that of the example that is traced, 2 or more.
        make_inputs: Makes inputs of some lengths of the axes, with random numbers of a generator.
        weights: The module whose weights are exported alone, where that is not ``network``.
        facts: What else a user has to know, as plain values: names of classes, normalisation.
        notes: Where the network differs from what ``fulgurite predict`` does.
    """

    network: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, tuple[int, ...]]
    make_inputs: Callable[[Mapping[str, int], torch.Generator], tuple[Tensor, ...]]
    weights: nn.Module | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Check that the network takes and gives what its ports say.

        Raises:
            RunError: The network takes or gives something else.
        """
        for inputs in self.examples():
            lengths: dict[str, int] = {}
            _check_ports(self.inputs, inputs, lengths, "takes")
            with torch.no_grad():
                outputs = self.network(*inputs)
            results = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
            _check_ports(self.outputs, results, lengths, "gives")

    def examples(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield inputs of all lengths that are compared; the first is the example."""
        generator = torch.Generator().manual_seed(0)
        for number in range(max((len(lengths) for lengths in self.axes.values()), default=1)):
            lengths = {
                axis: tried[min(number, len(tried) - 1)] for axis, tried in self.axes.items()
            }
            yield self.make_inputs(lengths, generator)


def _check_ports(
    ports: tuple[Port, ...], tensors: tuple[Tensor, ...], lengths: dict[str, int], verb: str
) -> None:
    """Compare tensors with ports, and note the lengths of axes."""
    if len(ports) != len(tensors):
        raise RunError(
            f"The network {verb} {len(tensors)} tensors, and {len(ports)} are described."
        )
    for port, tensor in zip(ports, tensors, strict=True):
        fits = tensor.dtype == port.dtype and tensor.ndim == len(port.axes)
        for axis, length in zip(port.axes, tensor.shape, strict=fits):
            expected = lengths.setdefault(axis, length) if isinstance(axis, str) else axis
            fits = fits and length == expected
        if not fits:
            raise RunError(
                f"The network {verb} {tensor.dtype} {tuple(tensor.shape)} as {port.name}, which is "
                f"described as {port.type_name} {port.axes}."
            )


@dataclass
class ExportRequest:
    """What a LightningModule is asked to hand over.

    Args:
        data: The DataModule of the run, made and not yet set up.
        data_state: What the checkpoint holds of it; empty for nothing.
        options: Values of the options that the module names in ``export_options``.
    """

    data: LightningDataModule
    data_state: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def restore_data(self) -> None:
        """Give the DataModule what the checkpoint holds of it, without reading any data."""
        if self.data_state:
            self.data.load_state_dict(dict(self.data_state))

    def prepare_data(self) -> None:
        """Read the data of the run, as ``fulgurite predict`` does."""
        self.data.prepare_data()
        self.data.setup("predict")
        self.restore_data()
