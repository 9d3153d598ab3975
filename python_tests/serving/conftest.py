"""Checkpoints of the tests of serving, and the engines that serve them.

These tests run in an environment with vLLM (``python3 tools/dev.py serving``). What to expect comes from Transformers,
which has an environment of its own, as vLLM wants an older one: MODA_EXT_TRANSFORMERS_PYTHON is its Python.
"""

import contextlib
import gc
import json
import os
import subprocess
from pathlib import Path

import pytest

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in this process starts in seconds, and its counters are here
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions that look into workers
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="session", autouse=True)
def settings_of_vllm(tmp_path_factory):
    """Read when vLLM is imported, or later."""
    pytest.importorskip("vllm", reason="vLLM is not installed: python3 tools/dev.py serving")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm")))
        # vLLM looks at a new class in a process of its own, 15 seconds for each; moda-ext serve is tested with that.
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """<family>/<settings>: see checkpoints.py."""
    python = os.environ.get("MODA_EXT_TRANSFORMERS_PYTHON")
    if python is None:
        pytest.skip("MODA_EXT_TRANSFORMERS_PYTHON names no Python with Transformers; tools/dev.py serving does")
    folder = Path(os.environ.get("MODA_EXT_CHECKPOINTS") or tmp_path_factory.mktemp("checkpoints") / "made")
    if not folder.exists():
        made = subprocess.run(
            [python, Path(__file__).with_name("checkpoints.py"), folder], capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
    return folder


class Served:
    """A checkpoint in an engine, with the requests and what Transformers generates for them."""

    def __init__(self, path: Path, llm):
        self.llm = llm
        self.path = path
        self.expected = json.loads((path / "expected.json").read_text())["requests"]

    def generate(self, tokens: int = 16) -> list[list[int]]:
        """Of all requests at once."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
        outputs = self.llm.generate(requests_of(self.path), greedy, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == [want["prompt"] for want in self.expected]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def agreeing(self) -> list[bool]:
        """For each request whether its tokens are those of Transformers."""
        pairs = zip(self.generate(), self.expected, strict=True)
        return [tokens[: len(want["tokens"])] == want["tokens"] for tokens, want in pairs]

    def counter(self, name: str) -> float:
        """One of vLLM's own."""
        values = [metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:{name}"]
        assert values, name
        return sum(values)


def requests_of(path: Path) -> list[dict]:
    from PIL import Image

    images = [Image.open(path.parent / f"image{i}.png") for i in range(4)]
    requests = []
    for text, which in json.loads((path.parent / "requests.json").read_text()):
        data = {"multi_modal_data": {"image": [images[i] for i in which]}} if which else {}
        requests.append({"prompt": text, **data})
    return requests


@pytest.fixture
def serve(checkpoints):
    """``with serve(family, settings, **options) as served``; ``serve(path)`` for a checkpoint that a test has made."""

    @contextlib.contextmanager
    def start(*names: str | Path, **options):
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        path = checkpoints.joinpath(*names)
        defaults = {
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 10,
            "max_num_batched_tokens": 512,
            "block_size": 32,
            "enforce_eager": True,
            "limit_mm_per_prompt": {"image": 2},
            "gpu_memory_utilization": 0.1,  # of this machine's memory, of which others may have taken some
            "disable_log_stats": False,
            "seed": 0,
        }
        llm = None
        try:
            llm = LLM(str(path), **{**defaults, **options})
            yield Served(path, llm)
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    return start
