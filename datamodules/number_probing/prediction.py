"""Text and problems of a user, which are in no split.

Axes: B windows or problems, L tokens, D digits of a number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fulgurite.data.text import FileWindows
from fulgurite.datamodules.number_probing.addition import IGNORED, AdditionTask
from fulgurite.datamodules.number_probing.batches import BatchDataset
from fulgurite.datamodules.number_probing.corpus import TokenCache, TokenWindows, WindowOptions
from fulgurite.datamodules.number_probing.draws import Ints
from fulgurite.datamodules.number_probing.tokenizers import Tokenizer
from fulgurite.errors import DataError
from fulgurite.foreign import reading
from fulgurite.predictions import list_input_files

__all__ = ["InputProblems", "InputTokens", "TrainedTokenizer"]

# `int` refuses thousands of digits
_PROBLEM = re.compile(r"\s*([0-9]{1,40})\s*\+\s*([0-9]{1,40})\s*")
_HINT = "Write a problem in each line, such as 12+30."


# --- text -----------------------------------------------------------------------------------------


class TrainedTokenizer:
    """A tokenizer whose vocabulary stays what it is, whatever text it meets.

    Args:
        tokenizer: One that has its vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size, self.end = tokenizer.vocab_size, tokenizer.end
        self.numbers = tokenizer.numbers
        vocabulary = json.dumps(tokenizer.state(), sort_keys=True)
        self.key = f"trained {tokenizer.key} {hashlib.sha256(vocabulary.encode()).hexdigest()}"

    def learn(self, documents: Iterable[str]) -> None:
        """Do nothing: the vocabulary is that of the training."""

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Tokens of each document."""
        return self.tokenizer.encode(documents)

    def state(self) -> dict[str, Any]:
        """Return nothing: the training has it all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing: the vocabulary is that of the training."""

    def spaced(self, token: int) -> bool:
        """Whether a token begins with a space."""
        return self.tokenizer.spaced(token)


class InputTokens(BatchDataset):
    """Windows of the tokens of files, each with its number as ``index``.

    Args:
        caches: The tokens of each file.
        windows: Where windows begin.
        options: What windows are, without a perturbation that replaces numbers.
    """

    def __init__(
        self, caches: Sequence[TokenCache], windows: FileWindows, options: WindowOptions
    ) -> None:
        self.windows = windows
        self.files = [_PaddedWindows(cache, options) for cache in caches]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [
            self.files[self.windows.file[k]].__getitems__([int(self.windows.begin[k])])
            for k in indices
        ]
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return {**batch, "index": torch.as_tensor(indices)}


class _PaddedWindows(TokenWindows):
    """Windows of one file by their first token; what is behind the end is padding."""

    def __init__(self, cache: TokenCache, options: WindowOptions) -> None:
        super().__init__(cache, range(len(cache)), options, random=False)

    def begins(self, indices: Sequence[int]) -> Ints:
        """First tokens of windows, which are their indices. Shape: (B,)."""
        return np.asarray(indices, np.int64)

    def text(self, begin: int, count: int) -> Ints:
        """Read tokens, and zeros behind the end. Shape: (count,)."""
        tokens = self.cache.tokens[begin : begin + count].astype(np.int64)
        return np.pad(tokens, (0, count - len(tokens)))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch = super().__getitems__(indices)
        for row, begin in zip(batch["targets"], indices, strict=True):
            row[max(0, len(self.cache) - begin - 1) :] = IGNORED
        return batch


# --- addition -------------------------------------------------------------------------------------


class InputProblems(BatchDataset):
    """Problems ``a+b`` of files, one in each line, each with its number as ``index``.

    Args:
        path: A file of any name, or a folder of ``.txt`` files.
        task: The problems of the training.

    Attributes:
        names: Columns that say what each problem is: ``file``, ``line`` and ``problem``.

    Raises:
        DataError: There is no such file, a line is no problem, or one that the training has none
            of.
    """

    def __init__(self, path: Path, task: AdditionTask) -> None:
        self.task = task
        self.names: dict[str, list[str]] = {"file": [], "line": [], "problem": []}
        pairs: list[tuple[int, int]] = []
        for name, file in list_input_files(path, [".txt"]):
            before = len(pairs)
            with reading(file, "The file", "Give text in UTF-8."):
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                pairs.append(self._parse(line, f"The line {number} of {file}"))
                for column, value in zip(
                    self.names.values(), (name, str(number), line.strip()), strict=True
                ):
                    column.append(value)
            if len(pairs) == before:
                raise DataError(f"The file {file} holds no problem.", _HINT)
        self.a, self.b = np.array(pairs, np.int64).T

    def _parse(self, line: str, subject: str) -> tuple[int, int]:
        match = _PROBLEM.fullmatch(line)
        if match is None:
            raise DataError(f"{subject} is no problem a+b: {line.strip()[:80]!r}.", _HINT)
        a, b = int(match[1]), int(match[2])
        size = self.task.size
        if max(a, b) >= size:
            raise DataError(
                f"{subject} has the number {max(a, b)}, and the network was trained on numbers "
                f"below {size}.",
                f"Give numbers from 0 to {size - 1}.",
            )
        if self.task.bounded and a + b >= size:
            raise DataError(
                f"{subject} has the sum {a + b}, and the network was trained on sums below {size}.",
                f"Give problems whose sum is below {size}.",
            )
        return a, b

    def __len__(self) -> int:
        return len(self.a)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(indices, np.int64)
        return {**self.task.encode(self.a[rows], self.b[rows]), "index": torch.from_numpy(rows)}
