"""Comparison tables: a grid of methods × settings × seeds through the one command line.

``fulgurite compare FILE`` runs each cell of the grid as ``fulgurite fit`` (and ``test``) in
parallel worker processes, keeps one JSON per finished cell, and renders tables and a figure from
these.

Its parts are imported on first use: a worker process needs few of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.compare.command import main
    from fulgurite.compare.comparison import Comparison
    from fulgurite.compare.driver import run
    from fulgurite.compare.plan import ComparisonMethod, ComparisonPlan
    from fulgurite.compare.plan_file import read_plan
    from fulgurite.compare.report import render, report_main
    from fulgurite.compare.trial import Trial, TrialResult
    from fulgurite.compare.trials import define_trials

_MODULES = {
    "command": ("main",),
    "comparison": ("Comparison",),
    "driver": ("run",),
    "plan": ("ComparisonMethod", "ComparisonPlan"),
    "plan_file": ("read_plan",),
    "report": ("render", "report_main"),
    "trial": ("Trial", "TrialResult"),
    "trials": ("define_trials",),
}

__all__ = [
    "Comparison",
    "ComparisonMethod",
    "ComparisonPlan",
    "Trial",
    "TrialResult",
    "define_trials",
    "main",
    "read_plan",
    "render",
    "report_main",
    "run",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
