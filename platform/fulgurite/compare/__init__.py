"""Comparison tables: a grid of methods × settings × seeds through the one command line.

``fulgurite compare FILE`` runs each cell of the grid as ``fulgurite fit`` (and ``test``) in
parallel worker processes, keeps one JSON per finished cell, and renders tables and a figure from
these.
"""

from fulgurite.compare.comparison import Comparison
from fulgurite.compare.driver import main, run
from fulgurite.compare.plan import Cell, ComparisonMethod, ComparisonPlan, read_plan
from fulgurite.compare.report import main as report_main
from fulgurite.compare.report import render

__all__ = [
    "Cell",
    "Comparison",
    "ComparisonMethod",
    "ComparisonPlan",
    "main",
    "read_plan",
    "render",
    "report_main",
    "run",
]
