"""Streamed attention on a GPU: against FlashAttention in core and the authors' package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ratios, report, spread, take_turns
from fulgurite.attention import stream_attention
from fulgurite.attention.budget import format_bytes, parse_budget
from fulgurite.errors import ConfigError

WIDTH, DTYPE = 64, torch.bfloat16
NOTES = f"""
One head of {WIDTH} numbers in bfloat16, causal. Budgets are shares of query, key, value and out
together. `host` keeps these in pinned host memory, copies included in the time; `in core` is
`F.scaled_dot_product_attention` with all on the GPU. `stream-cqsa` is the authors' package at its
own defaults, with the same tensors in host memory, if it is installed.
"""
LONGEST = """
Forward pass of one causal head, tensors in pinned host memory, at most 8 GiB on the GPU for all
that PyTorch allocates, doubled until it fails or takes more than half a minute.
"""


def tensors(device: str, tokens: int, grad: bool = False) -> list[Tensor]:
    """Query, key and value; pinned in host memory if the device is the host."""
    pin = device == "cpu" and torch.cuda.is_available()
    found = [torch.randn(1, 1, tokens, WIDTH, dtype=DTYPE, device=device) for _ in "qkv"]
    return [(x.pin_memory() if pin else x).requires_grad_(grad) for x in found]


def runner(attention: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> Any:
    """Forward, and backward where inputs want gradients, until the GPU is done."""

    def run() -> None:
        out = attention(*inputs, **options)
        if out.requires_grad:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def against_in_core(
    device: str, lengths: tuple[int, ...], raw: dict[str, Any]
) -> list[dict[str, str]]:
    """Times against one call, in turns, with tensors on the GPU and in host memory."""
    rows = []
    for tokens in lengths:
        for grad in (False, True):
            inside, outside = tensors(device, tokens, grad), tensors("cpu", tokens, grad)
            whole = 4 * inside[0].nbytes
            in_core = runner(F.scaled_dot_product_attention, inside, is_causal=True)
            contestants = {"in core": in_core}
            for share in (8, 32):
                options: dict[str, Any] = {"is_causal": True, "memory_budget": whole // share}
                contestants[f"on the GPU 1/{share}"] = runner(stream_attention, inside, **options)
                contestants[f"host 1/{share}"] = runner(
                    stream_attention, outside, device=device, **options
                )
            if authors := _package():
                contestants["stream-cqsa, host"] = runner(authors, outside, is_causal=True)
            seconds = take_turns(contestants, 5)
            raw[f"{tokens} backward={grad}"] = seconds
            rows += [
                {
                    "N": str(tokens),
                    "pass": "forward + backward" if grad else "forward",
                    "way": name,
                    "seconds": spread(times),
                    "time / in core": spread(ratios(times, seconds["in core"])),
                }
                for name, times in seconds.items()
            ]
    return rows


def longest(device: str, raw: dict[str, Any]) -> list[dict[str, str]]:
    """Double the sequence within 8 GiB of the GPU."""
    rows, tokens, budget = [], 2**20, 8 * 2**30
    total = parse_budget(1.0, torch.device(device)) or budget
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    while True:
        torch.cuda.reset_peak_memory_stats()
        try:
            run = runner(
                stream_attention, tensors("cpu", tokens), device=device, is_causal=True,
                memory_budget=int(0.9 * budget),
            )  # fmt: skip
            (seconds,) = take_turns({"host": run}, 1)["host"]
        except (torch.OutOfMemoryError, ConfigError, RuntimeError) as error:
            print(f"{tokens} tokens: {error}", file=sys.stderr)
            return rows
        peak = torch.cuda.max_memory_allocated()
        raw[str(tokens)] = [seconds, peak]
        rows.append({
            "N": str(tokens), "seconds": f"{seconds:.3g}", "allocated at most": format_bytes(peak),
        })  # fmt: skip
        if seconds > 30:
            return rows
        tokens *= 2


def _package() -> Callable[..., Tensor] | None:
    try:
        found: Callable[..., Tensor] = importlib.import_module("stream_cqsa").attention
    except ImportError:
        return None
    return found


def main() -> int:
    """Measure, print and write the tables."""
    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use; nothing is measured.", file=sys.stderr)
        return 1
    raw: dict[str, Any] = {}
    rows = against_in_core("cuda", (2**16, 2**18, 2**20), raw)
    report("stream_gpu", "Streamed attention on a GPU", NOTES, rows, raw)
    raw = {}
    rows = longest("cuda", raw)
    report("stream_gpu_longest", "The longest sequence in 8 GiB", LONGEST, rows, raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
