"""``fulgurite doctor``: versions, devices, and the known faults of an installation."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from importlib import metadata

__all__ = ["doctor"]

REQUIRED = ("torch", "lightning", "torchmetrics", "jsonargparse", "numpy", "scikit-learn", "wandb")
OPTIONAL = {
    "tensorboard": "pip install 'fulgurite[tensorboard]'",
    "cleanlab": "pip install 'fulgurite[cleaning]'",
    "torch-geometric": "pip install 'fulgurite[ice]'",
    "h5py": "pip install 'fulgurite[ice]'",
    "netCDF4": "pip install 'fulgurite[ice]'",
    "pyproj": "pip install 'fulgurite[ice]'",
    "lightning-bolts": "pip install --no-deps lightning-bolts==0.7.0",
}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def doctor() -> int:
    """Print the state of this installation; returns 1 if something is known to break it."""
    faults = []
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("fulgurite", *REQUIRED):
        print(f"  {name} {_version(name) or 'missing'}")
        if _version(name) is None:
            faults.append(f"{name} is missing: reinstall fulgurite.")
    for name, install in OPTIONAL.items():
        print(f"  {name} {_version(name) or f'not installed ({install})'}")
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
    print(f"  FULGURITE_DATA: {os.environ.get('FULGURITE_DATA') or 'not set'}")
    for fault in faults:
        print(f"fault: {fault}")
    return int(bool(faults))
