"""Served tokens a second of checkpoints over the first one's: engines of vLLM in one process, in turn.

    python -m benchmarks.serving FOLDER plain full

FOLDER is that of a family as python_tests/serving/checkpoints.py makes it, then names of its checkpoints. Runs in the
environment of ``tools/dev.py serving``. Eight answers at once, of prompts that no engine has seen, without an image.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
REQUESTS, PROMPT = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default: 128)")
    parser.add_argument("--rounds", type=int, default=15, help="of all engines in turn (default: 15)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    given = parser.parse_args()
    os.environ.update(SETTINGS, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", OMP_NUM_THREADS=str(given.threads))
    from vllm import LLM, SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=given.tokens, min_tokens=given.tokens, detokenize=False)
    engines = {
        name: LLM(
            str(given.folder / name),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=REQUESTS,
            block_size=32,
            enforce_eager=given.eager,
            gpu_memory_utilization=0.1,
            enable_prefix_caching=False,
        )
        for name in given.names
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(1 + given.rounds):
        for name, engine in engines.items():
            tokens = [[4 + (number + 7 * i + 3 * j) % 200 for j in range(PROMPT)] for i in range(REQUESTS)]
            start = time.perf_counter()
            engine.generate([{"prompt_token_ids": t} for t in tokens], greedy, use_tqdm=False)
            seconds[name].append(time.perf_counter() - start)
    first = seconds[given.names[0]]
    for name, taken in seconds.items():
        rate = REQUESTS * given.tokens / statistics.median(taken[1:])
        share = statistics.median(a / b for a, b in zip(first[1:], taken[1:], strict=True))  # of rounds, so in pairs
        print(f"{name:10} {rate:7.0f} tokens/s  {share:.2f} of {given.names[0]}")


if __name__ == "__main__":
    main()
