"""What the hooks of a federated method must return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fulgurite.data.exclusions import name_some
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.methods import FederatedMethod

__all__ = ["check_participants", "check_weights"]

_TOLERANCE = 1e-4  # of a sum of weights that were computed in float32


def check_participants(
    method: FederatedMethod, participants: Sequence[int], sampled: Sequence[int]
) -> None:
    """Refuse participants that were not sampled, that come twice, or none.

    Raises:
        ConfigError: The participants are no part of the sampled clients.
    """
    strangers = sorted(set(participants) - set(sampled))
    if participants and not strangers and len(set(participants)) == len(participants):
        return
    if strangers:
        problem = f"names clients that were not sampled: {name_some(strangers)}"
    elif participants:
        problem = "names a client more than once"
    else:
        problem = "names no client"
    raise ConfigError(
        f"`participants` of {type(method).__name__} {problem}.",
        "Return some of the clients that it is given, each of them once.",
    )


def check_weights(
    method: FederatedMethod, weights: Mapping[int, float], clients: Sequence[int]
) -> None:
    """Refuse weights that would scale the global model, or leave clients out unsaid.

    Raises:
        ConfigError: The weights are not those of the clients that reported, or do not sum to 1.
    """
    total = sum(weights.values())
    if set(weights) == set(clients) and abs(total - 1) <= _TOLERANCE:  # also false for NaN
        return
    absent, strangers = set(clients) - set(weights), set(weights) - set(clients)
    if absent or strangers:
        which = absent or strangers
        names = name_some(sorted(which))
        problem = f"has no entry for client {names}" if absent else f"names client {names}"
        problem += ", which reported" if absent else ", which did not report"
    else:
        problem = f"sums to {total:.6g}" if math.isfinite(total) else "is not finite"
    raise ConfigError(
        f"What `weights` of {type(method).__name__} returns {problem}.",
        "Return a weight for each of replies.clients, 0 for one to leave out, with the sum 1.",
    )
