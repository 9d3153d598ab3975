"""The invariants that every implementation of modular attention must satisfy, one test name for each."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cotangents_for, dense, evaluate, make_problem, ours, problems
from tolerance import assert_close, assert_within_rule

from moda_ext import attention, reference

CASES = settings(max_examples=40)
FLOAT32 = {"dtype": torch.float32, "peak": 1.0, "scale": None}


# 1. Without bias, sink and padding it is scaled dot product attention.


@CASES
@given(data=st.data())
def test_plain_call_equals_scaled_dot_product_attention(device, data):
    problem = data.draw(problems(device, bias=None, sink=None, padding="none", views=False, **FLOAT32))
    rows, columns = problem.query.shape[-2], problem.key.shape[-2]
    mask = None
    if problem.is_causal:  # PyTorch's own flag is aligned at the top left; ours at the bottom right
        mask = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1), ("out",))

    def plain(p):
        if p.query.numel() == 0 or columns == 0:
            return dense(p)
        seen = mask is None or mask.any(dim=-1)[:, None]
        out = F.scaled_dot_product_attention(p.query, p.key, p.value, attn_mask=mask, enable_gqa=True)
        return (torch.where(seen, out, 0.0) if problem.is_causal else out, None, None)

    result, expected = evaluate(ours, problem, cotangents), evaluate(plain, problem, cotangents)
    for name in ("out", "gradient of query", "gradient of key", "gradient of value"):
        assert_close(result[name], expected[name], units=512)


def test_zero_bias_and_a_sink_of_minus_infinity_change_nothing(device):
    problem = make_problem(queries=50, keys=50, bias=None, sink=None, is_causal=True, runs="mixed runs", device=device)
    plain = ours(problem)
    problem.modality_bias = torch.zeros(2, device=device)
    problem.sink = torch.full((1,), -torch.inf, device=device)
    for result, expected in zip(ours(problem), plain, strict=True):
        assert_close(result, expected, units=4)


# 2. The closed-form sink is the dense StableMask matrix.


@CASES
@given(
    rows=st.integers(1, 50),
    beyond=st.integers(0, 30),
    decay=st.sampled_from((0.0, 1e-6, 0.1, 0.5, 2.0, 30.0)),
    base=st.sampled_from((0.0, -2.0, 1.5)),
    seed=st.integers(0, 2**16),
)
def test_closed_form_sink_equals_the_dense_stable_mask(device, rows, beyond, decay, base, seed):
    problem = make_problem(queries=rows, keys=rows, bias=None, sink=None, is_causal=True, device=device, seed=seed)
    length = rows + beyond
    problem.sink = attention.pseudo_score_sink(rows, length, decay, base=base, device=device)
    q, k, v = (t.double() for t in (problem.query, problem.key, problem.value))
    scores = F.pad(q @ k.mT * q.shape[-1] ** -0.5, (0, beyond))
    weights = reference.stable_mask_weights(scores, decay, base)
    out, _, mass = ours(problem)
    assert_close(out, weights[..., :rows] @ v)
    assert_close(mass.sum(-1), weights.sum(-1))


# 3. Query views are aligned keys; the joint softmax is the merge of plain attentions; one modality is plain attention.


@CASES
@given(data=st.data())
def test_query_views_equal_aligned_keys(device, data):
    keywords = {"views": False, "padding": "none", "layouts": ("contiguous",) * 3, "batch": 2, **FLOAT32}
    problem = data.draw(problems(device, max_tokens=30, **keywords))
    num, size = problem.num_modalities, problem.query.shape[-1]
    maps = torch.randn(num, size, size, device=device) * size**-0.5  # key j becomes k_j G[a_j]
    key_side = make_copy(problem)
    of_key = maps[problem.key_modality][:, None]  # (B, 1, Nk, D, D)
    key_side.key = (problem.key[..., None, :] @ of_key).squeeze(-2)
    query_side = make_copy(problem)
    query_side.query = torch.stack([problem.query @ maps[m].mT for m in range(num)])  # q . (k G) = (q G^T) . k
    for result, expected in zip(ours(query_side), ours(key_side), strict=True):
        assert_close(result, expected, units=512)


@CASES
@given(data=st.data())
def test_joint_softmax_equals_the_merge_of_plain_attentions(device, data):
    problem = data.draw(problems(device, sink="full", **FLOAT32))
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1))

    def merged(p):
        return reference.merged_attention(*p.positional(), **p.keywords())

    result = evaluate(ours, problem, cotangents)
    expected = evaluate(merged, problem.to(torch.float64), cotangents)
    for name, value in expected.items():
        # Where a modality is hidden from a row its lse is -inf, which the merge differentiates as inf - inf.
        if "gradient" not in name or value.isfinite().all():
            assert_close(result[name], value, units=1024)


@CASES
@given(data=st.data())
def test_one_modality_equals_plain_attention(device, data):
    keywords = {"num_modalities": 1, "views": False, "sink": None, "bias": "full", "padding": "none", **FLOAT32}
    problem = data.draw(problems(device, **keywords))
    with_bias = ours(problem)
    plain = make_copy(problem)
    plain.modality_bias = None
    out, lse, mass = ours(plain)
    assert_close(with_bias[0], out)  # the same number is added to every score of a row
    assert_close(with_bias[1], lse + problem.modality_bias[..., 0])
    assert_close(with_bias[2], mass)


def test_views_that_are_all_the_same_equal_one_query(device):
    problem = make_problem(queries=60, keys=70, num_modalities=3, is_causal=True, runs="mixed runs", device=device)
    views = make_copy(problem)
    views.query = problem.query.expand(3, *problem.query.shape)
    for result, expected in zip(ours(views), ours(problem), strict=True):
        assert_close(result, expected)


# 4. No leak: nothing that comes after a row changes it.


@CASES
@given(data=st.data(), tokens=st.integers(2, 200))
def test_no_leak_from_later_tokens(device, data, tokens):
    keywords = {"batch": 1, "queries": tokens, "keys": tokens, "is_causal": True, "runs": "long runs", **FLOAT32}
    problem = data.draw(problems(device, max_tokens=200, layouts=("contiguous",) * 3, **keywords))
    j = data.draw(st.integers(1, tokens - 1))
    changed = make_copy(problem)
    changed.key, changed.value = problem.key.detach().clone(), problem.value.detach().clone()
    changed.key[..., j:, :] = 1e4
    changed.value[..., j:, :] = -3e3
    for before, after in zip(ours(problem), ours(changed), strict=True):
        dim = before.dim() - 1 - (before.dim() == 4)
        assert torch.equal(before.narrow(dim, 0, j), after.narrow(dim, 0, j))


@CASES
@given(data=st.data(), tokens=st.integers(2, 60))
def test_no_gradient_flows_to_later_tokens(device, data, tokens):
    problem = data.draw(problems(device, batch=1, queries=tokens, keys=tokens, is_causal=True, **FLOAT32))
    j = data.draw(st.integers(1, tokens - 1))
    out, lse, mass = ours(problem)
    loss = out[..., :j, :].sum() + lse[..., :j][lse[..., :j].isfinite()].sum() + mass[..., :j, :].square().sum()
    for grad in torch.autograd.grad(loss, [problem.key, problem.value]):
        assert not grad[..., j:, :].any()


def test_a_later_token_of_another_modality_changes_nothing_before_it(device):
    problem = make_problem(batch=1, queries=90, keys=90, is_causal=True, runs="long runs", device=device)
    changed = make_copy(problem)
    changed.key_modality = problem.key_modality.clone()
    changed.key_modality[:, 60:] = 1 - changed.key_modality[:, 60:].clamp(min=0)
    for before, after in zip(ours(problem), ours(changed), strict=True):
        dim = before.dim() - 1 - (before.dim() == 4)
        assert_close(after.narrow(dim, 0, 60), before.narrow(dim, 0, 60), units=8)


# 5. Prefill in one call, in chunks, and token by token.


@CASES
@given(
    tokens=st.integers(1, 60),
    chunk=st.sampled_from((1, 7, 16)),
    padding=st.sampled_from(("none", "left", "scattered")),
)
def test_chunked_prefill_and_decoding_equal_one_call(device, tokens, chunk, padding):
    problem = make_problem(
        heads=4, kv_heads=2, queries=tokens, keys=tokens, padding=padding, sink=None, is_causal=True, device=device
    )
    decay = torch.tensor([0.5, 0.1, 1.0, 0.0], device=device)

    def piece(start, end):
        return attention.modular_attention(
            problem.query[:, :, start:end],
            problem.key[:, :, :end],
            problem.value[:, :, :end],
            problem.key_modality[:, :end],
            modality_bias=problem.modality_bias[:, :, start:end],
            sink=attention.pseudo_score_sink(end - start, tokens + 5, decay, start=start),
            is_causal=True,
            return_lse=True,
            return_mass=True,
        )

    pieces = [piece(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
    for parts, whole in zip(zip(*pieces, strict=True), piece(0, tokens), strict=True):
        assert_close(torch.cat(parts, dim=2), whole)


# 6. Permuting the batch, or padding, changes nothing for the other tokens.


@CASES
@given(data=st.data())
def test_permuting_the_batch_permutes_the_results(device, data):
    problem = data.draw(problems(device, batch=3, bias="full", sink="full", layouts=("contiguous",) * 3, **FLOAT32))
    order = torch.tensor([2, 0, 1], device=device)
    permuted = problem.map(lambda t: t.index_select(t.dim() - 4 if t.dim() > 3 else 0, order))
    permuted.key_modality = problem.key_modality[order]
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1))
    result = evaluate(ours, permuted, [c[order.cpu()] for c in cotangents])
    for name, value in evaluate(ours, problem, cotangents).items():
        assert_close(result[name], value.index_select(0 if "query" not in name else value.dim() - 4, order), units=8)


@CASES
@given(data=st.data(), left=st.integers(0, 70), right=st.integers(0, 70))
def test_padding_keys_changes_nothing(device, data, left, right):
    """Padding may hold anything, NaN too, and gets gradient 0."""
    problem = data.draw(problems(device, is_causal=False, layouts=("contiguous",) * 3, **FLOAT32))
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1))
    padded = make_copy(problem)
    padded.key, padded.value = (
        F.pad(t.detach(), (0, 0, left, right), value=float("nan")).requires_grad_()
        for t in (problem.key, problem.value)
    )
    padded.key_modality = F.pad(problem.key_modality, (left, right), value=-1)
    result = evaluate(ours, padded, cotangents)
    for name, value in evaluate(ours, problem, cotangents).items():
        if name in ("gradient of key", "gradient of value"):
            value = F.pad(value, (0, 0, left, right))
        assert_close(result[name], value)


@CASES
@given(data=st.data(), tokens=st.integers(1, 40), left=st.integers(0, 40), right=st.integers(0, 40))
def test_padding_a_causal_sequence_changes_nothing(device, data, tokens, left, right):
    keywords = {"queries": tokens, "keys": tokens, "is_causal": True, "bias": "full", "sink": "full", **FLOAT32}
    problem = data.draw(problems(device, layouts=("contiguous",) * 3, **keywords))
    padded = problem.map(lambda t: t)
    pads = {"query": 2, "key": 2, "value": 2, "modality_bias": 2, "sink": 1}
    for name, position in pads.items():
        zeros = (0, 0) * (position - 1)
        setattr(padded, name, F.pad(getattr(problem, name).detach(), (*zeros, left, right), value=1.0))
    padded.key_modality = F.pad(problem.key_modality, (left, right), value=-1)
    for result, value in zip(ours(padded), ours(problem), strict=True):
        assert_close(result.narrow(2, left, tokens), value)


# 7. The masses and the sink's share sum to one; an absent modality has mass exactly 0.


@CASES
@given(data=st.data())
def test_masses_and_sink_share_sum_to_one(device, data):
    problem = data.draw(problems(device))
    _, lse, mass = ours(problem)
    total = mass.sum(-1)
    if problem.sink is not None:
        total = total + torch.where(lse == -torch.inf, 0.0, (problem.sink.to(lse) - lse).exp())
    expected = torch.where(lse == -torch.inf, 0.0, 1.0)
    torch.testing.assert_close(total, expected.to(total), atol=1e-5, rtol=0)
    assert (mass >= 0).all()


@CASES
@given(data=st.data())
def test_mass_of_an_absent_modality_is_exactly_zero(device, data):
    problem = data.draw(problems(device, runs="absent modality"))
    _, _, mass = ours(problem)
    present = (problem.key_modality[..., None] == torch.arange(problem.num_modalities, device=device)).any(dim=1)
    assert not mass.masked_select(~present[:, None, None, :]).any()


@CASES
@given(data=st.data())
def test_a_row_that_sees_nothing_is_zero_and_has_zero_gradients(device, data):
    kind = data.draw(st.sampled_from(("everything hidden", "everything padded", "before the first key", "no keys")))
    keywords = {"queries": 9, "keys": 5, "is_causal": False, "batch": 2}
    if kind == "everything padded":
        keywords["padding"] = "everything"
    if kind == "before the first key":
        keywords["is_causal"] = True
    if kind == "no keys":
        keywords["keys"] = 0
    problem = data.draw(problems(device, **keywords))
    if kind == "everything hidden":
        hidden = torch.full((problem.num_modalities,), -torch.inf, dtype=problem.query.dtype, device=device)
        problem.modality_bias = hidden.requires_grad_()
    blind = 9 if kind != "before the first key" else 4  # 9 queries, 5 keys, aligned at the bottom right
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1))
    cotangents = [torch.cat([c[:, :, :blind], torch.zeros_like(c[:, :, blind:])], dim=2) for c in cotangents]
    results = evaluate(ours, problem, cotangents)
    sink = -torch.inf if problem.sink is None else problem.sink.to(results["lse"])
    assert torch.equal(results["lse"][..., :blind], (sink + torch.zeros_like(results["lse"]))[..., :blind])
    assert not results["out"][..., :blind, :].any()
    assert not results["mass"][..., :blind, :].any()
    for name in ("query", "key", "value", "modality_bias"):
        if f"gradient of {name}" in results:
            assert not results[f"gradient of {name}"].any(), name  # also no NaN
    if problem.sink is not None:  # lse is the sink itself, so its gradient goes there
        grad = results["gradient of sink"]
        assert grad.isfinite().all()


@CASES
@given(data=st.data())
def test_everything_is_finite(device, data):
    problem = data.draw(problems(device, peak=8.0))
    results = evaluate(ours, problem, cotangents_for(problem, torch.Generator().manual_seed(1)))
    for name, value in results.items():
        allowed = value.isfinite() if name != "lse" else ~value.isnan() & (value < torch.inf)
        assert allowed.all(), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bias", (None, 1e3, -1e10, 1e10))
@pytest.mark.parametrize("peak", (1e4, 1e8, 1e9, 3e9, 1e10, 1e18))
def test_scores_whose_rounding_errors_are_large(device, peak, bias, dtype):
    """Around 1e9 a score and the maximum of its row, rounded apart, differ by more than an exponential can hold."""
    shape = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 200, "keys": 200, "head_size": 64}
    sink = None if bias is None else "full"
    problem = make_problem(**shape, peak=peak, dtype=dtype, bias=None, sink=sink, is_causal=True, device=device)
    if bias is not None:  # of one modality
        problem.modality_bias = torch.tensor([0.0, bias], device=device, requires_grad=True)
    results = evaluate(ours, problem, cotangents_for(problem, torch.Generator().manual_seed(1)))
    for name, value in results.items():
        assert value.isfinite().all(), name
    assert (results["mass"].sum(dim=-1) < 1 + 1e-5).all()
    if bias is None:
        q, k, v = (t.detach().double() for t in (problem.query, problem.key, problem.value))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert_close(results["out"], expected, units=2**10 if dtype == torch.float32 else 4)


# 8. Finite differences agree with every gradient, in float64.


@pytest.mark.parametrize("loss", ("out", "lse", "mass"))
@pytest.mark.parametrize("views", (False, True), ids=("one view", "views"))
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("padding", ("none", "scattered"))
def test_finite_differences(device, loss, views, is_causal, padding):
    problem = make_problem(
        heads=4,
        kv_heads=2,
        queries=4,
        keys=6,
        num_modalities=3,
        views=views,
        padding=padding,
        is_causal=is_causal,
        dtype=torch.float64,
        device=device,
    )
    position = ("out", "lse", "mass").index(loss)
    other = problem.num_modalities, problem.is_causal

    def function(query, key, value, modality_bias, sink):
        return attention.modular_attention(
            query,
            key,
            value,
            problem.key_modality,
            num_modalities=other[0],
            modality_bias=modality_bias,
            sink=sink,
            is_causal=other[1],
            return_lse=True,
            return_mass=True,
        )[position]

    assert torch.autograd.gradcheck(function, tuple(problem.leaves().values()))


@pytest.mark.parametrize("bias", ("per modality", "per head", "hidden entries", "hidden rows"))
@pytest.mark.parametrize("sink", ("per head", "partly off"))
def test_gradients_of_broadcast_and_infinite_bias_and_sink(device, bias, sink):
    """Finite differences cannot step from -inf; the oracle can."""
    problem = make_problem(queries=8, keys=9, bias=bias, sink=sink, dtype=torch.float64, device=device)
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1))
    result, expected = evaluate(ours, problem, cotangents), evaluate(dense, problem, cotangents)
    for name, value in expected.items():
        assert_within_rule(name, result[name], value, value)


def make_copy(problem):
    return problem.map(lambda t: t)
