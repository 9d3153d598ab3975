"""The one home of the version and of the supported ranges of torch and Transformers, also for setup.py and tools/."""

__version__ = "0.1.0"

TORCH_MIN = (2, 11)  # first supported torch; the stable ABI the native library is compiled for
TORCH_BELOW = (2, 15)  # first torch that is not supported
TORCH_REQUIREMENT = "torch>=2.11,<2.15"
TORCH_TESTED = "2.13.0"  # what is installed, or built against, where no torch is there yet

TRANSFORMERS_MIN = (5, 23)  # first supported Transformers
TRANSFORMERS_BELOW = (5, 25)  # first one that was not tested: from it on, each family proves itself when first used
TRANSFORMERS_REQUIREMENT = "transformers>=5.23,<6"
TRANSFORMERS_TESTED = "5.24.0"  # the newest that was tested
