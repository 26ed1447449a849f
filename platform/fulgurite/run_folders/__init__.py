"""Run folders: ``runs/<system>/<name>/<stamp>/`` holds all that a run leaves behind.

========================  ==========================================================
``config.yaml``           the resolved configuration; ``--config`` takes it as it is
``environment.json``      versions, devices, seed, command line, checkpoint that was read
``metrics.csv``           every logged metric
``summary.json``          the last value of each metric of a fit that has ended
``test_metrics.json``     the result of ``fulgurite test`` (likewise ``validate``)
``figures/``              every figure as PNG
``checkpoints/``          ``last.ckpt`` and, with a monitored metric, ``best.ckpt``
``config.1.yaml`` …       the records of the command that a resumed run began with
========================  ==========================================================

A run is the training of one model on one data set with one seed. A fit that is resumed goes on in
its folder, under a lock, with the options of its training; ``--run.new`` begins another run.
"""

from fulgurite.run_folders.differences import (
    LINKS,
    describe,
    differences,
    identity_differences,
    training_differences,
)
from fulgurite.run_folders.finding import find_checkpoint, find_run
from fulgurite.run_folders.folders import (
    CHECKPOINT_VARIABLE,
    LAST,
    NO_NAME,
    NO_SYSTEM,
    RUN_DIR_VARIABLE,
    RunLock,
    RunOptions,
    leads_out,
    new_run_folder,
    run_folder_of,
)
from fulgurite.run_folders.records import (
    environment,
    holds_run,
    recorded_config,
    recorded_environment,
    set_records_aside,
    write_json,
)

__all__ = [
    "CHECKPOINT_VARIABLE",
    "LAST",
    "LINKS",
    "NO_NAME",
    "NO_SYSTEM",
    "RUN_DIR_VARIABLE",
    "RunLock",
    "RunOptions",
    "describe",
    "differences",
    "environment",
    "find_checkpoint",
    "find_run",
    "holds_run",
    "identity_differences",
    "leads_out",
    "new_run_folder",
    "recorded_config",
    "recorded_environment",
    "run_folder_of",
    "set_records_aside",
    "training_differences",
    "write_json",
]
