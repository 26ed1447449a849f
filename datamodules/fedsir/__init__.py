"""Data of fedsir: image data sets dealt to clients, some of which have wrong labels."""

from lazy_loader import attach_stub

# on first use: Lightning costs seconds, which noise and partitions alone need not pay
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
