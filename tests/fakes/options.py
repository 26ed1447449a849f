"""Options of tests: those of the command line, and those that are named without their records."""

from dataclasses import fields
from typing import Any

#: Of commands that nobody watches.
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def group(options: dict[str, Any], **records: type) -> dict[str, Any]:
    """Put options into the records that have them as fields.

    Args:
        options: By name; those that are in no record stay as they are.
        records: By the name of the argument that takes the record.
    """
    rest = dict(options)
    grouped = {}
    for argument, kind in records.items():
        names = {field.name for field in fields(kind)} & rest.keys()
        if names:
            grouped[argument] = kind(**{name: rest.pop(name) for name in names})
    return rest | grouped
