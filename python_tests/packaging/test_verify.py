"""``moda-ext verify``: passes here, finds what is wrong, and what a stamp then decides and does not."""

import importlib.machinery
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from processes import TIERS, environment_with

import moda_ext
from moda_ext._ops import backend, library, on_gpus, operators, stamps
from moda_ext._ops.limits import FLOATS
from moda_ext.verify import checks
from moda_ext.verify.__main__ import lower_isas, main, usable_device
from moda_ext.verify.cases import FAMILIES, SIZES, cases

pytestmark = pytest.mark.usefixtures("native")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MODA_EXT_STAMPS", str(tmp_path / "stamps"))
    return tmp_path / "stamps"


def verify(*arguments, **variables):
    command = [sys.executable, "-m", "moda_ext.verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment_with(**variables))


def test_every_operator_is_verified():
    assert tuple(FAMILIES) == backend.OPERATORS
    for op, (structures, _) in FAMILIES.items():
        axes = [{f", {str(dtype)[6:]}" for dtype in FLOATS}, {f"D={size}," for size in SIZES}, set(structures)]
        whole, some = (list(cases(op, FLOATS, some=some)) for some in (False, True))
        assert len(some) < len(whole) == len(axes[0]) * len(axes[1]) * len(axes[2])
        for one, other in itertools.combinations(axes, 2):
            for pair in itertools.product(one, other):
                assert any(all(word in case.label for word in pair) for case in some), (op, pair)


def test_every_instruction_set_passes(folder, tmp_path):
    """A few cases of each: the tests of the operators have the others."""
    report = tmp_path / "report.json"
    run = verify("--quick", "--device", "cpu", "--json", report)
    assert run.returncode == 0, run.stdout + run.stderr
    found = [told["circumstances"]["isa"] for told in json.loads(report.read_text())]
    assert found == [moda_ext.info()["isa"], *lower_isas()]
    assert set(found) == set(list(TIERS.values())[: len(found)])
    assert not folder.exists()


OFF_BY_A_HUNDREDTH = """
import sys
from moda_ext._ops import operators
from moda_ext.verify.__main__ import main
operator, call = operators.modality_gram, operators.modality_gram._call
operator._call = lambda inputs: call(inputs) + 1e-2
sys.exit(main(sys.argv[1:]))
"""


def test_a_wrong_operator_fails_and_another_backend_computes(folder, tmp_path):
    """A whole run on the instruction set in use, as it alone keeps a stamp; then processes that come later."""
    report = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--isa", "current", "--json", str(report)]
    run = subprocess.run([sys.executable, "-c", OFF_BY_A_HUNDREDTH, *arguments], capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "modality_gram FAILED: accuracy: " in run.stdout
    assert "To report it: python -m moda_ext.verify --device cpu --only modality_gram" in run.stdout
    (told,) = json.loads(report.read_text())
    assert [op for op, failure in told["failures"].items() if failure] == ["modality_gram"]
    assert tuple(told["failures"]) == backend.OPERATORS
    assert {check["check"] for check in told["checks"]} == {"accuracy", "same again"}
    passed = [check for check in told["checks"] if check["check"] == "accuracy" and not check["failed"]]
    assert all(0 < check["worst"] <= 1 for check in passed if check["operator"] != "paged_cache_update")  # which copies
    assert [times["what"] for times in told["times"]] == ["forward", "forward + backward"]
    (stamp,) = folder.iterdir()
    assert str(stamp) in run.stdout
    assert told["circumstances"] == stamps.circumstances(CPU)
    assert stamps.read(told["circumstances"]) == told["failures"]
    later = who_computes()
    assert later["modality_gram"]["backend"] == "reference"
    assert (
        "failed `python -m moda_ext.verify --device cpu` on this machine: accuracy: "
        in later["modality_gram"]["reason"]
    )
    assert later["modular_attention"]["backend"] == "native"
    assert who_computes(MODA_EXT_STAMPS="0")["modality_gram"]["backend"] == "native"
    assert who_computes(MODA_EXT_BACKEND="native")["modality_gram"]["backend"] == "native"
    # Of another library, as after an update: it says nothing about this one.
    changed = json.loads(stamp.read_text())
    changed["circumstances"]["libraries"] = "0" * 64
    stamp.write_text(json.dumps(changed))
    assert who_computes()["modality_gram"]["backend"] == "native"


def who_computes(**variables):
    """Who computes what on the CPU in a new process."""
    code = "import json, moda_ext; print(json.dumps({o: c['cpu'] for o, c in moda_ext.info()['backends'].items()}))"
    environment = environment_with(**variables)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("op", backend.OPERATORS)
def test_an_error_of_a_hundredth_shows_in_every_operator(op, monkeypatch):
    declared = operators.DECLARED[op]
    call = declared._call

    def off(inputs):
        results = call(inputs)
        if results is None:  # it writes into an argument
            inputs[declared.arguments.index("kv_cache")].add_(1e-2)
            return None
        first, *rest = results if isinstance(results, tuple) else (results,)
        return (first + 1e-2, *rest) if rest else first + 1e-2

    (case, *_) = (case for case in cases(op, (torch.float32,)) if "D=64" in case.label)
    assert checks.error_of(case, CPU).part <= 1
    monkeypatch.setattr(declared, "_call", off)
    assert checks.error_of(case, CPU).part > 10


def test_results_that_change_and_results_that_nobody_wrote_show(monkeypatch):
    (case, *_) = cases("modality_gram", (torch.float32,))
    assert checks.changes_when_repeated(case, CPU) is None
    call, calls = operators.modality_gram._call, []
    monkeypatch.setattr(
        operators.modality_gram, "_call", lambda inputs: call(inputs) * (1 + 1e-7 * len(calls.append(1) or calls))
    )
    assert checks.changes_when_repeated(case, CPU) == "gram"
    monkeypatch.setattr(operators.modality_gram, "_call", lambda inputs: torch.empty_like(call(inputs)))
    error = checks.error_of(case, CPU)
    assert (error.result.startswith("gram"), error.part) == (True, float("inf"))


NO_STAMPS = ("", "[]", "null", '"x"', "[" * 10**5, '{"circumstances": 3}', "FACTS", "LISTED", "NUMBERS")


@pytest.mark.parametrize("text", NO_STAMPS, ids=range(len(NO_STAMPS)))
def test_what_is_no_stamp_proves_nothing(folder, text):
    facts = stamps.circumstances(CPU)
    stamps.write(facts, {"modality_gram": "wrong"})
    (path,) = folder.iterdir()
    said = {"FACTS": {}, "LISTED": {"failures": ["modality_gram"]}, "NUMBERS": {"failures": {"modality_gram": 0}}}
    path.write_text(json.dumps({"circumstances": facts, **said[text]}) if text in said else text)
    assert stamps.read(facts) is None
    assert stamps.obstacles_on_cpu(backend.OPERATORS) == {}


@pytest.mark.parametrize("name", ("x" * 300, "/proc/1/root/stamps", "relative", "/dev/null"))
def test_a_folder_that_cannot_be_read_holds_no_stamps(name, tmp_path):
    told = who_computes(MODA_EXT_STAMPS=name)
    assert all(choice["backend"] == "native" for choice in told.values())


def test_without_a_home_there_are_no_stamps(monkeypatch):
    monkeypatch.delenv("MODA_EXT_STAMPS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert stamps.folder().is_absolute()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert stamps.folder() is None


# Stamps of GPUs, beside a GPU that is not there -----------------------------------------------------------------------


class Gpu:
    name, major, minor = "NVIDIA H200", 9, 0


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: Gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (Gpu.major, Gpu.minor))
    monkeypatch.setattr(stamps, "_driver", lambda: "580.1")
    return torch.device("cuda", 0)


def test_on_a_gpu_operators_wait_for_their_stamp(gpu, folder, monkeypatch):
    ops = ("modular_attention", "modality_gram")
    missing = stamps.obstacles_on_gpus(ops)
    assert set(missing) == set(ops)
    expected = "not verified on this NVIDIA H200: `python -m moda_ext.verify --device cuda:0` does that"
    assert all(expected in reason for reason in missing.values())
    facts = stamps.circumstances(gpu)
    assert (facts["capability"], facts["driver"]) == ("9.0", "580.1")
    stamps.write(facts, {"modular_attention": "", "modality_gram": "accuracy: D=64: off"})
    found = stamps.obstacles_on_gpus(ops)
    assert list(found) == ["modality_gram"]
    assert found["modality_gram"].endswith("--device cuda:0` on this machine: accuracy: D=64: off")
    for change in ("_driver", "_digest"):
        with monkeypatch.context() as changed:
            changed.setattr(stamps, change, lambda *files: "another")
            assert set(stamps.obstacles_on_gpus(ops)) == set(ops)
    with monkeypatch.context() as changed:
        changed.setattr(torch.cuda, "device_count", lambda: 2)  # the second is another
        changed.setattr(torch.cuda, "get_device_properties", lambda device: type("", (Gpu,), {"minor": device.index}))
        assert set(stamps.obstacles_on_gpus(ops)) == set(ops)
    monkeypatch.setenv("MODA_EXT_STAMPS", "0")
    assert set(stamps.obstacles_on_gpus(ops)) == set(ops)


def test_a_stamp_decides_who_computes(gpu, monkeypatch):
    monkeypatch.setattr(backend, "NATIVE_DEVICES", frozenset({"cpu", "cuda", "meta"}))
    monkeypatch.delitem(sys.modules, "moda_ext._ops.on_gpus", raising=False)
    stamps.write(stamps.circumstances(gpu), dict.fromkeys(backend.OPERATORS, "") | {"modality_gram": "graphs: wrong"})
    try:
        assert backend.explain("modular_attention", "cuda") == (backend.NATIVE, "native kernels")
        choice = backend.explain("modality_gram", "cuda")
        assert (choice.backend, "graphs: wrong" in choice.reason) == (backend.COMPOSITE, True)
    finally:
        sys.modules.pop("moda_ext._ops.on_gpus", None)


def test_triton_is_looked_for_where_there_is_a_gpu(gpu, monkeypatch):
    assert on_gpus._obstacle_of_triton() == (
        None if importlib.util.find_spec("triton") else "FlexAttention needs triton on a GPU, which is not installed"
    )
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton", "not a package"))  # no __spec__: ValueError
    assert "which is not installed" in on_gpus._obstacle_of_triton()
    sys.modules["triton"].__spec__ = importlib.machinery.ModuleSpec("triton", None)
    assert on_gpus._obstacle_of_triton() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert on_gpus._obstacle_of_triton().endswith("a GPU here has 6.1")


# What cannot be verified ----------------------------------------------------------------------------------------------


def test_refusals(monkeypatch, tmp_path, capsys):
    for device, message in (("tpu", "no device 'tpu'"), ("mps", "native operators for cpu and cuda, not for mps")):
        with pytest.raises(SystemExit, match=message):
            usable_device(device)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=f"--device cuda: torch {torch.__version__.replace('+', '.')} sees no GPU"):
            usable_device("cuda")
    monkeypatch.setenv("MODA_EXT_STAMPS", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        stamps.write({"device": "x"}, {})
    assert stamps.read({"device": "x"}) is None
    with pytest.raises(SystemExit, match=f"--json: no such directory: {tmp_path}/nowhere"):
        main(["--device", "cpu", "--json", f"{tmp_path}/nowhere/report.json"])
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr(library, "native_loaded", False)
    monkeypatch.setattr(library, "fallback_reason", "it is gone")
    with pytest.raises(SystemExit, match="it is gone: there is nothing to verify"):
        main(["--device", "cpu"])


def test_as_a_command(tmp_path):
    pytest.importorskip("typer", reason="typer is not installed")
    arguments = ["verify", "--quick", "--isa", "current", "--device", "cpu", "--only", "modality_gram"]
    command = [sys.executable, "-m", "moda_ext", *arguments, "--json", tmp_path / "report.json"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert "modality_gram             accuracy" in run.stdout
    told = subprocess.run([sys.executable, "-m", "moda_ext", "verify", "--help"], capture_output=True, text=True)
    assert "--quick" in told.stdout
