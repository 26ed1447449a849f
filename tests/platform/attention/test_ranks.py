"""Ranks share the tasks and all get the result of one."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fulgurite.attention import (
    attend_files,
    attend_files_backward,
    calibration,
    memory_mapped,
    stream_attention,
)
from fulgurite.attention.machine_costs import MachineCosts
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.survival import start_call


def work(rank, world, folder, schedule, budget):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    inputs, grad = example()
    out, lse = stream_attention(
        *inputs, is_causal=True, enable_gqa=True, memory_budget=budget, schedule=schedule,
        distributed=True, return_lse=True,
    )  # fmt: skip
    grads = torch.autograd.grad(out, inputs, grad)
    torch.save([out.detach(), lse, *grads], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_forked(ranks, work, world, folder, *arguments):
    """Call ``work(rank, world, folder, …)`` in forks of this process."""
    forks = [
        start_call(functools.partial(work, rank, world, folder, *arguments), Path(folder))
        for rank in range(ranks)
    ]
    for ended in [fork.wait() for fork in forks]:
        assert ended.status == 0, ended.output


def example():
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    inputs = [torch.randn(1, h, 300, 8, **make).requires_grad_() for h in (4, 2, 2)]
    return inputs, torch.randn(1, 4, 300, 8, **make)


@pytest.mark.parametrize(
    ("world", "schedule", "budget"),
    [(2, "auto", "160KiB"), (3, "cqs", "160KiB"), (3, "rect", "32KiB")],  # rect: in two passes
)
def test_ranks_agree_with_one(tmp_path, world, schedule, budget):
    run_forked(world, work, world, str(tmp_path), schedule, budget)
    inputs, grad = example()
    out, lse = stream_attention(*inputs, is_causal=True, enable_gqa=True, return_lse=True)
    expected = [out, lse, *torch.autograd.grad(out, inputs, grad)]
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def plan_alike(rank, world, folder):
    """The second rank has no costs of its own; both plan by those of the first."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    if rank == 1:
        calibration.measured_costs = None
    else:
        true = MachineCosts(
            flops=1e12, bandwidth=1e9, call=1e-4, short_tiles=((64, 9.0), (2048, 1.0))
        )
        calibration.measured_costs = lambda *_: true
    plans = []
    inputs = [x.detach() for x in example()[0]]
    for _ in range(2):  # the second time nothing is sent
        stream_attention(
            *inputs, is_causal=True, enable_gqa=True, memory_budget="64KiB", distributed=True,
            on_plan=plans.append,
        )  # fmt: skip
    assert plans[0] == plans[1]
    assert plans[0].request.costs.short_tiles == ((64, 9.0), (2048, 1.0))
    torch.save([plans[0].tile], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_plan_by_the_costs_of_the_first(tmp_path):
    run_forked(2, plan_alike, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second


def give_other_keys(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    query, key, value = (x.detach() for x in example()[0])
    rounded = key * (1 + rank * 1e-9)
    stream_attention(query, rounded, value, enable_gqa=True, distributed=True)
    for other in (key + rank * torch.rand_like(key), key.roll(rank, 3)):
        with pytest.raises(DataError, match=r"Ranks 0 and 1 give attention another key"):
            stream_attention(query, other, value, enable_gqa=True, distributed=True)
    Path(folder, f"refused.{rank}").touch()
    dist.destroy_process_group()


def test_ranks_that_give_other_inputs_are_refused(tmp_path):
    run_forked(2, give_other_keys, 2, str(tmp_path))
    assert len([*tmp_path.glob("refused.*")]) == 2


def work_in_files(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    inputs, grad = ([x.detach() for x in some] for some in (example()[0], [example()[1]]))
    new, group = {}, dist.barrier
    for name, like in zip(("out", "dq", "dk", "dv"), (grad[0], *inputs), strict=True):
        if rank == 0:
            memory_mapped(f"{folder}/{name}", like.shape, like.dtype, create=True)
        group()
        new[name] = memory_mapped(f"{folder}/{name}", like.shape, like.dtype)
    if rank == 0:
        memory_mapped(f"{folder}/lse", grad[0].shape[:-1], grad[0].dtype, create=True)
    group()
    lse = memory_mapped(f"{folder}/lse", grad[0].shape[:-1], grad[0].dtype)
    options = {"is_causal": True, "enable_gqa": True, "memory_budget": "48KiB"}
    options |= {"distributed": True, "progress": False}
    with pytest.raises(ConfigError, match=r"Ranks would merge .* schedule='cqs'"):
        attend_files(inputs, (new["out"], lse), schedule="cqs", **options)
    attend_files(inputs, (new["out"], lse), journal=f"{folder}/forward", **options)
    attend_files_backward(
        grad[0], inputs, (new["out"], lse), (new["dq"], new["dk"], new["dv"]),
        journal=f"{folder}/backward", **options,
    )  # fmt: skip
    dist.destroy_process_group()


def test_ranks_share_files(tmp_path):
    run_forked(2, work_in_files, 2, str(tmp_path))
    inputs, grad = example()
    out, lse = stream_attention(*inputs, is_causal=True, enable_gqa=True, return_lse=True)
    grads = torch.autograd.grad(out, inputs, grad)
    for name, wanted in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        found = memory_mapped(tmp_path / name, wanted.shape, wanted.dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for way in ("forward", "backward"):
        done = [(tmp_path / way / f"rank-{r}-of-2/done").stat().st_size for r in range(2)]
        assert min(done) > 0.3 * max(done)


def test_a_way_that_leaves_ranks_idle_is_refused():
    from fulgurite.attention.planning import make_plan
    from fulgurite.attention.request import PlanRequest
    from fulgurite.attention.spec import AttentionSpec
    from fulgurite.attention.visibility import Visibility

    spec = AttentionSpec(1, 1, 1, 8, 8, torch.float32, (Visibility.of(64, 64),))
    with pytest.raises(ConfigError, match=r"on 2 rank"):
        make_plan(spec, PlanRequest(schedule="whole", shard=(0, 2)))
