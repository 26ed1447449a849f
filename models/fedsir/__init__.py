"""FedSIR: spectral client identification and relabeling, and its baselines.

The pure functions are imported on first use, so that importing this package costs nothing.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
