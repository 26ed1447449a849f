"""FedSIR: spectral identification, spectral relabeling, noise-aware training.

Axes: K clients, N samples, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    Federation,
    Replies,
    Reply,
    Request,
    TrainingTask,
    TrainReply,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.noise_aware import (
    NoiseAwareClientSide,
    NoiseAwareMethod,
)
from fulgurite.models.fedsir.methods.options import (
    AggregationOptions,
    ClientLossOptions,
    DistillationOptions,
    RelabelingOptions,
)
from fulgurite.models.fedsir.methods.spectral import (
    SpectralClientSide,
    SpectralIdentification,
    accumulate,
    clean_reference,
)
from fulgurite.models.fedsir.relabeling import (
    ClientReference,
    References,
    aggregate_references,
    client_reference,
    relabel,
)
from fulgurite.options import NonNegativeInt, PositiveInt, check_arguments

__all__ = [
    "FedSIR",
    "FedSIRClientSide",
    "ReferenceReply",
    "ReferenceRequest",
    "RelabelReply",
    "RelabelRequest",
]


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest(Request):
    """Compute references of your classes under a teacher; for clean clients.

    Attributes:
        model: Flat state of the teacher. Shape: (P,).
    """

    optional: ClassVar[bool] = True

    model: Tensor


@dataclass(frozen=True, kw_only=True)
class ReferenceReply(Reply):
    """Directions and residual subspaces of a clean client's classes.

    Attributes:
        reference: Tensors on the CPU.
    """

    reference: ClientReference


@dataclass(frozen=True, kw_only=True)
class RelabelRequest(Request):
    """Relabel your samples, starting from the given labels; for noisy clients.

    Attributes:
        model: Flat state of the teacher. Shape: (P,).
        references: References of all classes.
    """

    optional: ClassVar[bool] = True

    model: Tensor
    references: References


@dataclass(frozen=True, kw_only=True)
class RelabelReply(Reply):
    """Numbers of a noisy client's samples.

    Attributes:
        samples: All samples.
        accepted: Those whose label comes from the references.
        agreeing: Those for which both scores name the same class.
    """

    samples: int
    accepted: int
    agreeing: int


class FedSIRClientSide(NoiseAwareClientSide):
    """Clients of all stages of FedSIR.

    Args:
        method: The method, of which only options are used.

    Source: docs/papers/fedsir.md Stages I to III.
    """

    def __init__(self, method: FedSIR) -> None:
        super().__init__(method)
        self.relabeling = method.relabeling
        self.spectral = SpectralClientSide(method.identification)

    def task(self, client: Client, request: Request) -> TrainingTask | None:
        """The training of Stage I, or of a round."""
        if isinstance(request, TrainRequest):
            return super().task(client, request)
        return self.spectral.task(client, request)

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Answer with scores, references, numbers of relabeled samples, or a trained model."""
        if isinstance(request, ReferenceRequest):
            return self._make_reference(client, request)
        if isinstance(request, RelabelRequest):
            return self._relabel(client, request)
        return self.spectral.reply(client, request, trained)

    def _make_reference(self, client: Client, request: ReferenceRequest) -> ReferenceReply:
        spectra = accumulate(client, request.model, client.given_labels)
        reference = client_reference(spectra, residual_rows=self.relabeling.residual_rows)
        on_cpu = {f.name: getattr(reference, f.name).cpu() for f in fields(reference)}
        return ReferenceReply(reference=ClientReference(**on_cpu))

    def _relabel(self, client: Client, request: RelabelRequest) -> RelabelReply:
        options = self.relabeling
        features = torch.cat([f.float() for f, _, _ in client.features(request.model)])
        result = relabel(
            features,
            client.given_labels,
            request.references,
            mode=options.mode,
            min_confidence=options.min_confidence,
        )
        client.relabel(result.labels)
        accepted = result.accepted.cpu()
        if options.distil_on == "disagree":
            client.remember(distil=~accepted)
        if options.confidence_weighting or options.kept_weight != 1.0:
            trust = result.confidence.float().cpu()
            if not options.confidence_weighting:
                trust = torch.ones_like(trust)
            client.remember(confidence=torch.where(accepted, trust, options.kept_weight))
        return RelabelReply(
            samples=len(client), accepted=int(accepted.sum()), agreeing=int(result.agree.sum())
        )


class FedSIR(NoiseAwareMethod):
    """The paper's method; every switch of its ablations is an argument.

    Beyond the paper, and off by default, go ``noisy_every``, ``reidentify_every``, and of the
    options: ``losses.prior=current``, ``aggregation.floor=false``,
    ``aggregation.client_confidence``, ``relabeling.teacher=global``,
    ``relabeling.confidence_weighting``, ``relabeling.kept_weight``, ``relabeling.min_confidence``
    and a ``relabeling.first`` below ``relabeling.every``. ``fedsir_plus``
    (``configs/fedsir/digits_plus.yaml``) is a configuration of them.

    Args:
        identification: Stage I, spectral identification of clean clients.
        relabeling: Stage II, relabeling of noisy clients.
        distillation: Distillation from the global model on noisy clients.
        losses: Losses of clean and of noisy clients.
        aggregation: Weights of the clients' models.
        noisy_every: Noisy clients train in rounds 0, n, 2n, … only; 1 is every round (paper).
        reidentify_every: Number of rounds between repetitions of Stage I, from the global model
            and the given labels; relabeling follows. 0 for never.

    Raises:
        ConfigError: A number is below its minimum.

    Source: docs/papers/fedsir.md Stages I to III.
    """

    def __init__(
        self,
        identification: SpectralIdentification | None = None,
        relabeling: RelabelingOptions = RelabelingOptions(),
        *,
        distillation: DistillationOptions = DistillationOptions(),
        losses: ClientLossOptions = ClientLossOptions(),
        aggregation: AggregationOptions = AggregationOptions(),
        noisy_every: PositiveInt = 1,
        reidentify_every: NonNegativeInt = 0,
    ) -> None:
        check_arguments(FedSIR.__init__, locals(), "model.init_args.method.init_args")
        if relabeling.distil_on == "none":
            distillation = replace(distillation, weight=0.0)
        super().__init__(distillation, losses, aggregation)
        self.identification = identification or SpectralIdentification()
        self.relabeling = relabeling
        self.noisy_every, self.reidentify_every = noisy_every, reidentify_every
        self.evidence: dict[str, Any] = {}
        self.clean_state: Tensor | None = None  # θ^cl: average of clean clients' models
        self.decided: Tensor | None = None  # fraction of samples with a decided label, (K,)
        self.relabel_rounds: list[int] = []
        self.last_report: dict[str, float] = {}

    @property
    def client_side(self) -> ClientSide:
        """Clients of all stages."""
        return FedSIRClientSide(self)

    def local_rounds(self) -> int:
        """Epochs of Stage I."""
        return self.identification.epochs

    def before_rounds(self, fed: Federation) -> None:
        """Stage I; the global model starts from the clean clients' average."""
        self._identify(fed, "identify")
        assert self.clean_state is not None
        fed.global_state = self.clean_state.clone()

    def _identify(self, fed: Federation, purpose: str) -> None:
        again = purpose != "identify"
        identification = self.identification(fed, purpose=purpose, restore_labels=again)
        self.is_clean = identification.split.clean
        self.decided = None
        self.evidence = identification.evidence
        self.clean_state = identification.clean_state

    def _reidentifies(self, round: int) -> bool:
        return bool(self.reidentify_every and round and round % self.reidentify_every == 0)

    def client_epochs_before(self, fed: Federation, round: int) -> int:
        """Client-epochs of a repeated identification."""
        return fed.num_clients * self.identification.epochs if self._reidentifies(round) else 0

    def before_round(self, fed: Federation, round: int) -> None:
        """Relabel (Stage II) and identify again (Stage I) in the rounds of their schedules."""
        again = self._reidentifies(round)
        if again:
            self._identify(fed, f"identify-{round}")
        if self.relabeling.is_due(round) or (again and self.relabeling.has_begun(round)):
            self.relabel_noisy_clients(fed, round)

    def relabel_noisy_clients(self, fed: Federation, round: int) -> None:
        """Relabel every noisy client's samples, starting from the given labels (Stage II).

        Args:
            fed: The clients, after Stage I has told which of them are noisy.
            round: The round that follows, as :attr:`relabel_rounds` names it.
        """
        assert self.is_clean is not None
        assert self.clean_state is not None
        clean = torch.nonzero(self.is_clean).flatten().tolist()
        noisy = torch.nonzero(~self.is_clean).flatten().tolist()
        if not clean or not noisy:
            return
        state = self.clean_state if self.relabeling.teacher == "clean" else fed.global_state
        side = self.client_side
        request = ReferenceRequest(model=state)
        gathered: dict[int, ReferenceReply]
        gathered = fed.exchange(side, dict.fromkeys(clean, request)).gather()
        if not gathered:  # the clean clients are away
            return
        references = aggregate_references(
            [gathered[k].reference for k in sorted(gathered)],
            min_count=self.relabeling.reference_min_count,
        )
        relabeling = RelabelRequest(model=state, references=references)
        replies: Replies[RelabelReply] = fed.exchange(side, dict.fromkeys(noisy, relabeling))
        if not replies.clients:
            return
        self._count_decided(fed, replies.gather())
        self.relabel_rounds.append(round)

    def _count_decided(self, fed: Federation, replies: dict[int, RelabelReply]) -> None:
        """Report what the noisy clients have relabeled."""
        samples = sum(reply.samples for reply in replies.values())

        def divide(count: int) -> float:
            return float(torch.tensor(float(count)) / samples)

        self.last_report = {
            "relabeled": divide(sum(reply.accepted for reply in replies.values())),
            "agreement": divide(sum(reply.agreeing for reply in replies.values())),
        }
        self.decided = torch.ones(fed.num_clients, dtype=torch.float64)
        for client, reply in replies.items():
            self.decided[client] = reply.accepted / reply.samples

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """The clean ones of the sampled clients, and in every n-th round the noisy ones.

        All of them in a round for which no clean one was sampled.
        """
        if round % self.noisy_every == 0:
            return list(sampled)
        return [k for k in sampled if self._client_is_clean(k)] or list(sampled)

    def weights(
        self, fed: Federation, round: int, replies: Replies[TrainReply]
    ) -> dict[int, float]:
        """DaAgg, with weights of noisy clients scaled by their fraction of decided labels."""
        weights = super().weights(fed, round, replies)
        if not self.aggregation.client_confidence or self.decided is None:
            return weights
        scaled = {
            k: w if self._client_is_clean(k) else w * float(self.decided[k])
            for k, w in weights.items()
        }
        total = sum(scaled.values())
        return {k: w / total for k, w in scaled.items()} if total > 0 else weights

    def after_round(self, fed: Federation, round: int, replies: Replies[TrainReply]) -> None:
        """Keep the average of the clean clients' models of this round as the next teacher."""
        assert self.is_clean is not None
        reported = torch.zeros(fed.num_clients, dtype=torch.bool)
        reported[replies.clients] = True
        if bool((reported & self.is_clean).any()):
            self.clean_state = clean_reference(fed, reported & self.is_clean, replies.models)

    def report(self) -> dict[str, float]:
        """Fractions of noisy clients' samples with agreeing scores and with a decided label."""
        return self.last_report

    def state_dict(self) -> dict[str, Any]:
        """The split, the teacher, and the report of the last relabeling."""
        return super().state_dict() | {
            "found": self.evidence,
            "clean_state": self.clean_state,
            "refreshes": self.relabel_rounds,
            "last_report": self.last_report,
            "decided": self.decided,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        super().load_state_dict(state)
        self.evidence, self.clean_state = state["found"], state["clean_state"]
        self.relabel_rounds, self.last_report = state["refreshes"], state["last_report"]
        self.decided = state["decided"]
