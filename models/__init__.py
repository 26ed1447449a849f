"""Networks, methods and LightningModules, one sub-package per system."""
