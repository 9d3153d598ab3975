"""One command from a fresh checkout to a result; needs Python 3.10+, a C++ compiler and pip.

python3 tools/dev.py demo        set up, then run the demo
python3 tools/dev.py test        set up, then C++ tests (plain, then with sanitizers), then Python tests
python3 tools/dev.py bench       set up, then the benchmarks
python3 tools/dev.py lint        ruff and clang-format, without building anything
python3 tools/dev.py kernels     compiles the CUDA kernels and checks what became of them; needs nvcc, no GPU

Further arguments go to the demo, pytest, the benchmarks or the report on the kernels. Uses the active virtual
environment if there is one, else .venv in the checkout; uses the torch that is there, else installs one (the CPU build
on a machine without an NVIDIA GPU). Run it as often as you like: what is done already is not done again.
"""

import argparse
import os
import runpy
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit("dev.py: needs Python 3.10 or newer")

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's CPU builds; PyPI has CUDA builds for Linux
BUILD_TOOLS = ["setuptools>=77", "wheel", "ninja"]  # [build-system] of pyproject.toml, for builds without isolation
DISASSEMBLER = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]  # a minimal CUDA toolkit has none
VERSION = runpy.run_path(str(ROOT / "moda_ext/_version.py"))


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: object, **options) -> None:
    """Runs a command in the checkout; ends this program with its exit status if it fails."""
    words = [str(word) for word in command]
    print("$ " + " ".join(words), flush=True)
    status = subprocess.run(words, cwd=ROOT, **options).returncode
    if status != 0:
        raise SystemExit(f"\ndev.py: failed with status {status}: {' '.join(words)}")


def torch_version(python: Path | str) -> tuple[int, ...] | None:
    """(major, minor) of the torch that `python` would import, None without one."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    probe = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    return tuple(map(int, probe.stdout.split(".")[:2])) if probe.returncode == 0 else None


def supported(version: tuple[int, ...] | None) -> bool:
    return version is not None and VERSION["TORCH_MIN"] <= version < VERSION["TORCH_BELOW"]


def has_pip(python: Path) -> bool:
    return python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def environment() -> Path:
    """Python of the virtual environment to work in, created if need be."""
    active = os.environ.get("VIRTUAL_ENV")
    if not active and os.environ.get("CONDA_DEFAULT_ENV", "base") != "base":  # conda's base is everyone's: left alone
        active = os.environ.get("CONDA_PREFIX")
    if sys.prefix != sys.base_prefix or sys.prefix == active:
        active, python = sys.prefix, Path(sys.executable)
    elif active:
        python = Path(active) / "bin" / "python"
    if active:
        step(f"environment: {active} (active)")
        if not has_pip(python):
            run(python, "-m", "ensurepip")
        return python

    home = ROOT / ".venv"
    python = home / "bin" / "python"
    step(f"environment: {home}")
    if not has_pip(python):
        options = ["--system-site-packages"] if supported(torch_version(sys.executable)) else []
        # Without venv's own way to get pip: it needs ensurepip, which Debian packs apart.
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", *options, home)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", site, "pip")
    return python


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def pip_install(python: Path, *words: str) -> None:
    run(python, "-m", "pip", "install", "--disable-pip-version-check", *words)


def ensure_torch(python: Path) -> None:
    version = torch_version(python)
    requirement = VERSION["TORCH_REQUIREMENT"]
    if supported(version):
        step(f"torch: {'.'.join(map(str, version))} is there")
        return
    if version is not None:
        found = ".".join(map(str, version))
        raise SystemExit(f'dev.py: found torch {found}; moda_ext needs {requirement}. Fix: pip install "{requirement}"')
    if has_gpu():
        step("torch: installing (this machine has an NVIDIA GPU)")
        pip_install(python, requirement)
        return
    step("torch: installing the CPU build (no NVIDIA GPU found)")
    index = ["--extra-index-url", CPU_INDEX] if reachable(f"{CPU_INDEX}/torch/") else []
    if not index:
        print(f"{CPU_INDEX} cannot be reached: taking what pip finds, which may be the larger CUDA build")
    pip_install(python, *index, f"torch=={VERSION['TORCH_TESTED']}")


def install(python: Path, extra: str) -> None:
    """The package, editable and compiled against the environment's torch; only what changed is compiled again."""
    step(f"moda_ext: building and installing with [{extra}] (minutes the first time)")
    pip_install(python, "--quiet", *BUILD_TOOLS)
    pip_install(python, "--quiet", "--no-build-isolation", "--editable", f".[{extra}]")
    run(python, "-m", "moda_ext.info", env={**os.environ, "MODA_EXT_REQUIRE_NATIVE": "1"})


def cpp_tests(python: Path, folder: str, *options: str) -> None:
    step(f"C++ tests in {folder} {' '.join(options)}")
    jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
    env = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}  # cmake and ninja from pip
    run("cmake", "-S", ".", "-B", folder, "-G", "Ninja", f"-DPython3_EXECUTABLE={python}", *options, env=env)
    run("cmake", "--build", folder, "--parallel", jobs, env=env)
    run("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "--parallel", jobs, env=env)


def demo(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    install(python, "demo")
    step("demo")
    run(python, "-m", "moda_ext.demo", *arguments)


def test(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    install(python, "test,test-transformers")
    cpp_tests(python, "build/cmake")
    cpp_tests(python, "build/sanitize", "-DMODA_EXT_SANITIZE=ON")
    step("Python tests")
    run(python, "-m", "pytest", *arguments, env={**os.environ, "MODA_EXT_REQUIRE_NATIVE": "1"})


def bench(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    install(python, "bench")
    step("benchmarks")
    run(python, "-m", "benchmarks", *arguments)


def lint(python: Path, arguments: list[str]) -> None:
    step("lint")
    pip_install(python, "--quiet", "-r", "tools/lint-requirements.txt")
    run(python, "-m", "ruff", "check", ".")
    run(python, "-m", "ruff", "format", "--check", ".")
    cpp = sorted(path.relative_to(ROOT) for end in ("h", "cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{end}"))
    run(python.parent / "clang-format", "--dry-run", "-Werror", *cpp)


def kernels(python: Path, arguments: list[str]) -> None:
    step("CUDA kernels")
    pip_install(python, "--quiet", *DISASSEMBLER)
    run(python, "tools/cuda_report.py", "--check", *arguments)


def main() -> None:
    commands = {"demo": demo, "test": test, "bench": bench, "lint": lint, "kernels": kernels}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parsed, arguments = parser.parse_known_args()
    start = time.monotonic()
    commands[parsed.command](environment(), arguments)
    step(f"{parsed.command}: done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
