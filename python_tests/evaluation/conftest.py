"""A judge to ask, and a tiny model that has learned to believe what it is told more often than what it sees."""

import http.server
import json
import random
import threading

import pytest
import torch

COLOURS = {"red": (220, 0, 0), "blue": (0, 0, 220), "green": (0, 200, 0), "white": (255, 255, 255)}
STEPS = 100


class Server(http.server.ThreadingHTTPServer):
    """Answers with what ``replies`` hold, in turn: a status, or the text of a verdict."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        reply = self.server.replies.pop(0)
        status, text = (reply, "no") if isinstance(reply, int) else (200, reply)
        data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def example(folder, number, hint):
    """A colour to name by its first letter, asked with a hint of a kind; colour and hint follow from the number."""
    names = list(COLOURS)
    name, other = names[number % 4], names[(number + 1 + number // 4 % 3) % 4]
    told = {"none": "", "right": name, "wrong": other}[hint]
    record = {
        "id": f"{number} {hint}",
        "image": str(folder / f"{name}.png"),
        "question": f"q{number}",
        "hint": hint,
        "task": "colour",
        "conversations": [{"from": "human", "value": f"<image>\n{told}?"}, {"from": "gpt", "value": name[0]}],
    }
    return {**record, "hinted": told[0]} if told else record


def train(model, processor, folder):
    """Teaches the picture's colour, and in six of ten wrong hints the hinted one."""
    from moda_ext.conversations import Conversation
    from moda_ext.training.collator import Collator

    collate, draw = Collator(processor), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        records = [example(folder, draw.randrange(12), hint) for hint in ("none", "right", "wrong") for _ in range(6)]
        for record in records:
            if record["hint"] == "wrong" and draw.random() < 0.6:
                record["conversations"][1]["value"] = record["hinted"]
        model(**collate([Conversation.from_record(record) for record in records])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def believer(tmp_path_factory):
    """A folder with a checkpoint ``model``, ``dev.jsonl`` and ``test.jsonl``: 36 and 12 questions in three forms."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    from moda_ext.conversations import write_conversations
    from moda_ext.diagnostics.tiny import tiny_llava

    folder = tmp_path_factory.mktemp("believer")
    for name, colour in COLOURS.items():
        image.new("RGB", (112, 112), colour).save(folder / f"{name}.png")
    model, processor = tiny_llava(layers=2)
    ended = "{% else %}{{ '\n' }}{% endif %}"  # an answer is its letter and its end
    processor.chat_template = processor.chat_template.replace("{% endif %}{{ '\n' }}", ended)
    train(model, processor, folder)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for name, numbers in (("dev", range(36)), ("test", range(36, 48))):
        records = [example(folder, number, hint) for number in numbers for hint in ("none", "right", "wrong")]
        write_conversations(folder / f"{name}.jsonl", records)
    return folder
