"""Files that others wrote: read within bounds, or refused by one error that names the file.

A parser raises nearly any exception on damaged bytes, and a small file can ask for gigabytes. Every
reader of such files does its work inside :func:`reading`, which turns what was raised into one
error of :mod:`fulgurite.errors`; the helpers here keep what is read in proportion to the file, and
raise a plain ``ValueError`` that says why, for :func:`reading` to name the file.

The readers are imported on first use: what only writes files needs no NumPy.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
