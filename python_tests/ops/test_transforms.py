"""The operators under PyTorch's transformations: opcheck, compile, export, func, vmap, autocast, checkpoint."""

import pytest
import torch
from problems import make_problem
from tolerance import assert_close
from torch.utils.checkpoint import checkpoint

import moda_ext
from moda_ext import attention, reference
from moda_ext._ops import backend as choices
from moda_ext.alignment import causal_gram_projection, duplex_query_views, modality_gram
from moda_ext.attention import (
    duplex_attention,
    modular_attention,
    paged_duplex_attention,
    paged_modular_attention,
)

pytestmark = pytest.mark.usefixtures("native")


def inputs(device, dtype=torch.float32, **changes):
    """(query, key, value, modality_bias, sink) leaves, and the modalities they go with."""
    keywords = {"heads": 4, "kv_heads": 2, "queries": 6, "keys": 9, "num_modalities": 3, "padding": "left", **changes}
    problem = make_problem(dtype=dtype, device=device, **keywords)
    return tuple(problem.leaves().values()), problem.key_modality


def call(query, key, value, modality_bias, sink, key_modality):
    return attention.modular_attention(
        query,
        key,
        value,
        key_modality,
        num_modalities=3,
        modality_bias=modality_bias,
        sink=sink,
        is_causal=True,
        return_lse=True,
        return_mass=True,
    )


def loss(*arguments):
    """A scalar that weighs every number of every result differently."""
    return sum((r * torch.linspace(-1, 1, r.numel(), device=r.device).view_as(r).to(r)).sum() for r in call(*arguments))


def detached(tensors):
    return tuple(t.detach() for t in tensors)


def all_close(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert_close(result, other)


# opcheck: schema, fake kernels (also strides), autograd registration, AOT dispatch with dynamic shapes.


def varlen_inputs(device):
    modality = torch.tensor([0, 1, 1, -1, 2, 0, 0, 2, 1], device=device, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 4, 9], device=device, dtype=torch.int32)
    query, key, value = (torch.randn(9, h, 16, device=device, requires_grad=True) for h in (4, 2, 2))
    bias = torch.randn(9, 4, 3, device=device, requires_grad=True)
    sink = torch.randn(9, 4, device=device, requires_grad=True)
    return (query, key, value, modality, cu_seqlens, cu_seqlens), (bias, sink)


def operator_calls(device):
    """(operator, arguments) of every registered operator, in several layouts."""
    ops = torch.ops.moda_ext
    calls = {}
    for name, layout, changes in (
        ("contiguous", "contiguous", {}),
        ("tokens first", "tokens first", {}),
        ("fused", "fused", {"views": True}),
        ("no bias", "expanded heads", {"bias": None, "sink": None}),
        ("bfloat16", "contiguous", {"dtype": torch.bfloat16}),
        ("no keys", "contiguous", {"keys": 0}),
    ):
        dtype = changes.pop("dtype", torch.float32)
        leaves, modality = inputs(device, dtype, layouts=(layout,) * 3, **changes)
        query, key, value, *rest = leaves
        bias, sink = (t.detach().float().requires_grad_() for t in rest) if rest else (None, None)
        arguments = (query, key, value, modality.int(), bias, sink)
        calls[f"modular_attention {name}"] = (ops.modular_attention.default, (*arguments, 3, True, 0.25))
        results = tuple(r.detach() for r in ops.modular_attention(*arguments, 3, True, 0.25))
        plain = tuple(a if a is None else a.detach() for a in arguments)
        needs = (True,) * 3 + (bias is not None,) * 2
        calls[f"modular_attention_backward {name}"] = (
            ops.modular_attention_backward.default,
            (*results[:3], *plain, *results, 3, True, 0.25, *needs, True),
        )
    calls["modular_attention_backward partly"] = (
        ops.modular_attention_backward.default,
        (None, results[1], None, *plain, *results, 3, True, 0.25, True, False, False, False, True, True),
    )
    calls["modular_attention_backward of a part"] = (
        ops.modular_attention_backward.default,
        (*results[:3], *plain, *results, 3, True, 0.25, *needs, False),
    )
    tensors, (bias, sink) = varlen_inputs(device)
    options = (5, 5, 3, True, 0.25)
    calls["modular_attention_varlen"] = (ops.modular_attention_varlen.default, (*tensors, bias, sink, *options))
    results = tuple(r.detach() for r in ops.modular_attention_varlen(*tensors, bias, sink, *options))
    plain = tuple(t.detach() for t in (*tensors, bias, sink))
    calls["modular_attention_varlen_backward"] = (
        ops.modular_attention_varlen_backward.default,
        (*results[:3], *plain, *results, *options, True, True, True, True, True),
    )
    return calls


def test_opcheck(device):
    for name, (op, arguments) in operator_calls(device).items():
        outcome = torch.library.opcheck(op, arguments, raise_exception=False)
        assert all(result == "SUCCESS" for result in outcome.values()), (name, outcome)


@pytest.mark.parametrize("layout", ("contiguous", "tokens first", "fused", "expanded heads", "strided last"))
@pytest.mark.parametrize("views", (False, True))
def test_results_have_the_layout_of_their_inputs(device, layout, views):
    """Tokens-first inputs give tokens-first results, so the projection that follows needs no copy."""
    leaves, modality = inputs(device, views=views, layouts=(layout,) * 3)
    out, lse, mass = call(*leaves, modality)
    grads = torch.autograd.grad(out.sum(), leaves)
    tokens_first = layout in ("tokens first", "fused", "expanded heads")
    assert lse.is_contiguous()
    assert mass.is_contiguous()
    for result in (out, *grads[:3]):
        assert result.transpose(-2, -3).is_contiguous() == tokens_first
        assert result.is_contiguous() != tokens_first


# torch.compile


@pytest.mark.parametrize("dynamic", (None, True), ids=("static first", "dynamic"))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_without_graph_breaks(device, dynamic, backend):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
    for changes in ({}, {"queries": 7, "keys": 13}, {"batch": 3, "queries": 11, "keys": 20}):
        leaves, modality = inputs(device, **changes)
        results, expected = compiled(*leaves, modality), call(*leaves, modality)
        all_close(results, expected)
        cotangents = [torch.randn_like(r) for r in results]
        all_close(torch.autograd.grad(results, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents))


def test_compile_does_not_recompile_for_every_length(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (9, 11, 20, 33, 47):
        leaves, modality = inputs(device, queries=length, keys=length)
        compiled(*leaves, modality)
    assert counter.frame_count <= 2


def test_compile_varlen_and_sink(device):
    torch._dynamo.reset()
    tensors, (bias, sink) = varlen_inputs(device)

    def function(decay, base, *tensors):
        per_head = attention.pseudo_score_sink(9, 20, decay, base=base)  # (4, 9)
        return attention.modular_attention_varlen(
            *tensors, 5, 5, num_modalities=3, modality_bias=bias, sink=per_head.mT, is_causal=True, return_mass=True
        )

    decay, base = (torch.rand(4, device=device, requires_grad=True) for _ in range(2))
    leaves = (decay, base, *tensors[:3])
    results, expected = torch.compile(function, fullgraph=True)(decay, base, *tensors), function(decay, base, *tensors)
    all_close(results, expected)
    all_close(*(torch.autograd.grad(r[0].sum() + r[1].square().sum(), leaves) for r in (results, expected)))


def test_compile_sink_of_numbers(device):
    torch._dynamo.reset()
    compiled = torch.compile(attention.pseudo_score_sink, fullgraph=True, dynamic=True)
    for rows, decay in ((6, 0.4), (9, 0.3)):
        all_close(
            [compiled(rows, 20, decay, device=device)], [attention.pseudo_score_sink(rows, 20, decay, device=device)]
        )


def test_compile_of_func_transforms(device):
    torch._dynamo.reset()
    leaves, modality = inputs(device)
    leaves = detached(leaves)
    grad = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    all_close(torch.compile(grad, fullgraph=True, backend="aot_eager")(*leaves, modality), grad(*leaves, modality))
    queries = torch.stack([leaves[0], 2 * leaves[0]])
    per_query = torch.vmap(torch.func.grad(loss), in_dims=(0, *(None,) * 5))
    compiled = torch.compile(per_query, fullgraph=True, backend="aot_eager")
    all_close([compiled(queries, *leaves[1:], modality)], [per_query(queries, *leaves[1:], modality)])


def test_func_grad_of_compiled(device):
    torch._dynamo.reset()
    leaves, modality = inputs(device)
    leaves = detached(leaves)
    compiled = torch.compile(loss, backend="aot_eager")
    all_close([torch.func.grad(compiled)(*leaves, modality)], [torch.func.grad(loss)(*leaves, modality)])


# torch.export


class Layer(torch.nn.Module):
    def forward(self, *arguments):
        return call(*arguments)


@pytest.mark.parametrize("strict", (False, True))
def test_export_with_a_dynamic_sequence_length(device, strict):
    leaves, modality = inputs(device, queries=9, keys=9)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = (({2: tokens},) * 5 + ({1: tokens},),)
    program = torch.export.export(Layer(), (*detached(leaves), modality), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "moda_ext.modular_attention.default" in targets
    for length in (2, 21):
        leaves, modality = inputs(device, queries=length, keys=length)
        all_close(program.module()(*leaves, modality), call(*leaves, modality))


# torch.func


def test_func_grad_equals_autograd(device):
    leaves, modality = inputs(device)
    expected = torch.autograd.grad(loss(*leaves, modality), leaves)
    all_close(torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*leaves, modality), expected)


def test_vjp_and_jacrev(device):
    leaves, modality = inputs(device)

    def lse(query):
        return call(query, *leaves[1:], modality)[1].sum((0, 1))

    jacobian = torch.func.jacrev(lse)(leaves[0])
    rows = [torch.autograd.grad(lse(leaves[0])[i], leaves[0])[0] for i in range(6)]
    all_close(jacobian, rows)


BATCHED = {
    "everything": (0, 0, 0, 0, 0, 0),
    "query": (0, None, None, None, None, None),
    "key and modality": (None, 0, None, None, None, 0),
    "bias and sink": (None, None, None, 0, 0, None),
    "inner dimensions": (2, 1, 4, 3, 1, 1),
    "last dimensions": (-1, -1, -1, -1, -1, -1),
}


def batched_inputs(device, in_dims, views=False):
    """Three problems, and their tensors stacked along ``in_dims`` (None: the first problem's serves all)."""
    slices = []
    for seed in range(3):
        leaves, modality = inputs(device, views=views, seed=seed)
        slices.append((*detached(leaves), modality))
    slices = [tuple(slices[0][i] if d is None else s[i] for i, d in enumerate(in_dims)) for s in slices]
    stacked = tuple(
        slices[0][i] if d is None else torch.stack([s[i] for s in slices], dim=d) for i, d in enumerate(in_dims)
    )
    return slices, stacked


@pytest.mark.parametrize("in_dims", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("views", (False, True), ids=("one view", "views"))
def test_vmap_equals_a_loop(device, in_dims, views):
    slices, stacked = batched_inputs(device, in_dims, views)
    expected = [torch.stack(parts) for parts in zip(*(call(*s) for s in slices), strict=True)]
    all_close(torch.vmap(call, in_dims)(*stacked), expected)


@pytest.mark.parametrize("in_dims", BATCHED.values(), ids=BATCHED)
@pytest.mark.parametrize("views", (False, True), ids=("one view", "views"))
def test_vmap_of_grad_equals_a_loop(device, in_dims, views):
    slices, stacked = batched_inputs(device, in_dims, views)
    grad = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    expected = [torch.stack(parts) for parts in zip(*(grad(*s) for s in slices), strict=True)]
    all_close(torch.vmap(grad, in_dims)(*stacked), expected)


@pytest.mark.parametrize("in_dims", BATCHED.values(), ids=BATCHED)
def test_grad_of_vmap_sums_what_is_shared(device, in_dims):
    slices, stacked = batched_inputs(device, in_dims)
    argnums = (0, 1, 2, 3, 4)
    result = torch.func.grad(lambda *a: torch.vmap(loss, in_dims)(*a).sum(), argnums=argnums)(*stacked)
    parts = list(zip(*(torch.func.grad(loss, argnums=argnums)(*s) for s in slices), strict=True))
    expected = [sum(p) if d is None else torch.stack(p, dim=d) for p, d in zip(parts, in_dims, strict=False)]
    all_close(result, expected)


def test_nested_vmap(device):
    _, stacked = batched_inputs(device, BATCHED["query"])
    queries = torch.stack([stacked[0], -stacked[0]])
    rest = stacked[1:]
    for function in (lambda q: call(q, *rest)[0], torch.func.grad(lambda q: loss(q, *rest))):
        result = torch.vmap(torch.vmap(function))(queries)
        assert_close(result[1, 2], function(queries[1, 2]))


def test_vmap_of_varlen_and_of_the_sink(device):
    tensors, (bias, _) = varlen_inputs(device)
    decays = torch.rand(3, 4, device=device)

    def function(query, decay, key):
        sink = attention.pseudo_score_sink(9, 20, decay).mT
        results = attention.modular_attention_varlen(
            query,
            key,
            *tensors[2:],
            5,
            5,
            num_modalities=3,
            modality_bias=bias,
            sink=sink,
            return_lse=True,
            return_mass=True,
        )
        return sum((r * torch.linspace(-1, 1, r.numel(), device=device).view_as(r)).sum() for r in results)

    queries = torch.randn(3, *tensors[0].shape, device=device)
    key = tensors[1].detach()
    grad = torch.func.grad(function, argnums=(0, 1, 2))
    result = torch.vmap(grad, in_dims=(0, 0, None))(queries, decays, key)
    slices = [grad(q, d, key) for q, d in zip(queries, decays, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*slices, strict=True)]
    all_close(result, expected)


def test_functional_call(device):
    leaves, modality = inputs(device)

    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(3, device=device))

        def forward(self):
            return loss(*leaves[:3], self.bias, leaves[4], modality)

    module, other = Biased(), {"bias": torch.tensor([0.5, -1.0, 0.2], device=device)}
    grad = torch.func.grad(lambda p: torch.func.functional_call(module, p, ()))(other)["bias"]
    leaf = other["bias"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(*leaves[:3], leaf, leaves[4], modality), leaf)
    assert_close(grad, expected)


# What is not supported says so.


def test_second_derivatives_are_refused(device):
    leaves, modality = inputs(device)
    (grad,) = torch.autograd.grad(loss(*leaves, modality), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"moda_ext\.reference"):
        torch.autograd.grad(grad.sum(), leaves[0])
    with pytest.raises(NotImplementedError, match=r"moda_ext\.reference"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, *leaves[1:], modality).sum())(leaves[0])


def test_forward_mode_is_refused_and_not_silently_zero(device):
    leaves, modality = inputs(device)
    query = leaves[0].detach()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: call(q, *leaves[1:], modality)[0], (query,), (query,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(query, query), *leaves[1:], modality)


def test_the_reference_has_second_derivatives_and_forward_mode(device):
    leaves, modality = inputs(device, torch.float64)
    query = leaves[0].detach()

    def lse(q):
        results = reference.modular_attention(q, *detached(leaves[1:3]), modality, num_modalities=3, return_lse=True)
        return torch.where(results[1].isfinite(), results[1], 0.0).sum()

    direction = torch.randn_like(query)
    product = torch.func.jvp(torch.func.grad(lse), (query,), (direction,))[1]
    step = 1e-5
    difference = torch.func.grad(lse)(query + step * direction) - torch.func.grad(lse)(query - step * direction)
    torch.testing.assert_close(product, difference / (2 * step), atol=1e-7, rtol=1e-5)


# Autocast and checkpoint


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_casts_query_key_and_value_only(device, dtype):
    leaves, modality = inputs(device)
    with torch.autocast(device, dtype=dtype):
        results = call(*leaves, modality)
        direct = torch.ops.moda_ext.modular_attention(
            *leaves[:3], modality.int(), *leaves[3:], 3, True, leaves[0].shape[-1] ** -0.5
        )
    expected = call(*(t.to(dtype) for t in leaves[:3]), *leaves[3:], modality)
    assert [r.dtype for r in results] == [dtype, torch.float32, torch.float32]
    for i in range(3):
        assert torch.equal(results[i], expected[i])
        assert torch.equal(direct[i], expected[i])
    grads = [torch.autograd.grad(r[0].float().sum() + r[1][..., -1].sum(), leaves) for r in (results, direct, expected)]
    for i, leaf in enumerate(leaves):
        assert grads[0][i].dtype == leaf.dtype
        assert torch.equal(grads[0][i], grads[2][i])
        assert torch.equal(grads[1][i], grads[2][i])


def test_autocast_leaves_float64_alone_and_aligns_mixed_inputs(device):
    leaves, modality = inputs(device, torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert call(*leaves, modality)[0].dtype == torch.float64
    leaves, modality = inputs(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = call(leaves[0].half(), leaves[1], leaves[2].bfloat16(), *leaves[3:], modality)
    assert mixed[0].dtype == torch.bfloat16


def test_backward_inside_an_autocast_region(device):
    leaves, modality = inputs(device)
    expected = torch.autograd.grad(loss(*leaves, modality), leaves)
    value = loss(*leaves, modality)
    with torch.autocast(device, dtype=torch.bfloat16):
        all_close(torch.autograd.grad(value, leaves), expected)


def test_compile_under_autocast(device):
    torch._dynamo.reset()
    leaves, modality = inputs(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves, modality)
        expected = call(*leaves, modality)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint(device, use_reentrant):
    leaves, modality = inputs(device)
    expected = torch.autograd.grad(loss(*leaves, modality), leaves)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(loss, *leaves, modality, use_reentrant=use_reentrant).backward()
    all_close([leaf.grad for leaf in leaves], expected)


def test_inference_mode(device):
    leaves, modality = inputs(device)
    expected = call(*leaves, modality)
    with torch.inference_mode():
        all_close(call(*leaves, modality), expected)


@pytest.mark.parametrize("backend", ["native", "composite", "reference"])
def test_autocast_reaches_no_sum(device, backend, monkeypatch):
    """What is computed of tokens that were cast is what it is of them without autocast, in the dtypes of sums."""
    if backend == "composite":  # on every device, though it is for GPUs
        choose = choices.choose
        composed = ("modality_gram", "causal_gram_projection", "duplex_query_views")
        monkeypatch.setattr(
            choices, "choose", lambda op, *t, **k: choices.COMPOSITE if op in composed else choose(op, *t, **k)
        )
    generator = torch.Generator().manual_seed(0)
    query, key, value = (3 * torch.randn(1, 4, 200, 64, generator=generator).to(device) for _ in range(3))
    weights = [torch.randn(*shape, generator=generator).to(device) for shape in ((2, 64, 4), (2, 4, 64)) * 2]
    ids = torch.randint(0, 2, (1, 200), generator=generator).to(device)

    def run(query, key, value):
        with moda_ext.use_backend("reference" if backend == "reference" else None):
            attended = modular_attention(query, key, value, ids, is_causal=True, return_lse=True, return_mass=True)
            gram = modality_gram(key, ids)
            projected, state = causal_gram_projection(
                query, key, ids, ids, key_norm=None, normalize="frobenius", return_state=True
            )
            views, indicator = duplex_query_views(query, key, ids, ids, *weights, return_indicator=True)
            chunk = causal_gram_projection(query, key, ids, ids, key_norm=None, state=state)
            duplex = duplex_attention(query, key, value, ids, ids, *weights, return_lse=True)
        return [*attended, gram, projected, *state, views, indicator, chunk, *duplex]

    expected = run(*(t.bfloat16() for t in (query, key, value)))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = run(query, key, value)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_autocast_and_pages():
    """The operators on pages know no autocast, and what they fall back on, for a gradient, must not either."""
    cache, table = torch.randn(4, 2, 16, 2 * 64 + 8), torch.tensor([[2, 0]])
    cache[..., 128] = torch.randint(0, 2, (4, 1, 16))
    weights = dict(zip(("a1", "b1", "a2", "b2"), (torch.randn(2, 64, 4), torch.randn(2, 4, 64)) * 2, strict=True))
    for grad in (False, True):
        query = torch.randn(2, 8, 64, requires_grad=grad)
        pages = cache, table, torch.tensor([19]), torch.tensor([0, 2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = (
                paged_modular_attention(query, *pages),
                paged_duplex_attention(query, torch.tensor([0, 1]), *pages, **weights),
            )
        expected = (
            paged_modular_attention(query, *pages),
            paged_duplex_attention(query, torch.tensor([0, 1]), *pages, **weights),
        )
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
