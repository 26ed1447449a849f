"""Models of Hugging Face transformers under the streaming strategy: exact, refused, wrong?

The whole table, written to results: ``python -m benchmarks.stream_transformers``.
A part of it, only printed: ``python -m benchmarks.stream_transformers llama t5 --modes packed``.
What models give to attention: ``python -m benchmarks.stream_transformers llama t5 --calls``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata

import torch

from benchmarks.harness import report
from fulgurite.strategies import StreamCQSAStrategy
from fulgurite.testing.attention_judge import Judgement, judge_architecture, record_attention
from fulgurite.testing.transformers_models import (
    EXTRA_MODES,
    MODES,
    build_model,
    select_architectures,
    take_modes,
)

BUDGET = "40KiB"
_SYMBOLS = {"wrong": "WRONG", "crashed": "CRASHED", "unsupported": "(no)"}


def count_verdicts(cells: Sequence[Judgement]) -> str:
    """Totals in words, with the percentage of exact cells among those that the models do."""
    counts = Counter(cell.verdict for cell in cells)
    supported = len(cells) - counts["unsupported"]
    percentage = f" ({counts['exact'] / supported:.1%})" if supported else ""
    return (
        f"{supported} cells, {counts['exact']} exact{percentage}, {counts['refused']} refused, "
        f"{counts['wrong']} wrong, {counts['crashed']} crashed; beside them "
        f"{counts['unsupported']} that the models do not do by themselves."
    )


def count_all(cells: Sequence[Judgement]) -> list[str]:
    """Totals of the common modes, of those that can be reached, and of the other modes."""
    common = [cell for cell in cells if cell.mode in MODES]
    reachable = [cell for cell in common if cell.is_reachable]
    other = [cell for cell in cells if cell.mode in EXTRA_MODES]
    return [
        f"- Common modes ({', '.join(MODES)}): {count_verdicts(common)}",
        "- Of these, models that let any of their attention be chosen: "
        f"{count_verdicts(reachable)}",
        f"- Other modes ({', '.join(EXTRA_MODES)}): {count_verdicts(other)}",
    ]


def count_reasons(cells: Sequence[Judgement], words: int = 12) -> list[str]:
    """The refusals by their first words, and the crashes, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    names: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        if cell.verdict in ("refused", "crashed"):
            reason = cell.verdict, " ".join(cell.detail.split()[:words])
            counts[reason] += 1
            names.setdefault(reason, set()).add(cell.architecture)
    return [
        f"- {number} {verdict}, {len(names[verdict, words])} architectures "
        f"({', '.join(sorted(names[verdict, words])[:8])}): {words} ..."
        for (verdict, words), number in counts.most_common()
    ]


def make_rows(cells: Sequence[Judgement]) -> list[dict[str, str]]:
    """A row for each architecture, a column for each mode."""
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        blank = {"architecture": cell.architecture} | dict.fromkeys((*MODES, *EXTRA_MODES), "–")
        row = rows.setdefault(cell.architecture, blank)
        row[cell.mode] = _SYMBOLS.get(cell.verdict, cell.verdict)
    return list(rows.values())


def judge_all(
    names: Sequence[str] | None, modes: Sequence[str] | None, budget: str
) -> list[Judgement]:
    """Judge architectures one after another, and print each cell."""
    cells: list[Judgement] = []
    for architecture in select_architectures(names):
        print(architecture.name, flush=True)
        for cell in judge_architecture(architecture, lambda: StreamCQSAStrategy(budget), modes):
            difference = "" if cell.difference is None else f"{cell.difference:.1e}"
            print(
                f"  {cell.mode:22} {_SYMBOLS.get(cell.verdict, cell.verdict):8} {difference:8} "
                f"{cell.seconds:5.2f} s  {cell.schedule or '':6} {cell.detail}",
                flush=True,
            )
            cells.append(cell)
    return cells


def print_calls(names: Sequence[str] | None, modes: Sequence[str] | None) -> None:
    """Print what each architecture gives to an attention function, and what it computes itself."""
    for architecture in select_architectures(names):
        model = build_model(architecture)
        for mode in modes or ("plain",):
            if mode not in take_modes(architecture, model):
                continue
            calls, self_computed = record_attention(architecture, model, mode)
            names = ", ".join(self_computed) or "none"
            print(f"{architecture.name} {mode}; computed by itself: {names}")
            for call in calls:
                print(
                    f"  {call.module} is_causal={call.is_causal} query {call.query} "
                    f"key {call.key} value {call.value} mask {call.mask}; {call.keywords}"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge the architectures named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="all by default")
    parser.add_argument("--modes", nargs="+", choices=(*MODES, *EXTRA_MODES))
    parser.add_argument("--budget", default=BUDGET)
    parser.add_argument("--calls", action="store_true", help="what attention is given, instead")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    if options.calls:
        print_calls(options.architectures or None, options.modes)
        return
    began = time.perf_counter()
    cells = judge_all(options.architectures or None, options.modes, options.budget)
    seconds = time.perf_counter() - began
    notes = [
        f"{len({cell.architecture for cell in cells})} architectures, transformers "
        f"{metadata.version('transformers')}, budget {options.budget}, float64, {seconds:.0f} s.",
        "",
        *count_all(cells),
        "",
        "Reasons, by their first words:",
        "",
        *count_reasons(cells),
    ]
    if options.architectures or options.modes or options.budget != BUDGET:
        print("\n".join(notes))
        return
    report(
        "stream_transformers",
        "Models of Hugging Face transformers under StreamCQSAStrategy",
        "\n".join(notes),
        make_rows(cells),
        raw=[
            # other tokens differ by infinity, for which JSON has no number
            dataclasses.asdict(cell) | {"difference": str(cell.difference)}
            if cell.difference == math.inf
            else dataclasses.asdict(cell)
            for cell in cells
        ],
    )


if __name__ == "__main__":
    main()
