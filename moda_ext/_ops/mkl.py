"""Makes MKL choose its vector functions before several threads ask for one at once.

MKL chooses the code of a function in its first call. Where that call comes from several threads, as it does for the
first large tensor of a process, one of them may run code that is right to four digits only
(https://github.com/pytorch/pytorch/issues/188792): seen here as rotary embeddings that differed from run to run.
"""

import functools

import torch

_FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.sigmoid)


@functools.cache
def warm_up() -> None:
    """Calls the functions that this package uses once in a process, on one thread: who makes a module calls it."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(one)
