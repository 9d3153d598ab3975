"""ModularMask: the settings of Table 1(d), the prior, the pseudo scores, joint and split softmax."""

import copy
import math
import pickle
import re

import pytest
import torch
from tolerance import assert_close

from moda_ext import reference
from moda_ext.alignment import DuplexAligner, causal_gram_projection, gram_indicator
from moda_ext.attention import modular_attention, pseudo_score_sink
from moda_ext.mask import ModularMask

B, H, N, D, M = 2, 4, 12, 8, 3


def inputs(device, dtype=torch.float32, **changes):
    """query, key, value (B, H, N, D) and modality (B, N) with a padded token in the second sequence."""
    query, key, value = (torch.randn(B, H, N, D, device=device, dtype=dtype) for _ in range(3))
    modality = torch.arange(N, device=device) // 3 % M * torch.ones(B, 1, dtype=torch.int64, device=device)
    modality[1, 4] = -1
    return query, key, value, modality


def make_mask(device, dtype=torch.float32, **keywords):
    """A mask in which every parameter has been trained to something."""
    mask = ModularMask(H, M, **keywords).to(device, dtype)
    for name, parameter in mask.named_parameters():
        if name in ("prior", "condition", "gate"):
            torch.nn.init.normal_(parameter)
    return mask


def run(mask, query, key, value, modality, projection=None, **keywords):
    """(out, mass) of causal attention under the mask."""
    if projection is None and mask.conditional:
        projection = causal_gram_projection(query, key, modality, modality, M)
    bias, sink = mask(query, modality, projection)
    return mask.attend(query, key, value, modality, modality, bias, sink, is_causal=True, return_mass=True, **keywords)


# Table 1(d)


def test_variant_inf_is_plain_attention(device):
    query, key, value, modality = inputs(device)
    mask = ModularMask(H, M, variant="inf").to(device)
    assert mask(query, modality) == (None, None)
    assert not list(mask.parameters())
    expected = modular_attention(query, key, value, modality, num_modalities=M, is_causal=True)
    assert torch.equal(run(mask, query, key, value, modality)[0], expected)


def test_variant_fix_has_a_fixed_prior_and_pseudo_scores(device):
    query, _, _, modality = inputs(device)
    prior = torch.randn(M, M)
    mask = ModularMask(H, M, variant="fix", prior=prior, length=20).to(device)
    assert not list(mask.parameters())
    bias, sink = mask(query, modality)
    for i in range(N):
        assert torch.equal(bias[0, :, i], prior[modality[0, i]].to(device).expand(H, M))
    assert_close(sink[0, 0], pseudo_score_sink(N, 20, 0.5, device=device))


def test_variant_attn_starts_without_prior_and_learns_it(device):
    query, key, value, modality = inputs(device)
    mask = ModularMask(H, M).to(device)
    bias, sink = mask(query, modality, causal_gram_projection(query, key, modality, modality, M))
    assert not bias.any()
    assert_close(sink.flatten(), pseudo_score_sink(1, None, 0.5, device=device).expand(H))
    run(mask, query, key, value, modality)[0].square().sum().backward()
    assert {name for name, _ in mask.named_parameters()} == {"prior", "condition"}
    assert all(parameter.grad.any() for parameter in mask.parameters())


def test_variant_learned_has_one_learnable_sink_per_head(device):
    query, key, value, modality = inputs(device)
    mask = ModularMask(H, M, variant="learned", base=-1.0).to(device)
    _, sink = mask(query, modality, indicator=torch.zeros(B, H, N, M, device=device))
    assert torch.equal(sink.flatten(), torch.full((H,), -1.0, device=device))
    run(mask, query, key, value, modality)[0].square().sum().backward()
    assert mask.sink.shape == (H,)
    assert mask.sink.grad.all()


# Pseudo scores


def test_pseudo_scores_equal_the_dense_stable_mask(device):
    """softmax(A * C + P) * C with a decay and a base of its own for every head."""
    query, key, value, _ = inputs(device)
    modality = torch.zeros(B, N, dtype=torch.int64, device=device)
    decay, base = torch.tensor([0.5, 0.1, 2.0, 0.0]), torch.tensor([0.0, -2.0, 1.0, 0.5])
    mask = ModularMask(H, M, variant="fix", decay=decay, base=base, length=N + 5).to(device)
    out, mass = run(mask, query, key, value, modality)
    for h in range(H):
        scores = torch.nn.functional.pad(query[:, h].double() @ key[:, h].double().mT * D**-0.5, (0, 5))
        weights = reference.stable_mask_weights(scores, decay[h].item(), base[h].item())[..., :N]
        assert_close(out[:, h], weights @ value[:, h].double())
        assert_close(mass[:, h].sum(-1), weights.sum(-1))


def test_pseudo_scores_are_no_identity_and_base_minus_infinity_is(device):
    query, key, value, modality = inputs(device)
    plain = modular_attention(query, key, value, modality, num_modalities=M, is_causal=True)

    def change(base):
        mask = ModularMask(H, M, variant="fix", base=base).to(device)
        return (run(mask, query, key, value, modality)[0] - plain).abs().max().item()

    assert change(-math.inf) == 0
    assert change(0.0) > 0.1
    assert 0 < change(-10.0) < 1e-2


def test_sink_counts_tokens_without_padding(device):
    """Padding on either side or in the middle, and a start per sequence, leave every token's sink as it is."""
    query = torch.randn(B, H, N, D, device=device)
    mask = ModularMask(H, M, variant="fix", length=9, decay=0.3).to(device)
    whole = mask(query, torch.zeros(B, N, dtype=torch.int64, device=device))[1].expand(B, H, N)
    assert (whole[..., 9:] == -math.inf).all()
    for padded in ([0, 1, 2], [N - 1], [4, 6, 7]):
        modality = torch.zeros(B, N, dtype=torch.int64, device=device)
        modality[1, padded] = -1
        sink = mask(query, modality)[1]
        assert torch.equal(sink[0], whole[0])
        assert torch.equal(sink[1][:, modality[1] >= 0], whole[1, :, : N - len(padded)])
    later = mask(query[:, :, :3], torch.zeros(B, 3, dtype=torch.int64, device=device), start=5)[1]
    assert torch.equal(later[0], whole[0, :, 5:8])
    start = torch.tensor([2, 6], device=device)
    ragged = mask(query[:, :, :3], torch.zeros(B, 3, dtype=torch.int64, device=device), start=start)[1]
    assert torch.equal(ragged, torch.stack([whole[0, :, 2:5], whole[1, :, 6:9]]))


def test_learned_decay_starts_exact_and_stays_positive(device):
    decay = torch.tensor([0.5, 1e-3, 5.0, 100.0])
    assert torch.equal(ModularMask(H, M, decay=decay).decay, decay)
    mask = ModularMask(H, M, variant="fix", decay=decay, learn_decay=True, learn_base=True).to(device)
    assert_close(mask.decay.cpu() / decay, torch.ones(H))
    mask.raw_decay.data.fill_(-50.0)
    assert (mask.decay > 0).all()
    assert {name for name, _ in mask.named_parameters()} == {"raw_decay", "base"}


# The prior


def test_indicator_is_the_quadratic_form_of_the_gram(device):
    query, key, _, modality = inputs(device, torch.float64)
    projection = causal_gram_projection(query, key, modality, modality, M)
    indicator = gram_indicator(query, projection)
    unit_query, unit_key = (torch.nn.functional.normalize(t, dim=-1) for t in (query, key))
    for b, i, m in ((0, 0, 0), (0, 5, 1), (0, 11, 2), (1, 7, 1), (1, 2, 2)):
        chosen = unit_key[b, :, : i + 1][:, modality[b, : i + 1] == m]
        dots = (chosen @ unit_query[b, :, i, :, None]).squeeze(-1)  # (H, tokens)
        expected = dots.square().sum(-1) / max(chosen.shape[1], 1)
        assert_close(indicator[b, :, i, m], expected)
    assert (indicator >= 0).all()
    assert (indicator <= 1).all()
    assert not gram_indicator(torch.zeros_like(query), torch.zeros_like(projection)).any()


def test_conditional_prior_follows_the_indicator(device):
    query, key, _, modality = inputs(device)
    mask = make_mask(device)
    projection = causal_gram_projection(query, key, modality, modality, M)
    indicator = gram_indicator(query, projection)
    bias, _ = mask(query, modality, projection)
    assert torch.equal(bias, mask(query, modality, indicator=indicator)[0])
    assert torch.equal(mask(query, modality)[0], mask(query, modality, indicator=torch.zeros_like(indicator))[0])
    a = modality.clamp(min=0)
    w, lam = (t[:, a].transpose(0, 1) for t in (mask.prior, mask.condition))  # (B, H, N, M)
    assert_close(bias, w + lam * indicator)


def test_prior_of_minus_infinity_hides_a_modality(device):
    query, key, value, modality = inputs(device)
    prior = torch.zeros(M, M)
    prior[2, 0] = -math.inf  # rows of modality 2 do not see modality 0
    mask = make_mask(device, prior=prior)
    torch.nn.init.normal_(mask.condition)
    mask.prior.data.copy_(prior)
    query.requires_grad_()
    out, mass = run(mask, query, key, value, modality)
    rows = (modality == 2)[:, None, :].expand(B, H, N)
    assert not mass[..., 0][rows].any()
    assert mass[..., 0][~rows].any()
    grads = torch.autograd.grad(out.sum() + mass.square().sum(), [query, *mask.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


# Joint and split softmax


def test_split_softmax_equals_two_dense_softmaxes(device):
    query, key, value, modality = inputs(device, torch.float64)
    mask = make_mask(device, torch.float64, softmax="split", length=20)
    projection = causal_gram_projection(query, key, modality, modality, M)
    out, mass = run(mask, query, key, value, modality, projection)

    bias, sink = mask(query, modality, projection)
    columns = modality[:, None, None, :].clamp(min=0).expand(B, H, N, N)
    scores = query @ key.mT * D**-0.5 + bias.gather(-1, columns)
    visible = torch.ones(N, N, dtype=torch.bool, device=device).tril() & (modality >= 0)[:, None, None]
    same = modality[:, :, None] == modality[:, None, :]
    weights = []
    for side in (same[:, None], ~same[:, None]):
        exponential = scores.exp() * (visible & side)
        weights.append(exponential / (exponential.sum(-1, keepdim=True) + sink.exp()[..., None]))
    gate = mask.gate.sigmoid()[:, None, None]
    weights = gate * weights[0] + (1 - gate) * weights[1]
    rows = (modality >= 0)[:, None, :, None]
    assert_close(out * rows, weights @ value * rows)
    onehot = (modality[..., None] == torch.arange(M, device=device)).double()
    assert_close(mass * rows, weights @ onehot[:, None] * rows)


def test_split_gate_starts_at_one_half_and_learns(device):
    query, key, value, modality = inputs(device)
    mask = ModularMask(H, M, variant="inf", softmax="split").to(device)
    out, mass = run(mask, query, key, value, modality)
    assert_close(mass[0, :, -1].sum(-1), torch.ones(H, device=device))  # row that sees both sides
    assert_close(mass[0, :, 0].sum(-1), torch.full((H,), 0.5, device=device))  # first row sees itself only
    out.square().sum().backward()
    assert mask.gate.grad.all()


# Gradients


@pytest.mark.parametrize("softmax", ("joint", "split"))
@pytest.mark.parametrize("variant", ("attn", "learned"))
def test_an_optimizer_moves_every_parameter(device, softmax, variant):
    query, key, value, modality = inputs(device)
    learn = {"learn_decay": True, "learn_base": True} if variant == "attn" else {}
    mask = ModularMask(H, M, variant=variant, softmax=softmax, **learn).to(device)
    before = {name: parameter.detach().clone() for name, parameter in mask.named_parameters()}
    optimizer = torch.optim.SGD(mask.parameters(), lr=0.1)
    run(mask, query, key, value, modality)[0].square().sum().backward()
    optimizer.step()
    for name, parameter in mask.named_parameters():
        assert (parameter != before[name]).flatten(1 if parameter.dim() > 1 else 0).any(-1).all(), name


@pytest.mark.parametrize("softmax", ("joint", "split"))
@pytest.mark.parametrize("variant", ("attn", "learned"))
@pytest.mark.parametrize("length", (None, 9))
def test_finite_differences(device, softmax, variant, length):
    query, key, value, modality = inputs(device, torch.float64)
    query, key, value, modality = query[:1, :, :5], key[:1, :, :5], value[:1, :, :5], modality[:1, 1:6]
    learn = {"learn_decay": True, "learn_base": True} if variant == "attn" else {}
    mask = make_mask(device, torch.float64, variant=variant, softmax=softmax, length=length, **learn)
    names, parameters = zip(*mask.named_parameters(), strict=True)

    def function(query, *values):
        parameters = {f"mask.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(_Run(mask), parameters, (query, key, value, modality))

    assert torch.autograd.gradcheck(function, (query.requires_grad_(), *parameters), fast_mode=True)


class _Run(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, *arguments):
        return run(self.mask, *arguments)


# Errors


CONSTRUCTOR = [
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"num_modalities": 17}, "num_modalities must lie in 1 to 16, got 17"),
    ({"variant": "Attn."}, "variant must be one of .*got 'Attn.'"),
    ({"softmax": "both"}, "softmax must be one of .*got 'both'"),
    ({"length": 0}, "length must be at least 1 or None, got 0"),
    ({"decay": -0.5}, "decay must be at least 0, got"),
    ({"decay": math.inf}, "decay must be finite, got"),
    ({"base": math.nan}, "base must be finite or -inf, got"),
    ({"prior": torch.tensor([0.0, math.nan, 0.0])}, "prior must be finite or -inf, got"),
    ({"prior": torch.tensor([0.0, math.inf, 0.0])}, "prior must be finite or -inf, got"),
    ({"decay": torch.ones(3)}, r"decay must broadcast to \(4,\), got shape \(3,\)"),
    ({"base": torch.ones(4, 1)}, r"base must broadcast to \(4,\), got shape \(4, 1\)"),
    ({"decay": 0.0}, "decay must be above 0 when length is None"),
    ({"decay": 0.0, "length": 9, "learn_decay": True}, "learn_decay needs a decay above 0"),
    ({"base": -math.inf, "learn_base": True}, "base must be finite to be learned"),
    ({"base": -math.inf, "variant": "learned"}, "base must be finite to be learned"),
    ({"variant": "learned", "learn_decay": True}, "variant 'learned' has no pseudo scores to learn"),
    ({"variant": "inf", "prior": torch.zeros(())}, "variant 'inf' has no prior"),
    ({"prior": torch.zeros(2, 2)}, r"prior must broadcast to \(4, 3, 3\), got shape \(2, 2\)"),
]


@pytest.mark.parametrize(("changes", "message"), CONSTRUCTOR)
def test_constructor_error(changes, message):
    with pytest.raises(ValueError) as caught:
        ModularMask(**{"num_heads": H, "num_modalities": M, **changes})
    assert re.search("^ModularMask: " + message, str(caught.value)), str(caught.value)


def test_forward_errors(device):
    query, _, _, modality = inputs(device)
    mask = ModularMask(H, M).to(device)
    with pytest.raises(ValueError, match=r"ModularMask: query must have shape \(B, 4, N, D\), got \(2, 3, 12, 8\)"):
        mask(query[:, :3], modality)
    with pytest.raises(ValueError, match=r"query_modality must have shape \(2, 12\), got \(2, 5\)"):
        mask(query, modality[:, :5])


# What is switched off


SWITCHED_OFF = {
    "no pseudo scores": {"base": -math.inf},
    "no pseudo scores, learned decay": {"base": -math.inf, "learn_decay": True},
    "no pseudo scores in some heads": {"base": torch.tensor([-math.inf, 0.0, -1.0, -math.inf])},
    "a fixed prior that hides": {"variant": "fix", "prior": torch.tensor([[0.5, -math.inf, 0.0]] * M), "length": 9},
    "a learned prior that hides": {"prior": torch.tensor([[0.5, -math.inf, 0.0]] * M)},
}
switched_off = pytest.mark.parametrize("keywords", SWITCHED_OFF.values(), ids=SWITCHED_OFF)


def trained_otherwise(mask):
    """A copy with other weights."""
    other = copy.deepcopy(mask)
    for parameter in other.parameters():
        parameter.data.add_(torch.rand_like(parameter))
    return other


def old_state_dict(mask, base=None):
    """As it was before 'off' was a setting: -inf in prior and base."""
    state = dict(mask.state_dict())
    for name in ("prior", "base"):
        off = state.pop(f"{name}_off", None)
        if off is not None:
            state[name] = state[name].masked_fill(off > 0.5, -math.inf)
    if "base" not in state:
        state["base"] = torch.full((H,), -math.inf)
    return state


@switched_off
def test_weights_and_buffers_are_finite_whatever_is_switched_off(keywords):
    mask = make_mask("cpu", **keywords)
    assert all(tensor.isfinite().all() for tensor in [*mask.state_dict().values(), *mask.buffers()])
    query, key, value, modality = inputs("cpu")
    bias, sink = mask(query, modality)
    if "prior" in keywords:
        assert (bias[..., 1] == -math.inf).all() and bias[..., [0, 2]].isfinite().all()
        assert run(mask, query, key, value, modality)[1][..., 1].max() == 0
    off = torch.as_tensor(keywords.get("base", 0.0)).isinf().expand(H)
    assert off.all() if sink is None else (sink[..., 0].isinf() == off).all()
    if off.all():
        assert torch.equal(mask.base, torch.full((H,), -math.inf))


@switched_off
@pytest.mark.parametrize("kind", ("ema", "swa"))
def test_averages_over_parameters_and_buffers_keep_what_is_switched_off(keywords, kind):
    swa = torch.optim.swa_utils
    mask = make_mask("cpu", **keywords)
    function = {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.9)} if kind == "ema" else {}
    average = swa.AveragedModel(mask, use_buffers=True, **function)
    steps = [trained_otherwise(mask) for _ in range(3)]
    for step in steps:
        average.update_parameters(step)
    query, key, value, modality = inputs("cpu")
    out, mass = run(average.module, query, key, value, modality)
    assert out.isfinite().all() and mass.isfinite().all()
    assert torch.equal(mass == 0, run(mask, query, key, value, modality)[1] == 0)
    if kind == "swa" and "prior" in dict(mask.named_parameters()):
        assert_close(average.module.prior, torch.stack([step.prior for step in steps]).mean(0))


@switched_off
def test_task_vectors_of_state_dicts_keep_what_is_switched_off(keywords):
    mask = make_mask("cpu", **keywords)
    a, b = mask.state_dict(), trained_otherwise(mask).state_dict()
    merged = copy.deepcopy(mask)
    merged.load_state_dict({name: a[name] + 0.3 * (b[name] - a[name]) for name in a})
    query, _, _, modality = inputs("cpu")
    for result, expected in zip(merged(query, modality), mask(query, modality), strict=True):
        assert (result is None) == (expected is None)
        if result is not None:
            assert not result.isnan().any() and torch.equal(result.isinf(), expected.isinf())


@switched_off
@pytest.mark.parametrize("settings", ("the same", "default"))
def test_state_dicts_with_infinities_load(keywords, settings):
    """Into a mask that switches off the same, and into one that switches off nothing."""
    mask = make_mask("cpu", **keywords)
    own = dict(keywords)
    if settings == "default":
        own.pop("prior", None), own.pop("base", None)
    loaded = ModularMask(H, M, **own)
    before = [name for name, _ in loaded.named_parameters()]
    loaded.load_state_dict(old_state_dict(mask))
    assert [name for name, _ in loaded.named_parameters()] == before
    assert all(tensor.isfinite().all() for tensor in loaded.buffers())
    query, _, _, modality = inputs("cpu")
    for result, expected in zip(loaded(query, modality), mask(query, modality), strict=True):
        expected = torch.full((H, 1), -math.inf) if expected is None and result is not None else expected
        assert result is None if expected is None else torch.equal(result, expected)
    again = copy.deepcopy(loaded)
    again.load_state_dict(loaded.state_dict())
    for result, expected in zip(again(query, modality), loaded(query, modality), strict=True):
        assert result is None if expected is None else torch.equal(result, expected)


def test_a_state_dict_switches_on_what_the_mask_had_off():
    source, loaded = (
        ModularMask(H, M, base=-2.0),
        ModularMask(H, M, base=-math.inf, prior=torch.tensor([-math.inf, 0, 0])),
    )
    loaded.load_state_dict({**source.state_dict()})
    query, _, _, modality = inputs("cpu")
    for result, expected in zip(loaded(query, modality), source(query, modality), strict=True):
        assert torch.equal(result, expected)


def test_a_hidden_modality_is_not_learned_and_the_others_are():
    mask = make_mask("cpu", prior=torch.tensor([[0.0, -math.inf, 0.0]] * M))
    query, key, value, modality = inputs("cpu")
    optimizer = torch.optim.AdamW(mask.parameters(), lr=0.1, weight_decay=0.1)
    run(mask, query, key, value, modality)[0].square().sum().backward()
    assert not mask.prior.grad[..., 1].any() and mask.prior.grad[..., [0, 2]].any()
    optimizer.step()
    assert (mask(query, modality)[0][..., 1] == -math.inf).all()


@switched_off
def test_a_mask_that_switches_off_is_copied_cast_compiled_and_exported(keywords):
    mask = make_mask("cpu", **keywords)
    query, _, _, modality = inputs("cpu")
    expected = mask(query, modality)
    twins = [
        copy.deepcopy(mask),
        pickle.loads(pickle.dumps(mask)),
        torch.compile(mask, backend="eager", fullgraph=True),
    ]
    twins.append(torch.export.export(mask, (query, modality)).module())
    for twin in twins:
        for result, wanted in zip(twin(query, modality), expected, strict=True):
            assert result is None if wanted is None else torch.equal(result, wanted)
    for dtype in (torch.bfloat16, torch.float16):
        bias, _ = copy.deepcopy(mask).to(dtype)(query.to(dtype), modality)
        assert torch.equal(bias.isinf(), expected[0].isinf())


@pytest.mark.parametrize("softmax", ("joint", "split"))
def test_parameters_that_are_there_in_the_forward_pass_only(softmax):
    """As offloading and sharding have them: every method of the mask and of the aligner enters the forward pass."""
    mask, aligner = make_mask("cpu", softmax=softmax), DuplexAligner(D, M, scope="full")
    torch.nn.init.normal_(aligner.b1)
    query, key, value, modality = inputs("cpu")

    @torch.no_grad()
    def results():
        bias, sink = mask(query, modality, indicator=torch.ones(B, H, N, M))
        out = mask.attend(query, key, value, modality, modality, bias, sink, is_causal=True)
        return out, mask.condition_of_rows(query, modality), aligner.align_keys(key, modality)

    expected = results()
    for module in (mask, aligner):
        kept = {name: parameter.data for name, parameter in module.named_parameters()}

        def load(module, *_, kept=kept):
            for name, tensor in kept.items():
                getattr(module, name).data = tensor

        def drop(module, *_):
            for parameter in module.parameters():
                parameter.data = torch.full_like(parameter, math.nan)

        drop(module)
        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
    for result, wanted in zip(results(), expected, strict=True):
        assert torch.equal(result, wanted)


def test_replicas_of_data_parallelism_have_the_same_mask():
    """In a replica parameters are plain attributes."""
    for keywords in ({"learn_base": True, "learn_decay": True}, *SWITCHED_OFF.values()):
        mask = make_mask("cpu", **keywords)
        replica = mask._replicate_for_data_parallel()
        for name, parameter in mask.named_parameters():
            setattr(replica, name, parameter.detach())
        query, _, _, modality = inputs("cpu")
        for result, expected in zip(replica(query, modality), mask(query, modality), strict=True):
            assert result is None if expected is None else torch.equal(result, expected)
