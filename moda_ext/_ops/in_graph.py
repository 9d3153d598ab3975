"""Calls through autograd functions that torch.compile takes into its graph as they are.

Imported only while one is traced: the decorator imports torch._dynamo, which takes as long as torch itself.
"""

from collections.abc import Callable
from typing import Any

import torch

from moda_ext._ops.operator import FUNCTIONS


def _in_graph(function: type[torch.autograd.Function]) -> Callable:
    @torch.compiler.allow_in_graph
    def call(*inputs: Any) -> Any:
        return function.apply(*inputs)

    return call


CALLS = {name: _in_graph(function) for name, function in FUNCTIONS.items()}
