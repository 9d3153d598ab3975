"""The native build as a whole: import, fallback, instruction sets, threads, memory."""

import doctest
import json
import os
import subprocess
import sys

import pytest
import torch
from problems import Problem, cotangents_for, evaluate, make_problem, ours
from processes import ORDER, TESTS, TIERS, environment_with, python
from tolerance import assert_close

import moda_ext
from moda_ext._ops import library
from moda_ext.functional import alignment, attention
from moda_ext.nn import aligner, mask
from moda_ext.nn import attention as layer

FIRST_CALL = """
import sys, torch, moda_ext.mask
moda_ext.mask.ModularMask(1)
torch.set_num_threads(2)
(torch.randn(600, 2000) @ torch.randn(2000, 2000)).sum()  # both threads are awake
x = torch.linspace(0.1, 20.0, 100000)
function = getattr(torch, sys.argv[1])
result, exact = function(x).double(), function(x.double())
print(((result - exact).abs() / exact.abs().clamp(min=1.0)).max().item())
"""


@pytest.mark.parametrize("function", ("cos", "sin", "log", "exp"))
def test_first_call_after_a_module_is_made_is_as_accurate_as_the_others(function):
    """MKL's own choice fails in about one process of three: moda_ext._ops.mkl."""
    assert float(python(FIRST_CALL, function)) < 1e-6


def test_import_in_a_fresh_interpreter():
    code = """
        import moda_ext, torch
        print(moda_ext.__version__, moda_ext.ops is torch.ops.moda_ext)
        print(all(callable(getattr(moda_ext.reference, name)) for name in ("modular_attention", "pseudo_score_sink")))
    """
    lines = python("\n".join(line.strip() for line in code.splitlines())).splitlines()
    assert lines == [f"{moda_ext.__version__} True", "True"]


def test_info_tells_what_runs():
    info = moda_ext.info()
    assert info["native"] == library.native_loaded
    assert info["version"] == moda_ext.__version__
    assert info["torch"] == torch.__version__
    if library.native_loaded:
        assert info["isa"] in ORDER
    json.dumps(info)  # plain values only
    printed = subprocess.run([sys.executable, "-m", "moda_ext.info"], capture_output=True, text=True, check=True).stdout
    for key in ("version", "torch", "isa"):
        assert key in printed


@pytest.mark.parametrize("module", (alignment, attention, aligner, layer, mask), ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_run(module):
    results = doctest.testmod(module)
    assert results.attempted >= 4
    assert results.failed == 0


# Fallback

AGREEMENT = (
    {"queries": 33, "keys": 40, "is_causal": True, "heads": 4, "kv_heads": 2, "num_modalities": 3},
    {"queries": 20, "keys": 20, "views": True, "dtype": torch.float64, "padding": "scattered", "num_modalities": 4},
    {"queries": 12, "keys": 30, "dtype": torch.bfloat16, "bias": "hidden rows", "sink": "partly off"},
    {"queries": 9, "keys": 0, "bias": None},
    {"queries": 17, "keys": 17, "head_size": 64, "layouts": ("tokens first", "fused", "expanded heads"), "sink": None},
)

FALLBACK = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from moda_ext._ops import library
assert not library.native_loaded
from problems import cotangents_for, evaluate, make_problem, ours
from test_native import AGREEMENT
results = []
for keywords in AGREEMENT:
    problem = make_problem(**keywords)
    results.append(evaluate(ours, problem, cotangents_for(problem, torch.Generator().manual_seed(1))))
torch.save(results, sys.argv[1])
"""


def test_fallback_and_native_build_agree(native, tmp_path):
    file = tmp_path / "fallback.pt"
    python(FALLBACK, str(file), MODA_EXT_DISABLE_NATIVE="1")
    for keywords, fallback in zip(AGREEMENT, torch.load(file), strict=True):
        problem = make_problem(**keywords)
        result = evaluate(ours, problem, cotangents_for(problem, torch.Generator().manual_seed(1)))
        assert result.keys() == fallback.keys()
        for name, value in fallback.items():
            assert result[name].dtype == value.dtype
            assert_close(result[name], value, units=4 if value.dtype == torch.bfloat16 else 64)


def test_fallback_passes_the_tests_of_the_interface(native):
    """The same suite with the native library switched off: the errors, the sink's closed form, mask and aligner."""
    files = ("ops/test_errors.py", "ops/test_pseudo_score_sink.py", "nn/test_mask.py", "nn/test_release.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / f) for f in files)]
    environment = environment_with(MODA_EXT_DISABLE_NATIVE="1")
    run = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:]


# Instruction sets

CONSISTENCY = """
import torch, moda_ext
from problems import compare, cotangents_for, make_problem
torch.set_num_threads(1)
shapes = [
    dict(queries=150, keys=220, head_size=64, is_causal=True, heads=8, runs="long runs"),
    dict(queries=37, keys=41, head_size=200, views=True, num_modalities=3, padding="left"),
    dict(queries=3, keys=333, head_size=128, is_causal=True, runs="runs of one"),
    dict(queries=70, keys=70, head_size=8, bias="hidden rows", sink="partly off"),
]
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in shapes:
        problem = make_problem(dtype=dtype, **shape)
        compare(problem, cotangents_for(problem, torch.Generator().manual_seed(1)), fuzzed=True)
print(moda_ext.info()["isa"])
"""


@pytest.mark.parametrize("capability", TIERS)
def test_every_instruction_set_of_this_machine(native, capability):
    best = moda_ext.info()["isa"]
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("ATEN_CPU_CAPABILITY is already set")
    if ORDER.index(TIERS[capability]) > ORDER.index(best):
        pytest.skip(f"this machine has {best} at most")
    assert python(CONSISTENCY, ATEN_CPU_CAPABILITY=capability).split() == [TIERS[capability]]


# Threads and memory


THREADED = {
    "many heads": {"heads": 8, "kv_heads": 4, "queries": 130, "keys": 130, "is_causal": True},
    "one head": {
        "batch": 1,
        "heads": 1,
        "kv_heads": 1,
        "queries": 600,
        "keys": 600,
        "is_causal": True,
        "runs": "long runs",
    },
    "decode": {
        "batch": 1,
        "heads": 8,
        "kv_heads": 2,
        "queries": 1,
        "keys": 1500,
        "is_causal": True,
        "runs": "long runs",
    },
}


@pytest.mark.parametrize("shape", THREADED.values(), ids=THREADED)
def test_the_number_of_threads_changes_nothing(native, shape):
    problem = make_problem(head_size=32, **shape)
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1))
    results = []
    for number in (1, 2, 2, 3):
        torch.set_num_threads(number)
        results.append(evaluate(ours, problem, cotangents))
    for other in results[1:]:
        for name, value in results[0].items():
            if "gradient" in name:
                assert_close(other[name], value)
            else:
                assert torch.equal(other[name], value), name
    for name, value in results[1].items():
        assert torch.equal(results[2][name], value), f"{name}: the same call twice"


MEMORY = """
import resource, sys, torch
from problems import cotangents_for, evaluate, make_problem, ours
torch.set_num_threads(2)
shape = dict(batch=1, heads=2, kv_heads=1, head_size=16, is_causal=True, runs="long runs")
def run(tokens):
    problem = make_problem(queries=tokens, keys=tokens, **shape)
    cotangents = [c.float() for c in cotangents_for(problem, torch.Generator().manual_seed(1))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate(ours, problem, cotangents)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
run(64)
print(run(16384))
"""


def test_no_memory_for_all_pairs(native):
    """16384 x 16384 scores of two heads are 2 GB in float32; forward and backward may take a twentieth of that."""
    assert int(python(MEMORY)) < 100 * 1024  # kilobytes


def test_problem_is_what_it_says():
    """The other tests rest on make_problem: its layouts hold the same values and differ in their strides."""
    plain = make_problem(queries=6, keys=9)
    for layout in ("tokens first", "fused", "padded rows", "strided last"):
        other = make_problem(queries=6, keys=9, layouts=(layout,) * 3)
        assert isinstance(other, Problem)
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(other, name), getattr(plain, name))
            assert getattr(other, name).stride() != getattr(plain, name).stride()
