"""Ranks share the tasks and all get the result of one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fulgurite.attention import stream_attention
from fulgurite.errors import ConfigError


def work(rank, world, folder, schedule):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    inputs, grad = example()
    out, lse = stream_attention(
        *inputs, is_causal=True, enable_gqa=True, memory_budget="48KiB", schedule=schedule,
        distributed=True, return_lse=True,
    )  # fmt: skip
    grads = torch.autograd.grad(out, inputs, grad)
    torch.save([out.detach(), lse, *grads], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def example():
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    inputs = [torch.randn(1, h, 300, 8, **make).requires_grad_() for h in (4, 2, 2)]
    return inputs, torch.randn(1, 4, 300, 8, **make)


@pytest.mark.parametrize(("world", "schedule"), [(2, "auto"), (3, "cqs"), (3, "rect")])
def test_ranks_agree_with_one(tmp_path, world, schedule):
    mp.spawn(work, (world, str(tmp_path), schedule), nprocs=world)
    inputs, grad = example()
    out, lse = stream_attention(*inputs, is_causal=True, enable_gqa=True, return_lse=True)
    expected = [out, lse, *torch.autograd.grad(out, inputs, grad)]
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_way_that_leaves_ranks_idle_is_refused():
    from fulgurite.attention.planning import Shape, make_plan
    from fulgurite.attention.tiles import Visibility

    shape = Shape(1, 1, 1, 8, torch.float32)
    with pytest.raises(ConfigError, match=r"on 2 rank"):
        make_plan(shape, Visibility(64, 64), None, "whole", share=(0, 2))
