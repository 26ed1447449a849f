"""``predictions.npz``: what ``predict_step`` returns, checked at once and written batch by batch.

========================================  ========================================================
what ``predict_step`` returns             what is written
========================================  ========================================================
a tensor                                  the array ``prediction``, all batches one after the other
a dict, a dataclass                       an array for each key; ``a.b`` for nested ones
a tuple, a named tuple                    an array for each part: ``0``, ``1`` …, or by its names
a list                                    a row for each item: tensors, numbers, strings, lists,
                                          or dicts (an array for each of their keys)
a number, a string, a tensor without      a row for each batch
axes
``None``                                  nothing
========================================  ========================================================

Rows of one shape become one array. Rows that differ in their first axis alone (detections, words)
become their concatenation ``key`` and ``key.lengths``, the length of each; rows that differ
otherwise become flat values ``key`` and ``key.shapes``, a shape for each. :func:`read_predictions`
puts rows of both kinds together again. Strings are arrays of fixed width. Nothing is pickled.

Codes get their names beside them, where the DataModule has ``prediction_names``: a mapping of keys
to the names of the numbers 0, 1 …, or to several columns of names by their headings, such as
``{"label": ["cat", "dog"], "index": {"plate": [...], "well": [...]}}``. The names of ``label`` are
the array ``label_name``, empty for other numbers. And all keys with one value in a row are written
as ``predictions.csv``, a line for each row, with names instead of codes and the several columns in
front. Rows of vectors are there too where ``prediction_axes`` of the DataModule names their
components (``{"probabilities": ["cat", "dog"]}``). Read it with ``keep_default_na=False`` where
pandas would take a name such as NA for a missing one.

``--input PATH`` predicts files that are in no split: :mod:`fulgurite.predictions.inputs`.

Axes: N rows.
"""

from fulgurite.predictions.file import PredictionFile
from fulgurite.predictions.inputs import ReadsInputs, list_input_files, serve_input
from fulgurite.predictions.reading import read_predictions
from fulgurite.predictions.writer import PredictionWriter

__all__ = [
    "PredictionFile",
    "PredictionWriter",
    "ReadsInputs",
    "list_input_files",
    "read_predictions",
    "serve_input",
]
