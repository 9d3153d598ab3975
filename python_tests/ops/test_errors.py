"""Every wrong argument raises before a kernel runs, and the message names operator, argument, expectation and fact."""

import re

import pytest
import torch

from moda_ext import alignment, attention, use_backend
from moda_ext.alignment import DuplexAligner


def dense_arguments():
    return {
        "query": torch.randn(2, 4, 5, 16),
        "key": torch.randn(2, 2, 7, 16),
        "value": torch.randn(2, 2, 7, 16),
        "key_modality": torch.zeros(2, 7, dtype=torch.int64),
        "num_modalities": 3,
    }


def varlen_arguments():
    return {
        "query": torch.randn(5, 4, 16),
        "key": torch.randn(7, 2, 16),
        "value": torch.randn(7, 2, 16),
        "key_modality": torch.zeros(7, dtype=torch.int64),
        "cu_seqlens_q": torch.tensor([0, 2, 5]),
        "cu_seqlens_k": torch.tensor([0, 3, 7]),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "num_modalities": 3,
    }


def sink_arguments():
    return {"num_rows": 4, "length": 9, "decay": torch.full((2,), 0.5), "base": 0.0, "start": 0}


FUNCTIONS = {
    attention.modular_attention: dense_arguments,
    attention.modular_attention_varlen: varlen_arguments,
    attention.pseudo_score_sink: sink_arguments,
}

bfloat16 = torch.bfloat16
fp8 = torch.float8_e4m3fn
ids = torch.zeros(2, 7, dtype=torch.int64)

DENSE = [
    # TypeError: not a tensor
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
    ({"value": 3.0}, TypeError, "value must be a tensor, got float"),
    ({"key_modality": [[0] * 7] * 2}, TypeError, "key_modality must be a tensor, got list"),
    ({"modality_bias": 0.5}, TypeError, "modality_bias must be a tensor, got float"),
    ({"sink": 0.5}, TypeError, "sink must be a tensor, got float"),
    # TypeError: dtype
    (
        {"query": torch.ones(2, 4, 5, 16, dtype=torch.int32)},
        TypeError,
        "query must have one of the dtypes .*got torch.int32",
    ),
    (
        {"query": torch.ones(2, 4, 5, 16, dtype=torch.complex64)},
        TypeError,
        "query must have one of .*got torch.complex64",
    ),
    (
        {"key": torch.randn(2, 2, 7, 16, dtype=bfloat16)},
        TypeError,
        r"key must have the dtype of query \(torch.float32\)",
    ),
    ({"value": torch.randn(2, 2, 7, 16).double()}, TypeError, "value must have the dtype of query .*got torch.float64"),
    ({"key_modality": ids.bool()}, TypeError, "key_modality must have one of the dtypes int32, .*got torch.bool"),
    ({"key_modality": ids.float()}, TypeError, "key_modality must have one of the dtypes .*got torch.float32"),
    ({"modality_bias": torch.zeros(3, dtype=bfloat16)}, TypeError, "modality_bias must have .*got torch.bfloat16"),
    ({"modality_bias": torch.zeros(3, dtype=torch.int64)}, TypeError, "modality_bias must have .*got torch.int64"),
    ({"sink": torch.zeros(5).double()}, TypeError, "sink must have the dtype .*got torch.float64"),
    # TypeError: options
    ({"num_modalities": 2.0}, TypeError, "num_modalities must be an int, got float"),
    ({"num_modalities": True}, TypeError, "num_modalities must be an int, got bool"),
    ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
    ({"scale": "0.1"}, TypeError, "scale must be a number or None, got str"),
    ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a number or None, got Tensor"),
    # ValueError: range
    ({"num_modalities": 0}, ValueError, "num_modalities must lie in 1 to 16, got 0"),
    ({"num_modalities": 17}, ValueError, "num_modalities must lie in 1 to 16, got 17"),
    ({"key_modality": ids + 3}, ValueError, "key_modality"),
    ({"key_modality": ids - 2}, ValueError, "key_modality"),
    # ValueError: shape
    (
        {"query": torch.randn(4, 5, 16)},
        ValueError,
        r"query must have shape \(B, Hq, Nq, D\), .*got 3 dimensions, \(4, 5, 16\)",
    ),
    ({"query": torch.randn(1, 3, 2, 4, 5, 16)}, ValueError, "query must have shape .*got 6 dimensions"),
    ({"query": torch.randn(2, 2, 4, 5, 16)}, ValueError, "query must have num_modalities=3 views .*expected 3, got 2"),
    (
        {"key": torch.randn(2, 7, 16)},
        ValueError,
        r"key must have shape \(B, Hkv, Nk, D\), got 3 dimensions, \(2, 7, 16\)",
    ),
    ({"value": torch.randn(7, 16)}, ValueError, r"value must have shape \(B, Hkv, Nk, D\), got 2 dimensions"),
    (
        {"value": torch.randn(2, 2, 8, 16)},
        ValueError,
        r"value must have the shape of key: expected \(2, 2, 7, 16\), got \(2, 2, 8, 16\)",
    ),
    ({"value": torch.randn(2, 2, 7, 8)}, ValueError, r"value must have the shape of key: .*got \(2, 2, 7, 8\)"),
    ({"query": torch.randn(3, 4, 5, 16)}, ValueError, "key must have the batch size of query: expected 3, got 2"),
    ({"query": torch.randn(2, 4, 5, 24)}, ValueError, "key must have the head size of query: expected 24, got 16"),
    (
        {"query": torch.randn(2, 3, 5, 16)},
        ValueError,
        "multiple of the heads of key .*got 3 query heads and 2 key heads",
    ),
    ({"query": torch.randn(2, 0, 5, 16)}, ValueError, "got 0 query heads and 2 key heads"),
    ({"key_modality": ids[0]}, ValueError, r"key_modality must have shape \(B, Nk\), got 1 dimensions, \(7,\)"),
    (
        {"key_modality": ids[:, :6]},
        ValueError,
        r"key_modality must have the shape \(B, Nk\): expected \(2, 7\), got \(2, 6\)",
    ),
    (
        {"modality_bias": torch.zeros(2)},
        ValueError,
        r"modality_bias must have a shape that broadcasts to \(B, Hq, Nq, M\): expected \(2, 4, 5, 3\), got \(2,\)",
    ),
    (
        {"modality_bias": torch.zeros(1, 2, 4, 5, 3)},
        ValueError,
        r"modality_bias must have a shape .*got \(1, 2, 4, 5, 3\)",
    ),
    (
        {"sink": torch.zeros(4)},
        ValueError,
        r"sink must have a shape that broadcasts to \(B, Hq, Nq\): expected \(2, 4, 5\), got \(4,\)",
    ),
    # ValueError: device
    (
        {"key": torch.randn(2, 2, 7, 16, device="meta")},
        ValueError,
        r"key must be on the device of query \(cpu\), got meta",
    ),
    ({"key_modality": ids.to("meta")}, ValueError, r"key_modality must be on the device of query \(cpu\), got meta"),
    ({"sink": torch.zeros(5, device="meta")}, ValueError, r"sink must be on the device of query \(cpu\), got meta"),
    # NotImplementedError: no kernel, and what would do instead
    (
        {n: torch.randn(2, 2, 7, 12) for n in ("query", "key", "value")},
        NotImplementedError,
        "head size 12, .*Pad query",
    ),
    (
        {n: torch.randn(2, 2, 7, 264) for n in ("query", "key", "value")},
        NotImplementedError,
        "head size 264, .*moda_ext.reference",
    ),
    ({n: torch.randn(2, 2, 7, 0) for n in ("query", "key", "value")}, NotImplementedError, "head size 0"),
    (
        {n: torch.zeros(2, 2, 7, 16, dtype=fp8) for n in ("query", "key", "value")},
        NotImplementedError,
        "float8.*torch.bfloat16",
    ),
]

VARLEN = [
    ({"query": torch.randn(1, 4, 5, 8, 16)}, ValueError, r"query must have shape \(Tq, Hq, D\), or \(M, Tq, Hq, D\)"),
    ({"query": torch.randn(2, 5, 4, 16)}, ValueError, "query must have num_modalities=3 views .*expected 3, got 2"),
    ({"key": torch.randn(1, 7, 2, 16)}, ValueError, r"key must have shape \(Tk, Hkv, D\), got 4 dimensions"),
    (
        {"value": torch.randn(6, 2, 16)},
        ValueError,
        r"value must have the shape of key: expected \(7, 2, 16\), got \(6, 2, 16\)",
    ),
    ({"key_modality": ids}, ValueError, r"key_modality must have shape \(Tk,\), got 2 dimensions"),
    (
        {"key_modality": ids[0, :5]},
        ValueError,
        r"key_modality must have the shape \(Tk,\): expected \(7,\), got \(5,\)",
    ),
    ({"key_modality": ids[0] + 3}, ValueError, "key_modality"),
    ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
    (
        {"cu_seqlens_k": torch.tensor([0.0, 3.0, 7.0])},
        TypeError,
        "cu_seqlens_k must have one of the dtypes int32, int64, got",
    ),
    (
        {"cu_seqlens_q": torch.tensor([[0, 2, 5]])},
        ValueError,
        r"cu_seqlens_q must have shape \(number of sequences \+ 1,\)",
    ),
    ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int64)}, ValueError, "cu_seqlens_q must have at least one offset"),
    ({"cu_seqlens_k": torch.tensor([0, 7])}, ValueError, "cu_seqlens_k must have as many offsets .*expected 3, got 2"),
    (
        {"cu_seqlens_q": torch.zeros(3, dtype=torch.int64, device="meta")},
        ValueError,
        "cu_seqlens_q must be on the device",
    ),
    ({"cu_seqlens_q": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_q": torch.tensor([1, 2, 5])}, ValueError, "cu_seqlens_q"),
    ({"cu_seqlens_k": torch.tensor([0, 9, 7]), "max_seqlen_k": 10}, ValueError, "cu_seqlens_k"),
    ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q"),
    ({"max_seqlen_k": 3}, ValueError, "max_seqlen_k"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
    ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k must be an int, got float"),
    (
        {"modality_bias": torch.zeros(4, 5, 3)},
        ValueError,
        r"modality_bias must have a shape that broadcasts to \(Tq, Hq, M\)",
    ),
    ({"sink": torch.zeros(5)}, ValueError, r"sink must have a shape that broadcasts to \(Tq, Hq\): expected \(5, 4\)"),
    ({"query": torch.randn(5, 4, 16, dtype=bfloat16)}, TypeError, "key must have the dtype of query"),
    ({"num_modalities": 17}, ValueError, "num_modalities must lie in 1 to 16, got 17"),
    ({n: torch.randn(7, 2, 20) for n in ("query", "key", "value")}, NotImplementedError, "head size 20"),
]

SINK = [
    ({"num_rows": -1}, ValueError, "num_rows must be at least 0, got -1"),
    ({"num_rows": 4.0}, TypeError, "num_rows must be an int, got float"),
    ({"length": -1}, ValueError, "length must be at least 0, got -1"),
    ({"length": 9.5}, TypeError, "length must be an int, got float"),
    ({"start": -3}, ValueError, "start must be at least 0, got -3"),
    ({"start": None}, TypeError, "start must be an int, got NoneType"),
    ({"decay": "0.5"}, TypeError, "decay must be a number or a tensor, got str"),
    ({"base": None}, TypeError, "base must be a number or a tensor, got NoneType"),
    ({"decay": torch.ones(2, dtype=torch.int64)}, TypeError, "decay must have one of the dtypes .*got torch.int64"),
    ({"base": torch.ones(2, dtype=torch.bool)}, TypeError, "base must have one of the dtypes .*got torch.bool"),
    ({"dtype": torch.int32}, TypeError, "dtype must be one of .*got torch.int32"),
    ({"decay": torch.ones(2, 2)}, ValueError, r"decay must be a scalar or have shape \(H,\), got shape \(2, 2\)"),
    ({"base": float("nan")}, ValueError, "base must be a number below infinity, got nan"),
    ({"base": float("inf")}, ValueError, "base must be a number below infinity, got inf"),
    ({"base": torch.ones(3)}, ValueError, "base must have as many heads as decay: expected 2, got 3"),
    ({"decay": -0.5}, ValueError, "decay must be at least 0, got -0.5"),
    ({"decay": float("nan")}, ValueError, "decay must be at least 0, got nan"),
    ({"decay": 0.0, "length": None}, ValueError, "decay must be above 0 when length is None"),
    ({"decay": torch.tensor([0.5, -1.0])}, ValueError, "decay"),
    ({"decay": torch.tensor([0.5, 0.0]), "length": None}, ValueError, "decay"),
    ({"base": torch.ones(2, device="meta")}, ValueError, r"base must be on the device of decay \(cpu\), got meta"),
    ({"device": "meta"}, ValueError, r"decay must be on the device asked for \(meta\), got cpu"),
]

TABLE = [(function, *case) for function, cases in zip(FUNCTIONS, (DENSE, VARLEN, SINK), strict=True) for case in cases]


@pytest.mark.parametrize(("function", "changes", "error", "message"), TABLE)
def test_error(function, changes, error, message):
    arguments = {**FUNCTIONS[function](), **changes}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    text = str(caught.value)
    assert re.search(message, text), text
    assert text.startswith((function.__name__ + ": ", "modular_attention: ")), text


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_unchanged_arguments_are_right(function):
    function(**FUNCTIONS[function]())


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64), ids=str)
def test_every_integer_type_of_key_modality(device, dtype):
    arguments = dense_arguments()
    arguments["key_modality"] = torch.randint(0, 3, (2, 7))
    expected = attention.modular_attention(**arguments)
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    arguments["key_modality"] = arguments["key_modality"].to(dtype)
    assert torch.allclose(attention.modular_attention(**arguments).cpu(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bias_and_sink_in_either_dtype(device, dtype):
    """They may have the dtype of query or that of lse; gradients come back in their own dtype."""
    q, k, v = (torch.randn(1, 2, 5, 16, device=device, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(2, device=device, dtype=dtype, requires_grad=True)
    sink = torch.randn(2, 1, device=device, dtype=dtype, requires_grad=True)
    modality = torch.tensor([[0, 1, 1, 0, 0]], device=device)
    out, lse, mass = attention.modular_attention(
        q, k, v, modality, modality_bias=bias, sink=sink, return_lse=True, return_mass=True
    )
    assert (out.dtype, lse.dtype, mass.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    for grad, leaf in zip(torch.autograd.grad(lse.sum() + out.float().sum(), (bias, sink)), (bias, sink), strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
def test_empty_inputs_are_valid(device, batch, queries, keys):
    q = torch.randn(batch, 4, queries, 16, device=device, requires_grad=True)
    k, v = (torch.randn(batch, 2, keys, 16, device=device, requires_grad=True) for _ in range(2))
    sink = torch.randn(4, 1, device=device, requires_grad=True)
    modality = torch.zeros(batch, keys, dtype=torch.int64, device=device)
    out, lse, mass = attention.modular_attention(q, k, v, modality, sink=sink, return_lse=True, return_mass=True)
    assert out.shape == q.shape
    assert lse.shape == (batch, 4, queries)
    assert mass.shape == (batch, 4, queries, 2)
    assert not out.any()
    assert not mass.any()
    assert torch.equal(lse, sink.expand(batch, 4, queries))
    grads = torch.autograd.grad(out.sum() + lse.sum() + mass.sum(), (q, k, v, sink))
    assert not any(g.any() for g in grads[:3])
    assert torch.equal(grads[3], torch.full((4, 1), float(batch * queries), device=device))


# Names: an error says what was called, and what it was called with


def operator_calls():
    """{operator: (arguments that are valid but for one, the name of that one)} for direct callers of torch.ops."""
    q, k, ids, wrong = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8), *torch.tensor([[[0] * 4], [[7] * 4]]).int()
    out, lse, mass = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, 2)
    packed_q, packed_k, offsets = torch.zeros(4, 2, 8), torch.zeros(4, 1, 8), torch.tensor([0, 4]).int()
    scale, a, b = torch.ones(1, 1, 4, 2), torch.zeros(2, 8, 4), torch.zeros(2, 4, 8)
    views, gram, weights = torch.zeros(2, 1, 2, 4, 8), torch.zeros(1, 1, 2, 8, 8), (a, b, a, b)
    per_row = torch.zeros(4, 2)
    needs = (True,) * 5
    cache, pages = torch.zeros(2, 1, 4, 17), (torch.tensor([[2]]).int(), offsets[1:], offsets)
    return {
        "modular_attention": ((q, k, k, wrong, None, None, 2, False, 1.0), "key_modality"),
        "modular_attention_backward": (
            (out, None, None, q, k, k, ids, None, None, out, lse[:, 1:], mass, lse, 2, False, 1.0, *needs, True),
            "lse",
        ),
        "modular_attention_varlen": (
            (packed_q, packed_k, packed_k, wrong[0], offsets, offsets, None, None, 4, 4, 2, False, 1.0),
            "key_modality",
        ),
        "modular_attention_varlen_backward": (
            (None, None, None, packed_q, packed_k, packed_k, ids[0], offsets, offsets, None, None)
            + (packed_q, per_row, per_row, per_row, 4, 4, 2, False, 1.0, *needs),
            "mass",
        ),
        "modality_gram": ((k, wrong, 2, True, 1e-6), "modality"),
        "modality_gram_backward": ((gram, k, wrong, 2, True, 1e-6), "modality"),
        "causal_gram_projection": ((q, k, wrong, scale, None, 2, True, 1e-6), "key_modality"),
        "causal_gram_projection_backward": (
            (views, None, q, k, wrong, scale, None, 2, True, 1e-6),
            "key_modality",
        ),
        "duplex_query_views": ((q, k, wrong, scale, *weights, None, 2, True, 1e-6, False, False), "key_modality"),
        "duplex_query_views_backward": (
            (views, None, None, q, k, wrong, scale, *weights, None, mass, 2, True, 1e-6),
            "key_modality",
        ),
        "duplex_attention": (
            (q, k, k, ids, k, wrong, scale, *weights, None, None, None, None, 2, True, 1e-6, 1.0),
            "new_modality",
        ),
        "duplex_aligned_keys": ((k, wrong, None, *weights, 2, True, 1e-6, 0), "modality"),
        "paged_modular_attention": ((packed_q, cache, *pages, None, None, 2, 1.0), "block_table"),
        "paged_duplex_attention": (
            (packed_q, ids[0], cache, *pages, *weights, None, None, None, 2, True, True, 1e-6, 1.0),
            "block_table",
        ),
        "paged_cache_update": ((packed_k, packed_k, wrong[0], cache, torch.full((4,), 9)), "slot_mapping"),
        "paged_attention_step": (
            (packed_q, packed_k[:, :1], packed_k[:, :1], ids[0], torch.full((4,), 9), cache, *pages, *weights)
            + (None, None, None, 2, True, True, 1e-6, 1.0, packed_q.clone()),
            "slot_mapping",
        ),
    }


def test_every_operator_names_itself_and_the_argument(native):
    calls = operator_calls()
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("moda_ext::") for name in names if name.startswith("moda_ext::")}
    registered = {name for name in registered if not name.startswith("toy_")}  # of test_operator.py
    assert calls.keys() == registered
    for name, (arguments, argument) in calls.items():
        with pytest.raises((ValueError, RuntimeError)) as caught:  # torch 2.15 makes one of the other
            getattr(torch.ops.moda_ext, name)(*arguments)
        assert re.match(rf"{name}: {argument}\b", str(caught.value)), caught.value


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), -float("inf")))
def test_a_scale_that_is_no_number_is_refused(scale, native):
    dense, varlen = dense_arguments(), varlen_arguments()
    for function, arguments in ((attention.modular_attention, dense), (attention.modular_attention_varlen, varlen)):
        with pytest.raises(ValueError, match=f"^{function.__name__}: scale must be finite, got {scale}"):
            function(**{**arguments, "scale": scale})
    with pytest.raises((ValueError, RuntimeError), match="^modular_attention: scale: expected a finite number"):
        arguments, _ = operator_calls()["modular_attention"]
        torch.ops.moda_ext.modular_attention(*arguments[:-1], scale)


def test_duplex_attention_names_its_own_arguments():
    q, k, ids = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, dtype=torch.int32)
    a, b = torch.zeros(2, 8, 4), torch.zeros(2, 4, 8)
    for grad in (False, True):  # one operator, or two
        good = [q.clone().requires_grad_(grad), k, k, ids, ids, a, b, a, b]
        cases = [
            ({"new_key": k[..., :4], "new_modality": ids}, NotImplementedError, "new_key has head size 4"),
            ({"new_key": k, "new_modality": ids[:, 1:]}, ValueError, "new_modality must have the shape"),
            ({"new_key": k[:, :, 1:], "new_modality": ids[:, 1:]}, ValueError, "query must have .* tokens as new_key"),
            ({"eps": float("inf")}, ValueError, "eps must be finite, got inf"),
            ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ]
        for options, error, message in cases:
            with pytest.raises(error, match=f"^duplex_attention: {message}"):
                attention.duplex_attention(*good, **options)


def test_duplex_attention_names_the_ids_that_are_wrong(native):
    q, k, ids = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, dtype=torch.int32)
    a, b = torch.zeros(2, 8, 4), torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match="^duplex_attention: key_modality holds 9 at key 0"):
        attention.duplex_attention(q, k, k, ids, ids + 9, a, b, a, b)
    with pytest.raises(ValueError, match="^duplex_attention: new_modality holds 7 at key 0"):
        attention.duplex_attention(q, k, k, ids, ids, a, b, a, b, new_key=k, new_modality=ids + 7)


def test_aligned_keys_name_the_aligner():
    aligner, key = DuplexAligner(8, scope="full"), torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"^DuplexAligner.align_keys: modality must have the shape \(B, N\)"):
        aligner.align_keys(key, torch.zeros(1, 3, dtype=torch.int32))


BEYOND = 2**32


def wide_calls():
    """Integers that are another number, or padding, in 32 bits."""
    query, key, value = (torch.randn(1, 2, 4, 16) for _ in range(3))
    right, wrong = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1 + BEYOND, BEYOND - 1, 0]])
    weights = [torch.randn(*shape) for shape in ((2, 16, 4), (2, 4, 16)) * 2]
    cache, table = torch.zeros(3, 2, 8, 40), torch.tensor([[1, 2]])
    rows, offsets = torch.randn(1, 2, 16), torch.tensor([0, 1])
    packed = [t[0].transpose(0, 1) for t in (query, key, value)]
    return {
        "modular_attention": lambda: attention.modular_attention(query, key, value, wrong),
        "varlen ids": lambda: attention.modular_attention_varlen(
            *packed, wrong[0], torch.tensor([0, 4]), torch.tensor([0, 4]), 4, 4
        ),
        "varlen offsets": lambda: attention.modular_attention_varlen(
            *packed, right[0], torch.tensor([0, 4 + BEYOND]), torch.tensor([0, 4 + BEYOND]), 4, 4
        ),
        "modality_gram": lambda: alignment.modality_gram(key, wrong),
        "causal_gram_projection": lambda: alignment.causal_gram_projection(query, key, right, wrong),
        "duplex_attention": lambda: attention.duplex_attention(query, key, value, right, wrong, *weights),
        "paged lengths": lambda: attention.paged_modular_attention(
            rows, cache, table, torch.tensor([9 + BEYOND]), offsets
        ),
        "paged table": lambda: attention.paged_modular_attention(
            rows, cache, table + BEYOND, torch.tensor([9]), offsets
        ),
        "paged modality": lambda: attention.paged_cache_update(
            torch.randn(1, 2, 16), torch.randn(1, 2, 16), torch.tensor([1 + BEYOND]), cache, torch.tensor([8])
        ),
        "layer": lambda: attention.ModularDuplexAttention(32, 2)(torch.randn(1, 4, 32), wrong),
    }


@pytest.mark.parametrize("call", wide_calls())
def test_integers_without_a_place_in_32_bits_are_refused(call):
    with pytest.raises(ValueError):
        wide_calls()[call]()


@pytest.mark.parametrize("wrong", [2, -2, 300])
def test_ids_of_rows_are_checked_as_those_of_keys_are(wrong):
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    right, ids = torch.tensor([[0, 1, 1]]), torch.tensor([[0, wrong, 1]])
    weights = [torch.randn(*shape) for shape in ((2, 16, 4), (2, 4, 16)) * 2]
    for call in (
        lambda: alignment.causal_gram_projection(query, key, ids, right),
        lambda: alignment.duplex_query_views(query, key, ids, right, *weights),
        lambda: attention.duplex_attention(query, key, key, ids, right, *weights),
    ):
        with pytest.raises(ValueError, match="query_modality must lie in"):
            call()


def test_unsigned_ids_are_as_good_as_others():
    key, ids = torch.randn(1, 2, 9, 16), torch.randint(0, 2, (1, 9), dtype=torch.uint8)
    expected = alignment.modality_gram(key, ids.long())
    assert torch.equal(alignment.modality_gram(key, ids), expected)
    with use_backend("reference"):
        torch.testing.assert_close(alignment.modality_gram(key, ids), expected)
        attended = attention.modular_attention(key, key, key, ids)
    torch.testing.assert_close(attention.modular_attention(key, key, key, ids), attended)


@pytest.mark.parametrize("modality", [99, -7])
def test_no_page_gets_a_modality_that_is_none(modality):
    """Where there is no kernel, as there is none where something wants a gradient."""
    cache = torch.zeros(1, 2, 8, 40)
    tokens = [torch.randn(2, 2, 16) for _ in range(2)]
    for name in ("native", "reference"):
        with use_backend(name), pytest.raises(ValueError, match="modality"):
            attention.paged_cache_update(*tokens, torch.tensor([0, modality]), cache, torch.tensor([0, 1]))
        assert not cache.any()
