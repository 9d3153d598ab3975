"""The command ``moda-ext``. Needs the extra ``moda_ext[cli]``; :mod:`moda_ext.__main__` says so where it is missing."""

# Each makes its commands known to the application.
from moda_ext.cli import assemble, calibrate, chat, diagnose, evaluate, machine, serve, study, train  # noqa: F401
from moda_ext.cli.app import app

__all__ = ["app"]
