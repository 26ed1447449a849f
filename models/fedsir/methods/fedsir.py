"""FedSIR: spectral identification, spectral relabeling, noise-aware training.

Axes: K clients, N samples, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.errors import ConfigError
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
    CleanLoss,
    NoiseAwareClientSide,
    NoiseAwareMethod,
    NoisyLoss,
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
    RelabelMode,
    aggregate_references,
    client_reference,
    relabel,
)

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

    Source: FedSIR, arXiv 2604.20825, Stages I to III.
    """

    def __init__(self, method: FedSIR) -> None:
        super().__init__(method)
        self.method = method
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
        reference = client_reference(spectra, residual_rows=self.method.residual_rows)
        on_cpu = {f.name: getattr(reference, f.name).cpu() for f in fields(reference)}
        return ReferenceReply(reference=ClientReference(**on_cpu))

    def _relabel(self, client: Client, request: RelabelRequest) -> RelabelReply:
        method = self.method
        features = torch.cat([f.float() for f, _, _ in client.features(request.model)])
        result = relabel(
            features,
            client.given_labels,
            request.references,
            mode=method.relabel_mode,
            min_confidence=method.min_confidence,
        )
        client.relabel(result.labels)
        accepted = result.accepted.cpu()
        if method.kd_on == "disagree":
            client.remember(distil=~accepted)
        if method.confidence_weighting or method.kept_weight != 1.0:
            trust = result.confidence.float().cpu()
            if not method.confidence_weighting:
                trust = torch.ones_like(trust)
            client.remember(confidence=torch.where(accepted, trust, method.kept_weight))
        return RelabelReply(
            samples=len(client), accepted=int(accepted.sum()), agreeing=int(result.agree.sum())
        )


class FedSIR(NoiseAwareMethod):
    """The paper's method; every switch of its ablations is an argument.

    Beyond the paper, and off by default, go ``prior="current"``, ``confidence_weighting``,
    ``kept_weight``, ``min_confidence``, ``teacher="global"``, ``reidentify_every``,
    ``distance_floor=False``, ``noisy_every``, ``client_confidence`` and a ``relabel_first`` below
    ``relabel_every``. ``fedsir_plus``
    (``configs/fedsir/digits_plus.yaml``) is a configuration of them.

    Args:
        identification: Stage I, spectral identification of clean clients.
        relabel_every: Number of rounds R between relabelings of noisy clients; 0 for never.
        relabel_first: First round with relabeling; R by default (paper).
        relabel_mode: Rule by which the two spectral scores decide; see
            :func:`~fulgurite.models.fedsir.relabeling.relabel`.
        min_confidence: Smallest confidence of an accepted proposal. 0 is the paper's rule.
        residual_rows: Number of residual directions of a class in the references.
        reference_min_count: Smallest class of a clean client that enters the references.
        teacher: Model whose features are used for relabeling: the average of the ``clean``
            clients' models of the previous round (paper), or the ``global`` model.
        kd_on: Samples of noisy clients that learn from the global model: those whose label was
            not decided since the scores ``disagree`` (paper; all before the first relabeling),
            ``all``, or ``none``.
        confidence_weighting: Weight the loss of relabeled samples by their confidence, and that
            of samples which kept their label by ``kept_weight``.
        kept_weight: Weight of the samples of noisy clients whose label no reference supports,
            after the first relabeling.
        noisy_every: Noisy clients train in rounds 0, n, 2n, … only; 1 is every round (paper).
        client_confidence: Multiply the weight of a noisy client in the global model by the
            fraction of its samples whose label the last relabeling decided.
        reidentify_every: Number of rounds between repetitions of Stage I, from the global model
            and the given labels; relabeling follows. 0 for never.
        kd_begin: Last round in which the teacher has its smallest weight.
        kd_end: First round in which the teacher has its largest weight.
        kd_height: Largest weight of the teacher, in [0, 1].
        kd_temperature: Temperature of the teacher.
        tau: Strength of the logit adjustment; 0 gives plain cross-entropy.
        aggregation: Aggregation rule, ``distance`` (DaAgg) or ``size`` (FedAvg).
        distance_floor: Scale distances so that the farthest client keeps e⁻¹ of its weight
            (paper).
        prior: Labels whose frequencies adjust the logits: those ``given`` (paper) or the
            ``current`` ones.
        clean_loss: Loss of clean clients: logit-adjusted (``la``, paper) or plain (``ce``)
            cross-entropy.
        noisy_loss: Loss of noisy clients: the same with (``la_kd``, paper; ``ce_kd``) or without
            (``la``, ``ce``) distillation from the global model.

    Raises:
        ConfigError: A number is negative or below its minimum.

    Source: FedSIR, arXiv 2604.20825, Stages I to III.
    """

    def __init__(
        self,
        identification: SpectralIdentification | None = None,
        relabel_every: int = 20,
        relabel_first: int | None = None,
        relabel_mode: RelabelMode = "agree",
        min_confidence: float = 0.0,
        residual_rows: int = 12,
        reference_min_count: int = 100,
        teacher: Literal["clean", "global"] = "clean",
        kd_on: Literal["disagree", "all", "none"] = "disagree",
        confidence_weighting: bool = False,
        kept_weight: float = 1.0,
        noisy_every: int = 1,
        client_confidence: bool = False,
        reidentify_every: int = 0,
        kd_begin: int = 2,
        kd_end: int = 49,
        kd_height: float = 0.2,
        kd_temperature: float = 0.8,
        tau: float = 1.0,
        aggregation: Literal["distance", "size"] = "distance",
        distance_floor: bool = True,
        prior: Literal["given", "current"] = "given",
        clean_loss: CleanLoss = "la",
        noisy_loss: NoisyLoss = "la_kd",
    ) -> None:
        super().__init__(
            kd_begin, kd_end, kd_height if kd_on != "none" else 0.0, kd_temperature, tau,
            aggregation, distance_floor, prior, clean_loss, noisy_loss,
        )  # fmt: skip
        not_negative = {"relabel_every": relabel_every, "reidentify_every": reidentify_every}
        for name, value in (not_negative | {"kept_weight": kept_weight}).items():
            if value < 0:
                raise ConfigError(
                    f"model.init_args.method.init_args.{name}={value} is negative.",
                    "Give 0 or more.",
                )
        for name, value in {"residual_rows": residual_rows, "noisy_every": noisy_every}.items():
            if value < 1:
                raise ConfigError(
                    f"model.init_args.method.init_args.{name}={value} is too small.",
                    "Give 1 or more.",
                )
        self.identification = identification or SpectralIdentification()
        self.relabel_every, self.relabel_mode = relabel_every, relabel_mode
        self.relabel_first = relabel_every if relabel_first is None else relabel_first
        self.min_confidence, self.residual_rows = min_confidence, residual_rows
        self.reference_min_count, self.teacher, self.kd_on = reference_min_count, teacher, kd_on
        self.confidence_weighting, self.kept_weight = confidence_weighting, kept_weight
        self.noisy_every, self.client_confidence = noisy_every, client_confidence
        self.reidentify_every = reidentify_every
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
        due = self.relabel_every and round >= self.relabel_first
        if due and (again or (round - self.relabel_first) % self.relabel_every == 0):
            self._refresh(fed, round)

    def _refresh(self, fed: Federation, round: int) -> None:
        """Relabel every noisy client's samples, starting from the given labels."""
        assert self.is_clean is not None
        assert self.clean_state is not None
        clean = torch.nonzero(self.is_clean).flatten().tolist()
        noisy = torch.nonzero(~self.is_clean).flatten().tolist()
        if not clean or not noisy:
            return
        state = self.clean_state if self.teacher == "clean" else fed.global_state
        side = self.client_side
        request = ReferenceRequest(model=state)
        gathered = fed.exchange(side, dict.fromkeys(clean, request)).gather()
        references = aggregate_references(
            [gathered[k].reference for k in clean], min_count=self.reference_min_count
        )
        relabeling = RelabelRequest(model=state, references=references)
        replies: Replies[RelabelReply] = fed.exchange(side, dict.fromkeys(noisy, relabeling))
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
        if not self.client_confidence or self.decided is None:
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
