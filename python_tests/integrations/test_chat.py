"""Conversations with a model: what is streamed, kept and measured, the command, and the two applications."""

import json
import os
import runpy
import select
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

from moda_ext.chat import ChatSession, model_notes, read_dialogue  # noqa: E402
from moda_ext.conversations import (  # noqa: E402
    Conversation,
    encode,  # noqa: E402
    read_conversations,
)
from moda_ext.diagnostics import AttentionMeter, load_model  # noqa: E402
from moda_ext.evaluation.answers import generate_answers  # noqa: E402
from moda_ext.integrations.transformers import FAMILIES, MODAConfig, apply_moda, recording  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IMAGE_TOKENS = 64  # of a picture of the tiny model
RED, GRADIENT = Image.new("RGB", (112, 112), "firebrick"), Image.radial_gradient("L").convert("RGB")


@pytest.fixture
def tiny():
    """(model, processor) that never ends an answer by itself."""
    model, processor = load_model("random", device="cpu")
    model.generation_config.eos_token_id = None
    return model, processor


def passes(model, action):
    """Calls ``action(n)`` before the n-th forward pass of a model, and gives the list of them."""
    seen = []

    def before(*_):
        seen.append(len(seen) + 1)
        action(seen[-1])

    model.register_forward_pre_hook(before)
    return seen


class TestAnswers:
    def test_the_pieces_are_the_answer_of_generate(self, tiny):
        model, processor = tiny
        session = ChatSession(model, processor, "Be brief.", max_new_tokens=12)
        pieces = list(session.ask("What is it?", [GRADIENT]))
        asked = Conversation("", (("system", "Be brief."), ("user", "<image>\nWhat is it?")), (GRADIENT,))
        inputs, _ = encode(processor, [asked], padding_side="left")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert "".join(pieces) == processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert len(pieces) > 3
        assert session.conversation.messages[:2] == asked.messages
        assert [session.conversation.answer] == generate_answers(model, processor, [asked], max_new_tokens=12)

    def test_at_temperature_0_no_penalty_of_the_checkpoint_counts(self, tiny):
        session = ChatSession(*tiny, max_new_tokens=12)
        answer = "".join(session.ask("Hello"))
        tiny[0].generation_config.repetition_penalty = 0.1
        session.reset()
        assert "".join(session.ask("Hello")) == answer
        session.reset()
        session.temperature = 1e-4  # samples, as the checkpoint wants it
        assert "".join(session.ask("Hello")) != answer

    def test_samples_are_those_of_generate(self, tiny):
        model, processor = tiny
        session = ChatSession(model, processor, max_new_tokens=12, temperature=0.8, top_p=0.9)
        torch.manual_seed(3)
        answer = "".join(session.ask("Hello"))
        torch.manual_seed(3)
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
        asked = Conversation("", (("user", "Hello"),))
        assert generate_answers(model, processor, [asked], max_new_tokens=12, **sampling) == [answer.strip()]
        torch.manual_seed(4)
        session.reset()
        assert "".join(session.ask("Hello")) != answer

    def test_a_character_comes_whole(self, tiny):
        _, processor = tiny
        words = "naïve 🙂 é\n  so."
        tokens = processor.tokenizer(words, add_special_tokens=False)["input_ids"]

        def generate(input_ids, streamer, **_):
            streamer.put(input_ids)
            for token in tokens:
                streamer.put(torch.tensor([token]))
            streamer.end()
            return torch.cat([input_ids, torch.tensor([tokens])], dim=1)

        model = types.SimpleNamespace(config=tiny[0].config, device="cpu", dtype=torch.float32, generate=generate)
        pieces = list(ChatSession(model, processor).ask("Hello"))
        assert "".join(pieces) == words
        assert len(tokens) > len(pieces) == len(words)  # of bytes, and of characters
        assert "🙂" in pieces

    def test_pictures_of_every_turn_are_read_in_their_order(self, tiny, tmp_path):
        model, processor = tiny
        GRADIENT.save(tmp_path / "gradient.png")
        session = ChatSession(model, processor, max_new_tokens=6)
        answers = ["".join(session.ask("What is it?", [tmp_path / "gradient.png"]))]
        answers += ["".join(session.ask("And?")), "".join(session.ask("Is <image> another?", [RED]))]
        turns = (("user", "<image>\nWhat is it?"), ("user", "And?"), ("user", "Is <image> another?"))
        answered = [("assistant", answer.strip()) for answer in answers]
        messages = tuple(turn for pair in zip(turns, answered, strict=True) for turn in pair)
        assert session.conversation.messages == messages
        asked = [Conversation("", messages[:-1], pictures) for pictures in ((GRADIENT, RED), (RED, GRADIENT))]
        right, wrong = generate_answers(model, processor, asked, max_new_tokens=6)
        assert answers[2].strip() == right != wrong

    def test_ended_early_the_model_stops_and_the_answer_stays_as_far_as_written(self, tiny):
        model, processor = tiny
        ran = passes(model, lambda _: None)
        session = ChatSession(model, processor, max_new_tokens=1000)
        threads = threading.active_count()  # such as a progress bar's
        pieces = session.ask("Hello")
        first = next(pieces)
        pieces.close()
        assert len(ran) < 500
        assert threading.active_count() == threads
        whole = "".join(ChatSession(model, processor, max_new_tokens=len(ran)).ask("Hello")).strip()
        assert session.conversation.answer == whole and whole.startswith(first.strip())

    @pytest.mark.parametrize("at", [1, 4])
    def test_what_the_model_raises_comes_to_the_caller(self, tiny, at):
        model, processor = tiny

        def fail(n):
            if n == at:
                raise RuntimeError("out of luck")

        passes(model, fail)
        session = ChatSession(model, processor, max_new_tokens=8)
        pieces = []
        with pytest.raises(RuntimeError, match="out of luck"):
            pieces.extend(session.ask("Hello"))
        with pytest.raises(ValueError, match="user and assistant must take turns"):
            session.conversation  # noqa: B018  nothing of the turn is left
        assert "".join(session.ask("Hello")).strip() == session.conversation.answer

    def test_errors(self, tiny, tmp_path):
        for options, message in (
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
            ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
            ({"temperature": float("nan")}, "temperature must be finite"),
            ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ):
            with pytest.raises(ValueError, match=message):
                ChatSession(*tiny, **options)
        session = ChatSession(*tiny, max_new_tokens=4)
        with pytest.raises(FileNotFoundError):
            session.ask("What?", ["nowhere.jpg"])
        with pytest.raises(ValueError, match="1 times <image> and 2 images"):
            session.ask("What is <image>?", [RED, RED])
        with pytest.raises(ValueError, match="tokens, and the model has 2048 positions"):
            session.ask("x" * 2048)
        with pytest.raises(ValueError, match="takes an answer of two tokens"):
            session.attention()
        tiny[1].chat_template = "{{ raise_exception('no system message') }}"
        with pytest.raises(ValueError, match="the chat template refuses it: no system message"):
            session.ask("Hello")

    def test_a_record_is_read_again(self, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        RED.save("red.png")
        session = ChatSession(*tiny, "Be kind.", max_new_tokens=3)
        list(session.ask("What is it?", ["red.png"]))
        record = session.record()
        assert record["image"] == [str(tmp_path / "red.png")]
        assert Conversation.from_record(record, "elsewhere").messages == session.conversation.messages
        list(session.ask("And?", [RED]))
        with pytest.raises(ValueError, match="is not a file"):
            session.record()


def decoded_mass(model, processor, asked, tokens):
    """(tokens - 1, M): what each generated token gives to each modality while decoding, mean over layers and heads."""
    inputs, _ = encode(processor, [asked], padding_side="left")
    steps = []
    with torch.no_grad(), recording(model, lambda record: steps.append(record.mass[0, :, -1].mean(dim=0))):
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    layers = model.config.text_config.num_hidden_layers
    return torch.stack(steps).unflatten(0, (tokens, layers)).mean(dim=1)[1:].double()


class TestAttention:
    def sums(self, found):
        return [sum((*shares.pictures, shares.text, shares.sink)) for shares in (found.shares, found.uniform)]

    @pytest.mark.parametrize("with_moda", [False, True])
    def test_shares_are_those_of_decoding(self, tiny, with_moda):
        model, processor = tiny
        if with_moda:  # with a sink
            apply_moda(model, MODAConfig(mask={"base": 1.0}))
        session = ChatSession(model, processor, max_new_tokens=6)
        list(session.ask("What are these?", [GRADIENT, RED]))
        found = session.attention()
        image = decoded_mass(model, processor, session.conversation.prompt, 6).mean(dim=0)
        assert sum(found.shares.pictures) == pytest.approx(image[1].item(), abs=1e-5)
        assert found.shares.text == pytest.approx(image[0].item(), abs=1e-5)
        assert (found.shares.sink > 0.01) is with_moda
        assert self.sums(found) == pytest.approx([1, 1])
        length = len(session._last[0]["input_ids"][0])
        rows = torch.arange(length + 1, length + 6).double()  # a row sees itself and all before
        uniform = (IMAGE_TOKENS / rows).mean().item()
        assert found.uniform.pictures == pytest.approx((uniform, uniform), abs=1e-6)
        assert found.uniform.sink == pytest.approx(0, abs=1e-6)

    def test_shares_are_those_of_a_meter(self, tiny):
        """Of one generated token, whose share of the prompt the meter has: without what it gives to itself."""
        model, processor = tiny
        session = ChatSession(model, processor, max_new_tokens=2)
        inputs, _ = encode(processor, [Conversation("", (("user", "<image>\nLook"),), (RED,))], padding_side="left")
        with torch.no_grad(), AttentionMeter(model) as meter:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        measured = meter.result().mass(rows="generated")[:, 0]
        list(session.ask("Look", [RED]))
        weights = []
        whole = torch.cat([inputs["input_ids"], session._last[1][None, :1]], dim=1)
        with torch.no_grad(), recording(model, lambda record: weights.append(record.weights()[0, :, -1].mean(dim=0))):
            model(input_ids=whole, pixel_values=inputs["pixel_values"], use_cache=False)
        kept = 1 - torch.stack(weights)[:, -1].double()  # for the prompt, of each layer
        assert session.attention().shares.pictures[0] == pytest.approx((measured[:, 1] * kept).mean().item(), abs=1e-5)

    def test_every_picture_has_its_own_tokens(self, tiny):
        model, processor = tiny
        session = ChatSession(model, processor, max_new_tokens=4)
        list(session.ask("First", [GRADIENT]))
        list(session.ask("Second", [RED]))
        found = session.attention()
        inputs, tokens = session._last
        whole = torch.cat([inputs["input_ids"], tokens[None, :-1]], dim=1)
        weights = []
        with torch.no_grad(), recording(model, lambda r: weights.append(r.weights(-3)[0].mean(dim=(0, 1)))):
            model(input_ids=whole, pixel_values=inputs["pixel_values"], use_cache=False)
        scores = torch.stack(weights).mean(dim=0)[whole[0] == model.config.image_token_id].unflatten(0, (2, -1))
        for share, picture, expected in zip(found.shares.pictures, found.maps, scores, strict=True):
            assert picture.grid == (8, 8)
            torch.testing.assert_close(picture.scores.float(), expected)
            assert share == pytest.approx(expected.sum().item())
        assert found.maps[0].title == "picture 1" and found.notes == ()
        torch.testing.assert_close(found.maps[1].image[0, 0], torch.tensor([178, 34, 34]) / 255)

    def test_measuring_changes_no_answer(self, tiny):
        quiet, measured = (ChatSession(*tiny, max_new_tokens=5) for _ in range(2))
        for question, images in (("What?", [RED]), ("And?", []), ("Now?", [GRADIENT])):
            assert list(quiet.ask(question, images)) == list(measured.ask(question, images))
            measured.attention()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_more_pass_is_the_decoding_of_every_family(self, tiny, family, monkeypatch):
        """What the processor of a family tells of each token besides goes on over the answer."""
        from vision_language import END, IMAGE, START, VIDEO, make_inputs, make_model

        model, inputs = make_model(family), make_inputs(family, rows=1)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        options["suppress_tokens"] = [IMAGE, VIDEO, START, END]  # random weights would write pictures
        steps = []
        with torch.no_grad(), recording(model, lambda record: steps.append(record.mass[0, :, -1].mean(dim=0))):
            tokens = model.generate(**inputs, **options)
        expected = torch.stack(steps).unflatten(0, (5, -1)).mean(dim=1)[1:].mean(dim=0)
        session = ChatSession(model, tiny[1])
        session._last = inputs, tokens[0, inputs["input_ids"].shape[1] :]
        monkeypatch.setattr(session, "_places", lambda ids: ([torch.where(ids == IMAGE)[0]], [None], []))
        found = session.attention()
        assert found.shares.pictures[0] == pytest.approx(expected[1].item(), abs=1e-5)
        assert found.shares.text == pytest.approx(expected[0].item(), abs=1e-5)

    def test_without_pictures(self, tiny):
        session = ChatSession(*tiny, max_new_tokens=4)
        list(session.ask("Hello"))
        found = session.attention()
        assert found.shares.pictures == () == found.maps
        assert found.shares.text == pytest.approx(1)

    @pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
    def test_pictures_of_different_numbers_of_tokens(self, family, monkeypatch):
        """Of families that cut a picture into tiles by its shape, OneVision only where there is one picture."""
        from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
        from vision_language import make_model

        model, (_, tiny) = make_model(family), load_model("random", device="cpu")
        pinpoints, size = [[8, 16], [16, 8], [16, 16]], {"height": 8, "width": 8}
        common = {"image_token": "<image>", "chat_template": tiny.chat_template, "tokenizer": tiny.tokenizer}
        if family == "llava_next":
            of_image = LlavaNextImageProcessorPil(
                size={"shortest_edge": 8}, crop_size=size, image_grid_pinpoints=pinpoints
            )
            common |= {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            processor = LlavaNextProcessor(of_image, **common)
        else:
            of_image = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints)
            common |= {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
            # It would look for the class of a video processor, which needs torchvision.
            monkeypatch.setattr(LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *_: None)
            processor = LlavaOnevisionProcessor(of_image, **common)
        model.config.image_token_id = tiny.tokenizer.convert_tokens_to_ids("<image>")
        session = ChatSession(model, processor, max_new_tokens=8)
        wide, square = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (16, 16), "blue")
        session._images = (wide, square)
        asked = Conversation("", (("user", "<image>or<image>?"),), session._images)
        ids = encode(processor, [asked], padding_side="left")[0]["input_ids"][0]
        places, grids, notes = session._places(ids)
        found = (ids == model.config.image_token_id).nonzero()[:, 0]
        border = int((found.diff() > 1).nonzero()) + 1  # the word between them
        assert [len(place) for place in places] == [border, len(found) - border]
        assert (border != len(found) - border) is (family == "llava_next")
        assert torch.equal(torch.cat(places), found)
        assert notes == [] and all(
            torch.equal(grids[k].places, places[k][:4]) for k in (0, 1)
        )  # the whole image is first


@pytest.fixture
def chat(monkeypatch, tmp_path):
    """Calls ``moda-ext chat`` on the tiny random model: (exit code, stdout, stderr)."""
    testing = pytest.importorskip("typer.testing", reason="typer is not installed")
    from moda_ext.cli import app

    monkeypatch.chdir(tmp_path)
    GRADIENT.save("gradient.png")
    RED.save("red.png")

    def call(*arguments, lines=()):
        words = ["chat", "--model", "random", "--device", "cpu", "--max-new-tokens", "5", *map(str, arguments)]
        result = testing.CliRunner().invoke(app, words, input="".join(f"{line}\n" for line in lines))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


def answers_of(*questions, **options):
    session = ChatSession(*load_model("random", device="cpu"), max_new_tokens=5, **options)
    return ["".join(session.ask(*question)) for question in questions]


class TestCommand:
    def test_a_script(self, chat, tmp_path):
        lines = ["/image red.png", "What is it?", "", "/system Be brief.", "And?", "/save talk.jsonl", "/quit", "No"]
        code, out, err = chat("--image", "gradient.png", lines=lines)
        assert code == 0, err
        session = ChatSession(*load_model("random", device="cpu"), max_new_tokens=5)
        first = "".join(session.ask("What is it?", ["gradient.png", "red.png"]))
        session.system = "Be brief."
        assert out == f"{first}\n{''.join(session.ask('And?'))}\n"
        (saved,) = read_conversations("talk.jsonl")
        assert saved.messages == session.conversation.messages
        assert saved.images == (tmp_path / "gradient.png", tmp_path / "red.png")
        assert "random: its words mean nothing" in err

    def test_what_is_wrong_is_a_sentence_and_the_session_goes_on(self, chat):
        Path("text.png").write_text("no picture")
        Path("half.png").write_bytes(Path("gradient.png").read_bytes()[:2000])
        wrong = {
            "/image nowhere.jpg": "no such image: nowhere.jpg",
            "/image text.png": "not an image: text.png",
            "/image half.png": "cannot read the image half.png",
            "/image": "no such command: /image;",
            "/attention perhaps": "no such command: /attention perhaps;",
            "/sing": "no such command: /sing;",
            "/save talk.jsonl": "user and assistant must take turns",
            "What is <image>?": "1 times <image> and 0 images",
        }
        code, out, err = chat(lines=[*wrong, "Hello", "/save nowhere/talk.jsonl", "/help"])
        assert code == 0
        assert out == f"{answers_of(['Hello'])[0]}\n"
        assert all(sentence in err for sentence in wrong.values())
        assert "nowhere/talk.jsonl" in err and "/attention on|off" in err
        assert not Path("talk.jsonl").exists()

    def test_a_file_is_not_overwritten(self, chat):
        code, _, err = chat(lines=["Hello", "/save red.png", "/save talk.jsonl", "/save talk.jsonl"])
        assert code == 0 and "is there already: red.png" in err and err.count("is there already: talk.jsonl") == 1
        assert Path("red.png").read_bytes().startswith(b"\x89PNG") and len(read_conversations("talk.jsonl")) == 1

    def test_reset_forgets_the_turns(self, chat):
        code, out, _ = chat(lines=["What is it?", "/image red.png", "/reset", "Hello"])
        assert code == 0
        assert out == "".join(f"{answers_of([question])[0]}\n" for question in ("What is it?", "Hello"))

    def test_one_question(self, chat):
        code, out, _ = chat("--prompt", "What is it?", "--image", "red.png", "--system", "Be kind.", lines=["Hello"])
        assert (code, out) == (0, answers_of(["What is it?", ["red.png"]], system="Be kind.")[0] + "\n")
        code, out, err = chat("--prompt", "What is <image>?")
        assert (code, out) == (1, "") and "1 times <image> and 0 images" in err

    def test_a_seed_repeats_samples(self, chat):
        first, again, other = (chat("--prompt", "Hi", "--temperature", "1", "--seed", seed)[1] for seed in (1, 1, 2))
        assert first == again != other

    def test_attention_is_drawn(self, chat):
        lines = ["/attention on", "What?", "/attention off", "And?"]
        code, out, _ = chat("--image", "gradient.png", "--attention", lines=lines)
        assert code == 0
        session = ChatSession(*load_model("random", device="cpu"), max_new_tokens=5)
        list(session.ask("What?", ["gradient.png"]))
        found = session.attention()
        cells = [[word.strip() for word in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
        expected = [
            ["picture 1", f"{100 * found.shares.pictures[0]:.1f}", f"{100 * found.uniform.pictures[0]:.1f}"],
            ["text", f"{100 * found.shares.text:.1f}", f"{100 * found.uniform.text:.1f}"],
            ["no token", "0.0", "0.0"],
        ]
        assert cells[:3] == expected
        assert len(cells) == 3 + 8 and all(row[1] == "▒" * 16 for row in cells[3:])  # once: "And?" has none
        (picture,) = found.maps
        most = (picture.scores / picture.scores.mean()).reshape(8, 8)
        dark = [line.count("▓") // 2 + line.count("█") // 2 for line, _ in cells[3:]]
        assert dark == (most >= 1.5).sum(dim=1).tolist() and sum(dark) > 0

    def test_an_interrupt_stops_the_answer_alone(self, chat, tiny, monkeypatch):
        from moda_ext import diagnostics

        model, processor = tiny
        main = threading.main_thread().ident
        passed = passes(model, lambda n: signal.pthread_kill(main, signal.SIGINT) if n == 3 else None)
        monkeypatch.setattr(diagnostics, "load_model", lambda *_, **__: (model, processor))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background: ignored
        try:
            code, out, err = chat("--max-new-tokens", 1500, "--attention", lines=["Hello", "/save talk.jsonl"])
        finally:
            signal.signal(signal.SIGINT, before)
        assert (code, len(passed) < 1000) == (0, True)
        assert "stopped" in err and "saved talk.jsonl" in err and "where the answer looked" not in out
        (saved,) = read_conversations("talk.jsonl")
        assert saved.messages[0] == ("user", "Hello") and len(saved.answer) < 1000

    def test_an_interrupt_where_a_question_is_waited_for_ends_it(self, chat, monkeypatch):
        from moda_ext.cli.chat import Terminal

        def lines(self):
            yield "Hello"
            raise KeyboardInterrupt

        monkeypatch.setattr(Terminal, "lines", lines)
        assert chat()[:2] == (0, f"{answers_of(['Hello'])[0]}\n")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--image", "nowhere.jpg"], "no such image: nowhere.jpg"),
            (["--top-p", "0"], "must be above 0 and at most 1, got 0.0"),
            (["--temperature", "-1"], "--temperature"),
            (["--max-new-tokens", "0"], "--max-new-tokens"),
            (["--dtype", "int3"], "must be auto, float32, bfloat16 or float16"),
            (["--model", "./nowhere"], "cannot load the checkpoint ./nowhere"),
        ],
    )
    def test_wrong_options(self, chat, options, message):
        code, _, err = chat("--prompt", "Hello", *options)
        assert code == 2
        assert message in " ".join(err.replace("│", " ").split())

    @pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
    def test_in_a_terminal(self, tmp_path):
        import subprocess

        main, terminal = os.openpty()
        words = [sys.executable, "-m", "moda_ext", "chat", "--model", "random", "--max-new-tokens", "5"]
        process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
        os.close(terminal)
        shown = b""

        def read_until(words):
            nonlocal shown
            while words not in shown:
                assert select.select([main], [], [], 60)[0], shown
                shown += os.read(main, 1024)
            shown = shown.partition(words)[2]

        try:
            read_until(b"> ")
            os.write(main, b"/attention on\n/image nowhere.jpg\nHello\n")
            read_until(b"no such image: nowhere.jpg")
            read_until(b"uniform")
            read_until(b"> ")
            os.write(main, b"\x04")  # Ctrl-D
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(main)


def test_weights_of_zero_are_drawn():
    """A picture that the mask hides."""
    from moda_ext.cli.chat import SHADES, shaded

    assert shaded(torch.zeros(6), (2, 3)) == "\n".join([SHADES[0][1] * 6] * 2)


def test_small_models_say_so():
    class Parameters(torch.nn.Module):
        def __init__(self, count):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(count, device="meta"))

    assert model_notes(Parameters(135_000_000), "x") == ["135M parameters: expect the answers of a model of that size."]
    assert model_notes(Parameters(1_000_000_000), "x") == []
    assert "mean nothing" in model_notes(Parameters(10), "random")[0]


class TestDialogues:
    LINES = [("Ben", "Hello: how are you?"), ("Anna", "Fine.")]

    def test_text_and_json(self, tmp_path):
        (tmp_path / "a.txt").write_text("Ben: Hello: how are you?\n\n Anna : Fine. \n")
        (tmp_path / "a.json").write_text(json.dumps([{"speaker": s, "text": t} for s, t in self.LINES]))
        assert read_dialogue(tmp_path / "a.txt") == self.LINES == read_dialogue(str(tmp_path / "a.json"))

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.txt", "Ben: Hello\nfine", "line 2: must have a speaker and words"),
            ("a.txt", "\n", "no dialogue"),
            ("a.json", "{", "is not JSON"),
            ("a.json", "{}", "must be a JSON list, got dict"),
            ("a.json", '[{"speaker": "Ben", "text": 3}]', "line 1: must have a speaker and words"),
        ],
    )
    def test_errors(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_dialogue(tmp_path / name)


class TestApplications:
    @staticmethod
    def run(name, monkeypatch, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    def test_a_profile_has_a_field_for_each_question(self, tiny, tmp_path, monkeypatch, capsys):
        (tmp_path / "scene.txt").write_text("Ben: You came!\nAnna: I promised.")
        RED.save(tmp_path / "scene.png")
        options = ["--dialogue", tmp_path / "scene.txt", "--image", tmp_path / "scene.png", "--character", "Ben"]
        options += ["--json", tmp_path / "profile.json", "--max-new-tokens", "5"]
        found = self.run("understand_character", monkeypatch, *options)
        profile = json.loads((tmp_path / "profile.json").read_text())
        assert list(profile) == ["character", "expression", "intent", "relation"] and profile["character"] == "Ben"
        assert "mean nothing" in capsys.readouterr().out
        session = ChatSession(*load_model("random"), max_new_tokens=5)
        dialogue = read_dialogue(tmp_path / "scene.txt")
        again = found["understand_character"](session, tmp_path / "scene.png", dialogue, "Ben")
        assert profile == {"character": "Ben", **again}
        questions = [text for role, text in session.conversation.messages if role == "user"]
        assert questions[0].startswith("<image>") and "Ben: You came!\nAnna: I promised." in questions[0]
        assert len(questions) == 3 and all("Ben" in question for question in questions)
        assert session.conversation.images == (tmp_path / "scene.png",)

    def test_a_plan_has_as_many_options_as_asked_for(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "said.json").write_text('[{"speaker": "Mia", "text": "I cannot sleep."}]')
        options = ["--dialogue", tmp_path / "said.json", "--situation", "Mia sits an exam.", "--options", 2]
        found = self.run("plan_conversation", monkeypatch, *options, "--json", tmp_path / "plan.json")
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert list(plan) == ["description", "analysis", "options"] and len(plan["options"]) == 2
        printed = capsys.readouterr().out
        assert "option 2: " in printed and "option 3: " not in printed
        session = ChatSession(*load_model("random"), max_new_tokens=5)
        found["plan_conversation"](session, RED, "Mia sits an exam.", [("Mia", "I cannot sleep.")], options=1)
        first = session.conversation.messages[0][1]
        assert "Mia sits an exam." in first and "Mia: I cannot sleep." in first

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("understand_character", ["--character", "Zoe"], "Zoe says nothing in the dialogue"),
            ("plan_conversation", ["--options", "0"], "--options must be at least 1, got 0"),
        ],
    )
    def test_wrong_options(self, monkeypatch, capsys, name, options, message):
        with pytest.raises(SystemExit):
            self.run(name, monkeypatch, *options)
        assert message in capsys.readouterr().err
