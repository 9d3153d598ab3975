"""What checks in several processes compare: tensors that may be sharded, and the same model in one process."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

EXACT, SINGLE = 1e-12, 2e-6  # of the largest number: what float64 and float32 leave between one process and several


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(result, expected):
    """max |difference| / max |expected|."""
    result, expected = full(result).detach(), expected.detach()
    assert result.shape == expected.shape, f"{tuple(result.shape)}, expected {tuple(expected.shape)}"
    return ((result - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_equal_gradients(model, whole, allowed=EXACT, scale=1.0, but=(), names=""):
    """Each gradient of ``model``, times ``scale``, is that of one process, if there is one; of some names alone."""
    compared = 0
    for (name, own), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if names in name and not name.endswith(but):
            assert (own.grad is None) == (other.grad is None), f"{name} has {own.grad}, expected {other.grad}"
            if own.grad is not None and other.grad.abs().max() > 1e-7:  # below, nothing but rounding: a bias of keys
                assert error(own.grad * scale, other.grad) <= allowed, f"{name}: {error(own.grad * scale, other.grad)}"
                compared += 1
    assert compared


def assert_replicas_equal(tensors, group=None):
    """Bit for bit the same numbers in all processes of a group."""
    for tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        smallest, largest = tensor.detach().clone(), tensor.detach().clone()
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        assert torch.equal(smallest, largest)


def randomize_moda(layer, seed=3, scale=0.3):
    """Aligner and mask whose every parameter matters, equal in every process."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name.startswith(("aligner.", "mask.")):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return layer
