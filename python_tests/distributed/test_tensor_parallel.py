"""The layer with its heads over several processes computes what it computes in one."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from parallel import EXACT, SINGLE, assert_equal_gradients, assert_replicas_equal, error, full, randomize_moda
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from moda_ext.attention import AttentionState, ModularDuplexAttention
from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter
from moda_ext.distributed import SplitHeads, split_heads
from moda_ext.distributed import heads as heads_module

EMBED, HEADS, KV_HEADS, TOKENS = 64, 8, 4, 14
LEARNED = {"base": -1.0, "learn_base": True, "learn_decay": True, "length": 40}
HIDDEN = torch.tensor([[0.0, 1.5], [-torch.inf, 0.5]]) * torch.arange(1.0, 9.0)[:, None, None]  # no text for images
SETTINGS = {
    "all": {"mask": LEARNED},
    "three modalities": {"mask": LEARNED, "num_modalities": 3},
    "add": {"aligner": {"fusion": "add"}},
    "split softmax": {"mask": {"softmax": "split", "base": -1.0}},
    "learned sink": {"mask": {"variant": "learned", "base": 0.0}},
    "buffers alone": {"aligner": False, "mask": {"variant": "fix", "prior": HIDDEN, "base": -1.0}},
    "heads of their own": {"mask": {"base": torch.arange(8.0) - 4, "decay": torch.arange(1.0, 9.0) / 4}},
    "no prior": {"mask": {"variant": "inf"}},
    "aligner alone": {"mask": False},
    "nothing": {"aligner": False, "mask": False},
    "not causal": {"is_causal": False, "mask": LEARNED},
}
PADDING = {"none": (0, 0), "left": (4, 0), "right": (0, 4), "mixed": (2, 3)}  # of the second row


def make(settings, dtype=torch.float64):
    torch.manual_seed(0)
    layer = ModularDuplexAttention(EMBED, HEADS, KV_HEADS, bias=True, **settings).to(dtype)
    return randomize_moda(layer)


def make_inputs(padding="mixed", num_modalities=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, EMBED, generator=generator, dtype=torch.float64).to(dtype)
    modality = torch.randint(0, num_modalities, (2, TOKENS), generator=generator, dtype=torch.int32)
    left, right = PADDING[padding]
    modality[1, :left], modality[1, TOKENS - right :] = -1, -1
    return x, modality


def projections():
    return {
        "q_proj": ColwiseParallel(),
        "k_proj": ColwiseParallel(),
        "v_proj": ColwiseParallel(),
        "o_proj": RowwiseParallel(),
    }


def tensor_parallel(layer, mesh):
    return split_heads(parallelize_module(layer, mesh, projections()), mesh)


def world_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def own_heads(mass):
    return mass.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def check_layer(settings, padding, dtype, allowed):
    x, modality = make_inputs(padding, settings.get("num_modalities", 2), dtype)
    one, split = make(settings, dtype), tensor_parallel(make(settings, dtype), world_mesh())
    for passes in (1, 2):  # the second time both layers have gradients already
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for layer, own in zip((split, one), inputs, strict=True):
            out, mass = layer(own, modality, return_mass=True)
            balance = AttentionBalanceLoss()(mass, modality, mesh=None if layer is one else world_mesh())
            (out.square().sum() + balance).backward()
            layer.result = out.detach(), mass.detach()
        assert error(split.result[0], one.result[0]) <= allowed
        assert error(split.result[1], own_heads(one.result[1])) <= allowed
        assert error(inputs[0].grad, inputs[1].grad) <= allowed, passes
        assert_equal_gradients(split, one, allowed)
    assert_replicas_equal([p.grad for name, p in split.named_parameters() if name.startswith(("aligner", "mask"))])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_two_ranks_compute_what_one_does(two_ranks, settings):
    two_ranks.run(check_layer, settings, "mixed", torch.float64, EXACT)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("dtype, allowed", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=["double", "float"])
def test_four_ranks_compute_what_one_does(four_ranks, padding, dtype, allowed):
    four_ranks.run(check_layer, SETTINGS["all"], padding, dtype, allowed)


def check_low_precision():
    """In bfloat16 two processes are no farther from float64 than one is."""
    errors = {}
    results = {}
    for name, dtype in (("exact", torch.float64), ("one", torch.bfloat16), ("split", torch.bfloat16)):
        layer = make(SETTINGS["all"]).to(torch.bfloat16).to(dtype)
        layer = tensor_parallel(layer, world_mesh()) if name == "split" else layer
        x, modality = make_inputs(dtype=torch.bfloat16)
        out, mass = layer(x.to(dtype), modality, return_mass=True)
        out.square().sum().backward()
        mass = mass if name == "split" else own_heads(mass)
        grads = {n: full(p.grad).double() for n, p in layer.named_parameters() if n.startswith(("aligner", "mask"))}
        results[name] = {"out": out.detach().double(), "mass": mass.detach().double(), **grads}
    for name in ("one", "split"):
        errors[name] = {key: error(value, results["exact"][key]) for key, value in results[name].items()}
    for key, own in errors["split"].items():
        assert own <= 2 * errors["one"][key] + 2**-8, f"{key}: {own}, one process {errors['one'][key]}"


def test_low_precision(two_ranks):
    two_ranks.run(check_low_precision)


def check_training():
    """Accumulated and recomputed gradients, then steps of AdamW: the processes' copies stay the same bit for bit."""
    x, modality = make_inputs()
    one, split = make(SETTINGS["all"]), tensor_parallel(make(SETTINGS["all"]), world_mesh())
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-2, foreach=False) for layer in (split, one)]
    for reentrant in (False, True, False):
        for layer, optimizer in zip((split, one), optimizers, strict=True):
            optimizer.zero_grad()
            for row in (0, 1):
                own = x[row : row + 1].clone().requires_grad_()
                out = checkpoint(layer, own, modality[row : row + 1], use_reentrant=reentrant)
                out.square().sum().backward()
        assert_equal_gradients(split, one, 1e-9)  # Adam divides rounding by rounding
        for optimizer in optimizers:
            optimizer.step()
    parameters = dict(split.named_parameters())
    assert_replicas_equal([p for name, p in parameters.items() if name.startswith(("aligner", "mask"))])
    assert max(error(p, q) for p, q in zip(parameters.values(), one.parameters(), strict=True)) < 1e-8


def test_training_keeps_replicas_equal(two_ranks):
    two_ranks.run(check_training)


def check_one_all_reduce():
    split, (x, modality) = tensor_parallel(make(SETTINGS["all"]), world_mesh()), make_inputs()
    sizes, all_reduce = [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda tensor, **kw: (sizes.append(tensor.numel()), all_reduce(tensor, **kw)))
        with torch.no_grad():
            split(x, modality)
        assert sizes == []
        split(x, modality).sum().backward()
    assert sizes == [sum(p.numel() for part in (split.aligner, split.mask) for p in part.parameters())]
    split.requires_grad_(False)
    split.mask.prior.requires_grad_(True)
    split.zero_grad()
    split(x, modality).sum().backward()
    assert split.mask.prior.grad.abs().sum() > 0 and split.aligner.a1.grad is None


def test_gradients_of_a_layer_take_one_all_reduce(two_ranks):
    two_ranks.run(check_one_all_reduce)


def check_unused_parameters():
    """A parameter that has no part in a loss has no gradient, as in one process; nobody waits for it."""
    layer = heads_module.HeadSplit(world_mesh())
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    used, _ = heads_module._SumGradients.apply(layer.mesh.get_group(), a, b)
    used.sum().backward()
    assert torch.equal(a.grad, torch.full((3,), 2.0)) and b.grad is None
    low = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    (heads_module._SumGradients.apply(layer.mesh.get_group(), low)[0] * (1 + 2**-7)).sum().backward()
    assert low.grad.dtype == torch.bfloat16 and torch.equal(low.grad.float(), torch.full((3,), 2 * (1 + 2**-7)))


def test_unused_parameters_have_no_gradient(two_ranks):
    two_ranks.run(check_unused_parameters)


def check_decoding():
    x, modality = make_inputs("left")
    one, split = make(SETTINGS["all"]), tensor_parallel(make(SETTINGS["all"]), world_mesh())
    states = AttentionState(), AttentionState()
    for begin, end in ((0, 9), (9, 10), (10, 14)):
        piece = slice(begin, end)
        with torch.no_grad():
            results = [
                layer(x[:, piece], modality[:, piece], state=state)
                for layer, state in zip((split, one), states, strict=True)
            ]
        assert error(*results) <= EXACT
    assert states[0].key.shape[1] * dist.get_world_size() == states[1].key.shape[1]


def test_decoding(two_ranks):
    two_ranks.run(check_decoding)


def check_copies_and_values():
    """Fresh values differ by process; those of the first are taken. A copy has parameters of its own."""
    torch.manual_seed(dist.get_rank())
    layer = ModularDuplexAttention(EMBED, HEADS, KV_HEADS, mask={"prior": torch.randn(HEADS, 2, 2)})
    split_heads(layer, world_mesh())
    tensors = [*layer.aligner.parameters(), *layer.mask.parameters(), *layer.mask.buffers()]
    assert_replicas_equal(tensors)
    assert tensors[0].std() > 0
    x, modality = make_inputs()
    split = tensor_parallel(make(SETTINGS["all"]), world_mesh())
    other = copy.deepcopy(split)
    assert other.head_split is split.head_split
    expected = split(x, modality)
    with torch.no_grad():
        other.mask.prior += 1.0
        other.aligner.b1 += 1.0
    assert torch.equal(split(x, modality), expected)
    changed = other(x, modality)
    assert not torch.equal(changed, expected)
    changed.sum().backward()
    assert other.mask.prior.grad is not None and split.mask.prior.grad is None
    assert split.mask.num_heads == HEADS and split.mask.prior.shape[0] == HEADS  # whole again after each pass


def test_fresh_values_and_copies(two_ranks):
    two_ranks.run(check_copies_and_values)


def check_compiled():
    """In one graph, whose backward pass has the all-reduce; new values are seen."""
    x, modality = make_inputs()
    one, split = make(SETTINGS["all"]), tensor_parallel(make(SETTINGS["all"]), world_mesh())
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for layer in (compiled, one):
            layer(x, modality).square().sum().backward()
        assert_equal_gradients(split, one)
        with torch.no_grad():
            for layer in (split, one):
                layer.mask.prior += 1.0
            assert error(compiled(x, modality), one(x, modality)) <= EXACT


def test_compiled(two_ranks):
    two_ranks.run(check_compiled, patience=120)


class Block(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(EMBED, dtype=dtype), make(SETTINGS["all"], dtype)

    def forward(self, x, modality):
        return x + self.attention(self.norm(x), modality)


def check_style():
    plan = {"attention": SplitHeads(), **{f"attention.{name}": style for name, style in projections().items()}}
    one, split, (x, modality) = Block(), parallelize_module(Block(), world_mesh(), plan), make_inputs()
    for block in (split, one):
        block.out = block(x, modality)
        block.out.square().sum().backward()
    assert error(split.out, one.out) <= EXACT
    assert_equal_gradients(split, one)


def test_the_parallel_style(two_ranks):
    two_ranks.run(check_style)


def check_meter():
    x, modality = make_inputs()
    results = []
    one = nn.Sequential(make(SETTINGS["all"]), make(SETTINGS["split softmax"]))
    for parallel in (True, False):
        layers = copy.deepcopy(one)
        if parallel:
            for layer in layers:
                tensor_parallel(layer, world_mesh())
        with torch.no_grad(), AttentionMeter(layers, token_scores=2) as meter:
            for layer in layers:
                layer(x, modality)
        results.append(meter.result())
    split, whole = results
    for figure in ("self", "cross", "score"):
        own, expected = (r.figure(figure, per_head=True) for r in (split, whole))
        assert own.shape[1] == HEADS and error(own.nan_to_num(), expected.nan_to_num()) <= EXACT
    for own, expected in zip(split.token_scores, whole.token_scores, strict=True):
        assert error(own.scores, expected.scores) <= SINGLE


def test_the_meter_measures_all_heads(two_ranks):
    two_ranks.run(check_meter)


def check_sharded():
    """Tensor parallelism in two processes, FSDP2 in two: each has a row of the batch, and gradients are means."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one, split = make(SETTINGS["all"]), tensor_parallel(make(SETTINGS["all"]), mesh["tp"])
    fully_shard(split, mesh=mesh["dp"])
    x, modality = make_inputs()
    row = slice(mesh["dp"].get_local_rank(), mesh["dp"].get_local_rank() + 1)
    expected = one(x, modality)
    expected.square().sum().backward()
    for _ in range(2):
        split.zero_grad()
        out = split(x[row], modality[row])
        assert error(out, expected[row]) <= EXACT
        out.square().sum().backward()
        assert_equal_gradients(split, one, scale=2.0)
    assert all(full(p).shape == q.shape for p, q in zip(split.parameters(), one.parameters(), strict=True))
    parts = tensor_parallel(make(SETTINGS["all"]), mesh["tp"])
    fully_shard(parts.aligner, mesh=mesh["dp"])
    with pytest.raises(
        RuntimeError, match="aligner or mask .* are sharded for themselves. Call fully_shard on the lay"
    ):
        parts(x[row], modality[row])


def check_flat_parameters():
    """FullyShardedDataParallel makes plain tensors of them: no gradient would be summed, and the copies drift apart."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    flattened = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    x, modality = make_inputs()
    for settings in ({"mask": False}, {"mask": {"variant": "fix"}}):
        split = flattened(tensor_parallel(make(settings), mesh["tp"]), device_mesh=mesh["dp"])
        with torch.no_grad():
            assert split(x, modality).isfinite().all()
        with pytest.raises(RuntimeError, match="have no parameters in its forward pass"):
            split(x, modality)


def test_with_flat_parameters(two_ranks):
    two_ranks.run(check_flat_parameters)


def test_with_sharded_parameters(four_ranks):
    four_ranks.run(check_sharded)


def check_errors():
    mesh, layer = world_mesh(), make({})
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(TypeError, match="split_heads: mesh must be a torch.distributed.DeviceMesh, got ProcessGroup"):
        split_heads(layer, dist.group.WORLD)
    with pytest.raises(ValueError, match='split_heads: mesh must have one dimension, got 2; .* such as mesh."tp".'):
        split_heads(layer, two)
    with pytest.raises(ValueError, match="split_heads: module must be a MODA layer or have some in it, got Linear"):
        split_heads(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="split_heads: mesh must divide the 3 heads of a layer, got 2"):
        split_heads(ModularDuplexAttention(48, 3, 3), mesh)
    with pytest.raises(ValueError, match="split_heads: mesh must divide the 1 key/value heads of a layer, got 2"):
        split_heads(ModularDuplexAttention(64, 4, 1), mesh)
    assert split_heads(layer, mesh) is layer
    with pytest.raises(ValueError, match="split_heads: the heads of a layer in module are split already"):
        split_heads(nn.Sequential(layer), mesh)
    x, modality = make_inputs()
    with pytest.raises(
        RuntimeError, match="made 8 query heads and 4 key/value heads, .* computes with 4 and 2 of them"
    ):
        layer(x, modality)  # its projections are whole
    keys = make({})
    parallelize_module(keys, mesh, {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()})
    with pytest.raises(
        RuntimeError, match="made 4 query heads and 4 key/value heads, .* computes with 4 and 2 of them"
    ):
        split_heads(keys, mesh)(x, modality)


def test_errors_name_the_argument(two_ranks):
    two_ranks.run(check_errors)
