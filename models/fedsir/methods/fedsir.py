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
    """FedAvg over the clients that spectral identification holds for clean.

    The global model starts from the average of their models, as in FedSIR. Where no client is
    held for clean, all take part.

    Args:
        identification: Stage I.

    Source: the authors' "pruning" baseline, with identified instead of true clean clients.
    """

    def __init__(self, identification: SpectralIdentification | None = None) -> None:
        self.identification = identification or SpectralIdentification()
        self.split_clean: Tensor | None = None
        self.found: dict[str, Any] = {}

    @property
    def clean(self) -> Tensor | None:
        """Which clients are held for clean, bool. Shape: (K,)."""
        return self.split_clean

    def local_rounds(self) -> int:
        """Epochs of Stage I."""
        return self.identification.epochs

    def before_rounds(self, fed: Federation) -> None:
        """Identify, and start from the clean clients' average."""
        found = self.identification(fed)
        self.split_clean = found.split.clean
        self.found = _evidence(found.scores, found.similarities, found.split.p_clean)
        fed.global_state = clean_reference(fed, self.split_clean, found.states)
        fed.costs.bytes_up += int(self.split_clean.sum()) * fed.state_bytes

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """The clean ones of the sampled clients, or all where none is clean."""
        assert self.split_clean is not None
        chosen = [k for k in sampled if bool(self.split_clean[k])]
        return chosen or list(sampled)

    def state_dict(self) -> dict[str, Any]:
        """Who is clean."""
        return {"split_clean": self.split_clean, "found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state again."""
        self.split_clean, self.found = state["split_clean"], state["found"]


def _evidence(scores: Tensor, similarities: Tensor, p_clean: Tensor) -> dict[str, Any]:
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
        identification: Stage I.
        relabel_every: Rounds R between refreshes of the labels of noisy clients; 0 never.
        relabel_first: First round with a refresh; R by default (paper).
        relabel_mode: Rule by which the two spectral scores decide; see
            :func:`~fulgurite.models.fedsir.relabeling.relabel`.
        min_confidence: Proposals below it are not taken. 0 is the paper's rule.
        residual_rows: Residual directions of a class that references keep.
        reference_min_count: Smallest class of a clean client that enters the references.
        teacher: Whose features label and are labelled: the average of the ``clean`` clients'
            models of the round before (paper), or the ``global`` model.
        kd_on: Which samples of noisy clients learn from the global model: those whose label was
            not decided since the scores ``disagree`` (paper; all before the first refresh),
            ``all``, or ``none``.
        confidence_weighting: Weight the loss of relabeled samples by their confidence, and that
            of samples which kept their label by ``kept_weight``.
        kept_weight: Weight of the samples of noisy clients whose label no reference supports,
            once labels were refreshed.
        noisy_every: Noisy clients train in rounds 0, n, 2n, … only; 1 is every round (paper).
        client_confidence: Multiply the weight of a noisy client in the global model by the share
            of its samples whose label the last refresh decided.
        reidentify_every: Rounds between repetitions of Stage I, from the global model and the
            labels as given; a refresh of the labels follows. 0 never.
        kd_begin: See :class:`NoiseAwareMethod`.
        kd_end: See :class:`NoiseAwareMethod`.
        kd_height: See :class:`NoiseAwareMethod`.
        kd_temperature: See :class:`NoiseAwareMethod`.
        tau: See :class:`NoiseAwareMethod`.
        aggregation: See :class:`NoiseAwareMethod`.
        distance_floor: See :class:`NoiseAwareMethod`.
        prior: See :class:`NoiseAwareMethod`.
        clean_loss: See :class:`NoiseAwareMethod`.
        noisy_loss: See :class:`NoiseAwareMethod`.

    Raises:
        ConfigError: A number is out of range.

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
        least = {"relabel_every": relabel_every, "reidentify_every": reidentify_every}
        for name, value in (least | {"kept_weight": kept_weight}).items():
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
        self.found: dict[str, Any] = {}
        self.clean_state: Tensor | None = None  # θ^cl: average of clean clients' models
        self.decided: Tensor | None = None  # share of samples with a decided label, (K,)
        self.refreshes: list[int] = []
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
            # from the labels as given: corrected ones would make their clients look clean
            own = fed.own(range(fed.num_clients))
            fed.relabel({k: fed.labels.given[fed.index[k]] for k in own})
            self.distil = self.confidence = self.decided = None
            self.labels_changed()
        found = self.identification(fed, purpose=purpose)
        self.split_clean = found.split.clean
        self.found = _evidence(found.scores, found.similarities, found.split.p_clean)
        self.clean_state = clean_reference(fed, self.split_clean, found.states)
        fed.costs.bytes_up += int(self.split_clean.sum()) * fed.state_bytes

    def _identifies_again(self, round: int) -> bool:
        return bool(self.reidentify_every and round and round % self.reidentify_every == 0)

    def client_epochs_before(self, fed: Federation, round: int) -> int:
        """Those of a repeated identification."""
        return fed.num_clients * self.identification.epochs if self._identifies_again(round) else 0

    def before_round(self, fed: Federation, round: int) -> None:
        """Stage II, in the rounds of the schedule; identification again where asked for."""
        again = self._identifies_again(round)
        if again:
            self._identify(fed, f"identify-{round}")
        due = self.relabel_every and round >= self.relabel_first
        if due and (again or (round - self.relabel_first) % self.relabel_every == 0):
            self._refresh(fed, round)

    def _refresh(self, fed: Federation, round: int) -> None:
        """Relabel every noisy client's samples, from the labels originally given."""
        assert self.split_clean is not None
        assert self.clean_state is not None
        clean = torch.nonzero(self.split_clean).flatten().tolist()
        noisy = torch.nonzero(~self.split_clean).flatten().tolist()
        if not clean or not noisy:
            return
        state = self.clean_state if self.teacher == "clean" else fed.global_state
        own: dict[int, ClientReference] = {}
        for client in fed.own(clean):
            spectra = accumulate(fed, client, state, fed.labels.given[fed.index[client]])
            sent = client_reference(spectra, residual_rows=self.residual_rows)
            own[client] = ClientReference(*(getattr(sent, f.name).cpu() for f in fields(sent)))
        gathered = fed.gather_objects(own)
        references = aggregate_references(
            [gathered[k] for k in clean], min_count=self.reference_min_count
        )
        per_class = (1 + self.residual_rows) * references.direction.shape[1] * 4
        fed.costs.bytes_up += len(clean) * fed.num_classes * per_class
        fed.costs.bytes_down += len(noisy) * fed.num_classes * per_class
        self._send_teacher(fed, state, [*clean, *noisy])

        labels, accepted, confidence, agree = {}, {}, {}, {}
        for client in fed.own(noisy):
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
        both = torch.cat(list(fed.gather_objects(agree).values())).float().mean()
        self._mark(fed, fed.gather_objects(accepted), fed.gather_objects(confidence))
        self.last_report["agreement"] = float(both)
        self.labels_changed()
        self.refreshes.append(round)

    @staticmethod
    def _send_teacher(fed: Federation, state: Tensor, clients: Sequence[int]) -> None:
        """Count the model whose features label: clean clients need it for their references."""
        if torch.equal(state, fed.global_state):
            fed.send_global(clients)
        else:
            fed.costs.bytes_down += len(clients) * fed.state_bytes

    def _mark(
        self, fed: Federation, accepted: dict[int, Tensor], confidence: dict[int, Tensor]
    ) -> None:
        """Which samples learn from the teacher, and how much each loss counts."""
        distil = torch.zeros(len(fed.labels.given), dtype=torch.bool)
        weight = torch.ones(len(fed.labels.given))
        for client, taken in accepted.items():
            at = fed.index[client]
            distil[at] = ~taken
            trust = confidence[client] if self.confidence_weighting else torch.ones_like(taken)
            weight[at] = torch.where(taken, trust.float(), self.kept_weight)
        taken_share = torch.cat(list(accepted.values())).float().mean()
        self.last_report = {"relabeled": float(taken_share)}
        if self.kd_on == "disagree":
            self.distil = distil
        if self.confidence_weighting or self.kept_weight != 1.0:
            self.confidence = weight
        self.decided = torch.ones(fed.num_clients, dtype=torch.float64)
        for client, taken in accepted.items():
            self.decided[client] = taken.double().mean()

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """The clean ones of the sampled clients, and in every n-th round the noisy ones.

        All of them in a round for which no clean one was sampled.
        """
        if round % self.noisy_every == 0:
            return list(sampled)
        return [k for k in sampled if self._is_clean(k)] or list(sampled)

    def weights(
        self, fed: Federation, round: int, clients: Sequence[int], states: ClientStates
    ) -> dict[int, float]:
        """DaAgg, with weights of noisy clients scaled by what is known of their labels."""
        weights = super().weights(fed, round, clients, states)
        if not self.client_confidence or self.decided is None:
            return weights
        scaled = {
            k: w if self._is_clean(k) else w * float(self.decided[k]) for k, w in weights.items()
        }
        total = sum(scaled.values())
        return {k: w / total for k, w in scaled.items()} if total > 0 else weights

    def after_round(
        self, fed: Federation, round: int, clients: Sequence[int], states: ClientStates
    ) -> None:
        """Keep the average of the clean clients' models of this round as the next teacher."""
        assert self.split_clean is not None
        reported = torch.zeros(fed.num_clients, dtype=torch.bool)
        reported[list(clients)] = True
        if bool((reported & self.split_clean).any()):
            self.clean_state = clean_reference(fed, reported & self.split_clean, states)

    def report(self) -> dict[str, float]:
        """Of noisy clients' samples, where the two scores agree and whose label is decided."""
        return self.last_report

    def state_dict(self) -> dict[str, Any]:
        """The split, the teacher, and what the last refresh left."""
        return super().state_dict() | {
            "found": self.found,
            "clean_state": self.clean_state,
            "refreshes": self.refreshes,
            "last_report": self.last_report,
            "decided": self.decided,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state again."""
        super().load_state_dict(state)
        self.found, self.clean_state = state["found"], state["clean_state"]
        self.refreshes, self.last_report = state["refreshes"], state["last_report"]
        self.decided = state["decided"]
