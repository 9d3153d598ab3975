"""PEP 517 backend: setuptools, plus the choice of the torch that an isolated build compiles against.

pip hides the user's packages from an isolated build, and torch as a build requirement would be another torch than the
one the package will run with. So: the torch of the environment that runs pip if it has one, which must be supported,
else (and only then) a required one. `--no-build-isolation` sees the user's torch anyway.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta

_VERSION = runpy.run_path(str(Path(__file__).resolve().parents[1] / "moda_ext/_version.py"))

_PROBE = """
import importlib.metadata, json, sys
print(json.dumps([importlib.metadata.version("torch"), sys.path]))
"""


def _user_torch_path() -> list[str]:
    """Import path of the environment that runs pip, or [] if it has no torch; ends the build with one not supported.

    pip runs a build with the interpreter of that environment and hides its packages through environment variables; the
    same interpreter without those variables finds all its packages: of a virtual environment, the user, the system.
    """
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hidden_by}
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=env, cwd="/", capture_output=True, text=True)
    if probe.returncode != 0:
        return []
    version, path = json.loads(probe.stdout)
    if not _VERSION["supports_torch"](version):  # another one would be built against and put in its place, unasked
        raise SystemExit(_VERSION["unsupported_torch"](version))
    return [entry for entry in path if entry]


def _make_torch_importable() -> None:
    if importlib.util.find_spec("torch") is None:
        # At the end of the path, so that the build's own packages win.
        sys.path += [entry for entry in _user_torch_path() if entry not in sys.path]


def _requirements() -> list[str]:
    if importlib.util.find_spec("torch") or _user_torch_path():
        return []
    return [f"torch=={_VERSION['TORCH_TESTED']}"]


def get_requires_for_build_sdist(config_settings=None):
    return _requirements()


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _make_torch_importable()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_sdist(sdist_directory, config_settings=None):
    _make_torch_importable()
    return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _make_torch_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
