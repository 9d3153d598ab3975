"""The processes of these tests: errors come to light, nobody waits for the dead, and none is left behind."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import GRACE, Ranks


def total(number):
    tensor = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(tensor)
    return tensor.item(), os.getpid()


def fail_in_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def die_in_rank_1():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def wait_in_rank_1():
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


@pytest.fixture
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_same_processes_serve_many_checks(ranks):
    first, second = ranks.run(total, 1), ranks.run(total, 2)
    assert [value for value, _ in first] == [3.0, 3.0] and [value for value, _ in second] == [5.0, 5.0]
    assert [pid for _, pid in first] == [pid for _, pid in second]
    ranks.stop()
    assert not any(exists(pid) for _, pid in first)


@pytest.mark.parametrize(
    ("function", "patience", "error"),
    [
        (fail_in_rank_1, 45, r"(?s)^rank 1 of 2: Traceback.*ValueError: the reason"),
        (die_in_rank_1, 45, "^rank 1 of 2: died with exit code 7"),
        (wait_in_rank_1, 2, "gave no answer in 2 s"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_rank_that_fails_ends_the_others_with_its_error_on_top(ranks, function, patience, error):
    pids = [pid for _, pid in ranks.run(total, 0)]
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=error):
        ranks.run(function, patience=patience)
    assert time.monotonic() - begin < patience + GRACE + 10 and not any(exists(pid) for pid in pids)
    assert [value for value, _ in ranks.run(total, 1)] == [3.0, 3.0]  # by new ones


def test_a_rank_that_died_between_checks_is_told(ranks):
    pids = [pid for _, pid in ranks.run(total, 0)]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(AssertionError, match="^rank 1 of 2: died with exit code -9"):
        ranks.run(total, 0)
    assert not any(exists(pid) for pid in pids)
