"""DuplexAligner and GramState: the invariants of alignment, one test name for each."""

import copy
import itertools
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close, assert_within_rule, finite_max
from torch._dynamo.testing import CompileCounter

from moda_ext.alignment import DuplexAligner, GramState, causal_gram_projection, gram_indicator, modality_gram
from moda_ext.attention import modular_attention

B, Hq, Hkv, N, D, M = 2, 4, 2, 24, 8, 3
FUSIONS, SCOPES = ("concat", "add"), ("causal", "context", "full")
everywhere = pytest.mark.parametrize(("fusion", "scope"), list(itertools.product(FUSIONS, SCOPES)))


def inputs(device, dtype=torch.float32, tokens=N):
    """query, key and modality in mixed runs, with padding on the left, on the right and in the middle."""
    query = torch.randn(B, Hq, tokens, D, device=device, dtype=dtype)
    key = torch.randn(B, Hkv, tokens, D, device=device, dtype=dtype)
    modality = torch.randint(0, M, (B, (tokens + 2) // 3), device=device).repeat_interleave(3, dim=1)[:, :tokens]
    modality[0, :2] = modality[1, -2:] = modality[1, tokens // 2] = -1
    return query, key, modality


def context(modality):
    """The first half of the tokens."""
    return (torch.arange(modality.shape[1], device=modality.device) < modality.shape[1] // 2).expand_as(modality)


def make_aligner(device, dtype=torch.float32, *, trained=True, **keywords):
    aligner = DuplexAligner(D, M, rank=3, **keywords).to(device, dtype)
    if trained:
        for parameter in aligner.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return aligner


def align(aligner, query, key, modality, **keywords):
    if aligner.scope == "context":
        keywords = {"include": context(modality), **keywords}
    return aligner(query, key, modality, modality, **keywords)


# The identity at the start


@everywhere
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_a_new_aligner_is_the_identity_bit_for_bit(device, fusion, scope, dtype):
    query, key, modality = inputs(device, dtype)
    aligner = make_aligner(device, torch.float32, fusion=fusion, scope=scope, trained=False)
    views = align(aligner, query, key, modality)
    assert views.dtype == dtype
    assert torch.equal(views, query.expand(M, *query.shape))
    if scope != "causal":
        include = context(modality) if scope == "context" else None
        assert torch.equal(aligner.align_keys(key, modality, include), key)


def test_a_new_aligner_can_learn(device):
    """At the identity the gradient is not zero, neither for what a token gives itself nor for what others give it."""
    query, key, modality = inputs(device)
    for fusion, names in (("concat", {"b1", "b2"}), ("add", {"b1", "ratio"})):
        aligner = make_aligner(device, fusion=fusion, trained=False)
        align(aligner, query, key, modality).square().sum().backward()
        assert {name for name, p in aligner.named_parameters() if p.grad is not None and p.grad.any()} == names


def test_keys_that_are_not_contiguous_have_a_frobenius_norm(device):
    query, key, modality = inputs(device)
    aligner = make_aligner(device, normalize="frobenius")
    strided = key.mT.contiguous().mT
    assert_close(align(aligner, query, strided, modality), align(aligner, query, key, modality))


def test_a_key_beyond_the_range_of_squares_is_left_out_of_the_gram(device):
    query, key, modality = inputs(device, tokens=100)
    modality = modality.clamp(min=0)
    key[:, :, 50] = 3e19
    aligner = make_aligner(device, scope="full")
    expected = aligner.align_keys(key, modality).detach()
    with torch.no_grad():
        aligned = aligner.align_keys(key, modality)
    others = torch.arange(100, device=device) != 50
    assert aligned.isfinite().all()
    torch.testing.assert_close(aligned[:, :, others], expected[:, :, others], rtol=1e-4, atol=1e-5)


# The equations, token by token


def gram_of(keys, modality, key_norm, normalize):
    """Ghat of each modality from (n, D) keys and (n,) modalities."""
    grams = []
    for m in range(M):
        chosen = keys[modality == m]
        chosen = F.normalize(chosen, dim=-1) if key_norm == "l2" else chosen
        gram = chosen.mT @ chosen
        if len(chosen):
            gram = (
                gram
                / {
                    "trace": gram.trace(),
                    "frobenius": gram.norm(),
                    "row": gram.norm(dim=1, keepdim=True),
                }[normalize]
            )
        grams.append(gram)
    return grams


CASES = itertools.product(FUSIONS, SCOPES, ("trace", "frobenius", "row"))


@pytest.mark.parametrize(
    ("fusion", "scope", "normalize"),
    [case for case in CASES if case[1:] != ("causal", "row")],  # a row norm has no causal form
)
@pytest.mark.parametrize("key_norm", ("l2", None))
def test_views_follow_the_equations(device, fusion, scope, normalize, key_norm):
    """q . k' with k' from Eq. 5-6, for every pair (query, key), with a Gram for every query."""
    query, key, modality = inputs(device, torch.float64, tokens=9)
    aligner = make_aligner(device, torch.float64, fusion=fusion, scope=scope, normalize=normalize, key_norm=key_norm)
    views, indicator = align(aligner, query, key, modality, return_indicator=True)
    a1, b1 = aligner.a1, aligner.b1
    for b, h, i in itertools.product(range(B), (0, 3), range(9)):
        if modality[b, i] < 0:
            continue
        k, a = key[b, h // (Hq // Hkv)], modality[b]
        inside = {"causal": slice(0, i + 1), "context": slice(0, 4), "full": slice(None)}[scope]
        grams = gram_of(k[inside], a[inside], key_norm, normalize)
        for j in range(9):
            m = int(a[j])
            if m < 0:
                continue
            u = sum(k[j] @ grams[other] for other in range(M) if other != m)
            if fusion == "concat":
                aligned = k[j] + k[j] @ a1[m] @ b1[m] + u @ aligner.a2[m] @ aligner.b2[m]
            else:
                aligned = (k[j] + aligner.ratio[m] * u) @ (torch.eye(D, device=device) + a1[m] @ b1[m])
            assert_close(views[m, b, h, i] @ k[j], query[b, h, i] @ aligned)
        unit = F.normalize(query[b, h, i], dim=0)
        assert_close(indicator[b, h, i], torch.stack([unit @ gram @ unit for gram in grams]))


# Key side and query side


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("scope", ("context", "full"))
@pytest.mark.parametrize("normalize", ("trace", "frobenius", "row"))
def test_key_side_equals_query_side(device, fusion, scope, normalize):
    query, key, modality = inputs(device)
    value = torch.randn_like(key)
    aligner = make_aligner(device, fusion=fusion, scope=scope, normalize=normalize)
    include = context(modality) if scope == "context" else None
    keywords = {"num_modalities": M, "is_causal": True}
    query_side = modular_attention(align(aligner, query, key, modality), key, value, modality, **keywords)
    aligned = aligner.align_keys(key, modality, include)
    assert not torch.allclose(aligned, key)
    assert_close(query_side, modular_attention(query, aligned, value, modality, **keywords))


fused_device = pytest.mark.parametrize("device", ("cpu",))  # the fused operator has kernels on the CPU alone

# Tiles are used from 64 keys on; A2^T G is made of the keys or of the Gram, whichever is less.
ALIGNED_KEYS = {
    "few keys": {"tokens": 30},
    "one modality": {"num_modalities": 1},
    "odd sizes": {"head_dim": 40, "rank": 5},
    "small heads": {"head_dim": 8, "rank": 3, "num_modalities": 3},
    "wide": {"head_dim": 256, "rank": 128},
    "three": {"head_dim": 128, "rank": 17, "num_modalities": 3},
    "by the rank": {"head_dim": 128, "rank": 33},
    "long": {"head_dim": 64, "rank": 16, "tokens": 1500},
}


@pytest.mark.usefixtures("native", "two_threads")
@fused_device
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("normalize", ("trace", "frobenius", "row"))
@pytest.mark.parametrize("shape", ALIGNED_KEYS.values(), ids=ALIGNED_KEYS)
def test_keys_aligned_in_one_step_are_as_accurate_as_the_composition(device, shape, normalize, dtype):
    """Keys of both layouts, some outside the context, and padding that holds NaN."""
    shape = {"tokens": 150, "head_dim": 64, "rank": 4, "num_modalities": 2, **shape}
    tokens, head_dim, modalities = shape["tokens"], shape["head_dim"], shape["num_modalities"]
    keywords = {"rank": shape["rank"], "normalize": normalize}
    for key_norm, scope, tokens_first in (("l2", "full", True), (None, "context", False)):
        aligner = DuplexAligner(head_dim, modalities, scope=scope, key_norm=key_norm, **keywords).to(device)
        for parameter in (aligner.b1, aligner.b2):
            torch.nn.init.normal_(parameter, std=shape["rank"] ** -0.5)
        key = torch.randn(2, tokens, 3, head_dim, device=device).to(dtype).transpose(1, 2)
        key = key if tokens_first else key.contiguous()
        modality = torch.randint(-1, modalities, (2, tokens), device=device)
        padding = (modality < 0)[:, None, :, None]
        key = key.masked_fill(padding, float("nan"))
        include = torch.rand(2, tokens, device=device) < 0.7 if scope == "context" else None

        def without_padding(aligned, padding=padding):
            assert aligned.masked_select(padding).isnan().all()
            return aligned.masked_fill(padding, 0.0)

        expected = without_padding(copy.deepcopy(aligner).double().align_keys(key.double(), modality, include))
        sums = aligner.double() if dtype == torch.float64 else aligner
        composed = without_padding(sums.align_keys(key, modality, include)).detach()
        assert composed.shape == key.shape
        with torch.no_grad(), mock.patch.object(DuplexAligner, "_factors", side_effect=AssertionError("composed")):
            result = sums.align_keys(key, modality, include)
            assert result.dtype == dtype and result.stride() == torch.empty_like(key).stride()
            result = without_padding(result)
        assert_within_rule(f"{key_norm} {scope}", result, expected, composed, finite_max(expected))
        assert not torch.allclose(result, key.masked_fill(padding, 0.0))


def fused_calls(function):
    """How often a call runs the fused operator."""
    with torch.profiler.profile() as profile:
        result = function()
    return result, sum(event.name == "moda_ext::duplex_aligned_keys" for event in profile.events())


@pytest.mark.usefixtures("native")
@fused_device
def test_keys_are_aligned_in_one_step_where_no_gradient_is_asked_for(device):
    _, key, modality = inputs(device)
    aligner = make_aligner(device, scope="full")
    composed, count = fused_calls(lambda: aligner.align_keys(key, modality))
    assert count == 0 and composed.requires_grad
    with torch.no_grad():
        result, count = fused_calls(lambda: aligner.align_keys(key, modality))
        assert count == 1
        with torch.autocast(device, dtype=torch.bfloat16):
            cast, count = fused_calls(lambda: aligner.align_keys(key, modality))
        assert count == 0 and cast.dtype == key.dtype
        added = make_aligner(device, scope="full", fusion="add")
        assert fused_calls(lambda: added.align_keys(key, modality))[1] == 0
    assert_close(result, composed)
    with pytest.raises(NotImplementedError, match=r"duplex_aligned_keys has no derivative; .*align_keys has"):
        weights = (aligner.a1, aligner.b1, aligner.a2, aligner.b2)
        direct = torch.ops.moda_ext.duplex_aligned_keys(key, modality.int(), None, *weights, M, True, 1e-6, 0)
        direct.sum().backward()


@pytest.mark.usefixtures("native")
def test_aligned_keys_under_transformations(device):
    """vmap, torch.compile and torch.export, without a gradient and with one, and direct calls under autocast."""
    _, key, modality = inputs(device)
    aligner = make_aligner(device, scope="context")
    include = context(modality)
    expected = aligner.align_keys(key, modality, include)
    call = aligner.align_keys
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(enabled):
            assert_close(compiled(key, modality, include), expected)
            mapped = torch.vmap(call)(key[:, None], modality[:, None], include[:, None])
            assert_close(mapped[:, 0], expected)
    if device != "cpu":
        return

    class Aligned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.aligner = aligner

        def forward(self, *arguments):
            return self.aligner.align_keys(*arguments)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = (({2: tokens}, {1: tokens}, {1: tokens}),)
    with torch.no_grad():
        program = torch.export.export(Aligned(), (key, modality, include), dynamic_shapes=shapes, strict=False)
        assert "moda_ext.duplex_aligned_keys.default" in {str(node.target) for node in program.graph.nodes}
        cut = key[:, :, :9], modality[:, :9], include[:, :9]
        assert_close(program.module()(*cut), call(*cut))
        weights = (aligner.a1, aligner.b1, aligner.a2, aligner.b2)
        options = (*weights, M, True, 1e-6, 0)
        op, ids = torch.ops.moda_ext.duplex_aligned_keys, modality.int()
        with torch.autocast(device, dtype=torch.bfloat16):
            cast = op(key, ids, include, *options)
        assert cast.dtype == torch.bfloat16 and torch.equal(cast, op(key.bfloat16(), ids, include, *options))
        mapped = torch.vmap(op, (0, 0, 0, *(None,) * 8))(key[:, None], ids[:, None], include[:, None], *options)
        assert torch.equal(mapped[:, 0], op(key, ids, include, *options))


@pytest.mark.usefixtures("native")
def test_direct_calls_for_aligned_keys_are_checked():
    key, ids = torch.randn(1, 1, 3, 8), torch.zeros(1, 3, dtype=torch.int32)
    down, up = torch.randn(2, 8, 4), torch.randn(2, 4, 8)
    op = torch.ops.moda_ext.duplex_aligned_keys
    for arguments, message in (
        ((ids, None, down, up, down, up, 2, True, 1e-6, 3), "normalization: expected 0 to 2, got 3"),
        ((ids, ids, down, up, down, up, 2, True, 1e-6, 0), "include: expected Bool"),
        ((ids, None, down, up, down, up[:, :3], 2, True, 1e-6, 0), "b2: expected"),
        ((ids + 2, None, down, up, down, up, 2, True, 1e-6, 0), "holds 2 at key 0"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"duplex_aligned_keys: .*{message}"):
            op(key, *arguments)


def test_one_modality_has_nothing_to_align_with(device):
    query, key, _ = inputs(device)
    modality = torch.zeros(B, N, dtype=torch.int64, device=device)
    for fusion, scope in itertools.product(FUSIONS, ("causal", "full")):
        aligner = DuplexAligner(D, 1, fusion=fusion, scope=scope).to(device)
        torch.nn.init.normal_(aligner.b1)
        views = aligner(query, key, modality, modality)
        assert_close(views[0], query + query @ (aligner.a1[0] @ aligner.b1[0]).mT)


# No leak


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("tokens", "j"), ((N, 1), (N, 9), (N, N - 1), (300, 63), (300, 64), (300, 130), (300, 257)))
def test_no_leak_from_later_tokens_bit_for_bit(device, fusion, tokens, j):
    query, key, modality = inputs(device, tokens=tokens)
    aligner = make_aligner(device, fusion=fusion)
    before = align(aligner, query, key, modality, return_indicator=True)
    query, key, modality = query.clone(), key.clone(), modality.clone()
    query[:, :, j:], key[:, :, j:] = -1e3, 1e4
    modality[:, j:] = (modality[:, j:] + 1) % M
    after = align(aligner, query, key, modality, return_indicator=True)
    assert torch.equal(before[0][:, :, :, :j], after[0][:, :, :, :j])
    assert torch.equal(before[1][:, :, :j], after[1][:, :, :j])
    assert not torch.equal(before[0], after[0])


def test_no_leak_from_outside_the_context(device):
    query, key, modality = inputs(device)
    aligner = make_aligner(device, scope="context")
    before = align(aligner, query, key, modality)
    changed = torch.where(context(modality)[:, None, :, None], key, 7.0)
    assert torch.equal(before, align(aligner, query, changed, modality))


def test_full_scope_does_look_at_everything(device):
    """What the causal scope is for: the Gram as printed lets the last key into the first view."""
    query, key, modality = inputs(device)
    aligner = make_aligner(device, scope="full")
    changed = key.clone()
    changed[:, :, -1] = 7.0
    before, after = align(aligner, query, key, modality), align(aligner, query, changed, modality)
    assert not torch.equal(before[:, 0, :, 2], after[:, 0, :, 2])


# Prefill = chunks = token by token


def decode(aligner, query, key, modality, pieces, state=None):
    """Views and indicator over pieces of the given lengths, concatenated, and the last state."""
    results, start = [], 0
    for length in pieces:
        part = slice(start, start + length)
        *result, state = aligner(
            query[:, :, part],
            key[:, :, part],
            modality[:, part],
            modality[:, part],
            state,
            return_indicator=True,
            return_state=True,
        )
        results.append(result)
        start += length
    views, indicators = zip(*results, strict=True)
    return torch.cat(views, dim=3), torch.cat(indicators, dim=2), state


def empty_state(key, modality, window):
    return GramState.from_keys(key[:, :, :0], modality[:, :0], M, window=window)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("normalize", ("trace", "frobenius"))
@pytest.mark.parametrize("window", (0, 5, 64))
@pytest.mark.parametrize(
    "pieces", ((24,), (10, 1, 13), (1,) * 24, (90, 1, 64, 75)), ids=("prefill", "chunks", "tokens", "long chunks")
)
def test_chunks_and_tokens_equal_one_call(device, fusion, normalize, window, pieces):
    tokens = sum(pieces)
    query, key, modality = inputs(device, tokens=tokens)
    aligner = make_aligner(device, fusion=fusion, normalize=normalize)
    expected = align(aligner, query, key, modality, return_indicator=True)
    state = empty_state(key, modality, window)
    views, indicator, state = decode(aligner, query, key, modality, pieces, state)
    assert_close(views, expected[0])
    assert_close(indicator, expected[1])
    assert state.length == tokens
    assert state.key.shape[2] == min(window, tokens)
    assert state.gram.any() == (window < tokens)


def test_decoding_goes_on_after_reorder_and_crop(device):
    """Beam search and speculative decoding: the continued state is that of the tokens that are left."""
    query, key, modality = inputs(device)
    aligner = make_aligner(device)
    _, _, state = decode(aligner, query, key, modality, (6,) * 3, empty_state(key, modality, 5))
    untouched = state.gram.clone(), state.key.clone(), state.length
    order = torch.tensor([1, 1, 0], device=device)
    branch = state.reorder(order).crop(14)
    beams = [torch.cat([t[order][..., :14, :], torch.randn_like(t[order][..., 14:, :])], dim=-2) for t in (query, key)]
    ids = modality[order]
    result = decode(aligner, *(t[..., 14:, :] for t in beams), ids[:, 14:], (3, 7), branch)
    expected = align(aligner, *beams, ids, return_indicator=True)
    assert_close(result[0], expected[0][..., 14:, :])
    assert_close(result[1], expected[1][..., 14:, :])
    assert result[2].length == N
    assert torch.equal(state.gram, untouched[0])
    assert torch.equal(state.key, untouched[1])
    assert state.length == untouched[2]


def test_crop_is_exact_within_the_window_and_refuses_beyond(device):
    _, key, modality = inputs(device)
    state = GramState.from_keys(key[:, :, :20], modality[:, :20], M, window=8)
    longer = state.append(key[:, :, 20:], modality[:, 20:])
    back = longer.crop(20)
    total = [modality_gram(*s.with_recent(key[:, :, :0], modality[:, :0]), M, normalize=None) for s in (back, state)]
    assert_close(back.gram + total[0], state.gram + total[1])
    assert torch.equal(longer.crop(16).gram, longer.gram)  # nothing is subtracted
    assert longer.crop(N).length == N
    with pytest.raises(ValueError, match=r"cannot crop to length 15, only to 16 or more.*GramState.from_keys"):
        longer.crop(15)
    with pytest.raises(ValueError, match="length must lie in 0 to 24, got 25"):
        longer.crop(25)
    rebuilt = GramState.from_keys(key[:, :, :15], modality[:, :15], M, window=8)
    assert (rebuilt.length, rebuilt.key.shape[2]) == (15, 8)


def test_state_holds_sums_and_their_trace(device):
    _, key, modality = inputs(device)
    state = GramState.from_keys(key, modality, M, window=0)
    assert_close(state.gram, modality_gram(key, modality, M, normalize=None))
    counts = torch.stack([(modality == m).sum(dim=1) for m in range(M)], dim=-1)
    assert_close(state.trace, counts[:, None].expand(B, Hkv, M).float())


def test_state_is_float32_for_low_precision_keys(device):
    _, key, modality = inputs(device, torch.bfloat16)
    state = GramState.from_keys(key, modality, M, window=4)
    assert (state.gram.dtype, state.key.dtype) == (torch.float32, torch.bfloat16)


def test_state_moves_detaches_and_is_a_pytree(device):
    _, key, modality = inputs(device)
    state = GramState.from_keys(key.requires_grad_(), modality, M, window=4)
    assert state.gram.requires_grad
    assert state.key.requires_grad
    detached = state.detach()
    assert not detached.gram.requires_grad
    assert not detached.key.requires_grad
    assert detached.to("meta").gram.device.type == "meta"
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    rebuilt = torch.utils._pytree.tree_unflatten([2 * leaf for leaf in leaves], spec)
    assert torch.equal(rebuilt.gram, 2 * state.gram)
    assert (rebuilt.length, rebuilt.key_norm, rebuilt.window) == (2 * N, "l2", 4)


def test_gradients_flow_through_the_state(device):
    """Two chunks with a state in between have the gradients of one call."""
    query, key, modality = inputs(device, torch.float64)
    leaves = query.requires_grad_(), key.requires_grad_()
    aligner = make_aligner(device, torch.float64)
    weight = torch.randn(M, B, Hq, N, D, device=device, dtype=torch.float64)
    grads = []
    for pieces in ((N,), (9, 15)):
        views, indicator, _ = decode(aligner, query, key, modality, pieces, empty_state(key, modality, 4))
        loss = (views * weight).sum() + indicator.square().sum()
        grads.append(torch.autograd.grad(loss, (*leaves, *aligner.parameters())))
    for one, two in zip(*grads, strict=True):
        assert_close(two, one)


def test_context_gram_stays_fixed_while_decoding(device):
    query, key, modality = inputs(device)
    aligner = make_aligner(device, scope="context")
    expected, indicator = align(aligner, query, key, modality, return_indicator=True)
    half = slice(0, N // 2)
    first = query[:, :, half], key[:, :, half], modality[:, half], modality[:, half]
    views, state = aligner(*first, include=context(modality)[:, half], return_state=True)
    assert_close(views, expected[:, :, :, half])
    gram = state.gram
    for i in range(N // 2, N):
        one = slice(i, i + 1)
        token = query[:, :, one], key[:, :, one], modality[:, one], modality[:, one]
        views, e, state = aligner(*token, state, return_indicator=True, return_state=True)
        assert_close(views, expected[:, :, :, one])
        assert_close(e, indicator[:, :, one])
    assert state.gram is gram


# Batch and padding


@everywhere
def test_permuting_the_batch_permutes_the_views(device, fusion, scope):
    query, key, modality = inputs(device)
    aligner = make_aligner(device, fusion=fusion, scope=scope)
    views = align(aligner, query, key, modality)
    assert_close(align(aligner, query.flip(0), key.flip(0), modality.flip(0)), views.flip(1))


@everywhere
@pytest.mark.parametrize(("left", "right"), ((5, 0), (0, 5), (3, 70)))
def test_padding_on_either_side_changes_nothing(device, fusion, scope, left, right):
    """Padded keys may hold anything, NaN too, and get gradient 0."""
    query, key, modality = inputs(device)
    aligner = make_aligner(device, fusion=fusion, scope=scope)
    include = {"include": context(modality)} if scope == "context" else {}
    expected = align(aligner, query, key, modality, return_indicator=True, **include)
    if include:
        include["include"] = F.pad(include["include"], (left, right), value=True)
    padded_key = F.pad(key, (0, 0, left, right), value=float("nan")).requires_grad_()
    padded = F.pad(query, (0, 0, left, right), value=1.0), padded_key, F.pad(modality, (left, right), value=-1)
    views, indicator = align(aligner, *padded, return_indicator=True, **include)
    inside = slice(left, left + N)
    assert_close(views[:, :, :, inside], expected[0])
    assert_close(indicator[:, :, inside], expected[1])
    (grad,) = torch.autograd.grad(views[:, :, :, inside].square().sum(), padded_key)
    assert grad.isfinite().all()
    assert not grad[:, :, :left].any()
    assert not grad[:, :, left + N :].any()


@everywhere
def test_an_absent_modality_is_zero_and_never_nan(device, fusion, scope):
    query, key, _ = inputs(device)
    query.requires_grad_(), key.requires_grad_()
    modality = torch.ones(B, N, dtype=torch.int64, device=device)  # M = 3, two of them absent
    aligner = make_aligner(device, fusion=fusion, scope=scope)
    views, indicator = align(aligner, query, key, modality, return_indicator=True)
    assert not indicator[..., [0, 2]].any()
    assert_close(views[1], query + query @ (aligner.a1[1] @ aligner.b1[1]).mT)
    grads = torch.autograd.grad(views.sum() + indicator.sum(), (query, key, *aligner.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


# Gradients


@everywhere
@pytest.mark.parametrize("normalize", ("trace", "frobenius"))
def test_finite_differences(device, fusion, scope, normalize):
    """For queries, keys and every weight, through views and indicator."""
    query, key, modality = inputs(device, torch.float64, tokens=5)
    aligner = make_aligner(device, torch.float64, fusion=fusion, scope=scope, normalize=normalize)
    names, parameters = zip(*aligner.named_parameters(), strict=True)
    query, key, modality = query[:1, :2], key[:1, :1], modality[1:]

    def function(query, key, *values):
        keywords = {"include": context(modality)} if scope == "context" else {}
        return torch.func.functional_call(
            aligner,
            dict(zip(names, values, strict=True)),
            (query, key, modality, modality),
            {"return_indicator": True, **keywords},
        )

    leaves = query.requires_grad_(), key.requires_grad_(), *parameters
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# The fused step and its parts


@pytest.mark.parametrize("normalize", ("trace", "frobenius"))
def test_fused_views_equal_the_projection_and_the_fuser(device, normalize):
    """What duplex_query_views does in one step, from causal_gram_projection and plain products."""
    query, key, modality = inputs(device)
    aligner = make_aligner(device, normalize=normalize)
    views, indicator = align(aligner, query, key, modality, return_indicator=True)
    keywords = {"normalize": normalize}
    for a in range(M):
        crossed = query @ (aligner.a2[a] @ aligner.b2[a]).mT
        projection = causal_gram_projection(crossed, key, modality, modality, M, **keywords)
        others = sum(projection[m] for m in range(M) if m != a)
        assert_close(views[a], query + query @ (aligner.a1[a] @ aligner.b1[a]).mT + others)
    projection = causal_gram_projection(query, key, modality, modality, M, **keywords)
    assert_close(indicator, gram_indicator(query, projection))


@everywhere
def test_low_precision_is_rounded_once(device, fusion, scope):
    query, key, modality = inputs(device, torch.bfloat16)
    aligner = make_aligner(device, fusion=fusion, scope=scope)
    low = align(aligner, query, key, modality)
    high = align(aligner, query.float(), key.float(), modality)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=2**-8, atol=1e-5)


# torch.compile and torch.export


def test_decoding_compiles_without_graph_breaks(device):
    torch._dynamo.reset()
    query, key, modality = inputs(device)
    aligner = make_aligner(device)
    expected = align(aligner, query, key, modality)
    counter = CompileCounter()
    compiled = torch.compile(aligner, fullgraph=True, backend=counter)
    state = empty_state(key, modality, 5)
    views = []
    for i in range(0, N, 4):
        part = slice(i, i + 4)
        chunk = query[:, :, part], key[:, :, part], modality[:, part], modality[:, part]
        result, state = compiled(*chunk, state, return_state=True)
        views.append(result)
    assert_close(torch.cat(views, dim=3), expected)
    assert counter.frame_count <= 2  # the length of the state is no constant of the graph


def test_a_decoding_step_exports(device):
    query, key, modality = inputs(device)
    aligner = make_aligner(device).eval()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.aligner = aligner

        def forward(self, query, key, modality, state):
            return self.aligner(query, key, modality, modality, state, return_state=True)

    state = GramState.from_keys(key[:, :, :-1], modality[:, :-1], M, window=4)
    token = query[:, :, -1:], key[:, :, -1:], modality[:, -1:]
    views, after = torch.export.export(Step(), (*token, state)).module()(*token, state)
    assert_close(views, align(aligner, query, key, modality)[:, :, :, -1:])
    assert isinstance(after, GramState)
    assert after.length == N


# Errors


CONSTRUCTOR = [
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"num_modalities": 0}, "num_modalities must lie in 1 to 16, got 0"),
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"fusion": "mul"}, "fusion must be one of .*got 'mul'"),
    ({"scope": "prompt"}, "scope must be one of .*got 'prompt'"),
    ({"key_norm": "l1"}, "key_norm must be one of .*got 'l1'"),
    ({"normalize": None}, "normalize must be one of .*got None"),
    ({"normalize": "row"}, "normalize='row' has no causal form"),
]


@pytest.mark.parametrize(("changes", "message"), CONSTRUCTOR)
def test_constructor_error(changes, message):
    with pytest.raises(ValueError) as caught:
        DuplexAligner(**{"head_dim": D, "num_modalities": M, **changes})
    assert re.search("^DuplexAligner: " + message, str(caught.value)), str(caught.value)


def test_forward_errors(device):
    query, key, modality = inputs(device)
    state = GramState.from_keys(key, modality, M)
    causal, fixed, full = (make_aligner(device, scope=scope) for scope in SCOPES)
    raw = make_aligner(device, key_norm=None)
    cases = (
        (lambda: causal(query[..., :4], key, modality, modality), r"query must have shape \(B, Hq, Nq, 8\)"),
        (lambda: causal(query[:, :3], key, modality, modality), "key must have shape .*Hkv a divisor of 3"),
        (lambda: causal(query, key, modality, modality, include=modality > 0), "include belongs to scope='context'"),
        (lambda: causal.align_keys(key, modality), "align_keys has no causal form"),
        (lambda: fixed(query, key, modality, modality), "context scope needs include in the first call"),
        (
            lambda: fixed(query, key, modality, modality, state),
            "state must be of .*'context', got .*a running Gram",
        ),
        (lambda: raw(query, key, modality, modality, state), "state must be of key_norm=None .*got key_norm='l2'"),
        (lambda: full(query, key, modality, modality, state), "full scope .*has no state"),
        (lambda: full(query, key, modality, modality, return_state=True), "full scope .*has no state"),
        (lambda: GramState.from_keys(key, modality, M, window=-1), "window must be at least 0 or None, got -1"),
        (lambda: GramState.from_keys(key, modality, M, include=modality > 0), "include belongs to a fixed Gram"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
