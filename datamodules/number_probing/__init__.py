"""Data of number_probing: addition of tokens, and text with numbers in it."""

from lazy_loader import attach_stub

# on first use: Lightning costs seconds, which tasks and tokenizers alone need not pay
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
