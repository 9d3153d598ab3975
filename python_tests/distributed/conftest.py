"""Groups of processes for all tests of this folder."""

import pytest
import torch
from ranks import Ranks


def _group(world):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    ranks = Ranks(world)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks():
    yield from _group(2)


@pytest.fixture(scope="session")
def four_ranks():
    yield from _group(4)
