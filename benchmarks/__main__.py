"""Run every benchmark, each in a process of its own: ``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import subprocess
import sys

ALL = (
    "fedsir_rounds", "fedsir_vectorized", "fedsir_overhead", "fedsir_network",
    "stream_attention", "stream_files", "plates",
    "number_probing_probe", "number_probing_power", "number_probing_backbones", "ice_layers_step",
    "ice_layers_inference", "ice_layers_sred", "stream_transformers", "startup",
    "scaling_predictions", "compare_engines", "sweep_storages",
)  # fmt: skip
GPU = ("gpu",)  # only by name


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; the exit status is the number that failed."""
    unknown = [n for n in names if n not in ALL + GPU]
    if unknown:
        print(f"There is no benchmark {unknown[0]!r}. There are {', '.join(ALL + GPU)}.")
        return 2
    commands = [[sys.executable, "-m", f"benchmarks.{name}"] for name in names or ALL]
    return sum(subprocess.run(command, check=False).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
