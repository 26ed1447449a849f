"""FedSIR: spectral identification, spectral relabeling, noise-aware training.

Axes: K clients, N samples, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation import ClientStates, Federation
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.methods.noise_aware import CleanLoss, NoiseAwareMethod, NoisyLoss
from fulgurite.models.fedsir.methods.spectral import (
    SpectralIdentification,
    accumulate,
    clean_reference,
)
from fulgurite.models.fedsir.relabeling import (
    ClientReference,
    RelabelMode,
    aggregate_references,
    client_reference,
    relabel,
)

__all__ = ["CleanOnly", "FedSIR"]


class CleanOnly(FederatedMethod):
    """FedAvg over the clients that spectral identification predicts to be clean.

    The global model starts from the average of their models, as in FedSIR. Where no client is
    predicted clean, all take part.

    Args:
        identification: Stage I, spectral identification of clean clients.

    Source: the authors' "pruning" baseline, with identified instead of true clean clients.
    """

    def __init__(self, identification: SpectralIdentification | None = None) -> None:
        self.identification = identification or SpectralIdentification()
        self.is_clean: Tensor | None = None
        self.evidence: dict[str, Any] = {}

    @property
    def clean(self) -> Tensor | None:
        """Predicted clean mask, bool; None before identification. Shape: (K,)."""
        return self.is_clean

    def local_rounds(self) -> int:
        """Epochs of Stage I."""
        return self.identification.epochs

    def before_rounds(self, fed: Federation) -> None:
        """Identify, and start from the clean clients' average."""
        identification = self.identification(fed)
        self.is_clean = identification.split.clean
        self.evidence = _collect_evidence(
            identification.scores, identification.similarities, identification.split.p_clean
        )
        fed.global_state = clean_reference(fed, self.is_clean, identification.states)
        fed.costs.bytes_up += int(self.is_clean.sum()) * fed.state_bytes

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """The clean ones of the sampled clients, or all where none is clean."""
        assert self.is_clean is not None
        clean_clients = [k for k in sampled if bool(self.is_clean[k])]
        return clean_clients or list(sampled)

    def state_dict(self) -> dict[str, Any]:
        """The predicted clean clients, and the evidence."""
        return {"split_clean": self.is_clean, "found": self.evidence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.is_clean, self.evidence = state["split_clean"], state["found"]


def _collect_evidence(scores: Tensor, similarities: Tensor, p_clean: Tensor) -> dict[str, Any]:
    return {
        "scores": scores.cpu(),
        "similarities": similarities.cpu(),
        "p_clean": p_clean.cpu(),
    }


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

    def local_rounds(self) -> int:
        """Epochs of Stage I."""
        return self.identification.epochs

    def before_rounds(self, fed: Federation) -> None:
        """Stage I; the global model starts from the clean clients' average."""
        self._identify(fed, "identify")
        assert self.clean_state is not None
        fed.global_state = self.clean_state.clone()

    def _identify(self, fed: Federation, purpose: str) -> None:
        if purpose != "identify":
            # identify on the given labels: relabeled ones would make noisy clients look clean
            clients = fed.local_clients(range(fed.num_clients))
            fed.relabel({k: fed.labels.given[fed.index[k]] for k in clients})
            self.distil = self.confidence = self.decided = None
            self.labels_changed()
        identification = self.identification(fed, purpose=purpose)
        self.is_clean = identification.split.clean
        self.evidence = _collect_evidence(
            identification.scores, identification.similarities, identification.split.p_clean
        )
        self.clean_state = clean_reference(fed, self.is_clean, identification.states)
        fed.costs.bytes_up += int(self.is_clean.sum()) * fed.state_bytes

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
        client_references: dict[int, ClientReference] = {}
        for client in fed.local_clients(clean):
            spectra = accumulate(fed, client, state, fed.labels.given[fed.index[client]])
            reference = client_reference(spectra, residual_rows=self.residual_rows)
            client_references[client] = ClientReference(
                *(getattr(reference, f.name).cpu() for f in fields(reference))
            )
        gathered = fed.gather_objects(client_references)
        references = aggregate_references(
            [gathered[k] for k in clean], min_count=self.reference_min_count
        )
        per_class = (1 + self.residual_rows) * references.direction.shape[1] * 4
        fed.costs.bytes_up += len(clean) * fed.num_classes * per_class
        fed.costs.bytes_down += len(noisy) * fed.num_classes * per_class
        self._send_teacher(fed, state, [*clean, *noisy])

        labels, accepted, confidence, agree = {}, {}, {}, {}
        for client in fed.local_clients(noisy):
            features = torch.cat([f.float() for f, _, _ in fed.features(client, state)])
            result = relabel(
                features,
                fed.labels.given[fed.index[client]],
                references,
                mode=self.relabel_mode,
                min_confidence=self.min_confidence,
            )
            labels[client] = result.labels.cpu()
            accepted[client] = result.accepted.cpu()
            agree[client] = result.agree.cpu()
            confidence[client] = result.confidence.float().cpu()
        fed.state.write(fed.global_state)
        fed.relabel(labels)
        agreement = torch.cat(list(fed.gather_objects(agree).values())).float().mean()
        self._weight_samples(fed, fed.gather_objects(accepted), fed.gather_objects(confidence))
        self.last_report["agreement"] = float(agreement)
        self.labels_changed()
        self.relabel_rounds.append(round)

    @staticmethod
    def _send_teacher(fed: Federation, state: Tensor, clients: Sequence[int]) -> None:
        """Count the teacher as sent: clean clients need it for their references."""
        if torch.equal(state, fed.global_state):
            fed.send_global(clients)
        else:
            fed.costs.bytes_down += len(clients) * fed.state_bytes

    def _weight_samples(
        self, fed: Federation, accepted: dict[int, Tensor], confidence: dict[int, Tensor]
    ) -> None:
        """Set the samples that learn from the teacher, and the weight of each loss."""
        distil = torch.zeros(len(fed.labels.given), dtype=torch.bool)
        weight = torch.ones(len(fed.labels.given))
        for client, relabeled in accepted.items():
            index = fed.index[client]
            distil[index] = ~relabeled
            trust = confidence[client] if self.confidence_weighting else torch.ones_like(relabeled)
            weight[index] = torch.where(relabeled, trust.float(), self.kept_weight)
        relabeled_fraction = torch.cat(list(accepted.values())).float().mean()
        self.last_report = {"relabeled": float(relabeled_fraction)}
        if self.kd_on == "disagree":
            self.distil = distil
        if self.confidence_weighting or self.kept_weight != 1.0:
            self.confidence = weight
        self.decided = torch.ones(fed.num_clients, dtype=torch.float64)
        for client, relabeled in accepted.items():
            self.decided[client] = relabeled.double().mean()

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """The clean ones of the sampled clients, and in every n-th round the noisy ones.

        All of them in a round for which no clean one was sampled.
        """
        if round % self.noisy_every == 0:
            return list(sampled)
        return [k for k in sampled if self._client_is_clean(k)] or list(sampled)

    def weights(
        self, fed: Federation, round: int, clients: Sequence[int], states: ClientStates
    ) -> dict[int, float]:
        """DaAgg, with weights of noisy clients scaled by their fraction of decided labels."""
        weights = super().weights(fed, round, clients, states)
        if not self.client_confidence or self.decided is None:
            return weights
        scaled = {
            k: w if self._client_is_clean(k) else w * float(self.decided[k])
            for k, w in weights.items()
        }
        total = sum(scaled.values())
        return {k: w / total for k, w in scaled.items()} if total > 0 else weights

    def after_round(
        self, fed: Federation, round: int, clients: Sequence[int], states: ClientStates
    ) -> None:
        """Keep the average of the clean clients' models of this round as the next teacher."""
        assert self.is_clean is not None
        reported = torch.zeros(fed.num_clients, dtype=torch.bool)
        reported[list(clients)] = True
        if bool((reported & self.is_clean).any()):
            self.clean_state = clean_reference(fed, reported & self.is_clean, states)

    def report(self) -> dict[str, float]:
        """Fractions of noisy clients' samples with agreeing scores and with a decided label."""
        return self.last_report

    def state_dict(self) -> dict[str, Any]:
        """The split, the teacher, and the outcome of the last relabeling."""
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
