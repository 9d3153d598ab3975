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

# name: batch, query heads, kv heads, queries, keys, head size, modality runs (modality, length)
WORKLOADS = {
    "llava-next": (1, 32, 8, 3072, 3072, 128, ((0, 32), (1, 2880), (0, 160))),
    "causal-4k": (4, 32, 32, 4096, 4096, 128, ((0, 64), (1, 3072), (0, 960))),
    "causal-8k": (2, 32, 32, 8192, 8192, 128, ((0, 64), (1, 7168), (0, 960))),
    "causal-8k-64": (2, 32, 32, 8192, 8192, 64, ((0, 64), (1, 7168), (0, 960))),
    "decode-32k": (16, 32, 8, 1, 32768, 128, ((0, 64), (1, 32000), (0, 704))),
}
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
COPIES = 3  # of the inputs


class Case:
    def __init__(self, shape, dtype):
        batch, heads, kv_heads, self.rows, self.columns, self.size, runs = shape
        modality = torch.cat([torch.full((n,), m) for m, n in runs]).cuda()
        self.modality = modality.expand(batch, -1).int().contiguous()

        def random(*sizes, dtype=dtype):
            return torch.randn(*sizes, device="cuda", dtype=dtype).requires_grad_()

        self.inputs = [
            (
                random(batch, heads, self.rows, self.size),
                random(batch, kv_heads, self.columns, self.size),
                random(batch, kv_heads, self.columns, self.size),
                random(batch, heads, self.rows, 2, dtype=torch.float32),
                random(batch, heads, self.rows, dtype=torch.float32),
            )
            for _ in range(COPIES)
        ]
        self.grads = torch.randn(batch, heads, self.rows, self.size, device="cuda", dtype=dtype)
        last = torch.arange(self.rows) + self.columns - self.rows
        self.products = 2 * batch * heads * int((last + 1).sum()) * self.size  # FLOP of one product over visible pairs

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
        causal = self.rows == self.columns  # one row against a cache sees all of it
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
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
        case = Case(WORKLOADS[workload], torch.bfloat16)
        for mode in ("forward",) if case.rows == 1 else ("forward", "train"):
            train = mode == "train"
            functions = {"ours": lambda i, case=case, train=train: case.ours(i, train)}
            for name, backend in PEERS.items():
                functions[name] = lambda i, case=case, train=train, b=backend: case.plain(i, train, b)
            print(f"{workload}, {mode}")
            with torch.set_grad_enabled(train):
                times = measure(functions, arguments.rounds)
            flop = case.products * (7 if train else 2)
            for name, samples in times.items():
                median = statistics.median(samples)
                rate = flop / median / 1e9
                print(
                    f"  {name:6}{median:9.3f} ms ({min(samples):.3f} to {max(samples):.3f}){rate:8.0f} TFLOP/s"
                    f"   ours / {name}: {statistics.median(times['ours']) / median:.2f}"
                )
                rows.append({"workload": workload, "mode": mode, "contender": name, "ms": samples, "tflops": rate})
        del case
    if arguments.json:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        with open(arguments.json, "w") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
