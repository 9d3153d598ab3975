"""Who computes: the one decision, its reasons, and where they are told."""

import subprocess
import sys

import pytest
import torch

import moda_ext
from moda_ext._ops import backend, library

native = pytest.mark.skipif(not library.native_loaded, reason="no native library")
HALVES = ("modular_attention", "modular_attention_varlen")
GRAMS = ("modality_gram", "causal_gram_projection", "duplex_query_views")


@pytest.fixture
def cuda_kernels(monkeypatch):
    """As if the CUDA library were loaded and in use."""
    monkeypatch.setattr(backend, "NATIVE_DEVICES", frozenset({"cpu", "cuda", "meta"}))
    monkeypatch.setattr(library, "cuda_mode", lambda: "native")


@native
@pytest.mark.parametrize("op", backend.OPERATORS)
def test_the_cpu_has_kernels_of_every_operator_and_dtype(op):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backend.explain(op, "cpu", dtype).backend == backend.NATIVE
    assert backend.explain(op, "meta").backend == (backend.COMPOSED if op in backend.FUSED else backend.NATIVE)


@native
@pytest.mark.parametrize("op", backend.FUSED)
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
    monkeypatch.setattr(library, "cuda_mode", lambda: "reference")
    choice = backend.explain("modular_attention", "cuda")
    assert choice.backend == backend.REFERENCE
    assert choice.reason == library.cuda_reason()


@native
def test_a_device_without_kernels_is_an_error_that_says_so():
    assert backend.explain("modular_attention", "xpu") == (None, "this build of moda_ext has no kernels for xpu")

    class Elsewhere:
        device, dtype = torch.device("xpu", 0), torch.float32

    with pytest.raises(NotImplementedError, match="modality_gram: key is on xpu:0, and this build of moda_ext has no"):
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
