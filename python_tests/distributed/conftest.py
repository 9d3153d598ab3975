"""Groups of processes for the tests of a file: the threads of gloo, a few for each group, never rest."""

import pytest
import torch
from ranks import Ranks


def _group(world):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    ranks = Ranks(world)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two_ranks():
    yield from _group(2)


@pytest.fixture(scope="module")
def four_ranks():
    yield from _group(4)
