"""The command ``moda-ext``. Needs the extra ``moda_ext[cli]``; :mod:`moda_ext.__main__` says so where it is missing."""

from moda_ext.cli import calibrate, diagnose, machine, serve  # noqa: F401  each makes its commands known to the application
from moda_ext.cli.app import app

__all__ = ["app"]
