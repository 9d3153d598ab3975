"""The Transformers that is installed, against the range that moda_ext was tested with (``moda_ext/_version.py``)."""

from importlib import metadata

from moda_ext._version import TRANSFORMERS_BELOW, TRANSFORMERS_MIN, TRANSFORMERS_TESTED, __version__, series

__all__ = ["at_least", "beyond_tested", "check_minimum", "versions"]


def found() -> str | None:
    """Version of the installed Transformers, None without one."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def _series(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def check_minimum() -> None:
    """Raises ImportError unless a Transformers is installed that is new enough."""
    version = found()
    if version is None:
        raise ImportError("moda_ext.integrations.transformers needs transformers: pip install 'moda_ext[transformers]'")
    if _series(version) < TRANSFORMERS_MIN:
        raise ImportError(
            f"moda_ext.integrations.transformers needs transformers {series(TRANSFORMERS_MIN)} or later, "
            f"found {version}: pip install 'moda_ext[transformers]'"
        )


def at_least(release: tuple[int, ...]) -> bool:
    """Whether the installed Transformers is of that release or a later one."""
    version = found()
    return version is not None and _series(version) >= release


def beyond_tested() -> bool:
    """Whether the installed Transformers is of a release that did not exist when moda_ext was tested."""
    return at_least(TRANSFORMERS_BELOW)


def versions() -> str:
    """Both versions and the tested range, for errors."""
    return (
        f"(transformers {found()}; moda_ext {__version__} was tested with transformers {series(TRANSFORMERS_MIN)} to "
        f"{TRANSFORMERS_TESTED})"
    )
