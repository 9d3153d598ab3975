"""duplex_attention: the operator that aligns while it attends gives, number for number, what its two halves give."""

import itertools
from unittest import mock

import pytest
import torch

from moda_ext._ops import operators
from moda_ext.alignment import GramState, causal_gram_projection, duplex_query_views
from moda_ext.attention import AttentionState, ModularDuplexAttention, duplex_attention, modular_attention

pytestmark = pytest.mark.usefixtures("native")
OPTIONS = {"return_lse": True, "return_mass": True}


def inputs(
    batch=2, heads=4, kv_heads=2, queries=150, keys=150, size=32, rank=5, modalities=3, dtype=torch.float32, seed=0
):
    """The arguments by position, and the terms of the mask, with padding and a hidden modality."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    modality = torch.randint(0, modalities, (batch, (keys + 6) // 7), generator=generator)
    modality = modality.repeat_interleave(7, dim=1)[:, :keys].contiguous()
    modality[0, :3] = modality[-1, keys // 2] = -1
    tokens = (
        normal(batch, heads, queries, size),
        normal(batch, kv_heads, keys, size),
        normal(batch, kv_heads, keys, size),
    )
    weights = [
        normal(modalities, *shape, dtype=sums) / 4 for shape in ((size, rank), (rank, size), (size, rank), (rank, size))
    ]
    terms = {
        "modality_bias": normal(batch, heads, queries, modalities, dtype=sums),
        "condition": normal(heads, 1, modalities, dtype=sums),
        "sink": normal(batch, heads, queries, dtype=sums),
    }
    terms["modality_bias"][0, 0, :, -1] = -torch.inf
    return (*tokens, modality[:, keys - queries :], modality, *weights, modalities), terms


def in_two_calls(query, key, value, query_modality, key_modality, a1, b1, a2, b2, num_modalities, **options):
    new_key, new_modality = options.pop("new_key", key), options.pop("new_modality", key_modality)
    alignment = {name: options.pop(name) for name in ("key_norm", "normalize", "eps", "state") if name in options}
    views, indicator = duplex_query_views(
        query,
        new_key,
        query_modality,
        new_modality,
        *(a1, b1, a2, b2, num_modalities),
        **alignment,
        return_indicator=True,
    )
    bias, condition = options.pop("modality_bias", None), options.pop("condition", None)
    if condition is not None:
        bias = condition * indicator if bias is None else bias + condition * indicator
    return modular_attention(
        views,
        key,
        value,
        key_modality,
        num_modalities=num_modalities,
        modality_bias=bias,
        is_causal=True,
        **options,
        **OPTIONS,
    )


def in_one(*arguments, **options):
    """The fused operator, which must be what ran."""
    with mock.patch.object(operators, "duplex_attention", wraps=operators.duplex_attention) as operator:
        results = duplex_attention(*arguments, **options, **OPTIONS)
    assert operator.call_count == 1
    return results


def assert_same(arguments, options):
    for result, expected in zip(in_one(*arguments, **options), in_two_calls(*arguments, **options), strict=True):
        assert result.dtype == expected.dtype and result.stride() == expected.stride()
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 if options.get("condition") is not None else 0)


SHAPES = {
    "gqa": {},
    "one head": {"heads": 1, "kv_heads": 1, "batch": 1},
    "no groups": {"heads": 3, "kv_heads": 3},
    "head size 128": {"size": 128, "queries": 300, "keys": 300, "modalities": 2, "rank": 16},
    "head size 40": {"size": 40},
    "one modality": {"modalities": 1},
    "many modalities": {"modalities": 16, "rank": 20},
    "more keys": {"queries": 70},
    "a step": {"queries": 1},
    "one token": {"queries": 1, "keys": 1},
    "no queries": {"queries": 0},
    "no batch": {"batch": 1, "queries": 30},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_alignment_then_attention(shape, dtype):
    arguments, terms = inputs(**shape, dtype=dtype)
    assert_same(arguments, terms)


@pytest.mark.parametrize(
    "given", list(itertools.product((False, True), repeat=3)), ids=lambda given: "".join(str(int(x)) for x in given)
)
def test_every_term_may_be_missing(given):
    arguments, terms = inputs()
    assert_same(arguments, {name: term for (name, term), there in zip(terms.items(), given, strict=True) if there})


@pytest.mark.parametrize(
    "options",
    ({"key_norm": None}, {"normalize": None}, {"normalize": "frobenius"}, {"eps": 5.0}, {"scale": 0.3}),
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    arguments, terms = inputs()
    assert_same(arguments, {**terms, **options})


def test_after_other_tokens():
    """A state in place of the first keys; attention sees all of them."""
    (query, key, value, _, modality, *rest), terms = inputs(queries=90)
    _, state = causal_gram_projection(
        query[:, :, :1], key[:, :, :50], modality[:, 49:50], modality[:, :50], rest[-1], return_state=True
    )
    arguments = query, key, value, modality[:, 60:], modality, *rest
    options = {**terms, "new_key": key[:, :, 50:], "new_modality": modality[:, 50:], "state": state}
    assert_same(arguments, options)
    whole = duplex_attention(*arguments, **terms)
    torch.testing.assert_close(duplex_attention(*arguments, **options), whole, rtol=1e-4, atol=1e-5)


def test_layouts():
    """Tokens before heads, expanded terms, a query whose last dimension is not contiguous."""
    arguments, terms = inputs()
    tokens = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments[:3]]
    assert_same((*tokens, *arguments[3:]), {**terms, "sink": torch.zeros(1, 4, 1)})
    strided = arguments[0].mT.contiguous().mT
    assert torch.equal(duplex_attention(strided, *arguments[1:]), duplex_attention(*arguments))


def test_threads_change_nothing():
    """Nor how many key heads have their views made at a time."""
    arguments, terms = inputs(batch=3, heads=6, kv_heads=3)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            results.append(in_one(*arguments, **terms))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_two_operators_where_a_gradient_is_asked_for():
    arguments, terms = inputs(dtype=torch.float64, queries=20, keys=20, size=8)
    leaves = [t.requires_grad_() for t in (*arguments[:3], *arguments[5:9], *terms.values())]
    with mock.patch.object(operators, "duplex_attention") as operator:
        out = duplex_attention(*arguments, **terms)
        assert operator.call_count == 0
    grads = torch.autograd.grad(out.sum(), leaves)
    expected = torch.autograd.grad(in_two_calls(*arguments, **terms)[0].sum(), leaves)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=0)
    with torch.no_grad():
        assert_same(arguments, terms)
    functional = torch.func.grad(lambda value: duplex_attention(*arguments[:2], value, *arguments[3:], **terms).sum())
    torch.testing.assert_close(functional(arguments[2].detach()), grads[2])


def operator_arguments():
    (query, key, value, _, modality, *weights, modalities), terms = inputs(queries=40, keys=70)
    modality = modality.int()
    scale = torch.rand(2, 2, 40, modalities)
    bias, sink = terms["modality_bias"], terms["sink"]
    condition = terms["condition"].expand_as(bias)
    state = torch.rand(2, 2, modalities, 32, 32)
    return [
        (query, key, value, modality, key, modality, scale, *weights, initial, *masks, modalities, True, 1e-6, 0.2)
        for initial, masks in ((None, (bias, condition, sink)), (state, (None, None, None)))
    ]


def test_opcheck():
    for arguments in operator_arguments():
        torch.library.opcheck(torch.ops.moda_ext.duplex_attention.default, arguments)


def test_the_operator_has_no_derivative():
    arguments = operator_arguments()[0]
    out, *_ = torch.ops.moda_ext.duplex_attention(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(NotImplementedError, match="duplex_attention has no derivative"):
        out.sum().backward()


def test_the_operator_checks_what_memory_safety_depends_on():
    arguments = operator_arguments()[0]
    for position, change, name in (
        (1, lambda key: key[:, :1], "key"),
        (4, lambda key: key[:, :1], "row_scale"),
        (5, lambda modality: modality[:, 1:], "new_modality"),
        (5, lambda modality: modality + 3, "new_modality"),
        (6, lambda scale: scale[:, :, 1:], "row_scale"),
        (12, lambda bias: bias[:, :, 1:], "modality_bias"),
        (13, lambda condition: condition[..., 1:], "condition"),
        (13, lambda condition: condition.double(), "condition"),
    ):
        changed = list(arguments)
        changed[position] = change(changed[position])
        with pytest.raises((RuntimeError, ValueError), match=rf"attention: {name}"):
            torch.ops.moda_ext.duplex_attention(*changed)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"condition": torch.zeros(5)}, ValueError, "condition"),
        ({"condition": torch.zeros(3, dtype=torch.int64)}, TypeError, "condition"),
        ({"condition": 1.0}, TypeError, "condition"),
        ({"normalize": "row"}, ValueError, "normalize"),
        ({"state": torch.zeros(3)}, TypeError, "state"),
        ({"new_modality": torch.zeros(2, 150).int()}, ValueError, "new_modality"),
        ({"new_key": torch.zeros(2, 2, 150, 32)}, ValueError, "new_key"),
        ({"new_key": 3, "new_modality": 3}, TypeError, "new_key"),
        ({"new_key": torch.zeros(2, 1, 150, 32), "new_modality": torch.zeros(2, 150).int()}, ValueError, "new_key"),
        ({"modality_bias": torch.zeros(7)}, ValueError, "modality_bias"),
        ({"new_key": torch.zeros(2, 2, 10, 32), "new_modality": torch.zeros(2, 10).int()}, ValueError, "query"),
    ),
    ids=lambda value: str(value)[:20],
)
def test_errors_name_the_argument_with_and_without_a_gradient(changes, error, message):
    arguments, terms = inputs()
    for differentiable in (False, True):
        query = arguments[0].requires_grad_(differentiable)
        with pytest.raises(error, match=message):
            duplex_attention(query, *arguments[1:], **{**terms, **changes})


def test_a_layer_refuses_with_and_without_a_gradient():
    """What the aligner's own forward pass refuses."""
    layer = ModularDuplexAttention(64, num_heads=4, num_kv_heads=2)
    x, modality = torch.randn(1, 10, 64), torch.randint(0, 2, (1, 10))
    state = AttentionState()
    layer(x, modality, state=state)
    state.gram.key_norm = None
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            with pytest.raises(ValueError, match="include belongs to scope='context'"):
                layer(x, modality, context=modality == 0)
            with pytest.raises(ValueError, match="state must be of key_norm"):
                layer(x, modality, state=state)


def test_a_layer_makes_its_mask_once():
    layer = ModularDuplexAttention(64, num_heads=4, num_kv_heads=2)
    calls = []
    layer.mask.register_forward_hook(lambda *_: calls.append(1))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            layer(torch.randn(1, 10, 64), torch.randint(0, 2, (1, 10)))
    assert len(calls) == 2


def test_autocast():
    arguments, terms = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        results = in_one(*arguments, **terms)
        direct = torch.ops.moda_ext.duplex_attention(*operator_arguments()[0])[0]
    assert results[0].dtype == direct.dtype == torch.bfloat16
    half = [t.bfloat16() for t in arguments[:3]]
    for result, expected in zip(results, in_one(*half, *arguments[3:], **terms), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_compiles_into_one_graph():
    arguments, terms = inputs()
    compiled = torch.compile(lambda *given: duplex_attention(*given, **terms), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), duplex_attention(*arguments, **terms), rtol=0, atol=0)


@pytest.mark.parametrize("mask", (False, True, {"variant": "fix"}), ids=("no mask", "attn", "fix"))
@pytest.mark.parametrize("state", (False, True), ids=("whole", "in chunks"))
def test_a_layer_gives_the_same_with_and_without_a_gradient(mask, state):
    layer = ModularDuplexAttention(64, num_heads=4, num_kv_heads=2, num_modalities=2, mask=mask)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, modality = torch.randn(2, 90, 64), torch.randint(-1, 2, (2, 90))

    def run():
        if not state:
            return layer(x, modality)
        past = AttentionState()
        cuts = [(0, 50), (50, 88), (88, 89), (89, 90)]
        return torch.cat([layer(x[:, i:j], modality[:, i:j], state=past) for i, j in cuts], dim=1)

    with mock.patch.object(operators, "duplex_attention", wraps=operators.duplex_attention) as operator:
        with_gradient = run()
        assert operator.call_count == 0
        with torch.no_grad():
            without = run()
        assert operator.call_count == (4 if state else 1)
    torch.testing.assert_close(without, with_gradient, rtol=1e-5, atol=1e-6)


def test_a_state_of_a_layer_is_the_same_with_and_without_a_gradient():
    layer = ModularDuplexAttention(64, num_heads=4, num_kv_heads=2)
    x, modality = torch.randn(1, 100, 64), torch.randint(0, 2, (1, 100))
    states = AttentionState(), AttentionState()
    layer(x, modality, state=states[0])
    with torch.no_grad():
        layer(x, modality, state=states[1])
    first, second = (state.gram for state in states)
    assert isinstance(first, GramState) and first.length == second.length == 100
    assert torch.equal(first.gram, second.gram) and torch.equal(first.key, second.key)
