"""Sweeps without a server: W&B's sweep files, run by Optuna.

``fulgurite sweep FILE`` runs each point as ``fulgurite fit`` in worker processes, keeps the trials
in a database that several machines may share, and writes a table, figures and the best
configuration.
"""

from fulgurite.sweep.driver import main, run
from fulgurite.sweep.space import Sweep
from fulgurite.sweep.sweep_file import read_sweep

__all__ = ["Sweep", "main", "read_sweep", "run"]
