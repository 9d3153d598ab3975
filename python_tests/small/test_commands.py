"""From nothing to an answer: every command on the small real model, with as little work as shows that it works."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("yaml", reason="yaml is not installed")
pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")

from commands import call

from moda_ext.conversations import encode, read_conversations
from moda_ext.diagnostics import load_model
from moda_ext.evaluation.answers import forced_matches, generate_answers
from moda_ext.integrations.transformers import MODAConfig, apply_moda, check_identity
from moda_ext.study import VARIANTS, read_runs, write_tables

ROOT = Path(__file__).resolve().parents[2]


def assemble(folder):
    code, output = call("assemble", "--out", folder, "--scenes", 30, "--dev", 2, "--test", 2)
    assert code == 0, output
    assert output.splitlines()[-2:] == [str(folder / "model"), str(folder / "data")]
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What moda-ext assemble makes, with few scenes."""
    return assemble(tmp_path_factory.mktemp("small") / "made")


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """The same, with as many threads: sums of one and of two threads are rounded differently."""
    return assemble(tmp_path_factory.mktemp("small") / "again")


@pytest.fixture(scope="module")
def loaded(small):
    return load_model(str(small / "model"))


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """Two steps of the recipe for it."""
    folder = tmp_path_factory.mktemp("trained") / "lora"
    changes = {
        "model": small / "model",
        "output": folder,
        "stages.align.data": f"[{{path: {small / 'data' / 'align.jsonl'}}}]",
        "stages.instruct.data": f"[{{path: {small / 'data' / 'train.jsonl'}}}]",
        **{f"stages.{stage}.{key}": 2 for stage in ("align", "instruct") for key in ("steps", "batch_size")},
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    code, output = call("train", ROOT / "recipes" / "small_cpu.yaml", *overrides, "--quiet")
    assert code == 0, output
    return folder


def test_the_seed_determines_the_model_to_the_byte(small, again):
    written = [path.relative_to(small) for path in small.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"model.safetensors", "config.json", "train.jsonl", "train-0.jpg"}
    for path in written:
        assert (again / path).read_bytes() == (small / path).read_bytes(), path


def test_the_tower_knows_what_it_was_published_for():
    """Classes of ImageNet of two pictures, by the published classifier: an umbrella and a violin."""
    from PIL import Image

    from moda_ext.small.bank import entries, picture
    from moda_ext.small.packages import TOWER, fetch
    from moda_ext.small.tower import HEAD, MEAN, STD, EfficientNetLiteConfig, EfficientNetLiteModel, load_weights

    published = torch.load(fetch(TOWER), weights_only=True)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig())
    load_weights(tower, published)
    for name, label in (("umbrella", 879), ("violin", 889)):
        tile = picture(entries(name)[0])
        image = Image.new("RGB", tile.size, "white")
        image.paste(tile, (0, 0), tile)
        pixels = torch.frombuffer(bytearray(image.resize((224, 224)).tobytes()), dtype=torch.uint8)
        pixels = (pixels.view(1, 224, 224, 3).permute(0, 3, 1, 2) / 255 - MEAN) / STD
        with torch.no_grad():
            cells = tower.eval()(pixels).last_hidden_state[..., :HEAD]
        scores = published["_fc.weight"] @ cells.mean(dim=1)[0] + published["_fc.bias"]
        assert int(scores.argmax()) == label
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(tower, {key: value for key, value in published.items() if "_blocks.3." not in key})


def test_the_model_speaks_and_moda_moves_nothing(small, loaded):
    model, processor = loaded
    conversation = read_conversations(small / "data" / "test.jsonl")[0]
    asked = type(conversation)("capital", (("user", "What is the capital of France? Answer in a sentence."),))
    (answer,) = generate_answers(model, processor, [asked], max_new_tokens=12)
    assert "Paris" in answer
    again, _ = load_model(str(small / "model"))
    apply_moda(again, MODAConfig())
    inputs, _ = encode(processor, [conversation.prompt], padding_side="left")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 49
    assert check_identity(again, inputs) < 1e-5


def test_the_projector_explains_what_it_has_seen(small, loaded):
    """The cells of a thing come nearer to the embedding of its name than to most others."""
    from moda_ext.small.bank import things
    from moda_ext.small.data import training_scenes

    model, processor = loaded
    scene = training_scenes(1)[0]
    pixels = processor.image_processor([scene.image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        cells = model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state)[0]
    table = model.get_input_embeddings().weight.detach()
    names = list(things())
    tokens = [processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    embeddings = torch.stack([table[ids].mean(dim=0) for ids in tokens])
    center = embeddings.mean(dim=0)
    nearness = torch.nn.functional.normalize(cells - center, dim=-1) @ (embeddings - center).T
    for quarter, name in enumerate(scene.names):
        cell = (quarter // 2 * 4 + 1) * 7 + quarter % 2 * 4 + 1
        rank = int((nearness[cell] > nearness[cell, names.index(name)]).sum())
        assert rank < 10, (name, rank)


def test_generated_and_forced_answers_agree(small, loaded):
    """With the model's own answers for the expected ones, so that right ones are among them."""
    model, processor = loaded
    asked = [c.prompt for c in read_conversations(small / "data" / "test.jsonl")[::6]]
    answers = generate_answers(model, processor, asked, max_new_tokens=40)
    ended = [
        type(c)(c.id, (*c.messages, ("assistant", text)), c.images)
        for c, text in zip(asked, answers, strict=True)
        if text and len(processor.tokenizer(text)["input_ids"]) < 36
    ]
    assert len(ended) >= 3
    assert all(forced_matches(model, processor, ended))
    wrong = [type(c)(c.id, (*c.messages[:-1], ("assistant", "seventeen")), c.images) for c in ended]
    assert not any(forced_matches(model, processor, wrong))


def test_train_then_evaluate_then_chat(small, trained, tmp_path):
    report = tmp_path / "report.html"
    options = ["--tasks", "small", "--data", small / "data", "--limit", 1, "--max-new-tokens", 4, "--out", report]
    code, output = call("evaluate", "--model", trained, "--compare", small / "model", *options)
    assert code == 0, output
    assert "significant" in output
    figures = json.loads(report.with_suffix(".json").read_text())
    assert "object" in json.dumps(figures) and "<html" in report.read_text()
    picture = next((small / "data" / "images").glob("test-object-0*"))
    question = "Which animal is in the picture?"
    code, output = call("chat", "--model", trained, "--image", picture, "--prompt", question, "--max-new-tokens", 4)
    assert code == 0, output
    assert "expect the answers of a model of that size" in output


def test_calibrate_says_when_there_is_nothing_to_gain(small, tmp_path):
    """Untrained, it repeats no hint: no checkpoint comes of that."""
    data = tmp_path / "dev.jsonl"
    lines = (small / "data" / "dev.jsonl").read_text().splitlines()[:6]
    data.write_text("\n".join(lines).replace("images/", f"{small / 'data' / 'images'}/"))
    out = tmp_path / "calibrated"
    code, output = call("calibrate", "--model", small / "model", "--data", data, "--out", out, "--doses", "1")
    assert code == 1, output
    assert not (out / "config.json").exists()


def test_study(small, tmp_path):
    """Each variant trains another way; what is done is not done again."""
    asked = tmp_path / "small"
    (asked / "data").mkdir(parents=True)
    for name in ("model", "data/images", "data/align.jsonl", "data/train.jsonl"):
        (asked / name).symlink_to(small / name)
    lines = (small / "data" / "test.jsonl").read_text().splitlines(keepends=True)
    (asked / "data" / "test.jsonl").write_text("".join(lines[:6]))  # one task, two questions in three forms
    out = tmp_path / "study"
    steps = ["--align-steps", 1, "--steps", 1, "--seeds", 1, "--limit", 1]
    options, names = ["--small", asked, "--out", out, *steps], ["lora", "gate"]
    code, output = call("study", *options, "--variants", *names)
    assert code == 0, output
    runs = read_runs(out)
    assert sorted(run.variant for run in runs) == sorted(names)
    assert all(list(run.outcomes) == ["object/none", "object/right", "object/wrong"] for run in runs)
    assert all(len(outcome) == 1 for run in runs for outcome in run.outcomes.values())
    gate, lora = (next(run for run in runs if run.variant == name) for name in ("gate", "lora"))
    assert gate.trained == lora.trained + 30 * 2 * 64 * 16
    assert all(run.loss > 0 for run in runs)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    code, output = call("study", *options, "--variants", *names)
    assert code == 0, output
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert (out / "README.md").read_text() == write_tables(runs)
    code, output = call("study", *options, "--variants", "lora", "--lr", "0.5")
    assert code == 2 and "was begun with another lr" in output
    code, output = call("study", *options, "--variants", "balance")
    assert code == 2 and "variants must have moda too" in output
    code, output = call("study", *options, "--variants", "nothing")
    assert code == 2 and "unknown variants nothing; known are " + ", ".join(VARIANTS) in output
