"""Training runs on the CPU, on which its batches and what it is compared with are."""

import pytest
from processes import hide_accelerators


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        hide_accelerators(patch.setattr)
        yield
