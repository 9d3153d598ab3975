"""``moda-ext train`` as a user calls it."""

import pytest

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
pytest.importorskip("accelerate", reason="accelerate is missing: moda_ext[train]")
pytest.importorskip("peft", reason="peft is missing: moda_ext[train]")
pytest.importorskip("yaml", reason="pyyaml is missing: moda_ext[train]")
from commands import call
from conversations import save_tiny_llava, write_data, write_recipe


def test_it_trains_and_prints_where_the_checkpoint_is(tmp_path):
    path = write_recipe(tmp_path, save_tiny_llava(tmp_path / "model", 1), write_data(tmp_path / "data", 4))
    code, output = call("train", path, "stages.instruct.steps=1", "stages.instruct.lora.r=2", "--quiet")
    assert code == 0 and output.rstrip().endswith(str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").is_file()
    code, output = call("train", path, "stages.instruct.steps=2", "stages.instruct.lora.r=2")
    assert code == 2 and "begun with another stages.instruct.steps" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.instruct.rate=1", "stages.instruct.rate is unknown"),
        ("data.0.path=nowhere.jsonl", "there is no nowhere.jsonl"),
    ],
)
def test_errors_come_before_anything_is_loaded(override, message, tmp_path, monkeypatch):
    import moda_ext.diagnostics.runner as runner

    monkeypatch.setattr(runner, "load_processor", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "model").mkdir()
    path = write_recipe(tmp_path, tmp_path / "model", write_data(tmp_path / "data", 1))
    code, output = call("train", path, override)
    assert code == 2 and message in output and not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_loaded_leaves_no_output(tmp_path):
    (tmp_path / "model").mkdir()
    code, output = call("train", write_recipe(tmp_path, tmp_path / "model", write_data(tmp_path / "data", 1)))
    assert code == 2 and "cannot load the checkpoint" in output and not (tmp_path / "out").exists()
    code, output = call("train", tmp_path / "nowhere.yaml")
    assert code == 2 and "nowhere.yaml" in output
    code, output = call("train", tmp_path)
    assert code == 2 and "Is a directory" in output


def test_data_that_cannot_be_read_leave_no_output(tmp_path):
    data = write_data(tmp_path / "data", 2)
    data.write_text(data.read_text() + "{}\n")
    path = write_recipe(tmp_path, save_tiny_llava(tmp_path / "model", 1), data)
    code, output = call("train", path)
    assert code == 2 and "line 3: conversation without id" in output and not (tmp_path / "out").exists()


def test_the_first_process_alone_prints(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, save_tiny_llava(tmp_path / "model", 1), write_data(tmp_path / "data", 4), steps=1)
    assert call("train", path, "--quiet")[0] == 0  # what is finished is not done again
    monkeypatch.setenv("RANK", "1")
    assert call("train", path, "--quiet") == (0, "")
