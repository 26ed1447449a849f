"""``fulgurite attend``: attention over tensors in files, by any number of processes or nodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fulgurite.attention.call_files import create_arrays, map_tensors
from fulgurite.attention.checks import GRADIENTS, INPUTS, SAVED
from fulgurite.attention.job_engine import JobSite, run_job
from fulgurite.attention.jobs import AttentionJob
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.keywords import JobKeywords
from fulgurite.clusters.engines import Engine, add_engine_options
from fulgurite.clusters.ray_tasks import Reservation
from fulgurite.errors import ConfigError

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Make the job, or open it where it is there, run what is missing of it, and merge it.

    Args:
        argv: The command line after ``fulgurite attend``.

    Returns:
        0; 130 if interrupted.

    Raises:
        FulguriteError: An option is wrong, or the tensors are not those of the job.
    """
    options = _make_parser().parse_args(argv)
    engine = Engine(options.engine, options.workers, options.address)
    reservation = _read_reservation(options)
    source, folder = Path(options.inputs).resolve(), Path(options.out).resolve()
    inputs = map_tensors(source, SAVED if options.gradients else INPUTS)
    create = AttentionJob.create_backward if options.gradients else AttentionJob.create
    job = create(folder / "job", *inputs.values(), **_job_keywords(options))
    print(job.explain(), flush=True)
    if options.dry_run:
        return 0
    is_watched = sys.stderr.isatty()
    site = JobSite(folder / "job", source, options.device)
    try:
        run_job(site, engine, reservation=reservation, progress=is_watched)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on with the tasks that are left.")
        return 130
    dtype = inputs["query"].dtype
    shapes = _with_input_axes(job.result_shapes(), inputs)
    dtypes = dict.fromkeys(shapes, dtype) | {"lse": accumulator_dtype(dtype)}
    with create_arrays(folder, shapes, dtypes) as targets:
        job.merge(*targets.values(), progress=is_watched)
    print(f"Results: {', '.join(str(folder / f'{name}.npy') for name in targets)}")
    return 0


def _with_input_axes(
    shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes of results with the axes before the tokens that the inputs have."""
    sources = {"lse": "query", "out": "query"} | {name: name[1:] for name in GRADIENTS}
    leads = {name: tuple(inputs[sources[name]].shape[:-2]) for name in shapes}
    return {name: (*leads[name], *shape[2:]) for name, shape in shapes.items()}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fulgurite attend",
        description="Exact attention over tensors in files, cut into tasks that any number of "
        "processes or nodes compute without communication, and merged. The same command goes on "
        "where it was stopped.",
    )
    add = parser.add_argument
    add("inputs", help="folder of query.npy, key.npy, value.npy, or one .safetensors file")
    add("--out", required=True, help="folder of the results and, in `job`, of the tasks' files")
    add("--gradients", action="store_true", help="dquery, dkey, dvalue; needs grad, out, lse too")
    add("--dry-run", "--dry_run", action="store_true", help="make and explain the job, run nothing")
    masks = parser.add_argument_group("what is computed, as in stream_attention")
    add = masks.add_argument
    add("--is-causal", "--is_causal", action="store_true", help="no later keys")
    add("--window", type=int, nargs="+", help="keys seen before, or before and behind, a query")
    add("--prefix", type=int, default=0, help="first keys that all queries see")
    add("--documents", type=int, nargs="+", action="extend", help="first token of each document")
    add("--chunk", type=int, help="tokens see only their own chunk of so many")
    add("--scale", type=float, help="of the scores (default: 1/√D)")
    add("--softcap", type=float, help="cap of the scores")
    add("--enable-gqa", "--enable_gqa", action="store_true", help="fewer key/value heads")
    plan = parser.add_argument_group("how it is cut")
    add = plan.add_argument
    add("--memory-budget", "--memory_budget", default="auto", help="of a task, such as 2GiB")
    add("--schedule", default="cqs", help="cqs (quorums, the default) or rect")
    add("--least-tasks", "--least_tasks", type=int, default=57, help="default: %(default)s")
    add("--device", default="cpu", help="where kernels run: cpu (default) or cuda")
    engine = parser.add_argument_group("where it runs")
    add_engine_options(engine, "1; each holds the budget")
    add = engine.add_argument
    add("--cpus", type=int, help="cores that a task reserves on a cluster (default: 1)")
    add("--gpus", type=int, help="GPUs that it reserves (default: 1 for --device cuda, else 0)")
    return parser


def _read_reservation(options: argparse.Namespace) -> Reservation:
    """What a task reserves.

    Raises:
        ConfigError: A number is negative, or an option says what another engine does not read.
    """
    for name, least in (("cpus", 1), ("gpus", 0)):
        value = getattr(options, name)
        if value is not None and options.engine != "ray":
            raise ConfigError(
                f"--{name} is {value}, and --engine is {options.engine!r}.",
                f"Tasks of a cluster reserve {name}: give --engine ray, or leave --{name} out.",
            )
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}.", f"Give {least} or more.")
    gpus = int(options.device != "cpu") if options.gpus is None else options.gpus
    return Reservation(1 if options.cpus is None else options.cpus, gpus)


def _job_keywords(options: argparse.Namespace) -> JobKeywords:
    """The options of the job.

    Raises:
        ConfigError: The window has more than two sides.
    """
    window: Any = options.window
    if window is not None:
        if len(window) > 2:
            raise ConfigError(f"--window has {len(window)} sides.", "Give one number or two.")
        window = window[0] if len(window) == 1 else tuple(window)
    budget = options.memory_budget
    return JobKeywords(
        is_causal=options.is_causal, window=window, prefix=options.prefix,
        documents=options.documents, chunk=options.chunk, scale=options.scale,
        softcap=options.softcap, enable_gqa=options.enable_gqa,
        memory_budget=int(budget) if budget.isdigit() else budget,
        schedule=options.schedule, least_tasks=options.least_tasks, device=options.device,
    )  # fmt: skip
