"""``fulgurite fit|validate|test|predict``: LightningCLI with run folders and one-line errors."""

from fulgurite.cli.arguments import prepare_arguments
from fulgurite.cli.lightning_cli import FulguriteCLI
from fulgurite.cli.metrics import metrics_table, sort_metrics
from fulgurite.cli.running import construct, main, parse, run

__all__ = [
    "FulguriteCLI",
    "construct",
    "main",
    "metrics_table",
    "parse",
    "prepare_arguments",
    "run",
    "sort_metrics",
]
