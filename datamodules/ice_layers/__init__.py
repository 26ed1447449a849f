"""Data of ice_layers: layer thickness along flight lines, with the climate at each trace."""

from lazy_loader import attach_stub

# on first use: Lightning costs seconds, which readers and generators alone need not pay
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
