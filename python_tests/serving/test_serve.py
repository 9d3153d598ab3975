"""``moda-ext serve`` as its clients see it, over HTTP."""

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: python3 tools/dev.py serving")
openai = pytest.importorskip("openai", reason="openai is not installed")

LOAD = float(os.environ.get("MODA_EXT_LOAD_SECONDS", "10"))
STARTING = 240.0
CLIENTS = 8


class Server:
    """A running ``moda-ext serve`` of a checkpoint."""

    def __init__(self, path: Path, log: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.path, self.log = path, log
        command = [sys.executable, "-m", "moda_ext", "serve", path, "--port", self.port, "--max-model-len", "512"]
        command += ["--enforce-eager", "--num-gpu-blocks-override", "256", "--block-size", "32", *options]
        command += ["--gpu-memory-utilization", "0.1"]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "COLUMNS": "500"}
        with log.open("w") as out:
            words = [str(word) for word in command]
            self.process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)
        ended = time.monotonic() + STARTING
        while "serving 'full' at" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < ended, self.log.read_text()[-4000:]
            time.sleep(0.5)

    def client(self) -> "openai.OpenAI":
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            return reply.read().decode()

    def metric(self, name: str) -> float:
        return sum(map(float, re.findall(rf"^{name}\{{.*\}} (\S+)$", self.metrics(), re.MULTILINE)))

    def descendants(self) -> list[int]:
        """Processes that it started, and those that they did."""
        found, new = [], [self.process.pid]
        while new:
            children = []
            for pid in new:
                tasks = Path(f"/proc/{pid}/task").glob("*/children")
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    children += [int(child) for task in tasks for child in task.read_text().split()]
            found += children
            new = children
        return found


@pytest.fixture(scope="module")
def start(checkpoints, tmp_path_factory):
    servers = []

    def make(*options: str) -> Server:
        log = tmp_path_factory.mktemp("serve") / "log.txt"
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # as a user has it
            servers.append(Server(checkpoints / "llava" / "full", log, *options))
        return servers[-1]

    yield make
    for server in servers:
        server.process.terminate()
        server.process.wait(60)


@pytest.fixture(scope="module")
def server(start) -> Server:
    return start("--metrics")


def image_chat(server: Server, image: int, question: str) -> list[dict]:
    data = base64.b64encode((server.path.parent / f"image{image}.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def ask(client, messages: list[dict], tokens: int = 16) -> str:
    reply = client.chat.completions.create(model="full", messages=messages, temperature=0, max_tokens=tokens)
    return reply.choices[0].message.content


def test_the_answer_about_an_image_is_that_of_generate(server):
    expected = json.loads((server.path / "expected.json").read_text())["chat"]
    assert ask(server.client(), image_chat(server, 0, "What is on the table?")) == expected


def test_attention_by_layer_and_modality_is_measured(server):
    ask(server.client(), image_chat(server, 1, "What is on the table?"))
    found = server.metrics()
    mass = re.findall(
        r'^moda_attention_mass_total\{layer="(\d)",modality="(\w+)",query="(\w+)"\} (\S+)$', found, re.MULTILINE
    )
    rows = re.findall(r'^moda_attention_rows_total\{layer="(\d)",query="(\w+)"\} (\S+)$', found, re.MULTILINE)
    kinds = {"text", "vision"}
    assert {(layer, m, query) for layer, m, query, _ in mass} == {
        (layer, m, query) for layer in "012" for m in kinds for query in kinds
    }
    assert len(rows) == 6
    for layer, query, count in rows:
        total = sum(float(value) for its, _, of, value in mass if (its, of) == (layer, query))
        assert 0.3 * float(count) < total < float(count)  # the sink takes the rest


def test_eight_clients_at_once_lose_no_request(server):
    """Each asks its own question again and again, and gets the same answer every time."""
    until = time.monotonic() + LOAD

    def one(number: int) -> int:
        client, messages, answers = server.client(), image_chat(server, number % 4, f"What is {number}?"), []
        while not answers or time.monotonic() < until:
            answers.append(ask(client, messages))
        assert len(answers[0]) > 0 and set(answers) == {answers[0]}
        return len(answers)

    finished = server.metric("vllm:request_success_total")
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        counts = list(pool.map(one, range(CLIENTS)))
    assert all(counts)
    assert server.metric("vllm:request_success_total") - finished == sum(counts)
    print(f"{sum(counts)} requests in {LOAD:.0f} s")


CLIENT = """
import sys
import openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
options = {"temperature": 1, "max_tokens": 450, "n": 64, "stream": True, "extra_body": {"ignore_eos": True}}
for _ in client.chat.completions.create(model="full", messages=[{"role": "user", "content": "Go on"}], **options):
    print("token", flush=True)
"""


def wait_until_idle(server: Server) -> None:
    """Nothing runs and no block is in use; metrics are those of the last step."""
    until = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") or server.metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < until, server.metrics()
        time.sleep(0.2)


def test_a_killed_client_frees_its_blocks(server):
    wait_until_idle(server)
    before = server.metric("vllm:generation_tokens_total")
    url = f"http://127.0.0.1:{server.port}/v1"
    client = subprocess.Popen([sys.executable, "-c", CLIENT, url], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout.readline() == "token\n"
        until = time.monotonic() + 10  # metrics are those of an earlier step
        while not server.metric("vllm:num_requests_running"):
            assert time.monotonic() < until and client.poll() is None, server.metrics()
    finally:
        client.kill()
        client.wait()
    wait_until_idle(server)
    generated = server.metric("vllm:generation_tokens_total") - before
    assert generated < 64 * 440  # nobody generated all of what nobody reads
    assert ask(server.client(), image_chat(server, 0, "Still there?"))


def test_ctrl_c_ends_it_and_all_that_it_started(server):
    started = server.descendants()
    assert len(started) >= 2  # the server and the engine
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started):  # until somebody has asked how they ended
        assert time.monotonic() < until
        time.sleep(0.1)
    assert server.log.read_text().rstrip().endswith("ended")


def test_a_dead_engine_is_reported(start):
    """And without --metrics there are none."""
    server = start()
    assert "moda_attention" not in server.metrics()
    (engine,) = (pid for pid in server.descendants() if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(engine, signal.SIGKILL)
    assert server.process.wait(90) == 1
    assert "moda-ext serve: vLLM ended with status" in server.log.read_text()
