"""Muon for hidden matrices and AdamW for everything else, as one optimizer.

Lightning optimises automatically (clipping, accumulation, schedules, resuming, ``global_step``)
with one optimizer only. So here is one: its state and parameter groups are shared with a
``torch.optim.Muon`` and a ``torch.optim.AdamW``, which do the steps.

Which parameters are hidden cannot be told from their shape: an embedding is a matrix too. The
groups say it with the key ``hidden``; :func:`parameter_groups` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.options import check_options, list_options, make_options

__all__ = ["AdamWOptions", "MuonAdamW", "MuonOptions", "parameter_groups"]


def parameter_groups(module: nn.Module, backbone: nn.Module) -> list[dict[str, Any]]:
    """Groups of a module's parameters: hidden matrices, other tables, and vectors.

    Hidden are the weights of linear and LSTM layers in the backbone, unless the same parameter
    is also used outside of it or as an embedding. Vectors (norms, biases, rates) do not decay.

    Args:
        module: The whole model.
        backbone: The part of it between embedding and head.

    Returns:
        Groups for any optimizer. The keys ``hidden`` and ``name`` are for :class:`MuonAdamW` and
        for people.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
        >>> [(g["name"], len(g["params"])) for g in parameter_groups(model, model[1])]
        [('hidden', 1), ('tables', 1), ('vectors', 1)]

    Source: docs/papers/number_probing.md section 6; vectors without decay: inferred.
    """
    inside = {id(part) for part in backbone.modules()}
    outer = (part for part in module.modules() if id(part) not in inside)
    visible = {id(p) for part in outer for p in part.parameters(recurse=False)}
    embeddings = (part for part in backbone.modules() if isinstance(part, nn.Embedding))
    visible |= {id(part.weight) for part in embeddings}
    layers = (part for part in backbone.modules() if isinstance(part, nn.Linear | nn.LSTM))
    mixing = {id(p) for part in layers for p in part.parameters(recurse=False) if p.ndim == 2}
    by_name: dict[str, list[Tensor]] = {"hidden": [], "tables": [], "vectors": []}
    for p in module.parameters():
        if p.requires_grad:
            hidden = id(p) in mixing and id(p) not in visible
            by_name["hidden" if hidden else "tables" if p.ndim > 1 else "vectors"].append(p)
    groups: list[dict[str, Any]] = [
        {"params": params, "hidden": name == "hidden", "name": name}
        for name, params in by_name.items()
        if params
    ]
    for group in groups:
        if group["name"] == "vectors":
            group["weight_decay"] = 0.0
    return groups


_KEY = "model.init_args.optimizer.init_args"


@dataclass(frozen=True)
class MuonOptions:
    """Options of ``torch.optim.Muon`` beside the learning rate and the weight decay.

    Args:
        momentum: Momentum.
        nesterov: Use Nesterov momentum.
        ns_steps: Number of Newton–Schulz iterations in each step.
        adjust_lr_fn: ``match_rms_adamw`` scales steps to the size of AdamW's, so that both can
            share a learning rate; ``original`` scales tall matrices only.

    Raises:
        ConfigError: A value is of another type.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.muon")


@dataclass(frozen=True)
class AdamWOptions:
    """Options of ``torch.optim.AdamW``.

    Args:
        lr: Learning rate, if it differs from Muon's.
        weight_decay: Weight decay, if it differs.
        betas: Decay rates of the averages of gradients and of their squares.
        eps: Added to the denominator of steps.

    Raises:
        ConfigError: A value is of another type.
    """

    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.adamw")


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for groups marked ``hidden``, ``torch.optim.AdamW`` for the others.

    Args:
        params: Parameter groups, each with a key ``hidden``; see :func:`parameter_groups`. Any
            other key of a group overrides the arguments below.
        lr: Learning rate of both.
        weight_decay: Weight decay of both.
        muon: Options of Muon.
        adamw: Options of AdamW, also a learning rate and a weight decay of its own.

    Raises:
        ConfigError: No group says whether it is hidden, or a hidden parameter is no matrix.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
        >>> optimizer = MuonAdamW(parameter_groups(model, model[1]), lr=0.01)
        >>> [len(part.param_groups) for part in (optimizer.muon, optimizer.adamw)]
        [1, 2]

    Source: docs/papers/number_probing.md section 2.2 (which parameters) and section 6 (one
        optimizer); ``match_rms_adamw``: arXiv 2502.16982; momentum and betas:
        github.com/KellerJordan/Muon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        muon: MuonOptions = MuonOptions(),
        adamw: AdamWOptions = AdamWOptions(),
    ) -> None:
        groups = [*params]
        marked = [isinstance(group, dict) and "hidden" in group for group in groups]
        if not groups or not all(marked):
            raise ConfigError(
                "MuonAdamW does not know which parameters are hidden matrices.",
                "Use it with fulgurite.models.number_probing.NumberLM, or give it groups from "
                "fulgurite.models.number_probing.parameter_groups(module, backbone).",
            )
        shared = {"lr": lr, "weight_decay": weight_decay}
        muon_options = {**shared, **list_options(make_options(MuonOptions, muon))}
        own = list_options(make_options(AdamWOptions, adamw))
        adamw_options = shared | {name: value for name, value in own.items() if value is not None}
        completed_groups = []
        for group in groups:
            # a throw-away optimizer checks the group and fills in all defaults of its kind
            kind: type[torch.optim.Optimizer] = (
                torch.optim.Muon if group["hidden"] else torch.optim.AdamW
            )
            options = {k: v for k, v in group.items() if k not in ("hidden", "name")}
            try:
                completed = kind(
                    [options], **(muon_options if group["hidden"] else adamw_options)
                ).param_groups
            except ValueError as error:
                raise ConfigError(
                    f"{kind.__name__} refuses its parameters or arguments: {error}",
                    "Fix --model.init_args.optimizer.init_args, and mark matrices as hidden only.",
                ) from error
            completed_groups += [{**group, **defaults} for defaults in completed]
        super().__init__(completed_groups, {})
        self._link()

    def _link(self) -> None:
        """Make both step on this optimizer's groups and state."""
        if not hasattr(self, "muon"):
            spare = [nn.Parameter(torch.zeros(1, 1))]  # neither can be made without parameters
            self.muon, self.adamw = torch.optim.Muon(spare), torch.optim.AdamW(spare)
        for part, hidden in ((self.muon, True), (self.adamw, False)):
            part.param_groups = [g for g in self.param_groups if g["hidden"] is hidden]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()  # loading puts new groups and a new state in place

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that names all options of its kind, as the constructor makes them."""
        super().add_param_group(param_group)
        if hasattr(self, "muon"):
            self._link()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step all parameters once.

        Args:
            closure: Computes the loss and its gradients anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            if part is self.muon and self._is_divided():
                self._step_whole_matrices()
            else:
                part.step()
        return loss

    def _is_divided(self) -> bool:
        """Whether the hidden matrices are divided among ranks."""
        if not dist.is_available() or not dist.is_initialized():
            return False
        from torch.distributed.tensor import DTensor

        return any(isinstance(p, DTensor) for g in self.muon.param_groups for p in g["params"])

    def _step_whole_matrices(self) -> None:
        """Step hidden matrices that are divided among ranks, one after the other, as a whole.

        Newton–Schulz iterations multiply whole matrices: each rank gathers one, computes its step,
        and keeps its own part, so that all is as if it were not divided.
        """
        from torch.distributed.tensor import DTensor, distribute_tensor

        for group in self.muon.param_groups:
            options = {k: v for k, v in group.items() if k not in ("params", "hidden", "name")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                matrix = nn.Parameter(p.full_tensor())
                matrix.grad = p.grad.full_tensor()
                muon: torch.optim.Optimizer = torch.optim.Muon([{**options, "params": [matrix]}])
                for name, value in self.state[p].items():
                    is_divided = isinstance(value, DTensor)
                    muon.state[matrix][name] = value.full_tensor() if is_divided else value
                muon.step()
                layout = p.device_mesh, p.placements
                p.copy_(distribute_tensor(matrix.detach(), *layout, src_data_rank=None))
                for name, value in muon.state[matrix].items():
                    is_matrix = isinstance(value, Tensor) and value.shape == matrix.shape
                    self.state[p][name] = (
                        distribute_tensor(value, *layout, src_data_rank=None)
                        if is_matrix
                        else value
                    )

    def _parts(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers that have parameters."""
        return (part for part in (self.muon, self.adamw) if part.param_groups)
