"""``fulgurite attend``: the tasks of a job in one process, in several, and on a cluster."""

import shutil
import threading
import time

import numpy as np
import pytest
import torch
from fakes.clusters import two_nodes

from fulgurite.attention import AttentionJob, stream_attention
from fulgurite.attention.call_files import map_tensors
from fulgurite.attention.command import main
from fulgurite.errors import CheckpointError, ConfigError, DataError, MissingExtraError

OPTIONS = ["--is-causal", "--memory-budget=1MiB", "--least-tasks=7"]


def write_inputs(folder, tokens=130, width=8, dtype=np.float32):
    """Query, key and value in files, and as tensors."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = ("query", "key", "value")
    arrays = {n: generator.standard_normal((1, 2, tokens, width)).astype(dtype) for n in names}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [torch.from_numpy(array) for array in arrays.values()]


def read(folder, *names):
    return [torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names]


def attend(tmp_path, out, *options):
    return main([str(tmp_path / "in"), f"--out={tmp_path / out}", *OPTIONS, *options])


def test_attention_and_its_gradients_come_from_files(tmp_path, capsys):
    leaves = [x.requires_grad_() for x in write_inputs(tmp_path / "in")]
    assert attend(tmp_path, "a", "--dry-run") == 0
    assert not (tmp_path / "a/out.npy").exists()
    assert attend(tmp_path, "a") == 0
    assert "job       attention, cqs" in capsys.readouterr().out
    wanted, wanted_lse = stream_attention(*leaves, is_causal=True, return_lse=True)
    out, lse = read(tmp_path / "a", "out", "lse")
    torch.testing.assert_close(out, wanted.detach())
    torch.testing.assert_close(lse, wanted_lse.detach())
    grad = torch.ones_like(wanted)
    np.save(tmp_path / "in/grad.npy", grad.numpy())
    for name in ("out", "lse"):
        shutil.copy(tmp_path / f"a/{name}.npy", tmp_path / "in")
    assert attend(tmp_path, "b", "--gradients", "--schedule=rect") == 0
    for total, expected in zip(
        read(tmp_path / "b", "dquery", "dkey", "dvalue"),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(total, expected)


def test_the_same_command_goes_on_with_the_tasks_that_are_left(tmp_path):
    write_inputs(tmp_path / "in")
    attend(tmp_path, "a")
    first = read(tmp_path / "a", "out", "lse")
    parts = sorted((tmp_path / "a/job/parts").iterdir())
    times = [part.stat().st_mtime_ns for part in parts]
    parts[3].unlink()
    (tmp_path / "a/out.npy").unlink()
    assert attend(tmp_path, "a") == 0
    for before, after in zip(first, read(tmp_path / "a", "out", "lse"), strict=True):
        assert torch.equal(before, after)
    assert [p.stat().st_mtime_ns == t for p, t in zip(parts, times, strict=True)].count(False) == 1
    with pytest.raises(CheckpointError, match="holds another job"):
        attend(tmp_path, "a", "--window=5")
    job = AttentionJob.open(tmp_path / "a/job")
    with pytest.raises(ConfigError, match=r"has no task 99\. Its tasks are 0 to"):
        job.run_task(99, *map_tensors(tmp_path / "in", ["query", "key", "value"]).values())


def test_results_have_the_axes_of_their_inputs(tmp_path):
    for number, lead in enumerate([(), (2,), (2, 1, 2)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("query", "key", "value"):
            np.save(folder / f"{name}.npy", np.ones((*lead, 12, 4), np.float32))
        out = folder / "results"
        assert main([str(folder), f"--out={out}", "--memory-budget=1MiB", "--least-tasks=3"]) == 0
        assert [x.shape for x in read(out, "out", "lse")] == [(*lead, 12, 4), (*lead, 12)]


def test_the_quorums_of_a_rectangle_are_refused_with_what_does_it(tmp_path):
    for name, tokens in (("query", 6), ("key", 12), ("value", 12)):
        np.save(tmp_path / f"{name}.npy", np.ones((1, 1, tokens, 4), np.float32))
    with pytest.raises(ConfigError, match=r'does not do 6 queries and 12 keys.*schedule="rect"'):
        main([str(tmp_path), f"--out={tmp_path / 'a'}"])


def test_bfloat16_comes_from_safetensors_and_leaves_as_float32(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = [x.bfloat16() for x in write_inputs(tmp_path / "in")]
    path = tmp_path / "in.safetensors"
    named = dict(zip(("query", "key", "value"), tensors, strict=True))
    library.save_file(named, path)
    assert main([str(path), f"--out={tmp_path / 'a'}", *OPTIONS]) == 0
    (out,) = read(tmp_path / "a", "out")
    assert out.dtype == torch.float32
    wanted = stream_attention(*tensors, is_causal=True).float()
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    library.save_file({**named, "attn_mask": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="holds 'attn_mask', which is no tensor of the call"):
        main([str(path), f"--out={tmp_path / 'b'}"])


def test_what_does_not_fit_is_refused_by_name(tmp_path, monkeypatch):
    write_inputs(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"--engine is 'rai'\. Did you mean 'ray'"):
        attend(tmp_path, "a", "--engine=rai")
    with pytest.raises(ConfigError, match="--address is 'auto', and --engine is 'pool'"):
        attend(tmp_path, "a", "--address=auto")
    with pytest.raises(ConfigError, match="--gpus is 1, and --engine is 'pool'"):
        attend(tmp_path, "a", "--gpus=1")
    with pytest.raises(ConfigError, match="--cpus is 0"):
        attend(tmp_path, "a", "--engine=ray", "--cpus=0")
    with pytest.raises(ConfigError, match="--window has 3 sides"):
        attend(tmp_path, "a", "--window", "1", "2", "3")
    with pytest.raises(ConfigError, match="no schedule 'whole' here"):
        attend(tmp_path, "a", "--schedule=whole")
    with pytest.raises(DataError, match="holds no 'grad'"):
        attend(tmp_path, "a", "--gradients")
    with pytest.raises(DataError, match=r"neither a folder nor a \.safetensors file"):
        main([str(tmp_path / "absent"), f"--out={tmp_path / 'a'}"])
    np.save(tmp_path / "in/keys.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"holds 'keys', which is no .* Did you mean 'key'"):
        attend(tmp_path, "a")
    (tmp_path / "in/keys.npy").unlink()
    np.save(tmp_path / "in/value.npy", np.zeros((1, 2, 130, 8), np.int64))
    with pytest.raises(DataError, match=r"value\.npy cannot be read \(its numbers are int64"):
        attend(tmp_path, "a")
    write_inputs(tmp_path / "more")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"fulgurite\[ray\]"):
        main([str(tmp_path / "more"), f"--out={tmp_path / 'c'}", *OPTIONS, "--engine=ray"])


@pytest.mark.slow
def test_several_processes_change_no_bit(tmp_path):
    write_inputs(tmp_path / "in", tokens=3000)
    attend(tmp_path, "a")
    assert attend(tmp_path, "b", "--workers=2") == 0
    for name in ("out", "lse"):
        (alone,), (shared,) = read(tmp_path / "a", name), read(tmp_path / "b", name)
        assert torch.equal(alone, shared)


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_changes_no_bit(tmp_path, monkeypatch):
    write_inputs(tmp_path / "in", tokens=4000, width=64)
    options = [str(tmp_path / "in"), "--is-causal", "--memory-budget=2MiB", "--least-tasks=57"]
    assert main([*options, f"--out={tmp_path / 'alone'}"]) == 0
    engine = ["--engine=ray", f"--out={tmp_path / 'ray'}"]
    with two_nodes(monkeypatch) as cluster:
        missing = []

        def lose_a_node() -> None:
            while len([*(tmp_path / "ray/job/parts").glob("task-*.part")]) < 3:
                time.sleep(0.02)
            cluster.remove_node(cluster.nodes[0], allow_graceful=False)
            missing.extend(AttentionJob.open(tmp_path / "ray/job").missing())

        killer = threading.Thread(target=lose_a_node)
        killer.start()
        assert main([*options, *engine, f"--address={cluster.address}"]) == 0
        killer.join()
        assert missing  # tasks were left when the node was lost
        for name in ("out", "lse"):
            assert (tmp_path / f"ray/{name}.npy").read_bytes() == (
                tmp_path / f"alone/{name}.npy"
            ).read_bytes()
        assert not (tmp_path / "ray/job/.ray-token").exists()
        (tmp_path / "ray/job/parts/task-0000005.part").unlink()
        with pytest.raises(ConfigError, match=r"No node .* has 9 CPUs .* lower --cpus or --gpus"):
            main([*options, *engine, f"--address={cluster.address}", "--cpus=9"])
        other = tmp_path / "other"
        shutil.copytree(tmp_path / "in", other)
        np.save(other / "key.npy", np.zeros((1, 2, 4000, 64), np.float32))
        with pytest.raises(CheckpointError, match="holds another job"):
            main([str(other), *options[1:], *engine, f"--address={cluster.address}"])
