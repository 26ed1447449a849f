"""The configuration of a run as text that runs again.

jsonargparse writes a default that is an object (``device=torch.device("cpu")``) as a remark that
it cannot be written, and gives up at strings of a type of their own (``Interval.step``). A record
holds neither: such a default is left out, so that it is the default again.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import yaml

__all__ = ["remove_objects"]

_REMARK = "Unable to serialize instance "


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_str(str.__str__(text))


# of all text that is written: jsonargparse, too, ends at `Interval.step` of a callback's default
yaml.SafeDumper.add_multi_representer(str, _write_text)


def remove_objects(value: Any, class_path: str = "") -> Any:
    """A configuration without the defaults that are objects.

    Args:
        value: As read from jsonargparse's text.
        class_path: The class whose arguments they are.

    Example:
        >>> arguments = {"swa_lrs": 0.1, "device": "Unable to serialize instance cpu"}
        >>> swa = "lightning.pytorch.callbacks.StochasticWeightAveraging"
        >>> remove_objects({"class_path": swa, "init_args": arguments})["init_args"]
        {'swa_lrs': 0.1}
    """
    if isinstance(value, list):
        return [remove_objects(part) for part in value]
    if not isinstance(value, dict):
        return value
    inner = value.get("class_path") if isinstance(value.get("class_path"), str) else None
    cleaned = {}
    for key, part in value.items():
        if isinstance(part, str) and part.startswith(_REMARK):
            text = part.removeprefix(_REMARK)
            if text != str(_default(class_path, key)):
                cleaned[key] = text  # it was given, in these words
            continue
        cleaned[key] = remove_objects(part, inner or "" if key == "init_args" else "")
    return cleaned


def _default(class_path: str, name: str) -> Any:
    """The default of a constructor's argument; an empty text where there is none."""
    module, _, cls = class_path.rpartition(".")
    try:
        signature = inspect.signature(getattr(importlib.import_module(module), cls))
        default = signature.parameters[name].default
    except (ImportError, AttributeError, ValueError, TypeError, KeyError):
        return ""
    return "" if default is inspect.Parameter.empty else default
