"""Every CUDA kernel once, forward and backward, against moda_ext.reference in float64: under a minute, for sanitizers.

MODA_EXT_CUDA=native python3 tools/gpu_smoke.py

Dtypes with tensor cores and without, every head size, causal or not, query views, few rows (packed heads, keys split),
sequences packed into one.
"""

import torch

from moda_ext import reference
from moda_ext.attention import modular_attention, modular_attention_varlen

TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}  # of the largest number in a result
DEVICE = "cuda"


def run(function, tensors, weight) -> list[torch.Tensor]:
    """Results and gradients of everything that has one."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    out, lse, mass = function(*inputs)
    ((out.double() * weight).sum() + lse.double().sum() + mass.double()[..., 0].sum()).backward()
    return [out, lse, mass, *(t.grad for t in inputs if t.is_floating_point())]


def compare(name, function, oracle, tensors) -> None:
    dtype = tensors[0].dtype
    weight = torch.randn(tensors[0].shape[-len(tensors[1].shape) :], device=DEVICE)
    results = run(function, tensors, weight)
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    for i, (got, expected) in enumerate(zip(results, run(oracle, doubles, weight), strict=True)):
        error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCES[dtype], f"{name}, {dtype}, result {i}: relative error {error:.1e}"


def dense(dtype, size, rows, columns, causal, views) -> None:
    def call(function):
        return lambda query, key, value, modality, bias, sink: function(
            query,
            key,
            value,
            modality,
            modality_bias=bias,
            sink=sink,
            is_causal=causal,
            return_lse=True,
            return_mass=True,
        )

    tensors = [
        torch.randn((2, 1, 4, rows, size) if views else (1, 4, rows, size), device=DEVICE, dtype=dtype),
        torch.randn(1, 2, columns, size, device=DEVICE, dtype=dtype),
        torch.randn(1, 2, columns, size, device=DEVICE, dtype=dtype),
        (torch.arange(columns, device=DEVICE) // 50 % 3 - 1)[None],
        torch.randn(1, 4, rows, 2, device=DEVICE),
        torch.randn(1, 4, rows, device=DEVICE),
    ]
    name = f"D={size}, Nq={rows}, Nk={columns}" + (", causal" if causal else "") + (", views" if views else "")
    compare(name, call(modular_attention), call(reference.modular_attention), tensors)


def varlen(dtype) -> None:
    def call(function):
        return lambda *tensors: function(*tensors, 60, 70, is_causal=True, return_lse=True, return_mass=True)

    tensors = [
        torch.randn(90, 4, 64, device=DEVICE, dtype=dtype),
        torch.randn(120, 2, 64, device=DEVICE, dtype=dtype),
        torch.randn(120, 2, 64, device=DEVICE, dtype=dtype),
        torch.randint(-1, 2, (120,), device=DEVICE),
        torch.tensor([0, 30, 30, 90], device=DEVICE),
        torch.tensor([0, 40, 50, 120], device=DEVICE),
    ]
    compare("varlen", call(modular_attention_varlen), call(reference.modular_attention_varlen), tensors)


def main() -> None:
    torch.manual_seed(0)
    for dtype in TOLERANCES:
        for size in (32, 64, 96, 128, 192, 256):
            dense(dtype, size, 70, 150, True, False)
            dense(dtype, size, 70, 150, False, True)
            dense(dtype, size, 1, 1500, True, False)
        varlen(dtype)
    torch.cuda.synchronize()
    print("every kernel agrees with the reference")


if __name__ == "__main__":
    main()
