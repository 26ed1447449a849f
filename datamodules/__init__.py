"""LightningDataModules and datasets, one sub-package per system."""
