"""Multinomial logistic regression of all folds and seeds at once: the slow probe.

Axes: N numbers, D embedding width, T classes, S seeds, F folds, E = S F models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.models.number_probing.probes.fold_statistics import FoldStatistics, StandardizedRows

__all__ = ["logistic_scores"]


def logistic_scores(
    table: StandardizedRows,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    *,
    strength: float = 1.0,
    max_steps: int = 500,
) -> Tensor:
    """Logits of every row under every model.

    Minimises C Σ log-loss + ‖w‖²/2 by L-BFGS on features standardised on the rows that a model is
    fitted to, as scikit-learn's ``LogisticRegression(C=strength)`` behind a ``StandardScaler``. The
    models are independent, so one descent serves the sum of their losses.

    Args:
        table: The N rows.
        labels: Class of each row. Shape: (N,).
        classes: T.
        folds: Fold of each row, by seed. Shape: (S, N).
        strength: C.
        max_steps: Limit of L-BFGS.

    Returns:
        Logits under the model that was fitted without fold f. Shape: (S, F, N, T).

    Raises:
        ConfigError: A fold leaves too few rows.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [5.0], [6.0]]).double().repeat(2, 1)
        >>> table = StandardizedRows(x)
        >>> labels, folds = torch.tensor([0, 0, 1, 1] * 2), torch.arange(8)[None] // 4
        >>> logistic_scores(table, labels, 2, folds).argmax(-1)[0, 0].tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]

    Source: docs/papers/number_probing.md section 1.5.
    """
    with torch.inference_mode(False), torch.enable_grad():
        c = FoldStatistics.from_labels(table, labels, classes, folds)
        x = table.x[:-1].clone()  # tensors made in inference mode cannot be differentiated
        scale = c.total.rsqrt()[..., None]  # (E, D, 1)
        center = (c.global_mean[..., None] * scale).clone()
        models = len(scale)
        fold = torch.arange(models // len(folds), device=x.device)
        train_mask = (folds[:, None] != fold[:, None]).flatten(0, 1).to(x)  # (E, N)
        one_hot = torch.nn.functional.one_hot(labels, classes).to(x)
        # scikit-learn has one vector for two classes, and so half our penalty
        penalty = 1.0 if classes == 2 else 0.5
        weight = x.new_zeros(models, x.shape[1], classes, requires_grad=True)
        bias = x.new_zeros(models, 1, classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=max_steps, history_size=10,
            tolerance_grad=1e-5 * strength * len(x), tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def compute_logits() -> Tensor:
            return x @ (weight * scale) + (bias - (center * weight).sum(1, keepdim=True))

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = compute_logits()
            loss = logits.logsumexp(-1) - (logits * one_hot).sum(-1)
            objective = strength * (loss * train_mask).sum() + penalty * weight.square().sum()
            objective.backward()  # type: ignore[no-untyped-call]
            return objective

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return compute_logits().detach().view(len(folds), -1, table.size, classes)
