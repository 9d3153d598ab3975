"""ModularDuplexAttention: the invariants at the level of the layer, and a small model that uses it for everything."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounter

from moda_ext.alignment import GramState
from moda_ext.attention import AttentionState, ModularDuplexAttention, modular_attention

B, N, E, M = 2, 20, 32, 2
HEADS = {"num_heads": 4, "num_kv_heads": 2}
OFF = {"base": -math.inf}  # a mask without pseudo scores


def inputs(device, dtype=torch.float32, tokens=N):
    x = torch.randn(B, tokens, E, device=device, dtype=dtype)
    modality = torch.arange(tokens, device=device) // 6 % 2 * torch.ones(B, 1, dtype=torch.int64, device=device)
    return x, modality


def make_layer(device, dtype=torch.float32, *, trained=True, **keywords):
    """A layer in which everything has been trained to something."""
    layer = ModularDuplexAttention(E, **{**HEADS, "aligner": {"rank": 3}, "mask": {"length": 32}, **keywords})
    for name, parameter in layer.named_parameters():
        if trained and not name.endswith("_proj.weight"):
            nn.init.normal_(parameter, std=0.5)
    return layer.to(device, dtype)


# The identity at the start


@pytest.mark.parametrize("fusion", ("concat", "add"))
@pytest.mark.parametrize("variant", ("inf", "fix", "attn"))
@pytest.mark.parametrize("is_causal", (True, False), ids=("causal", "full"))
def test_with_and_without_moda_is_the_same_at_the_start(device, fusion, variant, is_causal):
    """A pretrained layer that gets aligner and mask does not move, and neither do its gradients."""
    plain = make_layer(device, aligner=False, mask=False, is_causal=is_causal, bias=True)
    moda = make_layer(
        device,
        trained=False,
        aligner={"fusion": fusion},
        mask={"variant": variant, **OFF},
        is_causal=is_causal,
        bias=True,
    )
    missing, unexpected = moda.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith(("aligner.", "mask.")) for name in missing)
    assert not unexpected
    x, modality = inputs(device)
    x.requires_grad_()
    out, mass = plain(x, modality, return_mass=True)
    same_out, same_mass = moda(x, modality, return_mass=True)
    assert_close(same_out, out, units=4)
    assert_close(same_mass, mass, units=4)
    grads = (torch.autograd.grad(o.square().sum(), x)[0] for o in (same_out, out))
    assert_close(*grads)


def test_the_default_mask_is_no_identity(device):
    x, modality = inputs(device)
    plain = make_layer(device, aligner=False, mask=False)
    moda = make_layer(device, trained=False, aligner=True, mask=True)
    moda.load_state_dict(plain.state_dict(), strict=False)
    assert (moda(x, modality) - plain(x, modality)).abs().max() > 1e-2


def test_without_moda_it_is_rotary_attention(device):
    """Projections, RoPE and GQA, written out."""
    layer = make_layer(device, torch.float64, aligner=False, mask=False, rope_base=100.0)
    x, modality = inputs(device, torch.float64)
    query, key, value = (
        F.linear(x, p.weight).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )

    def rotate(t):
        pairs = torch.complex(*t.chunk(2, dim=-1))
        angle = torch.arange(N, device=device, dtype=torch.float64)[:, None] * 100.0 ** (
            -torch.arange(4, device=device, dtype=torch.float64) / 4
        )
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    out = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True, enable_gqa=True)
    assert_close(layer(x, modality), F.linear(out.transpose(1, 2).flatten(2), layer.o_proj.weight))


# No leak


@pytest.mark.parametrize("softmax", ("joint", "split"))
@pytest.mark.parametrize(("tokens", "j"), ((N, 1), (N, 7), (N, N - 1), (200, 64), (200, 150)))
def test_no_leak_from_later_tokens_bit_for_bit(device, softmax, tokens, j):
    layer = make_layer(device, mask={"softmax": softmax, "length": 32})
    x, modality = inputs(device, tokens=tokens)
    out, mass = layer(x, modality, return_mass=True)
    changed, other = x.clone(), modality.clone()
    changed[:, j:] = -5.0
    for ids in (modality, torch.cat([other[:, :j], 1 - other[:, j:]], dim=1)):
        # Other runs of modalities are another layout of the attention's blocks: equal but for rounding.
        out_changed, mass_changed = layer(changed, ids, return_mass=True)
        assert_close(out[:, :j], out_changed[:, :j], units=0 if ids is modality else 8)
        assert_close(mass[:, :, :j], mass_changed[:, :, :j], units=0 if ids is modality else 8)
        assert not torch.equal(out, out_changed)


def test_no_gradient_flows_to_later_tokens(device):
    layer = make_layer(device)
    x, modality = inputs(device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, modality)[:, :7].square().sum(), x)
    assert grad[:, :7].any()
    assert not grad[:, 7:].any()


# Prefill = chunks = token by token


@pytest.mark.parametrize("softmax", ("joint", "split"))
@pytest.mark.parametrize("finite", (False, True), ids=("any length", "finite length"))
@pytest.mark.parametrize("padding", ("none", "left", "right", "middle"))
def test_chunks_and_tokens_equal_one_call(device, softmax, finite, padding):
    tokens = 80 if softmax == "joint" else N  # 80: more than the Gram's window of recent tokens
    layer = make_layer(device, mask={"softmax": softmax, "length": tokens + 2 if finite else None})
    x, modality = inputs(device, tokens=tokens)
    modality[0, {"none": [], "left": [0, 1, 2], "right": [-1, -2], "middle": [9, 10]}[padding]] = -1
    out, mass = layer(x, modality, return_mass=True)
    for pieces in ((tokens // 2, 1, tokens - tokens // 2 - 1), (1,) * tokens):
        state = AttentionState()
        results = [
            layer(a, b, state=state, return_mass=True)
            for a, b in zip(x.split(pieces, dim=1), modality.split(pieces, dim=1), strict=True)
        ]
        assert_close(torch.cat([r[0] for r in results], dim=1), out)
        assert_close(torch.cat([r[1] for r in results], dim=2), mass)
        assert state.length == tokens


@torch.no_grad()
def test_decoding_compiles_without_graph_breaks(device):
    torch._dynamo.reset()
    layer = make_layer(device)
    x, modality = inputs(device)
    state = AttentionState()
    layer(x[:, :10], modality[:, :10], state=state)
    counter = CompileCounter()
    step = torch.compile(layer, fullgraph=True, backend=counter)
    results = [step(x[:, i : i + 1], modality[:, i : i + 1], state=state) for i in range(10, N)]
    assert_close(torch.cat(results, dim=1), layer(x, modality)[:, 10:])
    assert counter.frame_count <= 2  # no graph for every length


@pytest.mark.parametrize("length", (79, 70, 5, 0))
def test_decoding_goes_on_after_reorder_and_crop(device, length):
    """Any length: the layer still has the keys, also of tokens that are in the Gram's sums."""
    layer = make_layer(device, mask={"length": 100})
    x, modality = inputs(device, tokens=80)
    modality[1, :3] = -1
    state = AttentionState()
    layer(x, modality, state=state)
    order = torch.tensor([1, 1, 0], device=device)
    branch = state.reorder(order).crop(length).detach()
    assert branch.length == length
    fresh = torch.randn(3, 6, E, device=device)
    ids = torch.tensor([0, 1, 1, 0, 0, 1], device=device).expand(3, 6)
    expected = layer(torch.cat([x[order, :length], fresh], dim=1), torch.cat([modality[order, :length], ids], dim=1))
    results = [layer(fresh[:, i : i + 1], ids[:, i : i + 1], state=branch) for i in range(6)]
    assert_close(torch.cat(results, dim=1), expected[:, length:])
    assert state.length == 80  # the methods made copies


def test_context_scope_decodes_with_a_fixed_gram(device):
    layer = make_layer(device, aligner={"rank": 3, "scope": "context"})
    x, modality = inputs(device)
    context = torch.arange(N, device=device).expand(B, N) < 8
    expected = layer(x, modality, context=context)
    state = AttentionState()
    results = [layer(x[:, :8], modality[:, :8], context=context[:, :8], state=state)]
    results += [layer(x[:, i : i + 1], modality[:, i : i + 1], state=state) for i in range(8, N)]
    assert_close(torch.cat(results, dim=1), expected)
    again = state.crop(N - 1)
    assert_close(layer(x[:, -1:], modality[:, -1:], state=again), expected[:, -1:])


# Batch and padding


def test_permuting_the_batch_permutes_the_output(device):
    layer = make_layer(device)
    x, modality = inputs(device)
    modality[0, 3:5] = -1
    assert_close(layer(x.flip(0), modality.flip(0)), layer(x, modality).flip(0), units=8)


@pytest.mark.parametrize("is_causal", (True, False), ids=("causal", "full"))
@pytest.mark.parametrize(("left", "right"), ((4, 0), (0, 4), (3, 5)))
def test_padding_on_either_side_changes_nothing(device, is_causal, left, right):
    layer = make_layer(device, is_causal=is_causal, bias=True)
    x, modality = inputs(device)
    out, mass = layer(x, modality, return_mass=True)
    padded = F.pad(x, (0, 0, left, right), value=3.0), F.pad(modality, (left, right), value=-1)
    padded_out, padded_mass = layer(*padded, return_mass=True)
    assert_close(padded_out[:, left : left + N], out)
    assert_close(padded_mass[:, :, left : left + N], mass)
    for part in (slice(0, left), slice(left + N, None)):
        assert not padded_out[:, part].any()
        assert not padded_mass[:, :, part].any()


def test_mass_and_sink_share_sum_to_one_and_an_absent_modality_has_none(device):
    layer = make_layer(device, mask=OFF)
    x, modality = inputs(device)
    _, mass = layer(x, torch.zeros_like(modality), return_mass=True)
    assert_close(mass[..., 0], torch.ones_like(mass[..., 0]))
    assert not mass[..., 1].any()


@pytest.mark.parametrize(("batch", "tokens"), ((0, 5), (2, 0)))
def test_empty_inputs_are_valid(device, batch, tokens):
    layer = make_layer(device)
    modality = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    assert layer(torch.zeros(batch, tokens, E, device=device), modality).shape == (batch, tokens, E)


def test_a_state_is_saved_and_loaded_by_torch(device, tmp_path):
    """By ``torch.load`` as it is by default: no code runs that is in the file."""
    layer, (x, modality) = make_layer(device), inputs(device)
    state = AttentionState()
    with torch.no_grad():
        layer(x[:, :9], modality[:, :9], state=state)
        torch.save(state, tmp_path / "state.pt")
        torch.save(state.gram, tmp_path / "gram.pt")
        loaded, gram = torch.load(tmp_path / "state.pt"), torch.load(tmp_path / "gram.pt", weights_only=True)
        assert type(gram) is GramState and torch.equal(gram.gram, state.gram.gram) and gram.length == 9
        expected, result = (layer(x[:, 9:], modality[:, 9:], state=s) for s in (state, loaded))
    assert torch.equal(result, expected)


# Gradients


@pytest.mark.parametrize("is_causal", (True, False), ids=("causal", "full"))
@pytest.mark.parametrize("fusion", ("concat", "add"))
@pytest.mark.parametrize("softmax", ("joint", "split"))
def test_finite_differences_of_every_weight(device, is_causal, fusion, softmax):
    mask = {"softmax": softmax, "length": 9, "learn_decay": True, "learn_base": True}
    aligner = {"fusion": fusion, "rank": 2}
    layer = make_layer(device, torch.float64, is_causal=is_causal, mask=mask, aligner=aligner, bias=True)
    x, modality = inputs(device, torch.float64, tokens=8)
    modality[1, 5] = -1
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert {name.split(".")[-1] for name in names} >= {"a1", "b1", "prior", "condition", "raw_decay", "base"}

    def function(x, *values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, weights, (x, modality), {"return_mass": True})

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True)


def test_func_grad_and_vmap(device):
    """Per-sample gradients of every weight, as torch.func makes them."""
    layer = make_layer(device)
    x, modality = inputs(device)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x, modality):
        return torch.func.functional_call(layer, weights, (x[None], modality[None])).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, modality)
    for b in range(B):
        out = layer(x[b : b + 1], modality[b : b + 1]).square().sum()
        for (name, _), grad in zip(
            layer.named_parameters(), torch.autograd.grad(out, list(layer.parameters())), strict=True
        ):
            assert_close(per_sample[name][b], grad, units=512)


# Precisions and options


def test_low_precision_and_autocast(device):
    layer = make_layer(device)
    x, modality = inputs(device)
    expected = layer(x, modality)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = layer(x, modality)
        state = AttentionState()
        pieces = [layer(t, m, state=state) for t, m in zip(x.split(7, 1), modality.split(7, 1), strict=True)]
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.cat(pieces, dim=1).float(), expected, rtol=0.05, atol=0.05)
    low = layer.bfloat16()(x.bfloat16(), modality)
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05)


def test_positions_are_those_of_the_tokens_unless_given(device):
    layer = make_layer(device)
    x, modality = inputs(device)
    positions = torch.arange(N, device=device)
    assert torch.equal(layer(x, modality, positions=positions), layer(x, modality))
    assert not torch.allclose(layer(x, modality, positions=2 * positions), layer(x, modality))
    plain = make_layer(device, aligner=False, mask=False)
    assert_close(plain(x, modality, positions=positions + 7), plain(x, modality), units=512)  # RoPE is relative
    no_rope = make_layer(device, rope_base=None)
    assert torch.equal(no_rope(x, modality, positions=2 * positions), no_rope(x, modality))


def test_many_modalities_heads_of_any_size_and_no_grouping(device):
    layer = ModularDuplexAttention(E, 3, num_modalities=5, head_dim=16).to(device)
    x, modality = inputs(device)
    out, mass = layer(x, modality * 3, return_mass=True)
    assert out.shape == x.shape
    assert mass.shape == (B, 3, N, 5)


CONSTRUCTOR = [
    ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    ({"num_heads": 0}, "num_heads must be a multiple of num_kv_heads, got 0 and 2"),
    ({"embed_dim": 30}, "embed_dim must be a multiple of num_heads, or head_dim be given, got 30 and 4"),
    ({"head_dim": 7}, "head_dim must be even for RoPE, got 7"),
    ({"aligner": False}, "mask variant 'attn' is conditioned on the aligner's Gram"),
    ({"aligner": {"scope": "full"}}, "aligner scope 'full' in a causal layer"),
]


@pytest.mark.parametrize(("changes", "message"), CONSTRUCTOR)
def test_constructor_error(changes, message):
    with pytest.raises(ValueError) as caught:
        ModularDuplexAttention(**{"embed_dim": E, **HEADS, **changes})
    assert re.search("^ModularDuplexAttention: " + message, str(caught.value)), str(caught.value)


def test_forward_errors(device):
    x, modality = inputs(device)
    layer, full = make_layer(device), make_layer(device, is_causal=False)
    plain = make_layer(device, aligner=False, mask=False)
    state = AttentionState()
    layer(x, modality, state=state)
    cases = (
        (lambda: layer(x[..., :8], modality), r"x must have shape \(B, N, 32\), got \(2, 20, 8\)"),
        (lambda: layer(x, modality[:, :8]), r"modality must have shape \(2, 20\), got \(2, 8\)"),
        (lambda: full(x, modality, state=AttentionState()), "a layer that is not causal cannot decode"),
        (lambda: layer(x, modality, context=modality > 0), "include belongs to scope='context'"),
        (lambda: plain(x, modality, context=modality > 0), "context is for the aligner, and this layer has none"),
        (lambda: layer(x, modality, positions=modality[:, :8]), r"positions must have shape \(2, 20\) or \(20,\), got"),
        (lambda: layer(x[:1], modality[:1], state=state), r"state must have the batch size of x \(1\), got 2"),
        (lambda: state.crop(21), "AttentionState: length must lie in 0 to 20, got 21"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


# A small model

WORDS, PATCHES, PATCH_SIZE, ANSWER = 12, 6, 5, 4
TEXT, VISION = 0, 1


class TinyModel(nn.Module):
    """Two layers over [question][image][answer]; the image is given as vectors, the rest as words."""

    def __init__(self):
        super().__init__()
        self.words, self.patches = nn.Embedding(WORDS, E), nn.Linear(PATCH_SIZE, E)
        options = {"aligner": {"rank": 4}, "mask": {"length": 32, "learn_base": True}}
        self.attention = nn.ModuleList(ModularDuplexAttention(E, 4, 2, **options) for _ in range(2))
        self.feedforward = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(E) for _ in range(2))

    def embed(self, question, image, answer):
        x = torch.cat([self.words(question), self.patches(image), self.words(answer)], dim=1)
        modality = x.new_zeros(x.shape[:2], dtype=torch.int64)
        modality[:, question.shape[1] : question.shape[1] + image.shape[1]] = VISION
        return x, modality

    def forward(self, x, modality, states=(None, None)):
        for attention, feedforward, norm, state in zip(
            self.attention, self.feedforward, self.norms, states, strict=True
        ):
            x = x + attention(norm(x), modality, state=state)
            x = x + feedforward(x)
        return x @ self.words.weight.mT


def toy_batch(device):
    """Four images with one question; the answer can come from the image only. The last question is padded."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(4, PATCHES, PATCH_SIZE, generator=generator)
    answer = torch.randint(2, WORDS, (4, ANSWER), generator=generator)
    question = torch.tensor([[0, 5, 1]]).expand(4, 3)
    return question.to(device), image.to(device), answer.to(device)


@pytest.fixture(scope="module")
def trained(device):
    """The model after overfitting the toy batch, and its losses."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as in every test; this fixture is set up before the one that does it
    model = TinyModel().to(device)
    question, image, answer = toy_batch(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        logits = model(*model.embed(question, image, answer))[:, -ANSWER - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def generate(model, question, image, incremental):
    """Greedy answer, by a forward pass over everything for every word, or with states."""
    x, modality = model.embed(question, image, question[:, :0])
    states = [AttentionState(), AttentionState()] if incremental else [None, None]
    words = []
    for _ in range(ANSWER):
        words.append(model(x, modality, states)[:, -1].argmax(dim=-1))
        new = model.words(words[-1])[:, None]
        text = modality.new_full((len(x), 1), TEXT)
        x = new if incremental else torch.cat([x, new], dim=1)
        modality = text if incremental else torch.cat([modality, text], dim=1)
    return torch.stack(words, dim=1)


def test_model_overfits_a_multimodal_batch(device, trained):
    model, losses = trained
    assert losses[0] > 1.5
    assert losses[-1] < 0.05
    question, image, answer = toy_batch(device)
    shuffled = model(*model.embed(question, image.flip(0), answer))[:, -ANSWER - 1 : -1]
    assert F.cross_entropy(shuffled.flatten(0, 1), answer.flatten()) > 0.5  # it does look at the image
    for name, parameter in model.named_parameters():
        if "aligner" in name or "mask" in name:
            assert parameter.grad.any(), name


@torch.no_grad()
def test_model_decodes_incrementally_to_the_same_tokens(device, trained):
    model, _ = trained
    question, image, answer = toy_batch(device)
    whole = generate(model, question, image, incremental=False)
    assert torch.equal(generate(model, question, image, incremental=True), whole)
    assert torch.equal(whole, answer)


@torch.no_grad()
def test_model_saves_and_loads(device, trained, tmp_path):
    model, _ = trained
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = TinyModel().to(device).eval()
    arguments = model.embed(*toy_batch(device))
    assert not torch.equal(loaded(*arguments), model(*arguments))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(loaded(*arguments), model(*arguments))


def test_model_compiles_without_graph_breaks(device, trained):
    model, _ = trained
    torch._dynamo.reset()
    arguments = model.embed(*toy_batch(device))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        model.zero_grad()
        logits = function(*arguments)
        logits.square().mean().backward(retain_graph=True)
        results.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for result, expected in zip(*reversed(results), strict=True):
        assert_close(result, expected, units=512)


@torch.no_grad()
def test_model_exports(device, trained):
    model, _ = trained
    arguments = model.embed(*toy_batch(device))
    tokens = torch.export.Dim("tokens", min=4, max=32)
    exported = torch.export.export(model, arguments, dynamic_shapes=({1: tokens}, {1: tokens}))
    assert_close(exported.module()(*arguments), model(*arguments))
    shorter = tuple(t[:, :10] for t in arguments)
    assert_close(exported.module()(*shorter), model(*shorter))


@torch.no_grad()
def test_model_exports_a_decoding_step(device, trained):
    model, _ = trained

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, modality, states):
            return self.model(x, modality, states), states

    x, modality = model.embed(*toy_batch(device))
    states = [AttentionState(), AttentionState()]
    model(x[:, :-1], modality[:, :-1], states)
    token = x[:, -1:], modality[:, -1:]
    exported = torch.export.export(Step(), (*token, [state.detach() for state in states])).module()
    logits, after = exported(*token, [state.detach() for state in states])
    assert_close(logits, model(x, modality)[:, -1:])
    assert after[0].length == x.shape[1]


def test_mass_is_what_the_attention_reports(device):
    """return_mass goes through the layer unchanged."""
    layer = make_layer(device, mask={"variant": "fix", **OFF}, aligner=False, rope_base=None)
    x, modality = inputs(device)
    query, key, value = (
        p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    expected = modular_attention(query, key, value, modality, is_causal=True, return_mass=True)[1]
    assert_close(layer(x, modality, return_mass=True)[1], expected)
