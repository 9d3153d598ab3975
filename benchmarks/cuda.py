"""Modular attention on a GPU beside PyTorch's plain attention: python -m benchmarks.cuda [--json FILE]

Every call carries the full operator (random bias, sink, lse, mass); the peer, scaled_dot_product_attention with each
backend that runs, does less. Times are of CUDA events, medians over rounds in which ours and the peers take turns, with
inputs rotated through more memory than the second-level cache holds. TFLOP/s count the products of visible pairs: four
D for each forward, ten more for a backward pass.
"""

import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import moda_ext
from moda_ext.attention import modular_attention

from .workloads import LLAVA_NEXT, Case, image_in_text

WORKLOADS = {
    case.workload: case
    for case in (
        LLAVA_NEXT,
        Case("causal-4k", "causal N=4096", image_in_text(64, 3072, 960), batch=4, key_heads=32),
        Case("causal-8k", "causal N=8192", image_in_text(64, 7168, 960), batch=2, key_heads=32),
        Case("causal-8k-64", "causal N=8192 D=64", image_in_text(64, 7168, 960), batch=2, key_heads=32, head_dim=64),
        Case("decode-32k", "decode 32k keys", image_in_text(64, 32000, 704), batch=16, num_queries=1),
    )
}
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
COPIES = 3  # of the inputs


class Calls:
    """Random inputs of a case on the GPU, and what is timed on them."""

    def __init__(self, case: Case, dtype: torch.dtype):
        batch, heads, rows, size = case.batch, case.query_heads, case.rows, case.head_dim
        modality = torch.cat([torch.full((n,), m) for m, n in case.runs]).cuda()
        self.modality = modality.expand(batch, -1).int().contiguous()
        self.square = rows == case.num_keys

        def random(*sizes, dtype=dtype):
            return torch.randn(*sizes, device="cuda", dtype=dtype).requires_grad_()

        self.inputs = [
            (
                random(batch, heads, rows, size),
                random(batch, case.key_heads, case.num_keys, size),
                random(batch, case.key_heads, case.num_keys, size),
                random(batch, heads, rows, case.num_modalities, dtype=torch.float32),
                random(batch, heads, rows, dtype=torch.float32),
            )
            for _ in range(COPIES)
        ]
        self.grads = torch.randn(batch, heads, rows, size, device="cuda", dtype=dtype)

    def ours(self, i, train):
        query, key, value, bias, sink = self.inputs[i % COPIES]
        results = modular_attention(
            query,
            key,
            value,
            self.modality,
            modality_bias=bias,
            sink=sink,
            is_causal=True,
            return_lse=True,
            return_mass=True,
        )
        if train:
            torch.autograd.grad(results[0], (query, key, value, bias, sink), self.grads)

    def plain(self, i, train, backend):
        query, key, value = self.inputs[i % COPIES][:3]
        with sdpa_kernel(backend):  # one row against a cache sees all of it
            out = scaled_dot_product_attention(query, key, value, is_causal=self.square, enable_gqa=True)
        if train:
            torch.autograd.grad(out, (query, key, value), self.grads)


def measure(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the functions taking turns; those that cannot run are left out."""
    able = {}
    for name, function in functions.items():
        try:
            for i in range(COPIES):
                function(i)
            torch.cuda.synchronize()
            able[name] = function
        except RuntimeError as error:
            print(f"  {name}: cannot run: {str(error).splitlines()[0]}")
    times = {name: [] for name in able}
    for i in range(rounds):
        for name, function in able.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(i)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if moda_ext.info()["cuda_kernels"] != "native":
        raise SystemExit("benchmarks.cuda: the CUDA kernels are not in use. Fix: set MODA_EXT_CUDA=native.")
    rows = []
    for workload in arguments.workload:
        case = WORKLOADS[workload]
        calls = Calls(case, torch.bfloat16)
        for mode in ("forward",) if case.rows == 1 else ("forward", "train"):
            train = mode == "train"
            functions = {"ours": lambda i, calls=calls, train=train: calls.ours(i, train)}
            for name, backend in PEERS.items():
                functions[name] = lambda i, calls=calls, train=train, b=backend: calls.plain(i, train, b)
            print(f"{workload}, {mode}")
            with torch.set_grad_enabled(train):
                times = measure(functions, arguments.rounds)
            flop = case.useful_flops(mode)
            for name, samples in times.items():
                median = statistics.median(samples)
                rate = flop / median / 1e9
                print(
                    f"  {name:6}{median:9.3f} ms ({min(samples):.3f} to {max(samples):.3f}){rate:8.0f} TFLOP/s"
                    f"   ours / {name}: {statistics.median(times['ours']) / median:.2f}"
                )
                rows.append({"workload": workload, "mode": mode, "contender": name, "ms": samples, "tflops": rate})
        del calls, functions
    if arguments.json:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        with open(arguments.json, "w") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
