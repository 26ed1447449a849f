"""One training over several nodes: two agents of torchrun, and one of them that dies."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from fakes.repository import ROOT
from fakes.runs import read_weights, wait_until

from fulgurite.testing.survival import find_free_port

pytestmark = pytest.mark.slow

#: The strategy of each system, and further options.
SYSTEMS = {
    "fedsir": ("federated", []),
    "cs_arm_bn": ("ddp", []),
    "number_probing": ("ddp", []),
    "ice_layers": ("ddp", []),
    "stream_cqsa": (
        "stream_cqsa_ddp",
        # else tiles are cut by how fast a node was, and rounding follows the order of sums
        ["--trainer.deterministic=true", f"--data.init_args.text.paths={ROOT}/README.md"],
    ),
}


def fit_words(system, *more):
    strategy, options = SYSTEMS[system]
    return [
        *("-m", "fulgurite", "fit", f"--config={system}/smoke.yaml", "--trainer.accelerator=cpu"),
        *(f"--trainer.strategy={strategy}", "--trainer.enable_progress_bar=false", *options, *more),
    ]


def start_agents(folder, system, *more):
    """Two agents as on two machines, with a process each; their outputs are files."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--master-addr=127.0.0.1", f"--master-port={find_free_port()}"]
    words = fit_words(system, "--trainer.num_nodes=2", "--trainer.devices=1", *more)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [*torchrun, *meeting, f"--node-rank={node}", *words],
            cwd=folder,
            env=environment,
            stdout=(folder / f"{node}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for node in range(2)
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_nodes_train_as_one_with_two_processes(system, tmp_path):
    agents = start_agents(tmp_path, system, "--run.dir=two")
    outputs = [tmp_path / f"{node}.txt" for node in range(2)]
    assert [agent.wait(240) for agent in agents] == [0, 0], [path.read_text() for path in outputs]
    words = fit_words(system, "--trainer.devices=2", "--run.dir=one")
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, timeout=240)
    one, two = (read_weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_node_that_dies_ends_the_other_within_a_minute(tmp_path):
    agents = start_agents(
        tmp_path, "number_probing", "--run.dir=run", "--trainer.max_epochs=100000"
    )

    def is_saved():
        assert [agent.poll() for agent in agents] == [None, None]
        return (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()

    wait_until(is_saved, seconds=240, explain=(tmp_path / "0.txt").read_text)
    [worker] = psutil.Process(agents[1].pid).children()
    worker.send_signal(signal.SIGKILL)
    assert [agent.wait(60) != 0 for agent in agents] == [True, True]
    lines = (tmp_path / "0.txt").read_text().splitlines()
    [error] = [line for line in lines if line.startswith("fulgurite: error:")]
    assert "lost each other" in error
    assert "--ckpt_path=last" in error
    assert read_weights(tmp_path / "run")
