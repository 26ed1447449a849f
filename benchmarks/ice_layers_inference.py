"""Ice layers: time to complete a stack, the network against kriging.

``python -m benchmarks ice_layers_inference``.
"""

from __future__ import annotations

import copy
from importlib import resources
from typing import Any

import torch
import yaml
from torch import Tensor
from torch_geometric.data import Batch, Data

from benchmarks.harness import ratios, report, spread, take_turns
from fulgurite.domains.ice_layers.spans import Spans
from fulgurite.models.ice_layers import (
    CompletionInputs,
    CompletionLoss,
    CompletionNet,
    CompletionPrediction,
    IceCompletion,
    InputOptions,
    KrigingFitOptions,
    SpatialOptions,
    TransformerOptions,
)
from fulgurite.models.ice_layers.baselines.covariance import KrigingStack
from fulgurite.models.ice_layers.baselines.kriging import Kriging
from fulgurite.models.ice_layers.training.baseline_module import BaselineCompletion
from fulgurite.options import make_options

PHYSICS = 5
MISSING = 0.37  # share of entries in the generated data


def make_batch(stacks: int, traces: int, layers: int) -> Any:
    """Stacks of smooth layers with broken and absent boundaries."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    stack_list = []
    for number in range(stacks):
        physics = random(1, layers, PHYSICS) + 0.05 * random(traces, 1, PHYSICS).cumsum(0)
        thickness = (0.2 * physics[..., 0] + 0.01 * random(traces, layers)).exp()
        # mis-tracks, as many as in the generated data: kriging solves again without them
        wrong = torch.rand(traces, layers, generator=draw) < 0.01
        thickness = torch.where(wrong, 2 * thickness, thickness)
        start = torch.randint(traces, (layers,), generator=draw)
        offset = (torch.arange(traces)[:, None] - start) % traces
        # a missing boundary takes the layers on both of its sides, whose sum stays known
        hidden = offset < 0.85 * MISSING * traces * torch.linspace(0, 1, layers)
        hidden[:, torch.rand(layers, generator=draw) < 0.06] = True
        spans = Spans.of_thickness(thickness, sums=True).hide(hidden)
        observed = spans.observed
        at = 100.0 * torch.arange(traces, dtype=torch.float64)
        stack_list.append(
            Data(
                num_nodes=traces,
                thickness=torch.where(observed, thickness, torch.nan),
                observed=observed,
                span_start=spans.start,
                span_path=spans.path,
                refraction=spans.index,
                physics=physics.float(),
                pos=torch.stack([70 + at / 1.1e5, at * 0 - 40], 1),
                distance=at,
                segment=torch.tensor([number]),
                stack=torch.tensor([number]),
            )
        )
    return Batch.from_data_list(stack_list)


def network(layers: int, width: int) -> IceCompletion:
    """The network of ``ice_layers/synthetic.yaml``, at this width; what it learnt costs no time."""
    text = (resources.files("fulgurite.configs.ice_layers") / "synthetic.yaml").read_text("utf-8")
    options = dict(yaml.safe_load(text)["model"]["init_args"])
    inner = options.pop("network")["init_args"]
    kinds = {"inputs": InputOptions, "spatial": SpatialOptions, "transformer": TransformerOptions}
    records = {name: make_options(kind, inner[name]) for name, kind in kinds.items()}
    module = IceCompletion(
        lambda size, fields: CompletionNet(size, fields, width, **records),
        inputs=make_options(CompletionInputs, options["inputs"]),
        loss=make_options(CompletionLoss, options["loss"]),
        prediction=make_options(CompletionPrediction, options["prediction"]),
    )
    module.build(layers, PHYSICS)
    return module.eval()


def main() -> None:
    """Measure two sizes, print and write the table."""
    torch.set_num_threads(1)
    rows, raw = [], {}
    for name, (traces, layers, stacks, width, turns) in {
        "48 traces, 10 layers": (48, 10, 16, 32, 9),
        "96 traces, 10 layers": (96, 10, 8, 32, 9),
        "256 traces, 20 layers": (256, 20, 2, 64, 3),
    }.items():
        batch = make_batch(stacks, traces, layers)
        net = network(layers, width)
        compiled = copy.deepcopy(net)
        compiled.compile_networks()
        # a short fit: the time does not depend on the parameters
        baseline = BaselineCompletion("kriging", fit=KrigingFitOptions(2, 100, 2))
        fitted = [stack for _, stack in baseline._stacks(batch)]
        baseline.fit(fitted)
        assert baseline.kriging is not None

        @torch.inference_mode()
        def complete(module: Any = net, batch: Any = batch) -> None:
            module.fill(batch)

        @torch.inference_mode()
        def complete_compiled(module: Any = compiled, batch: Any = batch) -> None:
            module.fill(batch)

        @torch.inference_mode()
        def krige(kriging: Kriging = baseline.kriging, stacks: list[KrigingStack] = fitted) -> None:
            for stack in stacks:
                kriging(stack, mask=~stack.observed)

        size = sum(p.numel() for p in net.networks.parameters())
        contestants = {
            f"network ({size:,} parameters)": complete,
            "the same, compiled": complete_compiled,
            "kriging": krige,
        }
        seconds = take_turns(contestants, turns)
        raw[name] = seconds
        missing = float((~batch.observed).double().mean())
        rows += [
            {
                "setting": f"{name}, {100 * missing:.0f} % missing",
                "method": key,
                "ms/stack": spread([1000 * t / stacks for t in seconds[key]]),
                "times faster than kriging": "1"
                if key == "kriging"
                else spread(ratios(seconds["kriging"], seconds[key])),
            }
            for key in seconds
        ]
    report("ice_layers_inference", "Ice layers: completing a stack", NOTES, rows, raw=raw)


NOTES = """
One thread, on stacks in memory, 1 % of the picks mis-tracked. The network completes a batch of
16, 8 or 2 stacks, uncertainty and provenance with it; width 32 (64 with 256 traces), else as in
`ice_layers/synthetic.yaml`. Compiled it is with `prediction.compile=true`, whose half a minute at
the start is left out. Kriging is exact, in float64, and predicts only the missing entries,
with their standard deviation, stack by stack: matrices differ in size, and LAPACK factors batched
ones one after the other, too. Both take turns, the first turn is left out; the last column compares
turn by turn; medians with quartiles. Parameters are not those of a finished training, on which the
time does not depend.
"""

if __name__ == "__main__":
    main()
