"""Data of stream_cqsa: long sequences, of real bytes or with needles hidden in them."""

from lazy_loader import attach_stub

# on first use: Lightning costs seconds, which finding and reading text alone need not pay
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
