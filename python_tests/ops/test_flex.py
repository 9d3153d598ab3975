"""Attention on PyTorch's FlexAttention (functional/flex.py): equal to the reference, and no matrix of all pairs.

FlexAttention refuses gradients on the CPU, where its kernel has none; its dense form, which runs uncompiled, has them.
So its check of the device is stepped around (the fixture ``flex``). With MODA_EXT_BACKEND=flex in the environment,
pytest does that for any test of attention.
"""

import pytest
import test_large_biases
import test_varlen
import torch
from graphs import sizes_in_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import compare, cotangents_for, make_problem, modalities, ours, problems
from tolerance import assert_close
from torch.fx.experimental.proxy_tensor import make_fx

import moda_ext
from moda_ext import reference
from moda_ext._ops import backend as choices
from moda_ext.attention import modular_attention, modular_attention_varlen
from moda_ext.functional import flex as backend

LONGER_THAN_A_BLOCK = {
    "causal": {"queries": 300, "keys": 300, "is_causal": True, "num_modalities": 3, "padding": "left"},
    "views": {"queries": 140, "keys": 260, "is_causal": True, "views": True, "heads": 4, "runs": "long runs"},
    "all keys": {"queries": 130, "keys": 390, "num_modalities": 4, "bias": "hidden rows", "padding": "scattered"},
    "more rows than keys": {"queries": 390, "keys": 130, "is_causal": True, "sink": "partly off"},
    "decode": {"queries": 1, "keys": 400, "is_causal": True, "heads": 8, "runs": "long runs"},
}


def check(problem):
    compare(problem, cotangents_for(problem, torch.Generator().manual_seed(1)))


@settings(max_examples=25)
@given(data=st.data())
def test_fuzzed_problems(flex, data):
    problem = data.draw(problems("cpu"))
    compare(problem, cotangents_for(problem, torch.Generator().manual_seed(1)), fuzzed=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", LONGER_THAN_A_BLOCK.values(), ids=LONGER_THAN_A_BLOCK)
def test_longer_than_a_block(flex, shape, dtype):
    check(make_problem(head_size=32, dtype=dtype, **shape))


@settings(max_examples=15)
@given(data=st.data())
def test_packed_sequences(flex, data):
    arguments, keywords = test_varlen.pack(data.draw(test_varlen.batches("cpu")))
    results = modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    expected = reference.modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    leaves = [t for t in (*arguments[:3], *keywords.values()) if isinstance(t, torch.Tensor)]
    units = 4 if arguments[0].dtype == torch.bfloat16 else 256
    for found, wanted in zip(
        (*results, *torch.autograd.grad(results, leaves, cotangents)),
        (*expected, *torch.autograd.grad(expected, leaves, cotangents)),
        strict=True,
    ):
        assert_close(found, wanted, units)


@pytest.mark.parametrize("numbers", (-1e9, test_large_biases.LARGEST, test_large_biases.MIXED), ids=str)
@pytest.mark.parametrize("shape", ("causal", "hidden"))
def test_a_number_common_to_a_row_changes_nothing(flex, shape, numbers):
    test_large_biases.check(test_large_biases.build(test_large_biases.SHAPES[shape], numbers))


@pytest.mark.parametrize("bias", ([torch.finfo().min, torch.finfo().max], [-1e38, 3e38], [-1e9, torch.inf]), ids=str)
def test_a_bias_of_what_a_row_does_not_see_has_no_part(flex, bias):
    """Though its difference to what the row sees has no room in the dtype."""
    tokens, ids = torch.randn(1, 2, 9, 16, requires_grad=True), torch.zeros(1, 9, dtype=torch.int32)
    results, gradients = [], []
    for module in (moda_ext.attention, reference):
        prior = torch.tensor(bias, requires_grad=True)
        options = {"modality_bias": prior, "return_lse": True, "return_mass": True}
        results.append(module.modular_attention(tokens, tokens, tokens, ids, **options))
        gradients.append(torch.autograd.grad([r.sum() for r in results[-1]], [tokens, prior]))
    for found, expected in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert_close(found, expected)
    assert torch.equal(results[0][2][..., 1], torch.zeros(1, 2, 9))


def test_arguments_that_lie_are_errors_on_the_cpu(flex):
    tokens, ids = torch.randn(9, 2, 16), torch.zeros(9, dtype=torch.int32)
    for wrong in (5, -7):
        with pytest.raises(ValueError, match=r"key_modality must lie in \[-1, 2\)"):
            modular_attention_varlen(tokens, tokens, tokens, ids + wrong, *[torch.tensor([0, 9])] * 2, 9, 9)
    right = torch.tensor([0, 4, 9])
    for offsets in ([0, 4, 8], [1, 4, 9], [0, 10, 9]):
        for both in ((torch.tensor(offsets), right), (right, torch.tensor(offsets))):
            with pytest.raises(ValueError, match="cu_seqlens_[qk]: expected offsets that rise from 0 to 9"):
                modular_attention_varlen(tokens, tokens, tokens, ids, *both, 9, 9)


def test_what_it_lacks_on_the_cpu_goes_to_the_next():
    tokens = torch.randn(1, 2, 9, 16)
    with moda_ext.use_backend("flex"):
        assert choices.choose("modular_attention", tokens) == choices.FLEX
        assert choices.choose("modular_attention", tokens, tokens.clone().requires_grad_()) != choices.FLEX
        with torch.no_grad():
            assert choices.choose("modular_attention", tokens.clone().requires_grad_()) == choices.FLEX
        query = tokens.clone().requires_grad_()
        ids = torch.zeros(1, 9, dtype=torch.int32)
        modular_attention(query, tokens, tokens, ids).sum().backward()
        compiled = torch.compile(modular_attention, backend="eager", fullgraph=True)
        assert_close(compiled(tokens, tokens, tokens, ids), modular_attention(tokens, tokens, tokens, ids))


def test_padding_holds_anything(flex):
    problem = make_problem(queries=40, keys=150, padding="scattered", head_size=16)
    clean = ours(problem)
    for tensor in (problem.key, problem.value):
        tensor.data[(problem.key_modality < 0)[:, None].expand(tensor.shape[:3])] = torch.nan
    found = ours(problem)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
    sum(result.sum() for result in found).backward()
    assert all(leaf.grad.isfinite().all() for leaf in problem.leaves().values())


# Blocks ---------------------------------------------------------------------------------------------------------------


def dense_pairs(ids, first, last, m):
    column = torch.arange(ids.shape[1])
    return (ids == m)[:, None] & (column >= first[:, None]) & (column <= last[:, None])


@settings(max_examples=60)
@given(data=st.data())
def test_blocks_are_those_that_pytorch_finds_pair_by_pair(data):
    """Beside ``create_block_mask``, which looks at every pair: the same blocks, whole or in part."""
    from torch.nn.attention.flex_attention import create_block_mask

    columns, is_causal, seed = data.draw(st.integers(1, 700)), data.draw(st.booleans()), data.draw(st.integers(0, 99))
    generator, number = torch.Generator().manual_seed(seed), data.draw(st.integers(1, 3))
    runs = data.draw(st.sampled_from(("one run", "long runs", "mixed runs", "alternating", "absent modality")))
    padding = data.draw(st.sampled_from(("none", "left", "right", "middle", "everything")))
    ids = torch.stack([modalities(columns, number, runs, padding, generator) for _ in range(2)])
    if data.draw(st.booleans()):
        rows = data.draw(st.integers(1, 500))
        first, last = backend._dense_intervals(rows, columns, is_causal, ids.device)
    else:
        lengths = torch.randint(0, 300, (3,), generator=generator)
        cu_q = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        cu_k = (cu_q * columns) // max(int(cu_q[-1]), 1)
        rows = int(cu_q[-1])
        if rows == 0:
            return
        first, last = backend._packed_intervals(rows, cu_q, cu_k, is_causal)
    blocks = backend.make_blocks(ids, first, last, number)
    for m, (mask, seen) in enumerate(zip(*blocks, strict=True)):
        pairs = dense_pairs(ids, first, last, m)
        assert torch.equal(seen, pairs.any(dim=-1))
        expected = create_block_mask(
            lambda b, h, q, k, pairs=pairs: pairs[b, q, k], 2, None, rows, columns, device="cpu"
        )
        found, wanted = mask.to_dense()[:, 0], expected.to_dense()[:, 0]
        full, full_wanted = whole_blocks(mask), whole_blocks(expected)
        assert torch.equal(full, full_wanted)
        # Among packed sequences a block may lie between what its rows see: looked at, and found empty.
        assert bool((found >= wanted).all())
        if (first == 0).all():
            assert torch.equal(found, wanted)


def whole_blocks(mask):
    listed = torch.arange(mask.full_kv_indices.shape[-1]) < mask.full_kv_num_blocks[..., None]
    return torch.zeros_like(mask.full_kv_indices).scatter_add(-1, mask.full_kv_indices.long(), listed.int())


def test_layers_share_the_blocks_of_a_pass(flex, monkeypatch):
    made, make = [], backend.make_blocks
    monkeypatch.setattr(backend, "make_blocks", lambda *arguments: made.append(arguments) or make(*arguments))
    tokens, ids = torch.randn(1, 2, 40, 16), torch.zeros(1, 40, dtype=torch.int32)
    call = {"num_modalities": 2, "is_causal": True}
    first = modular_attention(tokens, tokens, tokens, ids, **call)
    modular_attention(first, tokens, tokens, ids, **call)
    assert len(made) == 1
    modular_attention(first[:, :, -3:], tokens, tokens, ids, **call)
    assert len(made) == 2
    ids[0, 7] = 1  # in place
    changed, expected = modular_attention(tokens, tokens, tokens, ids, **call), ids.clone()
    assert len(made) == 3
    assert_close(changed, reference.modular_attention(tokens, tokens, tokens, expected, **call))
    other = torch.zeros(1, 40, dtype=torch.int32)
    ids.data = other  # no version tells
    assert_close(
        modular_attention(tokens, tokens, tokens, ids, **call),
        reference.modular_attention(tokens, tokens, tokens, other, **call),
    )
    traced = make_fx(lambda ids: modular_attention(tokens, tokens, tokens, ids, return_mass=True)[1])(ids)
    assert_close(
        traced(ids.clone().fill_(1)), reference.modular_attention(tokens, tokens, tokens, ids + 1, return_mass=True)[1]
    )
    packed, offsets = ids[0], torch.tensor([0, 40])
    for rank in (1, 2, 1):  # the same tensor for both operators
        if rank == 2:
            packed.unsqueeze_(0)
            modular_attention(tokens, tokens, tokens, packed)
        else:
            packed.squeeze_(0)
            modular_attention_varlen(*(tokens[0].transpose(0, 1),) * 3, packed, offsets, offsets, 40, 40)
    for _ in range(9):  # what nobody holds is not found again, nor kept for long
        modular_attention(tokens, tokens, tokens, ids.clone(), **call)
    assert len(backend._kept) == backend.KEPT


# Compiled -------------------------------------------------------------------------------------------------------------


def test_the_kernel_of_the_cpu_visits_the_right_blocks(monkeypatch):
    """Compiled, which goes by the blocks: uncompiled every pair is looked at. The CPU's kernel has no log-sum-exp."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    problem = make_problem(queries=150, keys=410, is_causal=True, head_size=32, padding="left", runs="long runs")
    query, key, value, ids = (t.detach() for t in problem.positional())
    blocks = backend.make_blocks(ids, *backend._dense_intervals(150, 410, True, ids.device), 2)
    for m, (mask, seen) in enumerate(zip(*blocks, strict=True)):
        found = compiled(query, key, value, block_mask=mask)
        alone = torch.where(ids == m, 0, -1)
        wanted = reference.modular_attention(query, key, value, alone, num_modalities=1, is_causal=True)
        assert_close(torch.where(seen[:, None, :, None], found, 0.0), wanted)


def test_no_matrix_of_all_pairs(flex):
    length = 16384

    def call(query, key, value, ids, bias):
        out, mass = modular_attention(query, key, value, ids, modality_bias=bias, is_causal=True, return_mass=True)
        return out.sum() + mass.sum()

    def make():
        tokens = (torch.randn(1, n, length, 64, dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2))
        return *tokens, torch.zeros(1, length, dtype=torch.int32), torch.zeros(2, requires_grad=True)

    assert sizes_in_graphs(call, make)[0] == 8 * length * 64  # a query; the pairs are 2^28


@pytest.fixture
def kernels(monkeypatch):
    """The graphs that eager calls on a GPU are compiled to; the device's kernel is left out."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph

    def compile_with(function, **options):
        return compile_(function, backend=keep, **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compile_with)
    torch._dynamo.reset()
    backend._compiled.cache_clear()
    yield made
    backend._compiled.cache_clear()


def compiled_attention(query, key, columns, scale=0.25):
    """What ``_attend`` does on a GPU, without groups of heads."""
    ids = torch.randint(0, 2, (query.shape[0], columns))
    rows = query.shape[2]
    for mask in backend.make_blocks(ids, *backend._dense_intervals(rows, columns, True, ids.device), 2).masks:
        form = query.shape[1], key.shape[1], query.shape[3], query.dtype, False
        backend._compiled(scale, rows <= backend.DECODED, form)(query, key, key, mask)


def test_lengths_do_not_recompile(kernels):
    counts = []
    for length in (200, 300, 470, 650, 900, 129):
        tokens = torch.randn(1, 2, length, 16)
        compiled_attention(tokens, tokens, length)
        counts.append(len(kernels))
    assert counts == [1, 2, 2, 2, 2, 2]


def test_kernels_know_scale_and_head_size(kernels):
    """torch.compile makes dynamic what differs between two calls; FlexAttention has no kernel for an unknown scale."""
    for scale, size in ((0.25, 16), (0.125, 32), (0.3, 32), (0.25, 64)):
        for length in (200, 300):
            tokens = torch.randn(2, 2, length, size)
            compiled_attention(tokens, tokens, length, scale=scale)
        graph = kernels[-1].graph
        (call,) = [node for node in graph.nodes if "flex_attention" in str(node.target)]
        assert call.args[5] == scale
        shapes = [node.meta["example_value"].shape for node in call.args[:3]]
        assert all(shape[1] == 2 and isinstance(shape[2], torch.SymInt) and shape[3] == size for shape in shapes)
    assert len(kernels) == 8


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("llava", "qwen2_vl"))
def test_models_compute_on_it(flex, family, monkeypatch):
    """Identity, a training step, and generation with a dynamic and a static cache."""
    pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed")
    from trained_models import CACHES, check_generation, labels_of, logits_of, make_trained
    from vision_language import make_inputs, make_model

    from moda_ext.integrations.transformers import apply_moda, check_identity

    calls, attend = [], backend._attend
    monkeypatch.setattr(backend, "_attend", lambda *arguments: calls.append(arguments[4]) or attend(*arguments))
    inputs, model = make_inputs(family), apply_moda(make_model(family))
    check_identity(model, inputs)
    assert calls
    calls.clear()
    model(**inputs)
    assert len(calls) > 1
    assert all(blocks is calls[0] for blocks in calls)  # every layer looks at those of the first
    model = make_trained(family)
    with moda_ext.use_backend("native"):
        expected = logits_of(family, model, inputs)
    assert_close(logits_of(family, model, inputs), expected, units=1024)
    gradients = []
    for name in ("flex", "native"):
        model.zero_grad()
        with moda_ext.use_backend(name):
            model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], units=4096)
    for cache in CACHES:
        check_generation(family, model, inputs, cache_implementation=None if cache == "dynamic" else cache)


def test_blocks_made_in_inference_mode_serve_a_training_step(flex):
    tokens, ids = [torch.randn(1, 2, 140, 16, requires_grad=True) for _ in range(3)], torch.zeros(1, 140).int()
    with torch.inference_mode():
        modular_attention(*(t.detach() for t in tokens), ids, is_causal=True)
    modular_attention(*tokens, ids, is_causal=True).sum().backward()
    assert tokens[0].grad is not None
