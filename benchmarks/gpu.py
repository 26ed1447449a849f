"""What only a GPU can answer, in less than nine minutes: ``make gpu``.

Each part runs in a process of its own with a limit of its own, since some faults of a GPU outlive
everything but the process. Answers are lines of JSON, written as soon as they are known, and at
the end a page of tables. Without a GPU the same is done with small sizes, which shows that it
runs; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import RESULTS, machine, table
from fulgurite.attention import stream_attention
from fulgurite.attention.calibration import measured_costs
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.kernel_checks import KernelUse, compare_kernel
from fulgurite.attention.kernel_choice import kernel_for, usual_kernel_names
from fulgurite.attention.kernels import TileInputs
from fulgurite.attention.machine_costs import GPU_COSTS
from fulgurite.attention.planning import make_plan
from fulgurite.attention.request import Placement, PlanRequest
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.models.fedsir.federation import exact_average
from fulgurite.models.number_probing.probes.probing import probe

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
WIDTH = 64
SYSTEMS = ("fedsir", "cs_arm_bn", "number_probing", "ice_layers", "stream_cqsa")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 2e-5}
Row = dict[str, Any]


def sized(on_gpu: int, on_cpu: int) -> int:
    """A size, or the one with which the script is tried without a GPU."""
    return on_gpu if HAS_GPU else on_cpu


def wait() -> None:
    """Wait until the GPU has done what was started."""
    if HAS_GPU:
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], turns: int = 3) -> float:
    """Least time of some turns, after one that counts for nothing."""
    times = []
    for turn in range(turns + 1):
        begun = time.perf_counter()
        run()
        wait()
        times += [time.perf_counter() - begun] if turn else []
    return min(times)


def draw(
    tokens: int,
    heads: int = 1,
    kv_heads: int = 1,
    *,
    on_host: bool = False,
    grad: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Query, key and value; on the host they are pinned."""
    tensors = []
    for count in (heads, kv_heads, kv_heads):
        tensor = torch.randn(1, count, tokens, WIDTH, dtype=dtype, device=DEVICE)
        if on_host:
            tensor = tensor.cpu().pin_memory() if HAS_GPU else tensor.cpu()
        tensors.append(tensor.requires_grad_(grad))
    return tensors


def run_both(attention: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Forward, and backward where inputs want gradients."""
    out = attention()
    if out.requires_grad:
        torch.autograd.grad(out, inputs, torch.ones_like(out))


# --- parts: each gives rows, of which every one is written at once -----------------------------


def kernels() -> Iterator[Row]:
    """Which kernels give the numbers of matrix products, and what is refused."""
    names = BACKENDS if HAS_GPU else ()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (20, 64, 128):
            for name in names:
                for biased in (False, True) if name == "efficient" else (False,):
                    if dtype == torch.float32 and name != "efficient":
                        continue
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        is_right = compare_kernel(name, KernelUse(DEVICE, dtype, size, biased))
                    yield {
                        "kernel": name, "type": str(dtype)[6:], "head size": size,
                        "bias": biased, "right": is_right,
                        "why not": str(caught[0].message) if caught else "",
                    }  # fmt: skip
    yield {"kernel": "CPU" if not HAS_GPU else "all", "cudnn": torch.backends.cudnn.version()}


def exactness() -> Iterator[Row]:
    """Streamed attention and its gradients against matrix products in float64."""
    tokens = sized(4096, 256)
    distance = torch.arange(tokens, device=DEVICE)[:, None] - torch.arange(tokens, device=DEVICE)
    for dtype, allowed in TOLERANCES.items():
        plain = draw(tokens, 4, 2, dtype=dtype)
        for window in (None, tokens // 4 + 3):
            exact = [x.double().requires_grad_() for x in plain]
            visible = (distance >= 0) & (distance < (window or tokens))
            out = F.scaled_dot_product_attention(*exact, attn_mask=visible, enable_gqa=True)
            grad = torch.randn_like(out)
            expected = (out, *torch.autograd.grad(out, exact, grad))
            for origin in ("device", "host"):
                for schedule in ("rect", "cqs"):
                    x = [
                        t.to("cpu" if origin == "host" else DEVICE).requires_grad_() for t in plain
                    ]
                    streamed = stream_attention(
                        *x, is_causal=True, enable_gqa=True, window=window, device=DEVICE,
                        schedule=schedule, memory_budget=sized(2**24, 2**19),
                    )  # fmt: skip
                    results = (streamed, *torch.autograd.grad(streamed, x, grad.to(streamed)))
                    error = max(
                        float((a.double().to(DEVICE) - b).abs().max() / b.abs().max())
                        for a, b in zip(results, expected, strict=True)
                    )
                    yield {
                        "type": str(dtype)[6:], "window": window, "from": origin,
                        "schedule": schedule, "error": error, "allowed": allowed,
                        "right": error < allowed,
                    }  # fmt: skip


def smoke() -> Iterator[Row]:
    """The five systems: twice, and deterministic twice, where metrics must be equal."""
    with tempfile.TemporaryDirectory() as folder:
        for options in ([], ["--trainer.deterministic=true"]):
            runs = {
                (name, turn): _start_smoke(
                    name, Path(folder, f"{name}-{turn}-{len(options)}"), options
                )
                for name in SYSTEMS[: sized(5, 1)]
                for turn in range(2)
            }
            for process, _ in runs.values():
                process.wait()
            for name in SYSTEMS[: sized(5, 1)]:
                metrics = []
                for turn in range(2):
                    process, run_folder = runs[name, turn]
                    metrics.append(_metrics(run_folder))
                    log = (run_folder / "log").read_text(errors="replace").splitlines()
                yield {
                    "system": name, "deterministic": bool(options),
                    "status": [runs[name, turn][0].returncode for turn in range(2)],
                    "equal twice": bool(metrics[0]) and metrics[0] == metrics[1],
                    "last line": log[-1][:160] if log else "",
                }  # fmt: skip


def _metrics(folder: Path) -> list[dict[str, str]]:
    """What a run logged, without times and memory."""
    rows = []
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open() as file:
            rows += list(csv.DictReader(file))
    measured = ("time/", "memory/", "tokens_per_s")
    return [{k: v for k, v in row.items() if not any(x in k for x in measured)} for row in rows]


def _start_smoke(
    name: str, folder: Path, options: list[str]
) -> tuple[subprocess.Popen[bytes], Path]:
    folder.mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        command = ["fit", "--config", f"{name}/smoke.yaml", "--seed_everything=1", *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "fulgurite", *command], cwd=folder, stdout=log,
            stderr=subprocess.STDOUT, env=os.environ | {"FULGURITE_CACHE": str(folder / "cache")},
        )  # fmt: skip
    return process, folder


def memory() -> Iterator[Row]:
    """Planned against allocated bytes and predicted against measured seconds."""
    for tokens in (sized(2**18, 2**11), sized(2**20, 2**12)):
        for on_host in (False, True):
            for divisor, grad in ((8, False), (8, True), (32, False)):
                inputs = draw(tokens, on_host=on_host, grad=grad)
                yield _measured(inputs, 4 * tokens * WIDTH * 2 // divisor, on_host, divisor)
                del inputs


def _measured(inputs: list[Tensor], budget: int, on_host: bool, divisor: int) -> Row:
    plans: list[ExecutionPlan] = []

    def attend() -> Tensor:
        return stream_attention(
            *inputs, is_causal=True, device=DEVICE, memory_budget=budget, on_plan=plans.append
        )

    run_both(attend, inputs)
    wait()
    before = peak = 0
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = seconds_of(lambda: run_both(attend, inputs), 1)
    if HAS_GPU:
        results = 0 if on_host else sum(x.nbytes for x in inputs[: 4 if plans[-1].gradient else 1])
        peak = torch.cuda.max_memory_allocated() - before - results
    plan = plans[-1]
    predicted = plan.cost.seconds + (plan.gradient.cost.seconds if plan.gradient else 0)
    calls = plan.cost.calls + (plan.gradient.cost.calls if plan.gradient else 0)
    return {
        "tokens": inputs[0].shape[2], "from": "host" if on_host else "device",
        "budget": f"1/{divisor}", "gradients": plan.gradient is not None, "tile": list(plan.tile),
        "calls": calls, "seconds": seconds, "predicted / measured": predicted / seconds,
        "allocated [MiB]": peak / 2**20, "planned [MiB]": plan.peak_bytes / 2**20,
    }  # fmt: skip


def recovery() -> Iterator[Row]:
    """A budget that is twice what there is: attention goes on in smaller tiles."""
    tokens = sized(2**18, 2**11)
    inputs = draw(tokens)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    if HAS_GPU:
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_allocated() + 48 * 2**20
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun = time.perf_counter()
        out = stream_attention(
            *(x.cpu() for x in inputs), is_causal=True, device=DEVICE, memory_budget="4GiB",
            schedule="rect",
        )  # fmt: skip
        seconds = time.perf_counter() - begun
    error = float((out.to(DEVICE).float() - expected.float()).abs().max())
    yield {
        "tokens": tokens, "seconds": seconds, "error": error, "right": error < 2e-2,
        "warnings": [str(x.message) for x in caught],
    }  # fmt: skip


def speed() -> Iterator[Row]:
    """Streamed against in core with the same kernel, and kernels against each other."""
    for tokens in (sized(2**16, 2**10), sized(2**18, 2**11), sized(2**20, 2**12)):
        for grad in (False, True):
            inputs = draw(tokens, grad=grad)
            in_core = {"default": _in_core_seconds(inputs, None)}
            for name, backend in BACKENDS.items() if HAS_GPU else ():
                in_core[name] = _in_core_seconds(inputs, backend)
            for name, seconds in in_core.items():
                yield {
                    "tokens": tokens, "gradients": grad, "way": f"in core, {name}",
                    "seconds": seconds,
                }  # fmt: skip
            for name in BACKENDS if HAS_GPU else (None,):
                seconds = seconds_of(
                    lambda name=name, inputs=inputs, tokens=tokens: run_both(
                        lambda: stream_attention(
                            *inputs,
                            is_causal=True,
                            memory_budget=4 * tokens * WIDTH * 2 // 8,
                            kernel=name,
                        ),
                        inputs,
                    ),
                    2,
                )
                alone = in_core.get(name or "default")
                yield {
                    "tokens": tokens, "gradients": grad, "way": f"streamed 1/8, {name}",
                    "seconds": seconds, "time / in core": seconds / alone if alone else None,
                }  # fmt: skip


def _in_core_seconds(inputs: list[Tensor], backend: SDPBackend | None) -> float | None:
    try:
        with sdpa_kernel(backend or [*BACKENDS.values(), SDPBackend.MATH]):
            return seconds_of(
                lambda: run_both(
                    lambda: F.scaled_dot_product_attention(*inputs, is_causal=True), inputs
                ),
                2,
            )
    except RuntimeError:  # the kernel does not do this
        return None


def costs() -> Iterator[Row]:
    """What calls and copies cost, beside the costs that plans without measuring take."""
    begun = time.perf_counter()
    measured = measured_costs(DEVICE, torch.bfloat16, WIDTH)
    yield {"what": "calibration [s]", "measured": time.perf_counter() - begun}
    for name in ("flops", "bandwidth", "call", "merge", "short_tiles"):
        yield {
            "what": name,
            "measured": getattr(measured, name),
            "assumed": getattr(GPU_COSTS, name),
        }
    for pinned in (True, False) if HAS_GPU else ():
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=pinned)
        there = torch.empty_like(host, device=DEVICE)
        up = seconds_of(lambda host=host, there=there: there.copy_(host, non_blocking=True))
        down = seconds_of(lambda host=host, there=there: host.copy_(there, non_blocking=True))
        kind = "pinned" if pinned else "pageable"
        yield {"what": f"{kind}, to the GPU [GB/s]", "measured": 2**28 / up / 1e9}
        yield {"what": f"{kind}, from the GPU [GB/s]", "measured": 2**28 / down / 1e9}


def longest() -> Iterator[Row]:
    """Millions of tokens within one GiB of the GPU for all that PyTorch takes."""
    limit = 2**30
    if HAS_GPU:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    for tokens in (2**21, 2**22, 2**23) if HAS_GPU else (2**12,):
        inputs = [torch.empty(1, 1, tokens, WIDTH, dtype=torch.bfloat16) for _ in "qkv"]
        inputs = [(x.pin_memory() if HAS_GPU else x).normal_() for x in inputs]
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        stream_attention(*inputs, is_causal=True, device=DEVICE, memory_budget=int(0.8 * limit))
        wait()
        reserved = torch.cuda.max_memory_reserved() if HAS_GPU else 0
        yield {
            "tokens": tokens, "seconds": time.perf_counter() - begun,
            "reserved [MiB]": reserved / 2**20,
        }  # fmt: skip


def billion() -> Iterator[Row]:
    """One tile of a plan for a billion tokens, and what follows for all of them."""
    tokens = sized(10**9, 10**6)
    visible = (Visibility.of(tokens, tokens, EntryMasks(is_causal=True)),)
    spec = AttentionSpec(1, 1, 1, WIDTH, WIDTH, torch.bfloat16, visible, WIDTH**-0.5)
    request = PlanRequest(
        sized(2**33, 2**22), "rect",
        placement=Placement(resident=False, tiled=True, ahead=True),
        costs=measured_costs(DEVICE, torch.bfloat16, WIDTH),
        kernels=usual_kernel_names(HAS_GPU, torch.bfloat16),
    )  # fmt: skip
    plan = make_plan(spec, request)
    height, width = plan.tile
    query, key = (torch.randn(1, 1, n, WIDTH, dtype=torch.bfloat16) for n in plan.tile)
    query, key = ((x.pin_memory() if HAS_GPU else x) for x in (query, key))
    kernel = kernel_for(DEVICE, torch.bfloat16)

    def compute() -> None:
        rows, columns = (x.to(DEVICE, non_blocking=True) for x in (query, key))
        kernel.forward(TileInputs(rows, columns, columns, WIDTH**-0.5))

    seconds = seconds_of(compute, 2)
    all_seconds = seconds * spec.pairs / (height * width)
    yield {
        "tokens": tokens, "tile": [height, width], "seconds of a tile, copies included": seconds,
        "hours of all tiles": all_seconds / 3600, "hours, predicted": plan.cost.seconds / 3600,
    }  # fmt: skip


def training() -> Iterator[Row]:
    """Steps of the long configuration, streamed with offloaded activations and in core."""
    length = sized(131_072, 512)
    common = [
        "fit", "--config", "stream_cqsa/long.yaml", f"--data.init_args.length={length}",
        "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=0",
        *(["--trainer.precision=bf16-mixed"] if HAS_GPU else []),
    ]  # fmt: skip
    strategy = "--trainer.strategy.init_args."
    ways = {
        "streamed": [f"{strategy}memory_budget=256MiB", f"{strategy}offload.activations=host"],
        "in core": ["--trainer.strategy=auto"],
    }
    for name, options in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            result = subprocess.run(
                [sys.executable, "-m", "fulgurite", *common, *options], cwd=folder,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            lines = [
                text for path in Path(folder).rglob("metrics.csv")
                for text in path.read_text().splitlines()
            ]  # fmt: skip
            yield {
                "way": name, "tokens": length, "status": result.returncode,
                "seconds with start": time.perf_counter() - begun, "metrics": lines[-2:],
                "last line": (result.stderr.splitlines() or [""])[-1][:160],
            }  # fmt: skip


def systems() -> Iterator[Row]:
    """What the systems compute often, on the device and on the host."""
    for count, size in ((1000, 64), (10, 512)) if HAS_GPU else ((4, 16),):
        roots = torch.randn(count, size, size, dtype=torch.float64)
        there = (roots @ roots.mT).to(DEVICE)
        yield _beside_host(
            f"fedsir: eigenvectors, {count} x {size}²", lambda x: torch.linalg.eigh(x), there
        )
    embeddings = torch.randn(sized(1000, 100), sized(768, 32), device=DEVICE)
    yield _beside_host("number_probing: probe", lambda x: probe(x), embeddings)
    states = {k: torch.randn(sized(11_000_000, 10_000), device=DEVICE) for k in range(10)}
    sizes = [len(states[0]) // 100] * 100
    averages = [
        exact_average(
            {k: states[k] for k in order}, dict.fromkeys(order, 0.1), sizes, device=DEVICE
        )
        for order in (range(10), range(9, -1, -1))
    ]
    yield {
        "what": "fedsir: average of 10 clients",
        "same in any order": torch.equal(*averages),
        "device [s]": seconds_of(
            lambda: exact_average(states, dict.fromkeys(states, 0.1), sizes, device=DEVICE)
        ),
    }


def _beside_host(label: str, run: Callable[[Tensor], object], on_device: Tensor) -> Row:
    on_host = on_device.cpu()
    return {
        "what": label, "device [s]": seconds_of(lambda: run(on_device), 1),
        "host [s]": seconds_of(lambda: run(on_host), 1),
    }  # fmt: skip


class Part(NamedTuple):
    """One question.

    Attributes:
        ask: Gives the rows.
        limit: Most seconds.
        title: Of its table.
    """

    ask: Callable[[], Iterator[Row]]
    limit: int
    title: str


# In the order of their worth: what comes last may find no time.
PARTS = {
    "kernels": Part(kernels, 45, "Kernels against matrix products"),
    "exactness": Part(exactness, 40, "Streamed attention against float64"),
    "smoke": Part(smoke, 110, "The five systems"),
    "recovery": Part(recovery, 25, "Out of memory"),
    "memory": Part(memory, 70, "Planned and allocated"),
    "costs": Part(costs, 25, "Costs"),
    "speed": Part(speed, 70, "Streamed and in core"),
    "longest": Part(longest, 50, "Long sequences in 1 GiB"),
    "billion": Part(billion, 25, "A billion tokens"),
    "training": Part(training, 90, "Steps of long.yaml"),
    "systems": Part(systems, 40, "What the systems compute often"),
}


def ask(name: str, path: Path) -> None:
    """Answer one question; each row is on the disk before the next is asked for."""
    with path.open("a") as file:
        for row in PARTS[name].ask():
            file.write(json.dumps({"part": name, **row}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())


def ask_all(names: list[str], path: Path, seconds: float) -> bool:
    """Ask each in a process of its own; whether all of them ended well."""
    ends, all_well = time.monotonic() + seconds, True
    for name in names:
        remaining = ends - time.monotonic()
        if remaining < 5:
            status = "no time left"
        else:
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(path)]
            try:
                process = subprocess.run(
                    command, timeout=min(remaining, PARTS[name].limit * sized(1, 4)), check=False,
                    capture_output=True,
                    text=True,
                )  # fmt: skip
                last = (process.stderr.strip().splitlines() or [""])[-1][:200]
                status = "ok" if process.returncode == 0 else f"{process.returncode}: {last}"
            except subprocess.TimeoutExpired:
                status = "stopped at its limit"
        all_well &= status == "ok"
        print(f"{name}: {status} ({seconds - (ends - time.monotonic()):.0f} s)", flush=True)
        with path.open("a") as file:
            file.write(json.dumps({"part": name, "ended": status}) + "\n")
    return all_well


def page(rows: list[Row]) -> str:
    """A page of tables, one for each part."""
    text = [
        "# On a GPU" if HAS_GPU else "# Without a GPU: these numbers mean nothing",
        "",
        machine(),
    ]
    for name, part in PARTS.items():
        cells = [{k: _cell(v) for k, v in row.items() if k != "part"} for row in rows
               if row["part"] == name and "ended" not in row]  # fmt: skip
        ends = [row["ended"] for row in rows if row["part"] == name and "ended" in row]
        if not cells and not ends:
            continue
        text += ["", f"## {part.title}", ""]
        if cells:
            columns = list(dict.fromkeys(key for row in cells for key in row))
            text.append(table([{key: row.get(key, "") for key in columns} for row in cells]))
        text += [f"The part ended early: {end}." for end in ends if end != "ok"]
    return "\n".join(text) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "/")


def main(argv: list[str] | None = None) -> int:
    """Ask everything, or some parts; the exit status is 1 if a part did not end well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.jsonl and gpu.md")
    parser.add_argument("--seconds", type=float, default=510.0, help="most of all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        ask(options.part, options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.jsonl"
    path.unlink(missing_ok=True)
    path.touch()
    all_well = ask_all(options.parts, path, options.seconds)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (options.out / "gpu.md").write_text(page(rows))
    print(options.out / "gpu.md")
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
