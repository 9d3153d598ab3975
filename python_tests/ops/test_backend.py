"""Who computes: the one decision, its reasons, and where they are told."""

import subprocess
import sys

import pytest
import torch

import moda_ext
from moda_ext._ops import backend, library, on_gpus

native = pytest.mark.skipif(not library.native_loaded, reason="no native library")
HALVES = ("modular_attention", "modular_attention_varlen")
GRAMS = ("modality_gram", "causal_gram_projection", "duplex_query_views")


@pytest.fixture
def cuda_kernels(monkeypatch):
    """As if the CUDA library were loaded and in use."""
    monkeypatch.setattr(backend, "NATIVE_DEVICES", frozenset({"cpu", "cuda", "meta"}))
    monkeypatch.setattr(on_gpus, "NATIVE_OBSTACLES", {})


@native
@pytest.mark.parametrize("op", backend.OPERATORS)
def test_the_cpu_has_kernels_of_every_operator_and_dtype(op):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backend.explain(op, "cpu", dtype).backend == backend.NATIVE
    assert backend.explain(op, "meta").backend == (backend.COMPOSED if op in backend.FUSED else backend.NATIVE)


@native
@pytest.mark.parametrize("op", sorted(backend.FUSED))
def test_a_fused_operator_runs_where_nothing_is_differentiated(op):
    choice = backend.explain(op, "cpu", differentiated=True)
    assert choice.backend == backend.COMPOSED
    assert "gradient" in choice.reason
    leaf = torch.randn(2, requires_grad=True)
    assert backend.choose(op, torch.randn(2), None, leaf) == backend.COMPOSED
    with torch.no_grad():
        assert backend.choose(op, torch.randn(2), None, leaf) == backend.NATIVE
    assert backend.choose(op, torch.randn(2), torch.randn(2, device="meta")) == backend.COMPOSED
    torch.vmap(lambda t: _expect(op, t, backend.COMPOSED))(torch.randn(3, 2))


def _expect(op, tensor, expected):
    assert backend.choose(op, tensor) == expected
    return tensor


@native
def test_only_float64_on_cuda_has_no_kernels(cuda_kernels):
    for op in (*HALVES, *GRAMS):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backend.explain(op, "cuda", dtype).backend == backend.NATIVE
    for op in HALVES:
        assert backend.explain(op, "cuda", torch.float64).backend == backend.REFERENCE
    for op in GRAMS:
        assert backend.explain(op, "cuda", torch.float64).backend == backend.COMPOSITE
    for op in backend.FUSED:
        assert backend.explain(op, "cuda").backend == backend.COMPOSED


@native
def test_cuda_kernels_that_are_not_in_use(cuda_kernels, monkeypatch):
    reason = "the CUDA kernels are not verified on this GPU"
    monkeypatch.setattr(on_gpus, "NATIVE_OBSTACLES", dict.fromkeys(backend.OPERATORS, reason))
    for op in HALVES:
        assert backend.explain(op, "cuda", torch.bfloat16) == (backend.FLEX, reason)
        assert backend.explain(op, "cuda", torch.float64).backend == backend.REFERENCE
    for op in GRAMS:
        assert backend.explain(op, "cuda") == (backend.COMPOSITE, reason)
    with moda_ext.use_backend("native"):
        assert all(backend.explain(op, "cuda").backend == backend.NATIVE for op in (*HALVES, *GRAMS))


@native
def test_what_flex_attention_cannot_compute_goes_to_the_next(monkeypatch):
    choice = backend.explain("modular_attention", "cuda", torch.float64)
    assert choice.backend == backend.REFERENCE
    assert "FlexAttention has no float64 kernels" in choice.reason
    with monkeypatch.context() as without:
        without.setattr(on_gpus, "FLEX_OBSTACLE", "FlexAttention needs triton on a GPU, which is not installed")
        choice = backend.explain("modular_attention", "cuda")
        assert choice.backend == backend.REFERENCE
        assert "needs triton on a GPU, which is not installed" in choice.reason
        with moda_ext.use_backend("flex"):
            assert backend.explain("modular_attention", "cpu").backend == backend.FLEX
    monkeypatch.setattr(backend, "transformed", lambda: True)
    choice = backend.explain("modular_attention", "cuda")
    assert choice.backend == backend.REFERENCE
    assert "torch.func" in choice.reason


def test_a_backend_is_asked_for_and_given_back():
    default = backend.explain("modular_attention", "cpu")
    with moda_ext.use_backend("reference"):
        assert backend.explain("modular_attention", "cpu") == (backend.REFERENCE, "it is asked for")
        with moda_ext.use_backend(None):
            assert backend.explain("modular_attention", "cpu") == default
        assert backend.explain("modality_gram", "cpu").backend == backend.REFERENCE
        assert backend.explain("duplex_attention", "cpu").backend == backend.COMPOSED
    assert backend.explain("modular_attention", "cpu") == default
    with pytest.raises(ValueError, match="name must be one of native, flex, reference or None, got 'fast'"):
        moda_ext.use_backend("fast")


def test_a_backend_that_is_asked_for_computes():
    tokens, ids = torch.randn(2, 2, 9, 16), torch.zeros(2, 9, dtype=torch.int64)
    expected = moda_ext.attention.modular_attention(tokens, tokens, tokens, ids)
    compiled = torch.compile(moda_ext.attention.modular_attention, backend="eager", fullgraph=True)
    for name in ("native", "reference", None):
        with moda_ext.use_backend(name):
            torch.testing.assert_close(moda_ext.attention.modular_attention(tokens, tokens, tokens, ids), expected)
            torch.testing.assert_close(compiled(tokens, tokens, tokens, ids), expected)


@native
def test_a_device_without_kernels_is_an_error_that_says_so():
    assert backend.explain("modular_attention", "xpu").backend == backend.FLEX
    assert backend.explain("modality_gram", "xpu").backend == backend.COMPOSITE
    assert backend.explain("modular_attention", "mps") == (None, "this build of moda_ext has no kernels for mps")

    class Elsewhere:
        device, dtype = torch.device("mps", 0), torch.float32

    with pytest.raises(NotImplementedError, match="modality_gram: key is on mps:0, and this build of moda_ext has no"):
        backend.choose("modality_gram", Elsewhere(), name="key")


def test_without_a_native_library_the_reference_computes_and_says_why(monkeypatch):
    monkeypatch.setattr(library, "native_loaded", False)
    monkeypatch.setattr(library, "fallback_reason", "it is gone")
    assert backend.explain("modular_attention", "cpu") == (backend.REFERENCE, "it is gone")
    assert backend.explain("duplex_attention", "cpu") == (backend.COMPOSED, "it is gone")


def test_info_tells_it():
    backends = moda_ext.info()["backends"]
    assert set(backends) == set(backend.OPERATORS)
    for op, choices in backends.items():
        assert choices["cpu"] == backend.explain(op, "cpu")._asdict()
        assert all(choice["reason"] for choice in choices.values())
    told = subprocess.run([sys.executable, "-m", "moda_ext.info", "--why"], capture_output=True, text=True, check=True)
    for op, choices in backends.items():
        assert f"\n{op}\n" in told.stdout
        assert choices["cpu"]["reason"] in told.stdout
    refused = subprocess.run([sys.executable, "-m", "moda_ext.info", "--who"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "unknown arguments --who" in refused.stderr
