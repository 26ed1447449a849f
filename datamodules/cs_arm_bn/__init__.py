"""Data of cs_arm_bn: plates of microscope images as episodes of queries and controls."""

from lazy_loader import attach_stub

# on first use: Lightning costs seconds, which tables and splits alone need not pay
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
