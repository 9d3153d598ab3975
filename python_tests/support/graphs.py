"""What torch.compile makes of a call and its gradient, traced on tensors without data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sizes_in_graphs(call: Callable[..., Tensor], make: Callable[[], Sequence[Tensor]]) -> list[int]:
    """Numbers of elements of all tensors in the graphs of ``call(*make())`` and its gradient, the largest first.

    One graph each way, or an error: a step that reads what a tensor holds would wait for a device.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    with FakeTensorMode():
        compiled(*make()).backward()
    assert len(graphs) == 2  # forward and backward
    leaves = [torch.utils._pytree.tree_leaves(node.meta.get("val")) for graph in graphs for node in graph.graph.nodes]
    return sorted((leaf.numel() for made in leaves for leaf in made if isinstance(leaf, Tensor)), reverse=True)
