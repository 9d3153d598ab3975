"""Context parallelism in processes of gloo: the ring, which sends from rank to rank, and what every scheme sends.

One start of four processes for all of it: a start takes as long as everything that they do.
"""

import itertools
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from sharded import LIMITS, SETTINGS, alone, make_problem, on_ranks, worst_difference
from test_context_parallel import low_precision
from tolerance import assert_within_rule
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import moda_ext
from moda_ext._ops import backend
from moda_ext.distributed import SequenceShards, context_parallel_attention


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring from other ranks."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.bytes = world, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2]
        if function.namespace == "c10d":
            whole = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "alltoall_base_": 0}
            if name in whole:
                tensor = args[whole[name]]
                self.bytes += tensor.nbytes * (self.world - 1) // self.world
            elif name == "recv_":
                self.bytes += sum(tensor.nbytes for tensor in args[0])
            else:
                assert name == "send", f"{name} is not counted"
        return function(*args, **(kwargs or {}))


def check_ring(meshes: tuple, dtype: torch.dtype) -> None:
    for mesh in meshes:
        for setting, keywords in SETTINGS.items():
            problem = make_problem(**keywords).to(dtype)
            expected = alone(problem)
            for zigzag in (False, True):
                error, name = worst_difference(on_ranks(problem, SequenceShards(mesh, zigzag), "ring"), expected)
                assert error <= LIMITS[dtype], f"{setting}, zigzag={zigzag}: {name} differs by {error:.1e}"


def check_ring_in_bfloat16(mesh) -> None:
    for setting in ("defaults", "mixed", "split", "no aligner", "not causal, full"):
        problem, oracle, dense = low_precision(SETTINGS[setting])
        for name, result in on_ranks(problem, SequenceShards(mesh), "ring").items():
            assert_within_rule(f"ring, {setting}: {name}", result, oracle[name], dense[name])


def check_other_backends(mesh) -> None:
    from torch.nn.attention import flex_attention

    flex_attention._validate_device = lambda *tensors: None  # as the fixture flex does
    backend.FLEX_IS_WHOLE_ON_CPU = True
    problem = make_problem(**SETTINGS["mixed"])
    expected = alone(problem)
    for name in ("flex", "reference"):
        with moda_ext.use_backend(name):
            for scheme in ("ring", "regather"):
                error, of = worst_difference(on_ranks(problem, SequenceShards(mesh), scheme), expected)
                assert error <= LIMITS[torch.float64], f"{scheme} on {name}: {of} differs by {error:.1e}"


def check_large_biases(mesh) -> None:
    """What all biases of a row and its sink have in common changes nothing, however large."""
    problem = make_problem(aligner=None, mask={"variant": "fix", "length": 60, "learn_prior": True})
    problem = problem.to(torch.float32)
    problem.mask.base.data += 2.0**20
    problem.mask.prior.data += 2.0**20
    error, name = worst_difference(on_ranks(problem, SequenceShards(mesh), "ring"), alone(problem))
    assert error <= LIMITS[torch.float32], f"{name} differs by {error:.1e}"


def check_volumes(mesh) -> None:
    """The table of docs/distributed.md, for out alone."""
    batch, tokens, heads, kv_heads, size, modalities, world = 2, 64, 8, 4, 16, 2, mesh.size()
    problem = make_problem(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=size)
    for dtype, zigzag in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        low, shards = problem.to(dtype, torch.float32), SequenceShards(mesh, zigzag)
        number, of_sum = dtype.itemsize, 4
        gram = (world - 1) * (2 if zigzag else 1) * batch * kv_heads * modalities * size**2 * of_sum
        keys = 2 * batch * tokens * kv_heads * size * (world - 1) // world
        turned = batch * tokens * size * (2 * heads + 2 * kv_heads) * (world - 1) // world**2
        again = keys * number + gram, keys * (number + of_sum) + gram
        formulas = {
            "regather": again,
            "allgather": (keys * number + gram, keys * of_sum + gram),
            "ring": again,
            "ulysses": (turned * number, turned * number),
        }
        for scheme, formula in formulas.items():
            leaves = [shards.shard(t, 2).requires_grad_() for t in low.tokens]
            with Received(world) as forward:
                out = context_parallel_attention(
                    low.aligner, low.mask, *leaves, low.modality, shards=shards, scheme=scheme
                )
            with Received(world) as backward:
                out.sum().backward()
            assert (forward.bytes, backward.bytes) == formula, (scheme, dtype, zigzag)


def rank() -> None:
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"]
    everyone = init_device_mesh("cpu", (4,))
    assert (pairs.size(), everyone.size()) == (2, 4)
    check_ring((pairs, everyone), torch.float64)
    check_ring((pairs, everyone), torch.float32)
    check_ring_in_bfloat16(everyone)
    check_other_backends(pairs)
    check_large_biases(everyone)
    check_volumes(everyone)
    for scheme in ("regather", "allgather", "ulysses"):  # by gloo
        problem = make_problem(**SETTINGS["mixed"])
        error, name = worst_difference(on_ranks(problem, SequenceShards(everyone), scheme), alone(problem))
        assert error <= LIMITS[torch.float64], f"{scheme}: {name} differs by {error:.1e}"
    dist.barrier()


def test_ring_and_volumes_in_four_processes(tmp_path):
    run_ranks(rank, 4, tmp_path / "rendezvous")


def fail_on_rank_1() -> None:
    shards = SequenceShards(init_device_mesh("cpu", (2,)))
    if shards.rank == 1:
        raise RuntimeError("out of luck")
    try:
        shards.gather(torch.zeros(2), 0)
    except RuntimeError:
        time.sleep(20)  # the other's error is to be seen first, also on a machine that is busy
        raise


def test_a_rank_that_dies_ends_the_others(tmp_path):
    begin = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="out of luck"):
        run_ranks(fail_on_rank_1, 2, tmp_path / "rendezvous")
    assert time.monotonic() - begin < 60
