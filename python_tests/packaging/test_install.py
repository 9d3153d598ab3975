"""Loading the native library: what is checked at import, the fallback, and what moda_ext.info() says."""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import TIERS

import moda_ext
from moda_ext._ops import library

PACKAGE = Path(moda_ext.__file__).parent


def run_python(*arguments, path: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """A fresh Python, which imports the package from `path` if given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MODA_EXT_")} | environment
    cwd = path or PACKAGE.parent
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True)


# An editable installation finds modules that a copy of the package lacks: take its finder away.
ONLY_THE_COPY = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]; "


@pytest.fixture
def copy_without_native(tmp_path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "moda_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.mark.parametrize("found", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "2.15.0+cu132"])
def test_supported_torch_is_accepted(found):
    assert library.torch_mismatch(found, "2.13.0") is None


@pytest.mark.parametrize("found", ["1.13.1", "2.10.0+cpu", "2.16.0.dev20270101", "3.0.0"])
def test_unsupported_torch_names_both_versions_and_the_fix(found):
    message = library.torch_mismatch(found, "2.13.0+cpu")
    assert f"found torch {found}" in message
    assert "built for torch 2.13.0+cpu" in message
    assert 'pip install "torch>=2.11,<2.16"' in message


def test_unsupported_torch_is_an_import_error(native):
    result = run_python("-c", "import torch; torch.__version__ = '2.9.1'; import moda_ext")
    assert result.returncode != 0
    assert "ImportError: moda_ext" in result.stderr
    assert "found torch 2.9.1" in result.stderr


@pytest.fixture
def source_tree(tmp_path) -> Path:
    """What setup.py reads before it compiles."""
    checkout = PACKAGE.parent
    if not (checkout / "setup.py").exists():
        pytest.skip("the package is not in a checkout")
    read = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/sources.json", "tools/cuda_units.py")
    for name in (*read, "moda_ext/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(checkout / name, tmp_path / name)
    return tmp_path


def test_a_build_beside_an_unsupported_torch_stops_before_it_compiles(source_tree):
    fake = source_tree / "fake" / "torch" / "utils"
    fake.mkdir(parents=True)
    (fake.parent / "__init__.py").write_text("__version__ = '2.16.0'")
    (fake / "__init__.py").write_text("cpp_extension = None")
    result = run_python("setup.py", "build_ext", path=source_tree, PYTHONPATH=str(source_tree / "fake"))
    assert result.returncode != 0 and not (source_tree / "build").exists()
    message = "needs torch>=2.11,<2.16, but found torch 2.16.0. Fix: python -m pip install"
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("hook", ["wheel", "sdist", "editable"])
def test_an_isolated_build_does_not_choose_another_torch_than_the_users(hook, monkeypatch):
    path = PACKAGE.parent / "tools" / "build_backend.py"
    if not path.exists():
        pytest.skip("the package is not in a checkout")
    backend = importlib.util.module_from_spec(importlib.util.spec_from_file_location("build_backend", path))
    backend.__spec__.loader.exec_module(backend)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # in isolation there is no torch

    def answer(stdout, returncode=0):
        done = subprocess.CompletedProcess([], returncode, stdout=stdout)
        monkeypatch.setattr(backend.subprocess, "run", lambda *arguments, **options: done)

    requires = getattr(backend, f"get_requires_for_build_{hook}")
    answer("", returncode=1)
    assert requires() == [f"torch=={moda_ext._version.TORCH_TESTED}"]
    answer('["2.15.0+cu132", ["/somewhere"]]')
    assert requires() == []
    answer('["2.10.0", ["/somewhere"]]')
    with pytest.raises(SystemExit, match="but found torch 2.10.0. Fix: python -m pip install"):
        requires()


def test_a_source_tree_that_cannot_be_written_is_said(source_tree):
    (source_tree / "build").write_text("")  # also stops root, whom permissions do not
    result = run_python("setup.py", "--version", path=source_tree)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert f"{source_tree} cannot be written" in result.stderr and "copy the tree" in result.stderr


def test_a_wheel_and_a_source_distribution_say_that_the_package_is_typed(source_tree):
    for name in ("__init__.py", "py.typed"):
        shutil.copy(PACKAGE / name, source_tree / "moda_ext" / name)
    result = run_python("setup.py", "-q", "egg_info", "build_py", "--build-lib", "wheel", path=source_tree)
    assert result.returncode == 0, result.stderr
    assert (source_tree / "wheel" / "moda_ext" / "py.typed").exists()
    assert "moda_ext/py.typed" in (source_tree / "moda_ext.egg-info" / "SOURCES.txt").read_text().splitlines()


def test_info_is_a_function_and_a_program():
    result = run_python("-W", "error", "-m", "moda_ext.info", MODA_EXT_DISABLE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert moda_ext.__version__ in result.stdout
    result = run_python("-c", "import moda_ext.info; print(moda_ext.info()['torch'])")
    assert result.stdout.strip() == torch.__version__


def test_info_of_the_native_build(native):
    info = moda_ext.info()
    assert info["native"] is True
    assert info["isa"] in info["isas_built"]
    assert "build" in info["build"]
    assert Path(info["library"]).exists()


@pytest.mark.parametrize(("cap", "isa"), [("default", TIERS["default"]), ("avx2", "avx2")])
def test_instruction_set_can_be_capped(native, cap, isa):
    if cap == "avx2" and moda_ext.info()["isa"] == TIERS["default"]:
        pytest.skip("this machine has no AVX2")
    result = run_python("-c", "import moda_ext; print(moda_ext.info()['isa'])", ATEN_CPU_CAPABILITY=cap)
    assert result.stdout.strip() == isa


def test_an_unknown_backend_is_an_error():
    result = run_python("-c", "import moda_ext", MODA_EXT_BACKEND="fast")
    assert "MODA_EXT_BACKEND: expected one of native, flex, reference, got 'fast'" in result.stderr
    result = run_python("-c", "import moda_ext", MODA_EXT_CUDA="native")
    assert "MODA_EXT_CUDA has become MODA_EXT_BACKEND" in result.stderr


def test_a_backend_is_asked_for():
    code = "import moda_ext; print(moda_ext.info()['backends']['modular_attention']['cpu']['backend'])"
    assert run_python("-c", code, MODA_EXT_BACKEND="reference").stdout.strip() == "reference"


def test_without_native_library_warns_once_and_falls_back(copy_without_native):
    code = ONLY_THE_COPY + "import moda_ext; import moda_ext.attention; print(moda_ext.info()['native'])"
    result = run_python("-c", code, path=copy_without_native)
    assert result.stdout.strip() == "False"
    assert result.stderr.count("RuntimeWarning: moda_ext: the native library is not built") == 1


def test_required_native_library_is_an_error_when_missing(copy_without_native):
    result = run_python("-c", ONLY_THE_COPY + "import moda_ext", path=copy_without_native, MODA_EXT_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "ImportError: moda_ext: the native library is not built" in result.stderr


def test_broken_native_library_is_an_error_not_a_fallback(native, copy_without_native):
    shutil.copy(PACKAGE / "_build_info.abi3.so", copy_without_native / "moda_ext")
    result = run_python("-c", ONLY_THE_COPY + "import moda_ext", path=copy_without_native)
    assert "ImportError: moda_ext: the native build lacks moda_ext._operators" in result.stderr

    broken = copy_without_native / "moda_ext" / Path(library.library_path).name
    broken.write_bytes(b"not a library")
    result = run_python("-c", ONLY_THE_COPY + "import moda_ext", path=copy_without_native)
    assert f"ImportError: moda_ext: cannot load {broken}" in result.stderr


def test_libraries_of_an_older_build_are_not_picked_up(copy_without_native):
    for name in ("_operators", "_C"):
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if suffix != ".abi3.so":
                (copy_without_native / "moda_ext" / f"{name}{suffix}").write_bytes(b"not a library")
    code = ONLY_THE_COPY + "import moda_ext; print(moda_ext.info()['native'])"
    result = run_python("-W", "ignore", "-c", code, path=copy_without_native)
    assert result.stdout.strip() == "False", result.stderr


def test_one_wheel_serves_every_python(native):
    """No library names a symbol of Python, and the wheel says so in its tag."""
    libraries = sorted(PACKAGE.glob("_*.so"))
    assert {path.name for path in libraries} >= {"_build_info.abi3.so", "_operators.abi3.so"}
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    for path in libraries:
        assert path.name.endswith(".abi3.so")
        symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in symbols.splitlines()]
        assert names and [name for name in names if re.match("_?Py[A-Z_]", name)] == []


def test_the_installed_wheel_is_tagged_abi3(native):
    found = [each.read_text("WHEEL") for each in importlib.metadata.distributions(name="moda_ext")]
    wheels = [text for text in found if text is not None]  # None: what setuptools leaves in a checkout
    if not wheels:
        pytest.skip("the package is built in place, not installed")
    for text in wheels:
        tags = re.findall("^Tag: (.+)$", text, re.MULTILINE)
        assert tags and all(tag.startswith("cp310-abi3-") for tag in tags)


def test_native_library_can_be_ignored():
    result = run_python("-c", "import moda_ext; print(moda_ext.info()['native'])", MODA_EXT_DISABLE_NATIVE="1")
    assert result.stdout.strip() == "False"
    assert result.stderr == ""


def test_without_a_gpu_nothing_warns_and_what_needs_one_says_so():
    """Beside a torch with CUDA as well, which tests under `tools/dev.py matrix` have."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = run_python("-W", "error", "-m", "moda_ext.info", "--why")
    assert (told.returncode, told.stderr) == (0, "")
    assert "no kernels for cuda" in told.stdout or "no GPU to use the kernels on" in told.stdout
    refused = run_python("-W", "error", "-m", "moda_ext.verify", "--device", "cuda")
    assert refused.returncode == 1
    assert refused.stderr == f"moda-ext verify: --device cuda: torch {torch.__version__} sees no GPU\n"
