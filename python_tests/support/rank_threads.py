"""Ranks that are threads of one process: collectives without a start of processes (point to point there is not)."""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


def run_threads(function: Callable[[], None], world: int) -> None:
    """``function()`` on every one of ``world`` ranks; raises the first error of one."""
    errors: list[BaseException] = []
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            function()
            dist.destroy_process_group()
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)  # which ends the waiting of the others

    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        ProcessLocalGroup.reset()  # what an error has left there would be waited for in the next call
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
