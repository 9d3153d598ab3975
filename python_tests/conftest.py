"""Devices, seeds and the hypothesis profile shared by all tests."""

import os
import tempfile

os.environ.setdefault("MODA_EXT_STAMPS", "0")  # the user's have no part in what is tested

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import moda_ext  # noqa: E402
from moda_ext._ops import backend, library  # noqa: E402
from moda_ext.verify import checks  # noqa: E402

DEVICES = ("cpu", "cuda")

# Graphs that Inductor has cached for another instruction set, or for other operators, would run here.
_inductor_cache = tempfile.TemporaryDirectory(prefix="moda_ext_inductor_", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name

# The same cases in every run; HYPOTHESIS_PROFILE=explore looks for new ones. The database would litter the checkout.
_COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile("repeatable", derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def _let_flex_attention_differentiate_on_the_cpu(monkeypatch):
    """Its kernel there has no gradients, and it refuses them; its dense form, which runs uncompiled, has them."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(backend, "FLEX_IS_WHOLE_ON_CPU", True)


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention computes, on the CPU too."""
    _let_flex_attention_differentiate_on_the_cpu(monkeypatch)
    with moda_ext.use_backend("flex"):
        yield


if os.environ.get("MODA_EXT_BACKEND") == "flex":
    _let_flex_attention_differentiate_on_the_cpu(pytest.MonkeyPatch())


def pytest_report_header(config):
    info = moda_ext.info()
    kernels = ", ".join(sorted(backend.NATIVE_DEVICES - {"meta"})) or "none, the reference runs"
    return (
        f"moda_ext {info['version']}, native kernels: {kernels}, instruction set: {info['isa']}, torch {info['torch']}"
    )


def pytest_terminal_summary(terminalreporter):
    reason = unavailable("cuda")
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    number = sum(isinstance(text, tuple) and text[2] == f"Skipped: {reason}" for text in skipped)
    if number:
        terminalreporter.write_line(f"{number} tests for a GPU were skipped: {reason}")


def unavailable(device: str) -> str | None:
    """Why the tests cannot run on this device, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if device == "cuda" and library.cuda_loaded and backend.explain("modular_attention", "cuda").backend != "native":
        return "the CUDA kernels are not in use (MODA_EXT_BACKEND=native uses them)"
    if library.native_loaded and device not in backend.NATIVE_DEVICES:
        return f"built without {device} kernels"
    return None


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> str:
    """Every device that has kernels and hardware; the others show up as skipped."""
    reason = unavailable(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skips a test of what only a GPU has where there is none, or no kernels for it."""
    reason = unavailable("cuda")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def native() -> None:
    """Skips a test that is about the native operators themselves where they are not built."""
    if not library.native_loaded:
        pytest.skip("the native library is not built")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny calls: threads that wait for each other would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread) -> None:
    torch.set_num_threads(2)


@pytest.fixture
def poisoned_memory():
    """See moda_ext.verify.checks: a result that nobody wrote, or scratch that nobody set, shows as NaN."""
    with checks.poisoned_memory():
        yield
