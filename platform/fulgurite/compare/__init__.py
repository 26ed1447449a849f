"""Comparison tables: a grid of methods × settings × seeds through the one command line.

``fulgurite compare FILE`` runs each cell of the grid as ``fulgurite fit`` (and ``test``) in
parallel worker processes, keeps one JSON per finished cell, and renders tables and a figure from
these.

Its parts are imported on first use: a worker process needs few of them.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
