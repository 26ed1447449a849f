"""The federation: clients, local training, exchange between ranks.

Pure torch. Clients are simulated; each rank trains the clients dealt out to it, and whatever is
exchanged is exchanged through a few collectives, so that one process and several give the same
result bit for bit: random numbers come from generators keyed by their use (seed, purpose, round,
client), and sums over clients are exact integers (:func:`exact_average`). (Not so with
``vectorize``: which clients share a pass depends on the ranks, and so does rounding.)
"""

from fulgurite.models.fedsir.federation.clients import Client, ClientSide, TrainingTask
from fulgurite.models.fedsir.federation.federation import Costs, Federation
from fulgurite.models.fedsir.federation.grouping import choose_group_size
from fulgurite.models.fedsir.federation.messages import (
    Replies,
    Reply,
    Request,
    TrainReply,
    TrainRequest,
)
from fulgurite.models.fedsir.federation.objectives import LogitLoss, MiniBatch, Objective
from fulgurite.models.fedsir.federation.randomness import keyed_generator, mini_batches
from fulgurite.models.fedsir.federation.ranks import balanced_assignment
from fulgurite.models.fedsir.federation.remote import (
    Answer,
    Question,
    RemoteClients,
    RemoteFederation,
    connect_clients,
    connected_clients,
)
from fulgurite.models.fedsir.federation.states import ClientStates, FlatState, exact_average
from fulgurite.models.fedsir.federation.training import LocalTrainer
from fulgurite.models.fedsir.federation.visible import VisibleData

__all__ = [
    "Answer",
    "Client",
    "ClientSide",
    "ClientStates",
    "Costs",
    "Federation",
    "FlatState",
    "LocalTrainer",
    "LogitLoss",
    "MiniBatch",
    "Objective",
    "Question",
    "RemoteClients",
    "RemoteFederation",
    "Replies",
    "Reply",
    "Request",
    "TrainReply",
    "TrainRequest",
    "TrainingTask",
    "VisibleData",
    "balanced_assignment",
    "choose_group_size",
    "connect_clients",
    "connected_clients",
    "exact_average",
    "keyed_generator",
    "mini_batches",
]
