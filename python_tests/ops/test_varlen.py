"""Packed sequences: the varlen call is the dense call of each sequence."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from problems import BIASES, PADDINGS, RUNS, SINKS, make_problem, ours
from tolerance import assert_close

from moda_ext import attention, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pack(problems):
    """Positional and keyword arguments of one varlen call for dense problems of batch size 1 with the same options."""

    def tokens(name):  # (..., 1, H, N, X) -> (..., N, H, X), end to end
        dim = -4 if name != "sink" else -3
        parts = [getattr(p, name).detach().select(dim, 0) for p in problems]
        if name == "sink":
            return torch.cat([part.mT for part in parts]).requires_grad_()
        return torch.cat([part.transpose(-3, -2) for part in parts], dim=-3).requires_grad_()

    def offsets(name):
        lengths = [0] + [getattr(p, name).shape[-2] for p in problems]
        return torch.tensor(lengths, device=problems[0].query.device).cumsum(0), max(lengths)

    (cu_q, max_q), (cu_k, max_k) = offsets("query"), offsets("key")
    first = problems[0]
    tensors = {name: tokens(name) for name in first.leaves()}
    key_modality = torch.cat([p.key_modality[0] for p in problems])
    arguments = (*(tensors.pop(n) for n in ("query", "key", "value")), key_modality, cu_q, cu_k, max_q, max_k)
    keywords = {"num_modalities": first.num_modalities, "is_causal": first.is_causal, "scale": first.scale, **tensors}
    return arguments, keywords


def unpack(result, problem, start):
    """The rows of one sequence in the dense layout."""
    rows = result[..., start : start + problem.query.shape[-2], :, :]
    return rows.transpose(-3, -2).unsqueeze(-4)


@st.composite
def batches(draw, device):
    """1 to 4 sequences of different lengths, some empty, that share heads, options and dtype."""
    kv_heads = draw(st.sampled_from((1, 2)))
    shared = {
        "batch": 1,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from((1, 2, 4))),
        "head_size": draw(st.sampled_from((8, 32, 48))),
        "num_modalities": draw(st.integers(1, 4)),
        "views": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16))),
        "bias": draw(st.sampled_from([b for b in BIASES if b not in ("per modality", "per head")])),
        "sink": draw(st.sampled_from([s for s in SINKS if s != "per head"])),
        "is_causal": draw(st.booleans()),
        "device": device,
    }
    return [
        make_problem(
            queries=draw(st.integers(0, 60)),
            keys=draw(st.integers(0, 60)),
            runs=draw(st.sampled_from(RUNS)),
            padding=draw(st.sampled_from(PADDINGS)),
            seed=draw(st.integers(0, 2**16)),
            **shared,
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


@settings(max_examples=80)
@given(data=st.data())
def test_varlen_equals_each_sequence_alone(device, data):
    problems = data.draw(batches(device))
    arguments, keywords = pack(problems)
    outputs = attention.modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    names = list(problems[0].leaves())
    leaves = [*arguments[:3], *(keywords[n] for n in names[3:])]
    grads = dict(zip(names, torch.autograd.grad(outputs, leaves, cotangents), strict=True))
    units = 64 if problems[0].query.dtype != torch.bfloat16 else 4

    q = k = 0
    for problem in problems:
        alone = ours(problem)
        parts = [unpack(c if c.dim() == 3 else c[..., None], problem, q) for c in (*outputs, *cotangents)]
        parts = [p.squeeze(-1) if i in (1, 4) else p for i, p in enumerate(parts)]
        for result, expected in zip(parts[:3], alone, strict=True):
            assert_close(result, expected, units)
        expected = torch.autograd.grad(alone, list(problem.leaves().values()), parts[3:])
        for name, grad in zip(names, expected, strict=True):
            if name in ("key", "value"):
                result = grads[name][k : k + problem.key.shape[-2]].transpose(0, 1)[None]
            elif name == "sink":
                result = grads[name][q : q + problem.query.shape[-2]].mT[None]
            else:
                result = unpack(grads[name], problem, q)
            assert_close(result, grad, units)
        q, k = q + problem.query.shape[-2], k + problem.key.shape[-2]


def three_sequences(device):
    shared = {"batch": 1, "heads": 4, "kv_heads": 2, "head_size": 16, "is_causal": True, "device": device}
    return [make_problem(queries=n, keys=n, seed=n, **shared) for n in (37, 90, 11)]


def test_nan_in_another_sequence_does_not_leak(device):
    problems = three_sequences(device)
    with torch.no_grad():
        for tensor in (problems[1].query, problems[1].key, problems[1].value):
            tensor.fill_(float("nan"))
    arguments, keywords = pack(problems)
    outputs = attention.modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    clean = [output[keep] for output in outputs for keep in (slice(0, 37), slice(127, 138))]
    assert all(c.isfinite().all() for c in clean)
    grads = torch.autograd.grad([c.sum() for c in clean], [*arguments[:3], keywords["modality_bias"], keywords["sink"]])
    for grad in grads:
        assert grad[:37].isfinite().all()
        assert grad[127:].isfinite().all()


def test_reference_agrees(device):
    arguments, keywords = pack(three_sequences(device))
    ours_ = attention.modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    theirs = reference.modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    for result, expected in zip(ours_, theirs, strict=True):
        assert_close(result, expected)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_offsets_of_either_integer_type(device, dtype):
    arguments, keywords = pack(three_sequences(device))
    expected = attention.modular_attention_varlen(*arguments, **keywords)
    cu = arguments[4].to(dtype)
    assert torch.equal(attention.modular_attention_varlen(*arguments[:4], cu, cu, *arguments[6:], **keywords), expected)


def test_upper_bounds_of_the_lengths_are_enough(device):
    arguments, keywords = pack(three_sequences(device))
    expected = attention.modular_attention_varlen(*arguments, **keywords)
    assert_close(attention.modular_attention_varlen(*arguments[:6], 1000, 1000, **keywords), expected)


def test_bias_and_sink_broadcast(device):
    arguments, keywords = pack(three_sequences(device))
    bias, sink = torch.randn(2, device=device), torch.randn(4, device=device)
    tokens = arguments[0].shape[0]
    full = {"modality_bias": bias.expand(tokens, 4, 2), "sink": sink.expand(tokens, 4), "is_causal": True}
    small = {"modality_bias": bias, "sink": sink, "is_causal": True}
    assert torch.equal(
        attention.modular_attention_varlen(*arguments, **small), attention.modular_attention_varlen(*arguments, **full)
    )


def test_no_sequences(device):
    empty = torch.zeros(1, dtype=torch.int32, device=device)
    query = torch.zeros(0, 4, 8, device=device)
    key = torch.zeros(0, 2, 8, device=device)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    out, lse, mass = attention.modular_attention_varlen(
        query, key, key, ids, empty, empty, 0, 0, return_lse=True, return_mass=True
    )
    assert out.shape == (0, 4, 8)
    assert lse.shape == (0, 4)
    assert mass.shape == (0, 4, 2)
