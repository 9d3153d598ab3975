"""Every CUDA kernel once, forward and backward, against moda_ext.reference in float64: under a minute, for sanitizers.

MODA_EXT_BACKEND=native python3 tools/gpu_smoke.py

Dtypes with tensor cores and without, every head size, causal or not, query views, few rows (packed heads, keys split),
sequences packed into one, Gram matrices, an aligner's views.
"""

import torch

from moda_ext import alignment, reference
from moda_ext.attention import modular_attention, modular_attention_varlen

TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}  # of the largest number in a result
DEVICE = "cuda"


def weights(result: torch.Tensor) -> torch.Tensor:
    return torch.arange(result.numel(), device=result.device, dtype=torch.float64).cos().view(result.shape)


def run(function, tensors) -> list[torch.Tensor]:
    """Results and gradients of everything that has one."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    results = function(*inputs)
    sum((result.double() * weights(result)).sum() for result in results).backward()
    return [*results, *(t.grad for t in inputs if t.is_floating_point())]


def compare(name, function, oracle, tensors) -> None:
    dtype = tensors[0].dtype
    results = run(function, tensors)
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    for i, (got, expected) in enumerate(zip(results, run(oracle, doubles), strict=True)):
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


def grams(dtype, size) -> None:
    def call(module):
        def grams_of(query, key, modality):
            ids = modality[:, -query.shape[2] :], modality
            projection, (gram, _) = module.causal_gram_projection(query, key, *ids, 2, return_state=True)
            return module.modality_gram(key, modality, 2), projection, gram

        return grams_of

    tensors = [
        torch.randn(1, 4, 300, size, device=DEVICE, dtype=dtype),
        torch.randn(1, 2, 700, size, device=DEVICE, dtype=dtype),
        (torch.arange(700, device=DEVICE) // 50 % 3 - 1)[None],
    ]
    compare(f"Grams, D={size}", call(alignment), call(reference), tensors)


def aligner_views(dtype, size) -> None:
    def call(module):
        def views_of(query, key, a1, b1, a2, b2, modality):
            ids = modality[:, -query.shape[2] :], modality
            views, indicator, (gram, _) = module.duplex_query_views(
                query, key, *ids, a1, b1, a2, b2, return_indicator=True, return_state=True
            )
            return views, indicator, gram

        return views_of

    tensors = [
        torch.randn(1, 4, 300, size, device=DEVICE, dtype=dtype),
        torch.randn(1, 2, 700, size, device=DEVICE, dtype=dtype),
        *(torch.randn(2, *shape, device=DEVICE) / 8 for shape in ((size, 16), (16, size)) * 2),
        (torch.arange(700, device=DEVICE) // 50 % 3 - 1)[None],
    ]
    compare(f"views of an aligner, D={size}", call(alignment), call(reference), tensors)


def main() -> None:
    torch.manual_seed(0)
    for dtype in TOLERANCES:
        for size in (32, 64, 96, 128, 192, 256):
            dense(dtype, size, 70, 150, True, False)
            dense(dtype, size, 70, 150, False, True)
            dense(dtype, size, 1, 1500, True, False)
            grams(dtype, size)
            aligner_views(dtype, size)
        varlen(dtype)
    torch.cuda.synchronize()
    print("every kernel agrees with the reference")


if __name__ == "__main__":
    main()
