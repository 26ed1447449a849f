"""Map the top-level folders onto one package: ``models/`` is imported as ``fulgurite.models``."""

from setuptools import find_packages, setup

FOLDERS = {
    "fulgurite": "platform/fulgurite",
    **{f"fulgurite.{d}": d for d in ("datamodules", "models", "callbacks", "configs")},
}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
    ],
)
