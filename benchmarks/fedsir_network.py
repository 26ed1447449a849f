"""A round over Flower's network beside a round of the simulation, both as processes of their own.

SuperLink and SuperNodes run on this machine, without encryption. The times are those between two
rows of the run folders' metrics.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import ratios, report, spread
from fulgurite.testing.survival import find_free_port

CLIENTS, ROUNDS = 3, 6
SCRIPTS = Path(sys.executable).parent


def count_rounds(metrics: Path) -> int:
    """Rounds that a run has recorded."""
    if not metrics.is_file():
        return 0
    with metrics.open(newline="") as file:
        return sum(bool(row.get("fed/clients")) for row in csv.DictReader(file))


def time_rounds(metrics: Path, seconds: float = 1800.0) -> list[float]:
    """Seconds between the rows that a run writes, after its first round."""
    seen: list[float] = []
    deadline = time.monotonic() + seconds
    while len(seen) < ROUNDS:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{metrics} has {len(seen)} of {ROUNDS} rounds")
        seen += [time.monotonic()] * max(0, count_rounds(metrics) - len(seen))
        time.sleep(0.02)
    return [b - a for a, b in pairwise(seen)]


def main() -> None:
    """Measure both, and write the report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        port = find_free_port()
        environment = {
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            log = (folder / f"{name}.log").open("w")
            return subprocess.Popen(
                [str(SCRIPTS / command[0]), *command[1:]],
                cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

        options = [f"--data.clients={CLIENTS}", f"--trainer.max_epochs={ROUNDS}"]
        app = start(
            "app", "fulgurite", "federate", "app", "fedsir/smoke.yaml", "--out=app", *options
        )
        if app.wait() != 0:
            raise RuntimeError((folder / "app.log").read_text())
        simulated = folder / "simulated"
        fit = ["fulgurite", "fit", "--config=app/app/config.yaml", f"--run.dir={simulated}"]
        simulation = start("simulation", *fit)
        simulation_times = time_rounds(simulated / "metrics.csv")
        simulation.wait()
        link = ["flower-superlink", "--insecure", f"--port={port}"]
        processes = [start("link", *link, "--disable-runtime-dependency-installation")]
        for number in range(CLIENTS):
            node = ["flower-supernode", "--insecure", f"--superlink=127.0.0.1:{port}"]
            config = ["--node-config", f"partition-id={number}"]
            processes.append(start(f"node{number}", *node, f"--port={find_free_port()}", *config))
        run = folder / "run"
        try:
            time.sleep(5)
            start("run", "flwr", "run", "app", "here", f'--run-config=run-dir="{run}"').wait()
            network_times = time_rounds(run / "metrics.csv")
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        facts = json.loads((run / "federation.json").read_text())
    rows = [
        {"round of": "the simulation", "seconds": spread(simulation_times)},
        {
            "round of": f"a network of {len(facts['clients'])} nodes",
            "seconds": spread(network_times),
        },
        {"round of": "ratio", "seconds": spread(ratios(network_times, simulation_times))},
    ]
    notes = (
        "Flower starts a process for each message, whose imports and configuration are nearly all "
        "of the time."
    )
    raw = {"simulation": simulation_times, "network": network_times}
    report("fedsir_network", "A round over a network", notes, rows, raw=raw)


if __name__ == "__main__":
    main()
