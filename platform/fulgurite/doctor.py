"""``fulgurite doctor``: versions, devices, and the known faults of an installation."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from fulgurite.data.store import cache_folder
from fulgurite.extras import list_optional_packages, list_unfit_packages
from fulgurite.systems import plug_ins

__all__ = ["doctor"]

REQUIRED = ("torch", "lightning", "torchmetrics", "jsonargparse", "numpy", "scikit-learn", "wandb")
_NO_EXTRA = {"lightning-bolts": "pip install --no-deps lightning-bolts==0.7.0"}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _list_optional() -> dict[str, str]:
    """How to install each optional package."""
    extras = {
        name: f"pip install 'fulgurite[{names[0]}]'"
        for name, names in list_optional_packages().items()
    }
    return {**extras, **_NO_EXTRA}


def _free_space(folder: Path) -> str:
    """Free bytes of the disk of a folder, or of the nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _describe_data() -> tuple[str, list[str]]:
    """What ``FULGURITE_DATA`` names, and what is wrong with it."""
    value = os.environ.get("FULGURITE_DATA")
    if not value:
        return "not set", []
    folder = Path(value).expanduser()
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        fault = f"FULGURITE_DATA={value} cannot be read ({error.strerror}): name a folder of data."
        return value, [fault]
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{value} ({listing or 'empty'})", []


def doctor() -> int:
    """Print the state of this installation; returns 1 if something is known to break it."""
    faults = []
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("fulgurite", *REQUIRED):
        print(f"  {name} {_version(name) or 'missing'}")
        if _version(name) is None:
            faults.append(f"{name} is missing: reinstall fulgurite.")
    for name, install in _list_optional().items():
        print(f"  {name} {_version(name) or f'not installed ({install})'}")
    faults += [
        f"{name} {_version(name)} is installed, and {limits}: install that."
        for name, limits in list_unfit_packages().items()
    ]
    if _version("lightning") in ("2.6.2", "2.6.3"):
        faults.append("lightning 2.6.2 and 2.6.3 were malicious releases: upgrade at once.")
    if (_version("pytorch-lightning") or "2").startswith("1."):
        faults.append(
            "pytorch-lightning 1.x is installed (lightning-bolts with its dependencies brings it): "
            "uninstall both, then `pip install --no-deps lightning-bolts==0.7.0`."
        )
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            faults.append(f"torchvision cannot be imported ({error}): uninstall it.")
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"  build: torch {torch.__version__}")
    print(f"  devices: {os.cpu_count()} CPUs, {', '.join(gpus) or 'no GPU'}")
    data, missing = _describe_data()
    faults += missing
    print(f"  FULGURITE_DATA: {data}")
    print(f"  disk: {_free_space(Path.cwd())} in {Path.cwd()}")
    print(f"  cache: {_free_space(cache_folder())} in {cache_folder()}")
    for plug_in in plug_ins():
        if plug_in.fault:
            faults.append(f"{plug_in} Repair or uninstall it.")
        else:
            print(f"  plug-in: {plug_in.name} ({plug_in.origin})")
    if not plug_ins():
        print("  plug-in: none")
    for fault in faults:
        print(f"fault: {fault}")
    return int(bool(faults))
