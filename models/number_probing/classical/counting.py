"""Word vectors by counting: cooccurrences, their PPMI and its singular directions; vectors on disk.

Axes: B batch, L tokens, V vocabulary, D width, N numbers, C contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.io import write_text

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["cooccurrences", "ppmi", "save_vectors", "svd_embeddings"]

Floats = npt.NDArray[np.float64]


def cooccurrences(
    tokens: npt.NDArray[Any],
    vocab_size: int,
    window: int = 5,
    documents: npt.NDArray[Any] | None = None,
) -> csr_matrix:
    """Count how often two tokens stand at most ``window`` tokens apart, in either order.

    Args:
        tokens: Rows of text; pairs never cross from one row to the next.
            Shape: (B, L).
        vocab_size: V.
        window: Largest distance of two tokens.
        documents: Ids of documents; pairs do not cross them either. Shape: (B, L).

    Returns:
        Shape: (V, V), float64, symmetric.

    Example:
        >>> cooccurrences(np.array([[0, 1, 1]]), 2, window=1).toarray()
        array([[0., 1.],
               [1., 2.]])

    Source: docs/papers/number_probing.md section 4.3 (window 5); arXiv 1402.3722.
    """
    from scipy.sparse import coo_matrix, csr_matrix

    total = csr_matrix((vocab_size, vocab_size))
    for lag in range(1, min(window, tokens.shape[1] - 1) + 1):
        first, second = tokens[:, :-lag], tokens[:, lag:]
        if documents is not None:
            same = documents[:, :-lag] == documents[:, lag:]
            first, second = first[same], second[same]
        ones = np.ones(first.size)
        pairs = first.ravel().astype(np.int64), second.ravel().astype(np.int64)
        total = total + coo_matrix((ones, pairs), total.shape).tocsr()
    return csr_matrix(total + total.T)


def ppmi(counts: csr_matrix, smoothing: float = 0.75) -> csr_matrix:
    """Positive pointwise mutual information [nats] of rows and columns.

    Args:
        counts: Shape: (N, C).
        smoothing: Exponent of the columns' counts; below 1, rare contexts count less.

    Returns:
        Shape: (N, C), non-negative, zero where counts are.

    Example:
        >>> from scipy.sparse import csr_matrix
        >>> ppmi(csr_matrix([[2.0, 0.0], [0.0, 2.0]]), smoothing=1.0).toarray().round(3)
        array([[0.693, 0.   ],
               [0.   , 0.693]])

    Source: Levy, Goldberg and Dagan, 2015, sections 2.1 and 3.1; smoothing .75:
    docs/papers/number_probing.md section 4.3.
    """
    from scipy.sparse import csr_matrix

    table = csr_matrix(counts, dtype=np.float64).tocoo()
    rows = np.asarray(table.sum(1)).ravel()
    columns = np.asarray(table.sum(0)).ravel() ** smoothing
    # p(row, column) / (p(row) p'(column)), of which p(row) and the pairs share their total
    ratio = table.data / rows[table.row] * columns.sum() / columns[table.col]
    information = csr_matrix((np.maximum(np.log(ratio), 0), (table.row, table.col)), table.shape)
    information.eliminate_zeros()
    return information


def svd_embeddings(table: csr_matrix, width: int, power: float = 0.5) -> Floats:
    """The rows of a table in its first singular directions.

    Args:
        table: Shape: (N, C).
        width: D, below N and C.
        power: Exponent of the singular values.

    Returns:
        U S^power, directions by singular values, signs so that each one's largest entry is
        positive. Shape: (N, D), float64.

    Raises:
        ConfigError: D is too large, or the table empty.

    Example:
        >>> from scipy.sparse import csr_matrix
        >>> svd_embeddings(csr_matrix(np.diag([1.0, 4.0, 9.0])), 2).round(6) + 0.0
        array([[0., 0.],
               [0., 2.],
               [3., 0.]])

    Source: Levy, Goldberg and Dagan, 2015, section 3.3; docs/papers/number_probing.md section 4.3
    (SVD-100).
    """
    from scipy.sparse.linalg import svds

    if not 0 < width < min(table.shape) or not table.nnz:
        raise ConfigError(
            f"{width} singular directions of a {' x '.join(map(str, table.shape))} table with "
            f"{table.nnz} entries do not exist.",
            "Give a smaller --model.init_args.width, or more text.",
        )
    start_vector = np.ones(min(table.shape))  # else a random one
    u, singular_values, _ = svds(table, k=width, v0=start_vector)
    order = np.argsort(-singular_values)
    u, singular_values = u[:, order], singular_values[order]
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(width)])
    embeddings: Floats = u * signs * singular_values**power
    return embeddings


def save_vectors(path: str | Path, numbers: Sequence[int], embeddings: Tensor) -> Path:
    r"""Write number embeddings as a word2vec text file, which ``fulgurite probe`` reads.

    Args:
        path: A ``.txt`` file; replaced if it is there.
        numbers: Shape: (N,).
        embeddings: Shape: (N, D).

    Returns:
        The file.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_vectors(Path(folder) / "a.txt", [7, 8], torch.eye(2))
        ...     file.read_text()
        '2 2\n7 1.0 0.0\n8 0.0 1.0\n'

    Source: the format of word2vec's text files.
    """
    rows = embeddings.detach().cpu().tolist()
    lines = [f"{len(rows)} {embeddings.shape[1]}"]
    lines += [f"{n} {' '.join(map(repr, row))}" for n, row in zip(numbers, rows, strict=True)]
    write_text(path, "\n".join(lines) + "\n")
    return Path(path)


# --- LightningModules ----------------------------------------------------------------------------
