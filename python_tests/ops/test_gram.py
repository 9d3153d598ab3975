"""modality_gram, causal_gram_projection and duplex_query_views: against float64, and their invariants."""

import re
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from problems import LAYOUTS, PADDINGS, RUNS, lay_out, modalities
from tolerance import assert_close, assert_within_rule, finite_max
from torch import Tensor

from moda_ext import alignment, reference

CHUNK = 48  # of the kernels: shapes here go below, to and beyond it
WEIGHTS = ("a1", "b1", "a2", "b2")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(repr=False)
class Problem:
    """Arguments that all three operators can be made from; the floating-point tensors are leaves with a gradient."""

    query: Tensor
    key: Tensor
    modality: Tensor
    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    num_modalities: int
    gram: Tensor | None = None  # with trace: the state before the first key, as its square root
    trace: Tensor | None = None
    key_norm: str | None = "l2"
    normalize: str | None = "trace"

    def __repr__(self) -> str:
        q, k = self.query, self.key
        text = f"Problem(query {q.dtype} {tuple(q.shape)} {q.stride()}, key {tuple(k.shape)} {k.stride()}, "
        text += f"a1 {tuple(self.a1.shape)}, state {self.gram is not None}, {self.key_norm=}, {self.normalize=}, "
        return text + f"{self.modality.tolist()=})"

    def leaves(self) -> dict[str, Tensor]:
        names = ("query", "key", *WEIGHTS, "gram", "trace")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def map(self, function) -> "Problem":
        changed = {n: function(t).detach().requires_grad_() for n, t in self.leaves().items()}
        return replace(self, **changed)

    def to(self, dtype) -> "Problem":
        return self.map(lambda t: t.to(dtype))

    def state(self):
        if self.gram is None:
            return None
        return self.gram.mT @ self.gram, self.trace.exp()

    def options(self) -> dict:
        return {"key_norm": self.key_norm, "normalize": self.normalize}


def run(module, operator: str, p: Problem) -> tuple[Tensor, ...]:
    """Every output of one operator."""
    if operator == "modality_gram":
        return (module.modality_gram(p.key, p.modality, p.num_modalities, **p.options()),)
    ids = p.modality[:, p.key.shape[2] - p.query.shape[2] :], p.modality
    options = {**p.options(), "state": p.state(), "return_state": True}
    if operator == "causal_gram_projection":
        out, state = module.causal_gram_projection(p.query, p.key, *ids, p.num_modalities, **options)
        return (out, *state)
    weights = (getattr(p, name) for name in WEIGHTS)
    views, indicator, state = module.duplex_query_views(
        p.query, p.key, *ids, *weights, p.num_modalities, **options, return_indicator=True
    )
    return (views, indicator, *state)


def evaluate(module, operator: str, p: Problem, seed: int = 1, which=None) -> dict[str, Tensor]:
    """Outputs and the gradients of a random functional of them (of those in ``which``)."""
    outputs = run(module, operator, p)
    results = {f"output {i}": output for i, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    chosen = [(o, c) for i, (o, c) in enumerate(zip(outputs, cotangents, strict=True)) if which is None or i in which]
    leaves = p.leaves()
    chosen = [(o, c) for o, c in chosen if o.requires_grad]
    if chosen:
        outs, weights = zip(*chosen, strict=True)
        grads = torch.autograd.grad(outs, list(leaves.values()), weights, materialize_grads=True)
        results.update({f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)})
    return results


def compare(operator: str, p: Problem, which=None) -> None:
    result = evaluate(alignment, operator, p, which=which)
    oracle = evaluate(reference, operator, p.to(torch.float64), which=which)
    yardstick = evaluate(reference, operator, p, which=which)
    # A row's scale is 1 over a trace that may come from few keys, and the gradient sums over all rows.
    scale = max([1.0, *(finite_max(t.detach()) for t in p.leaves().values())])
    for name, value in result.items():
        magnitude = scale * max(1.0, finite_max(oracle[name]))
        assert_within_rule(f"{operator} {name}", value, oracle[name], yardstick[name], magnitude)


def make_problem(
    *,
    batch=2,
    heads=4,
    kv_heads=2,
    queries=60,
    keys=60,
    head_size=16,
    num_modalities=2,
    rank=4,
    dtype=torch.float32,
    runs="mixed runs",
    padding="none",
    layouts=("contiguous", "contiguous"),
    state=False,
    key_norm="l2",
    normalize="trace",
    device="cpu",
    seed=0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def leaf(tensor, dtype):
        return tensor.to(device, dtype).requires_grad_()

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    down, up = (num_modalities, head_size, rank), (num_modalities, rank, head_size)
    ids = [modalities(keys, num_modalities, runs, padding, generator) for _ in range(batch)]
    return Problem(
        query=lay_out(randn(batch, heads, queries, head_size).to(device, dtype), layouts[0]).detach().requires_grad_(),
        key=lay_out(randn(batch, kv_heads, keys, head_size).to(device, dtype), layouts[1]).detach().requires_grad_(),
        modality=(torch.stack(ids) if ids else torch.zeros(0, keys, dtype=torch.int64)).to(device),
        a1=leaf(randn(*down) / head_size**0.5, sums),
        b1=leaf(randn(*up) / rank**0.5, sums),
        a2=leaf(randn(*down) / head_size**0.5, sums),
        b2=leaf(randn(*up) / rank**0.5, sums),
        num_modalities=num_modalities,
        gram=leaf(randn(batch, kv_heads, num_modalities, 3, head_size), sums) if state else None,
        trace=leaf(randn(batch, kv_heads, num_modalities) + 2, sums) if state else None,
        key_norm=key_norm,
        normalize=normalize,
    )


@st.composite
def problems(draw, device="cpu", max_tokens=2 * CHUNK + 10) -> Problem:
    kv_heads = draw(st.sampled_from((1, 1, 2, 3)))
    keys = draw(st.integers(0, max_tokens))
    return make_problem(
        batch=draw(st.sampled_from((1, 1, 2, 0))),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.sampled_from((1, 2, 4))),
        keys=keys,
        queries=draw(st.one_of(st.just(keys), st.integers(0, keys))),
        head_size=8 * draw(st.one_of(st.sampled_from((1, 2, 3, 8)), st.integers(1, 32))),
        num_modalities=draw(st.one_of(st.integers(1, 3), st.integers(1, 16))),
        rank=draw(st.one_of(st.integers(1, 20), st.sampled_from((33, 128)))),
        dtype=draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        runs=draw(st.sampled_from(RUNS)),
        padding=draw(st.sampled_from(PADDINGS[:1] * 3 + PADDINGS)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(2)),
        state=draw(st.booleans()),
        key_norm=draw(st.sampled_from(("l2", "l2", None))),
        normalize=draw(st.sampled_from(("trace", "trace", "frobenius", None))),
        device=device,
        seed=draw(st.integers(0, 2**16)),
    )


BOTH_CAUSAL = ("causal_gram_projection", "duplex_query_views")
OPERATORS = ("modality_gram", *BOTH_CAUSAL)


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("operator", OPERATORS)
def test_fuzzed_problems(device, operator, data):
    p = data.draw(problems(device))
    outputs = {"modality_gram": 1, "causal_gram_projection": 3, "duplex_query_views": 4}[operator]
    compare(operator, p, data.draw(st.sets(st.integers(0, outputs - 1), min_size=1)))


LARGE = {
    "long runs": {"runs": "long runs", "queries": 700, "keys": 700, "head_size": 128, "rank": 16},
    "interleaved": {"runs": "runs of one", "queries": 300, "keys": 300, "head_size": 64, "num_modalities": 5},
    "chunk after a state": {"queries": 100, "keys": 400, "head_size": 64, "state": True, "padding": "middle"},
    "widest": {"queries": 130, "keys": 130, "head_size": 256, "rank": 128, "num_modalities": 3},
}


@pytest.mark.usefixtures("poisoned_memory", "two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("operator", OPERATORS)
def test_longer_than_a_chunk(device, operator, shape, dtype):
    compare(operator, make_problem(batch=1, heads=4, kv_heads=2, dtype=dtype, device=device, **shape))


@pytest.mark.usefixtures("two_threads")
def test_gram_of_a_sequence_cut_into_pieces(device):
    shape = {"batch": 1, "kv_heads": 1, "heads": 1, "keys": 2100, "queries": 1}
    compare("modality_gram", make_problem(**shape, runs="long runs", device=device))


@pytest.mark.parametrize("operator", OPERATORS)
def test_finite_differences(device, operator):
    p = make_problem(
        batch=1, heads=2, kv_heads=1, queries=5, keys=7, head_size=8, rank=2, dtype=torch.float64, padding="middle",
        state=True, device=device,
    )  # fmt: skip
    names = list(p.leaves())
    assert torch.autograd.gradcheck(
        lambda *leaves: run(alignment, operator, replace(p, **dict(zip(names, leaves, strict=True)))),
        tuple(p.leaves().values()),
    )


# Invariants


def test_a_row_is_the_gram_of_the_tokens_up_to_it(device):
    p = make_problem(dtype=torch.float64, num_modalities=3, padding="scattered", device=device)
    for key_norm in ("l2", None):
        for normalize in ("trace", "frobenius", None):
            options = {"key_norm": key_norm, "normalize": normalize}
            rows = alignment.causal_gram_projection(p.query, p.key, p.modality, p.modality, 3, **options)
            for i in (0, 17, CHUNK, 59):
                gram = alignment.modality_gram(p.key[:, :, : i + 1], p.modality[:, : i + 1], 3, **options)
                expected = alignment.project_queries(p.query[:, :, i : i + 1], gram)[:, :, :, 0]
                expected = expected * (p.modality[:, i] >= 0)[None, :, None, None]
                assert_close(rows[:, :, :, i], expected)


def test_views_are_the_fuser_applied_to_the_projection(device):
    p = make_problem(dtype=torch.float64, num_modalities=3, device=device)
    views, indicator, *_ = run(alignment, "duplex_query_views", p)
    ids = (p.modality, p.modality, 3)
    for a in range(3):
        expected = p.query + p.query @ (p.a1[a] @ p.b1[a]).mT
        projection = alignment.causal_gram_projection(p.query @ (p.a2[a] @ p.b2[a]).mT, p.key, *ids)
        for m in range(3):
            if m != a:
                expected = expected + projection[m]
        assert_close(views[a], expected)
    projection = alignment.causal_gram_projection(p.query, p.key, *ids)
    expected = (projection * p.query).sum(-1) / p.query.square().sum(-1)
    assert_close(indicator, expected.movedim(0, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_fresh_fuser_are_the_query_to_the_bit(device, dtype):
    p = make_problem(dtype=dtype, device=device)
    zero = torch.zeros_like(p.b1)
    views = alignment.duplex_query_views(p.query, p.key, p.modality, p.modality, p.a1, zero, p.a2, zero)
    assert all(torch.equal(view, p.query) for view in views)


@pytest.mark.parametrize("operator", BOTH_CAUSAL)
def test_no_leak_to_the_bit(device, operator):
    """A changed token, also in its modality, changes no row before it; and it changes its own row."""
    p = make_problem(num_modalities=3, queries=150, keys=150, device=device)
    before = run(alignment, operator, p)
    for j in (1, CHUNK - 1, CHUNK, 101):
        key, query, modality = p.key.detach().clone(), p.query.detach().clone(), p.modality.clone()
        key[:, :, j:] = torch.randn_like(key[:, :, j:])
        query[:, :, j:] = torch.randn_like(query[:, :, j:])
        modality[:, j:] = torch.randint(-1, 3, modality[:, j:].shape, device=device)
        after = run(alignment, operator, replace(p, key=key, query=query, modality=modality))
        assert torch.equal(after[0][..., :j, :], before[0][..., :j, :])
        assert not torch.equal(after[0][..., j, :], before[0][..., j, :])
        if operator == "duplex_query_views":
            assert torch.equal(after[1][..., :j, :], before[1][..., :j, :])


@pytest.mark.parametrize("normalize", ("trace", "frobenius", None))
@pytest.mark.parametrize("operator", BOTH_CAUSAL)
def test_one_call_equals_chunks_equals_token_by_token(device, operator, normalize):
    p = make_problem(dtype=torch.float64, num_modalities=3, padding="scattered", normalize=normalize, device=device)
    weights = tuple(getattr(p, name) for name in WEIGHTS)

    def call(rows, state):
        function = getattr(alignment, operator)
        extra = weights if operator == "duplex_query_views" else ()
        ids = p.modality[:, rows]
        return function(
            p.query[:, :, rows], p.key[:, :, rows], ids, ids, *extra, 3, normalize=normalize, state=state,
            return_state=True,
        )  # fmt: skip

    whole, end = call(slice(0, 60), None)
    for cuts in ((0, 7, 50, 51, 60), tuple(range(61))):
        parts, state = [], None
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            part, state = call(slice(first, last), state)
            parts.append(part)
        assert_close(torch.cat(parts, dim=3), whole)
        assert_close(state[0], end[0])
        assert_close(state[1], end[1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_padding_changes_nothing_for_the_others_whatever_it_holds(device, operator):
    p = make_problem(dtype=torch.float64, device=device)
    expected = run(alignment, operator, p)
    for left, right in ((5, 0), (0, 9), (CHUNK, CHUNK)):
        query, key = (torch.nn.functional.pad(t, (0, 0, left, right), value=float("nan")) for t in (p.query, p.key))
        padded = replace(p, query=query, key=key, modality=torch.nn.functional.pad(p.modality, (left, right), value=-1))
        result = run(alignment, operator, padded)
        if operator == "modality_gram":
            assert_close(result[0], expected[0])
            continue
        assert_close(result[0][..., left : left + 60, :], expected[0])
        for a, b in zip(result[-2:], expected[-2:], strict=True):
            assert_close(a, b)


def test_padded_keys_get_no_gradient(device):
    for operator in OPERATORS:
        p = make_problem(padding="scattered", device=device)
        grad = evaluate(alignment, operator, p)["gradient of key"]
        assert grad.isfinite().all()
        assert (grad.movedim(1, 2)[p.modality < 0] == 0).all()


def test_permuting_the_batch(device):
    p = make_problem(batch=3, padding="scattered", device=device)
    order = torch.tensor([2, 0, 1], device=device)
    other = replace(p, query=p.query[order], key=p.key[order], modality=p.modality[order])
    for operator in OPERATORS:
        for a, b in zip(run(alignment, operator, p), run(alignment, operator, other), strict=True):
            assert torch.equal(a[:, order] if a.dim() == 5 and operator != "modality_gram" and a.shape[0] == 2
                               else a[order], b)  # fmt: skip


def test_threads_do_not_change_a_bit(device):
    p = make_problem(queries=200, keys=200, device=device)
    for operator in OPERATORS:
        torch.set_num_threads(1)
        one = evaluate(alignment, operator, p)
        torch.set_num_threads(2)
        two = evaluate(alignment, operator, p)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_absent_modality_has_gram_zero_and_zero_keys_are_no_problem(device):
    key = torch.randn(1, 1, 4, 8, device=device)
    key[:, :, 2] = 0
    key.requires_grad_()
    modality = torch.tensor([[0, 0, 2, 0]], device=device)
    for normalize in ("trace", "frobenius", "row", None):
        gram = alignment.modality_gram(key, modality, 3, normalize=normalize)
        assert (gram[:, :, 1:] == 0).all()
        (grad,) = torch.autograd.grad(gram.sum(), key)
        assert grad.isfinite().all()
    projection = alignment.causal_gram_projection(key, key, modality, modality, 3)
    assert (projection[1:] == 0).all()


def test_trace_normalised_gram_of_unit_keys_is_a_covariance(device):
    p = make_problem(device=device)
    gram = alignment.modality_gram(p.key, p.modality)
    assert torch.equal(gram, gram.mT)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert_close(eigenvalues.sum(-1), torch.ones_like(eigenvalues[..., 0]))
    assert eigenvalues.min() > -1e-6


def test_include_equals_removing_the_others(device):
    p = make_problem(device=device, dtype=torch.float64)
    include = torch.rand(2, 60, device=device) < 0.5
    expected = alignment.modality_gram(p.key, p.modality.masked_fill(~include, -1))
    assert torch.equal(alignment.modality_gram(p.key, p.modality, include=include), expected)
    assert not torch.equal(alignment.modality_gram(p.key, p.modality), expected)


# PyTorch's transformations


def operator_calls(device):
    ops = torch.ops.moda_ext
    calls = {}
    for name, changes in (
        ("contiguous", {}),
        ("tokens first", {"layouts": ("tokens first",) * 2}),
        ("fused", {"layouts": ("fused",) * 2, "state": True}),
        ("bfloat16", {"dtype": torch.bfloat16, "state": True}),
        ("no keys", {"queries": 0, "keys": 0}),
    ):
        p = make_problem(**{"queries": 6, "keys": 9, "device": device, **changes})
        ids, options = p.modality.int(), (2, True, 1e-6)
        sums = p.a1.dtype
        scale = torch.rand(2, 2, p.query.shape[2], 2, device=device, dtype=sums, requires_grad=True)
        initial = None if p.gram is None else p.state()[0].detach().requires_grad_()
        causal = (p.query, p.key, ids, scale)
        weights = tuple(getattr(p, w) for w in WEIGHTS)
        calls[f"modality_gram {name}"] = (ops.modality_gram.default, (p.key, ids, *options))
        calls[f"causal_gram_projection {name}"] = (ops.causal_gram_projection.default, (*causal, initial, *options))
        for flags in ((True, True), (False, False)):
            calls[f"duplex_query_views {name} {flags}"] = (
                ops.duplex_query_views.default,
                (*causal, *weights, initial, *options, *flags),
            )
        causal, weights = tuple(t.detach() for t in causal), tuple(t.detach() for t in weights)
        initial = None if initial is None else initial.detach()
        include = None if name == "contiguous" else torch.rand(ids.shape, device=device) < 0.5
        if device == "cpu":
            calls[f"duplex_aligned_keys {name}"] = (
                ops.duplex_aligned_keys.default,
                (causal[1], ids, include, *weights, *options, 1),
            )
        gram = ops.modality_gram(causal[1], ids, *options)
        calls[f"modality_gram_backward {name}"] = (ops.modality_gram_backward.default, (gram, causal[1], ids, *options))
        projection, gram = ops.causal_gram_projection(*causal, initial, *options)
        calls[f"causal_gram_projection_backward {name}"] = (
            ops.causal_gram_projection_backward.default,
            (projection, gram, *causal, initial, *options),
        )
        views, indicator, gram = ops.duplex_query_views(*causal, *weights, initial, *options, True, True)
        calls[f"duplex_query_views_backward {name}"] = (
            ops.duplex_query_views_backward.default,
            (views, indicator, gram, *causal, *weights, initial, indicator, *options),
        )
    return calls


@pytest.mark.usefixtures("native")
def test_opcheck(device):
    for name, (op, arguments) in operator_calls(device).items():
        try:
            torch.library.opcheck(op, arguments)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def everything(query, key, modality, *weights):
    views, indicator, (gram, trace) = alignment.duplex_query_views(
        query, key, modality, modality, *weights, 2, return_indicator=True, return_state=True
    )
    projection = alignment.causal_gram_projection(query, key, modality, modality, 2, normalize="frobenius")
    full = alignment.modality_gram(key, modality, 2)
    return views, indicator, gram, trace, projection, full


def loss(*arguments):
    """A scalar that weighs every number of every result differently."""
    results = everything(*arguments)
    return sum((r * torch.linspace(-1, 1, r.numel(), device=r.device).view_as(r)).sum() for r in results)


def loss_arguments(device, **changes):
    p = make_problem(device=device, queries=20, keys=20, **changes)
    return (p.query, p.key, p.modality, *(getattr(p, w) for w in WEIGHTS))


@pytest.mark.usefixtures("native")
def test_compile_fullgraph_with_gradients(device):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for batch in (1, 2):
        arguments = loss_arguments(device, batch=batch)
        leaves = [t for t in arguments if t.requires_grad]
        expected = torch.autograd.grad(loss(*arguments), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*arguments), leaves), expected, strict=True):
            assert_close(a, b)


class Everything(torch.nn.Module):
    def forward(self, *arguments):
        return everything(*arguments)


@pytest.mark.usefixtures("native")
def test_export_with_a_dynamic_sequence_length(device):
    arguments = tuple(t.detach() for t in loss_arguments(device))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = (({2: tokens}, {2: tokens}, {1: tokens}, None, None, None, None),)
    program = torch.export.export(Everything(), arguments, dynamic_shapes=shapes, strict=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"moda_ext.{operator}.default" for operator in OPERATORS} <= targets
    for length in (3, 20):
        cut = (*(t[:, :, :length] for t in arguments[:2]), arguments[2][:, :length], *arguments[3:])
        for a, b in zip(program.module()(*cut), everything(*cut), strict=True):
            assert_close(a, b)


@pytest.mark.usefixtures("native")
def test_func_grad_and_vmap(device):
    arguments = loss_arguments(device)
    positions = (0, 1, 3, 4, 5, 6)
    expected = torch.autograd.grad(loss(*arguments), [arguments[i] for i in positions])
    arguments = tuple(t.detach() for t in arguments)
    grad = torch.func.grad(loss, argnums=positions)
    for a, b in zip(grad(*arguments), expected, strict=True):
        assert_close(a, b)
    for dims in ((0, 0, 0, None, None, None, None), (None, 0, None, 0, 0, 0, 0), (-1, 2, 1, None, -1, None, 1)):
        slices = [
            [t if d is None or not t.is_floating_point() else t + 0.1 * i for t, d in zip(arguments, dims, strict=True)]
            for i in range(2)
        ]
        stacked = [a if d is None else torch.stack([a, b], dim=d) for a, b, d in zip(*slices, dims, strict=True)]
        for function in (lambda *a: (loss(*a),), grad):
            results = torch.vmap(function, dims)(*stacked)
            for parts in zip(results, *(function(*s) for s in slices), strict=True):
                assert_close(parts[0], torch.stack(parts[1:]))


@pytest.mark.usefixtures("native")
def test_second_derivatives_and_forward_mode_are_refused(device):
    arguments = loss_arguments(device)
    (grad,) = torch.autograd.grad(loss(*arguments), arguments[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"moda_ext\.reference"):
        torch.autograd.grad(grad.sum(), arguments[0])
    query = arguments[0].detach()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: loss(q, *arguments[1:]), (query,), (query,))


@pytest.mark.usefixtures("native")
def test_autocast_casts_query_and_key_only(device):
    arguments = loss_arguments(device)
    query, key, modality, *weights = arguments
    with torch.autocast(device, dtype=torch.bfloat16):
        views, indicator = alignment.duplex_query_views(query, key, modality, modality, *weights, return_indicator=True)
        gram = torch.ops.moda_ext.modality_gram(key, modality.int(), 2, True, 1e-6)
    low = query.bfloat16(), key.bfloat16()
    expected = alignment.duplex_query_views(*low, modality, modality, *weights, return_indicator=True)
    assert views.dtype == torch.bfloat16 and indicator.dtype == gram.dtype == torch.float32
    assert torch.equal(views, expected[0]) and torch.equal(indicator, expected[1])
    assert torch.equal(gram, alignment.modality_gram(low[1], modality, normalize=None))


# Errors


def arguments_of(operator):
    key, ids = torch.randn(2, 2, 7, 16), torch.zeros(2, 7, dtype=torch.int64)
    if operator == "modality_gram":
        return {"key": key, "modality": ids, "num_modalities": 3}
    if operator == "project_queries":
        return {"query": torch.randn(2, 4, 5, 16), "gram": torch.randn(2, 2, 3, 16, 16)}
    causal = {
        "query": torch.randn(2, 4, 5, 16),
        "key": key,
        "query_modality": ids[:, :5],
        "key_modality": ids,
        "num_modalities": 3,
    }
    if operator == "duplex_query_views":
        down, up = torch.randn(3, 16, 4), torch.randn(3, 4, 16)
        causal.update(a1=down, b1=up, a2=down, b2=up)
    return causal


state = (torch.zeros(2, 2, 3, 16, 16), torch.zeros(2, 2, 3))
ERRORS = [
    (("modality_gram",), {"key": [1.0]}, TypeError, "key must be a tensor, got list"),
    (("modality_gram",), {"key": torch.ones(2, 2, 7, 16).int()}, TypeError, "key must have one of the dtypes float32"),
    (("modality_gram",), {"key": torch.randn(2, 7, 16)}, ValueError, r"key must have shape \(B, Hkv, N, D\)"),
    (("modality_gram",), {"key": torch.randn(2, 2, 7, 12)}, NotImplementedError, "key has head size 12"),
    (("modality_gram",), {"modality": torch.zeros(2, 6).long()}, ValueError, r"modality .*\(2, 7\), got \(2, 6\)"),
    (("modality_gram",), {"modality": torch.zeros(2, 7)}, TypeError, "modality must have one of the dtypes int32"),
    (("modality_gram",), {"modality": torch.full((2, 7), 3)}, ValueError, "modality holds 3 at key 0"),
    (("modality_gram",), {"modality": torch.full((2, 7), -2)}, ValueError, "modality holds -2 at key 0"),
    (("modality_gram",), {"include": torch.ones(2, 7)}, TypeError, "include must have one of the dtypes bool"),
    (("modality_gram",), {"include": torch.ones(7).bool()}, ValueError, "include must have the shape"),
    (("modality_gram",), {"num_modalities": 0}, ValueError, "num_modalities must lie in 1 to 16, got 0"),
    (("modality_gram",), {"num_modalities": 2.0}, TypeError, "num_modalities must be an int, got float"),
    (("modality_gram",), {"key_norm": "l1"}, ValueError, "key_norm must be one of 'l2', None, got 'l1'"),
    (("modality_gram",), {"normalize": "max"}, ValueError, "normalize must be one of 'trace', .*got 'max'"),
    (("modality_gram",), {"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
    (("modality_gram",), {"eps": "small"}, TypeError, "eps must be a number, got str"),
    (("project_queries",), {"gram": torch.randn(2, 3, 3, 16, 16)}, ValueError, "multiple of the heads of gram"),
    (("project_queries",), {"gram": torch.randn(2, 2, 3, 16, 8)}, ValueError, "gram must have the batch and head size"),
    (("project_queries",), {"query": torch.randn(4, 5, 16)}, ValueError, r"query must have shape \(B, Hq, Nq, D\)"),
    (BOTH_CAUSAL, {"query": torch.randn(2, 4, 8, 16)}, ValueError, "query must have at most as many tokens as key"),
    (BOTH_CAUSAL, {"query": torch.randn(2, 3, 5, 16)}, ValueError, "multiple of the heads of key"),
    (BOTH_CAUSAL, {"query": torch.randn(2, 4, 5, 8)}, ValueError, "key must have the head size of query"),
    (BOTH_CAUSAL, {"query": torch.randn(2, 4, 5, 16).double()}, TypeError, "key must have the dtype of query"),
    (BOTH_CAUSAL, {"query": torch.randn(3, 4, 5, 16)}, ValueError, "key must have the batch size of query"),
    (BOTH_CAUSAL, {"query_modality": torch.zeros(2, 7).long()}, ValueError, "query_modality must have the shape"),
    (BOTH_CAUSAL, {"key_modality": torch.zeros(2, 5).long()}, ValueError, "key_modality must have the shape"),
    (BOTH_CAUSAL, {"key_modality": torch.full((2, 7), 9)}, ValueError, "key_modality holds 9 at key 0"),
    (BOTH_CAUSAL, {"normalize": "row"}, ValueError, "normalize='row' has no causal form"),
    (BOTH_CAUSAL, {"state": state[0]}, TypeError, r"state must be a pair \(gram, trace\)"),
    (BOTH_CAUSAL, {"state": (state[0][:1], state[1])}, ValueError, r"state\[0\] \(gram\) must have the shape"),
    (BOTH_CAUSAL, {"state": (state[0], state[1].double())}, TypeError, r"state\[1\] \(trace\) must have one of"),
    (BOTH_CAUSAL[1:], {"a1": torch.randn(3, 16)}, ValueError, r"a1 must have shape \(M, D, rank\)"),
    (BOTH_CAUSAL[1:], {"b2": torch.randn(3, 5, 16)}, ValueError, r"b2 must have the shape \(M, rank, D\)"),
    (BOTH_CAUSAL[1:], {"a2": torch.zeros(3, 16, 4).long()}, TypeError, "a2 must have one of the dtypes"),
    (BOTH_CAUSAL[1:], {"a1": torch.randn(3, 16, 129)}, NotImplementedError, "a1 has rank 129.*up to 128"),
]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("operator", "changes", "error", "message"),
    [(operator, *rest) for operators, *rest in ERRORS for operator in operators],
)
def test_wrong_arguments(operator, changes, error, message):
    arguments = {**arguments_of(operator), **changes}
    with pytest.raises(error, match=message) as raised:
        getattr(alignment, operator)(**arguments)
    assert re.match(rf"{operator}: ", str(raised.value))


@pytest.mark.usefixtures("native")
def test_direct_calls_are_checked_too():
    query, key, ids = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.zeros(1, 3, dtype=torch.int32)
    scale = torch.ones(1, 1, 3, 2)
    ops = torch.ops.moda_ext
    for call, message in (
        (lambda: ops.modality_gram(key, ids.long(), 2, True, 1e-6), "modality_gram: modality: expected Int"),
        (lambda: ops.modality_gram(key[..., ::2], ids, 2, True, 1e-6), "key: expected a head size"),
        (
            lambda: ops.causal_gram_projection(query, key, ids, scale[:, :, :2], None, 2, True, 1e-6),
            r"causal_gram_projection: row_scale: expected \(1, 1, 3, 2\)",
        ),
        (
            lambda: ops.causal_gram_projection(query, key, ids, scale, scale, 2, True, 1e-6),
            "causal_gram_projection: initial: expected",
        ),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
