"""Context parallelism on ranks that are threads: layouts, three schemes, what is kept, what is refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from rank_threads import run_threads
from sharded import LIMITS, SETTINGS, alone, make_problem, on_ranks, worst_difference
from tolerance import assert_within_rule
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import moda_ext
from moda_ext.distributed import SequenceShards, context_parallel_attention
from moda_ext.mask import ModularMask
from moda_ext.nn.attention import Tokens, align_and_attend

pytestmark = pytest.mark.filterwarnings("ignore:.*Device mesh:UserWarning")

SCHEMES = ("regather", "allgather", "ulysses")


def shards_of_all(zigzag: bool = True) -> SequenceShards:
    return SequenceShards(DeviceMesh("cpu", list(range(dist.get_world_size()))), zigzag)


def hold_to_one_process(setting: dict, dtype: torch.dtype, world: int, schemes=SCHEMES) -> None:
    problem = make_problem(**setting).to(dtype)
    expected = alone(problem)

    def rank() -> None:
        own = problem.to(dtype)  # ranks are threads: gradients of their own
        for scheme in schemes:
            for zigzag in (False, True):
                error, name = worst_difference(on_ranks(own, shards_of_all(zigzag), scheme), expected)
                assert error <= LIMITS[dtype], f"{scheme}, zigzag={zigzag}: {name} differs by {error:.1e}"

    run_threads(rank, world)


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_one_process(setting, world):
    hold_to_one_process(SETTINGS[setting], torch.float64, world)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_one_process_in_float32(setting):
    hold_to_one_process(SETTINGS[setting], torch.float32, 4)


def test_equals_one_process_without_kernels():
    with moda_ext.use_backend("reference"):
        hold_to_one_process(SETTINGS["mixed"], torch.float64, 2)


def low_precision(setting: dict) -> tuple:
    """A problem in bfloat16 with weights in float32; the float64 oracle, and what dense PyTorch makes of it."""
    problem = make_problem(tokens=64, **setting).to(torch.bfloat16, torch.float32)
    with moda_ext.use_backend("reference"):
        return problem, alone(problem.to(torch.float64)), alone(problem)


@pytest.mark.parametrize("setting", ("defaults", "mixed", "split", "no aligner", "not causal, full"))
def test_bfloat16_is_within_its_rule(setting):
    problem, oracle, dense = low_precision(SETTINGS[setting])

    def rank() -> None:
        own = problem.to(torch.bfloat16, torch.float32)
        for scheme in SCHEMES:
            for name, result in on_ranks(own, shards_of_all(), scheme).items():
                assert_within_rule(f"{scheme}: {name}", result, oracle[name], dense[name])

    run_threads(rank, 4)


def test_without_gradients_the_result_is_the_same():
    problem = make_problem()
    expected = alone(problem)["out"]

    def rank() -> None:
        shards = shards_of_all()
        tokens = [shards.shard(t, 2) for t in problem.tokens]
        for scheme in SCHEMES:
            with torch.no_grad():
                out = context_parallel_attention(
                    problem.aligner, problem.mask, *tokens, problem.modality, shards=shards, scheme=scheme
                )
            assert not out.requires_grad
            assert (shards.gather(out, 2) - expected).abs().max() <= 1e-12

    run_threads(rank, 2)


def test_autocast_casts_tokens():
    problem = make_problem().to(torch.float32)
    low = problem.to(torch.bfloat16, torch.float32)

    def rank() -> None:
        shards = shards_of_all()
        for scheme in SCHEMES:
            out, explicit = (
                context_parallel_attention(
                    p.aligner, p.mask, *(shards.shard(t, 2) for t in p.tokens), p.modality, shards=shards, scheme=scheme
                )
                for p in (problem, low)
            )
            assert out.dtype == explicit.dtype == torch.bfloat16
            assert torch.equal(out, explicit)

    def under_autocast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rank()

    run_threads(under_autocast, 2)


def test_gradient_checkpointing():
    problem = make_problem()
    expected = alone(problem)

    def rank() -> None:
        own, shards = problem.to(torch.float64), shards_of_all()
        for scheme in SCHEMES:
            leaves = [shards.shard(t, 2).requires_grad_() for t in own.tokens]
            out, mass = checkpoint(
                lambda *tokens, scheme=scheme: context_parallel_attention(
                    own.aligner, own.mask, *tokens, own.modality, shards=shards, scheme=scheme, return_mass=True
                ),
                *leaves,
                use_reentrant=False,
            )
            ((out * shards.shard(own.grad_out, 2)).sum() + (mass * shards.shard(own.grad_mass, 2)).sum()).backward()
            for leaf, name in zip(leaves, ("query", "key", "value"), strict=True):
                assert (shards.gather(leaf.grad, 2) - expected[f"grad_{name}"]).abs().max() <= 1e-11, (scheme, name)

    run_threads(rank, 2)


def test_regather_is_one_graph():
    """With its collectives, forward and backward. One rank: what compiles does not know of threads."""
    problem = make_problem(**SETTINGS["mixed"])
    expected = alone(problem)
    compiled = torch.compile(context_parallel_attention, fullgraph=True, backend="aot_eager")

    def rank() -> None:
        error, name = worst_difference(on_ranks(problem, shards_of_all(), "regather", compiled), expected)
        assert error <= LIMITS[torch.float64], f"{name} differs by {error:.1e}"

    run_threads(rank, 1)


def kept_bytes(call) -> int:
    """Memory that autograd keeps for the backward pass of a call."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


def test_regather_keeps_a_rank_s_share():
    """At 4096 tokens on 4 ranks at most 0.3 of what one process keeps."""
    problem = make_problem(tokens=4096, heads=4, kv_heads=2, head_dim=32).to(torch.float32)
    query, key, value = (t.clone().requires_grad_() for t in problem.tokens)
    modality = problem.modality.int()
    tokens = Tokens(query, key, value, modality, modality, key, modality, 0.25)
    whole = kept_bytes(lambda: align_and_attend(problem.aligner, problem.mask, tokens, 2))
    kept = {}

    def rank() -> None:
        shards = shards_of_all()
        leaves = [shards.shard(t, 2).requires_grad_() for t in problem.tokens]
        modules = problem.aligner, problem.mask
        kept[shards.rank] = kept_bytes(
            lambda: context_parallel_attention(*modules, *leaves, problem.modality, shards=shards)
        )

    run_threads(rank, 4)
    assert len(kept) == 4
    assert all(0 < own <= 0.3 * whole for own in kept.values()), (kept, whole)


# SequenceShards


@pytest.mark.parametrize(("zigzag", "expected"), [(True, [0, 1, 6, 7]), (False, [0, 1, 2, 3])])
def test_who_holds_which_tokens(zigzag, expected):
    def rank() -> None:
        shards, x = shards_of_all(zigzag), torch.arange(8)
        own = shards.shard(x, 0)
        if shards.rank == 0:
            assert own.tolist() == expected
        assert torch.equal(shards.gather(own, 0), x)
        wide = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(shards.gather(shards.shard(wide, -2), 1), wide)
        assert torch.equal(copy.deepcopy(shards).gather(own, 0), x)

    run_threads(rank, 2)


def test_the_gradient_of_gather_is_the_sum_over_ranks():
    def rank() -> None:
        shards = shards_of_all()
        x = torch.arange(16.0)
        own = shards.shard(x, 0).requires_grad_()
        (shards.gather(own, 0) * x * (shards.rank + 1)).sum().backward()
        assert torch.equal(own.grad, 10 * shards.shard(x, 0))  # 1 + 2 + 3 + 4

    run_threads(rank, 4)


def refused(call, error, message) -> None:
    def rank() -> None:
        with pytest.raises(error, match=message):
            call()

    run_threads(rank, 2)


@pytest.mark.parametrize(
    ("zigzag", "length", "message"), [(True, 7, "of 4 .2 chunks.* pad with 1 "), (False, 7, "of 2 ")]
)
def test_lengths_that_cannot_be_cut(zigzag, length, message):
    refused(
        lambda: shards_of_all(zigzag).shard(torch.zeros(1, length), 1),
        ValueError,
        f"^SequenceShards.shard: x.*{message}",
    )


def test_meshes_that_are_none():
    refused(
        lambda: SequenceShards(dist.group.WORLD),
        TypeError,
        "^SequenceShards: mesh must be a torch.distributed.DeviceMesh, got",
    )
    refused(
        lambda: SequenceShards(DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("dp", "cp"))),
        ValueError,
        "^SequenceShards: mesh must have one dimension, got 2",
    )


REFUSED = {
    "scheme": ({"scheme": "star"}, {}, "scheme must be one of .*'regather'.*got 'star'"),
    "shards": ({"shards": None}, {}, "shards must be a SequenceShards, got NoneType"),
    "own ids": ({"modality": torch.zeros(2, 24).int()}, {}, r"modality must have shape \(2, 48\).*got \(2, 24\)"),
    "modalities": ({"num_modalities": 3}, {}, "num_modalities must be that of the aligner, 2, got 3"),
    "strange ids": ({"modality": torch.full((2, 48), 2)}, {}, "modality must hold -1 for padding, or 0 to 1"),
    "full scope": ({}, {"aligner": {"scope": "full"}}, "aligner scope 'full' in causal attention"),
    "no context": ({"context": None}, {"aligner": {"scope": "context"}}, "context belongs to.*'context'"),
    "context": ({"context": torch.ones(2, 48).bool()}, {}, "context belongs to.*got scope='causal'"),
    "condition": ({"aligner": None}, {}, "mask variant 'attn' is conditioned on"),
    "heads": ({"scheme": "ulysses"}, {"heads": 3, "kv_heads": 3, "mask": None}, "scheme 'ulysses' needs .*got 3 and 3"),
    "another mask": (
        {"scheme": "ulysses", "mask": ModularMask(16, variant="fix")},
        {"aligner": None, "mask": None},
        "scheme 'ulysses' cuts the heads of the mask, which must be those of query, 8, got .16.",
    ),
    "scale": ({"scale": float("nan")}, {}, "scale must be finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    changes, setting, message = REFUSED[case]
    problem = make_problem(**setting)

    def call() -> None:
        shards = shards_of_all()
        tokens = (shards.shard(t, 2) for t in problem.tokens)
        given = dict(zip(("query", "key", "value"), tokens, strict=True))
        given |= {"aligner": problem.aligner, "mask": problem.mask, "modality": problem.modality, "shards": shards}
        context_parallel_attention(**{**given, "context": problem.context, **changes})

    refused(call, (ValueError, TypeError), f"^context_parallel_attention: {message}")
