"""Methods that choose the source of BatchNorm statistics, and do nothing else."""

from __future__ import annotations

from typing import Literal

from fulgurite.errors import ConfigError
from fulgurite.models.cs_arm_bn.batchnorm import Context
from fulgurite.models.cs_arm_bn.methods.base import Method

__all__ = ["ARMBN", "CSARMBN", "ERM", "AdaBN", "AdaptiveWeight", "ControlsOnly", "Weighted"]


class ERM(Method):
    """Ordinary BatchNorm: statistics of the mini-batch in training, running ones at test.

    Training batches should mix plates (``data.init_args.episodes.mixed=true``).

    Source: docs/papers/cs_arm_bn.md section 1.2.
    """

    needs_batchnorm = False


class AdaBN(ERM):
    """A network trained by ERM; at test, statistics come from a plate's queries.

    Source: Li et al., arXiv 1603.04779; docs/papers/cs_arm_bn.md section 1.2 (per chunk of
    queries).
    """

    test_source = "batch"
    needs_batchnorm = True


class ARMBN(Method):
    """Statistics come from a plate's queries, in training and test.

    Source: Zhang et al., arXiv 2007.02931; docs/papers/cs_arm_bn.md section 1.2.
    """

    train_source = test_source = "batch"


class CSARMBN(Method):
    """Statistics come from queries and controls of a plate together; the paper's method.

    Args:
        test_source: ``"union"`` as in training (the paper's) or ``"controls"``, with which a
            prediction does not depend on other queries.
        test_weight: Weight of the queries at test in the union; None is the count weight L/(L+N),
            the paper's; about 0.1 is safe where classes are skewed.

    Source: docs/papers/cs_arm_bn.md sections 1.2 to 1.4; ``test_weight``: section 6.2.
    """

    train_source = "union"
    needs_controls = False
    deploys = True

    def __init__(
        self,
        test_source: Literal["union", "controls"] = "union",
        test_weight: float | None = None,
    ) -> None:
        super().__init__()
        if test_source not in ("union", "controls"):
            raise ConfigError(f"test_source {test_source!r} is unknown.", "Use union or controls.")
        self.test_source = test_source
        self.train_weight: float | None = None
        self.test_weight: float | Literal["adaptive"] | None = test_weight
        self.context(training=False)  # checks the weight

    def context(self, training: bool) -> Context:
        """Return a new context: see :meth:`Method.context`."""
        if training:
            return Context(self.train_source, weight=self.train_weight)
        return Context(self.test_source, weight=self.test_weight)


class AdaptiveWeight(CSARMBN):
    """CS-ARM-BN whose query weight at test is estimated for each plate, without labels.

    Training is the paper's; it also records the usual difference of queries and controls, from
    which :func:`~fulgurite.models.cs_arm_bn.adaptive_weight` detects label shift.

    Source: beyond the paper; see docs/systems/cs_arm_bn.md.
    """

    def __init__(self) -> None:
        super().__init__()
        self.test_weight = "adaptive"


class Weighted(CSARMBN):
    """CS-ARM-BN with a fixed weight of the queries, in training too.

    Args:
        weight: Weight in training: 0 for controls only, 1 for queries only.
        test_weight: Weight at test; None for that of training.

    Source: docs/papers/cs_arm_bn.md section 1.5.
    """

    def __init__(self, weight: float = 0.1, test_weight: float | None = None) -> None:
        super().__init__(test_weight=weight if test_weight is None else test_weight)
        self.train_weight = weight
        self.context(training=True)


class ControlsOnly(Method):
    """Statistics come from the controls only: predictions do not depend on other queries.

    Args:
        gradient: Whether the gradient passes through the statistics into the controls; without it
            (BEN in the authors' code) accuracy is far lower.

    Source: docs/papers/cs_arm_bn.md sections 1.2 and 6.2.
    """

    train_source = test_source = "controls"
    needs_controls = True
    deploys = True

    def __init__(self, gradient: bool = True) -> None:
        super().__init__()
        self.gradient = gradient

    def context(self, training: bool) -> Context:
        """Return a new context: see :meth:`Method.context`."""
        return Context("controls", detach=training and not self.gradient)
