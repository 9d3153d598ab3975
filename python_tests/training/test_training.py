"""Training by recipes: what comes out, and that it is the same however often it was interrupted."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
pytest.importorskip("accelerate", reason="accelerate is missing: moda_ext[train]")
pytest.importorskip("peft", reason="peft is missing: moda_ext[train]")
pytest.importorskip("yaml", reason="pyyaml is missing: moda_ext[train]")
import transformers
from conversations import save_tiny_llava, write_data, write_recipe
from processes import hide_accelerators, run_ranks
from safetensors.torch import load_file
from tolerance import assert_close

from moda_ext.diagnostics import AttentionBalanceLoss, load_model
from moda_ext.integrations.transformers import apply_moda
from moda_ext.training import Collator, Lora, Stage, read_recipe, train, train_stage
from moda_ext.training.data import draw_order, have_images, load_conversations
from moda_ext.training.parts import prepare
from moda_ext.training.recipe import Source
from moda_ext.training.run import begin, steps_of
from moda_ext.training.trainer import load_trained, save_trained

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Data of which every conversation has a picture."""
    return write_data(tmp_path_factory.mktemp("pictured"), text_only=False)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    return train(read_recipe(write_recipe(folder, model, data, deficit_every=3)), progress=False)


def weights(folder: Path, name: str = "instruct/trained.safetensors") -> dict:
    return load_file(folder / name)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    pass


def killed_in_batch(number, monkeypatch):
    """Ends a run while it makes a batch."""
    calls, collate = [], Collator.__call__

    def call(self, conversations):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return collate(self, conversations)

    monkeypatch.setattr(Collator, "__call__", call)


def test_the_checkpoint_loads_and_holds_what_was_trained(finished, model):
    loaded, processor = load_model(str(finished), dtype="float32")
    assert processor.chat_template
    trained = weights(finished)
    moda = {name: p for name, p in loaded.named_parameters() if ".moda." in name}
    for name, tensor in moda.items():
        layer, _, rest = name.partition(".moda.")
        (match,) = [key for key in trained if f".{layer}." in key and key.endswith(f".default.{rest}")]
        assert torch.equal(tensor, trained[match]), name
    assert any(tensor.any() for name, tensor in moda.items() if name.endswith(("b1", "prior")))
    before = load_model(str(model), dtype="float32")[0].state_dict()
    after = loaded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    lora = ("q_proj.weight", "v_proj.weight", "o_proj.weight", "up_proj.weight")
    assert all("language_model" in name and name.endswith(lora) or "projector" in name for name in changed)
    assert len(changed) == 2 * 4 + 4
    assert {path.name for path in (finished / "instruct").iterdir()} <= {
        "trained.safetensors",
        "log.json",
        "tensorboard",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_base_and_update_in_float32(model, data, dtype, tmp_path):
    loaded, processor = load_model(str(model), dtype=dtype)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    stage = Stage("s", ["projector"], lora=Lora(r=2, alpha=4), lr=1e-4, steps=2, batch_size=2, warmup=0.0)
    conversations = load_conversations([Source(path=str(data))])
    merged = train_stage(loaded, processor, stage, conversations, tmp_path, progress=False).state_dict()
    trained = load_file(tmp_path / "trained.safetensors")
    maps = [name for name in trained if "lora_A" in name]
    assert len(maps) == 2 * 4
    for name in maps:
        update = 2 * (trained[name.replace("lora_A", "lora_B")] @ trained[name])
        weight = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
        assert update.any() and merged[weight].dtype == torch.float32
        assert torch.equal(merged[weight], before[weight].float() + update), weight


def test_the_merged_model_computes_what_the_adapters_did(model, data, tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, model, data))
    conversations = load_conversations(recipe.data)
    models = []
    for _ in range(2):
        loaded, processor = load_model(recipe.model, dtype="float32")
        torch.manual_seed(0)
        models.append(apply_moda(loaded))
    trained = train_stage(models[0], processor, recipe.stages[0], conversations, tmp_path / "s", progress=False)
    assert not any(p.requires_grad for p in trained.parameters())
    adapted = prepare(models[1], recipe.stages[0]).eval()
    load_trained(adapted, tmp_path / "s/trained.safetensors")
    batch = Collator(processor)([c for c in conversations if c.images][:2])
    with torch.no_grad():
        assert_close(trained(**batch).logits, adapted(**batch).logits)


@pytest.mark.parametrize("batch", [2, 4, 6])
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(finished, model, data, batch, tmp_path, monkeypatch):
    recipe = read_recipe(write_recipe(tmp_path, model, data, deficit_every=3))
    with monkeypatch.context() as patch:
        killed_in_batch(2 + batch, patch)  # the first two are the probe
        with pytest.raises(Killed):
            train(recipe, progress=False)
    output = train(recipe, progress=False)
    assert same(weights(output), weights(finished))
    assert same(weights(output, "model.safetensors"), weights(finished, "model.safetensors"))
    assert all("lora_" in name or "projector" in name or ".moda." in name for name in weights(output))
    logs = [json.loads((folder / "instruct/log.json").read_text())[:-1] for folder in (output, finished)]
    assert logs[0] == logs[1]


def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(model, data, tmp_path, monkeypatch):
    """Checkpoints at 2, 4 and 6, and entries of the log at 3 and 6 otherwise."""
    logs = []
    for name in ("whole", "interrupted"):
        folder = tmp_path / name
        folder.mkdir()
        recipe = read_recipe(write_recipe(folder, model, data, log_every=3, balance=0.1))
        if name == "interrupted":
            with monkeypatch.context() as patch:
                killed_in_batch(5, patch)
                with pytest.raises(Killed):
                    train(recipe, progress=False)
        output = train(recipe, progress=False)
        logs.append(json.loads((output / "instruct/log.json").read_text()))
    assert [entry["step"] for entry in logs[0]] == [2, 3, 4, 6, 6]
    assert logs[0][:-1] == logs[1][:-1] and all("balance" in entry for entry in logs[0][:-1])
    assert all("loss" not in key for key in logs[1][-1])  # what the last start did


def test_a_single_step_trains(model, data, tmp_path):
    before = load_file(model / "model.safetensors")
    output = train(read_recipe(write_recipe(tmp_path, model, data, steps=1)), progress=False)
    merged = weights(output, "model.safetensors")
    assert any(name in merged and not torch.equal(before[name], merged[name]) for name in before)


@pytest.mark.parametrize("moment", ["optimizer", "move"])
def test_a_checkpoint_that_was_half_written_is_not_used(finished, model, data, moment, tmp_path, monkeypatch):
    recipe = read_recipe(write_recipe(tmp_path, model, data, deficit_every=3))
    save, saved = torch.save, []

    def killed(value, path, *rest, **options):
        saved.append(str(path))
        if sum(name.endswith("optimizer.pt") for name in saved) == 2:
            Path(path).write_bytes(b"half")
            raise Killed
        return save(value, path, *rest, **options)

    def not_moved(source, target):
        if "checkpoint-4" in str(target):
            raise Killed
        return os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed) if moment == "optimizer" else patch.setattr(os, "replace", not_moved)
        with pytest.raises(Killed):
            train(recipe, progress=False)
    stage = tmp_path / "out/instruct"
    assert [path.name for path in stage.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (stage / "unfinished/checkpoint-4").is_dir()
    assert same(weights(train(recipe, progress=False)), weights(finished))


def test_what_is_finished_is_not_done_again(model, pictured, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, model, pictured)
    two = "[{name: align, train: [projector], autocast: none, steps: 2}, {name: instruct, lora: {r: 2}, train: [moda], "
    recipe = read_recipe(path, [f"stages={two}autocast: none, steps: 2, batch_size: 2}}]"])
    with monkeypatch.context() as patch:
        killed_in_batch(3, patch)  # the first of the second stage
        with pytest.raises(Killed):
            train(recipe, progress=False)
    assert not (tmp_path / "out/config.json").exists()
    aligned = weights(tmp_path / "out", "align/trained.safetensors")
    stamp = (tmp_path / "out/align/trained.safetensors").stat().st_mtime_ns
    output = train(recipe, progress=False)
    assert (output / "align/trained.safetensors").stat().st_mtime_ns == stamp
    merged = weights(output, "model.safetensors")
    projected = {name: tensor for name, tensor in merged.items() if "projector" in name}
    assert len(projected) == len(aligned) == 4
    for name, tensor in projected.items():
        (match,) = [key for key in aligned if key.endswith(name.partition("multi_modal_")[2])]
        assert torch.equal(tensor, aligned[match])
    killed_in_batch(1, monkeypatch)
    assert train(recipe, progress=False) == output


def test_another_recipe_is_refused_in_the_same_folder(finished, model, data, tmp_path):
    path = write_recipe(tmp_path, model, data, deficit_every=3)
    changed = read_recipe(path, [f"output={finished}", "stages.instruct.lr=0.1", "stages.instruct.lora.r=2"])
    with pytest.raises(ValueError, match=r"another stages\.instruct\.lora\.r, stages\.instruct\.lr"):
        train(changed)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        train(read_recipe(path))


def test_before_a_stage_has_begun_another_recipe_may_take_the_folder(model, data, tmp_path):
    path = write_recipe(tmp_path, model, data)
    begin(read_recipe(path))
    begin(read_recipe(path, ["seed=1"]))
    assert json.loads((tmp_path / "out/recipe.json").read_text())["seed"] == 1
    (tmp_path / "out/instruct").mkdir()
    with pytest.raises(ValueError, match="begun with another seed"):
        begin(read_recipe(path))


def test_other_data_are_refused(model, tmp_path):
    data = write_data(tmp_path / "data")
    recipe = read_recipe(write_recipe(tmp_path, model, data))
    begin(recipe)
    (tmp_path / "out/instruct").mkdir()
    begin(recipe)
    data.write_text(data.read_text().replace("What?", "Why?"))
    with pytest.raises(ValueError, match=rf"begun with another contents\.{data}: take another output"):
        begin(recipe)


def test_each_list_of_sources_is_loaded_once(model, data, tmp_path):
    two = "[{name: a, train: [projector]}, {name: b, train: [projector]}, "
    own = f"{{name: c, train: [text], data: [{{path: {data}, fraction: 0.5}}]}}]"
    overrides = ["dtype=bfloat16", f"stages={two}{own}"]
    one, other, third = begin(read_recipe(write_recipe(tmp_path, model, data), overrides))
    assert one is other and (len(one), len(third)) == (12, 6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_is_loaded_with_the_dtype_of_the_recipe(model, data, dtype, tmp_path):
    """Whatever was trained: the tower has the first parameter, and is float32 where it is trained."""
    path = write_recipe(tmp_path, model, data, steps=1, train=["vision", "projector"], autocast="bf16")
    output = train(read_recipe(path, [f"dtype={dtype}"]), progress=False)
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    loaded, _ = load_model(str(output))
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    stored = {name: tensor.dtype for name, tensor in weights(output, "model.safetensors").items()}
    assert {kind for name, kind in stored.items() if "vision" in name} == {torch.float32}
    assert {kind for name, kind in stored.items() if "embed_tokens" in name} == {getattr(torch, dtype)}


def test_measuring_changes_nothing_and_is_logged(finished, model, data, tmp_path):
    output = train(read_recipe(write_recipe(tmp_path, model, data)), progress=False)
    assert same(weights(output), weights(finished))
    log = json.loads((finished / "instruct/log.json").read_text())
    measured = [entry for entry in log if "mdi/vision" in entry]
    assert [entry["step"] for entry in measured] == [0, 3, 6]
    for key in ("avg_diff/text", "avg_diff/vision", "mdi/vision"):
        values = [entry[key] for entry in measured]
        assert len(set(values)) == 3  # it is the model that is measured
        assert len({entry[f"{key}_uniform"] for entry in measured}) == 1
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_the_bar_shows_loss_and_deficits(model, data, tmp_path, capsys):
    train(read_recipe(write_recipe(tmp_path, model, data, steps=1, deficit_every=1)))
    shown = capsys.readouterr().err
    assert "loss=" in shown and "AvgDiff text=" in shown and "MDI vision=" in shown and "1/1" in shown


def test_tensorboard_gets_the_figures(finished):
    pytest.importorskip("tensorboard", reason="tensorboard is missing: moda_ext[train]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "instruct/tensorboard")).Reload()
    assert {"train/loss", "train/mdi/vision"} <= set(events.Tags()["scalars"])


def loss_of(network, batch):
    with torch.no_grad():
        return network(**batch).loss


def test_the_loss_is_the_models_own(model, data, tmp_path):
    """At a rate of 0: over batches of a step that have unequal numbers of labels."""
    loaded, processor = load_model(str(model), dtype="float32")
    conversations = load_conversations([Source(path=str(data))])
    stage = Stage("s", ["text"], lr=0.0, steps=1, batch_size=2, gradient_accumulation=3, log_every=1, autocast="none")
    seen = []

    def collate(some):
        seen.append(Collator(processor)(some))
        return copy.deepcopy(seen[-1])

    train_stage(loaded, processor, stage, conversations, tmp_path, collator=collate, progress=False)
    counts = torch.tensor([(batch["labels"] != -100).sum() for batch in seen])
    assert len(set(counts.tolist())) > 1
    losses = torch.stack([loss_of(loaded, batch) for batch in seen])
    logged = json.loads((tmp_path / "log.json").read_text())[0]["loss"]
    assert_close(torch.tensor(logged), (losses * counts).sum() / counts.sum())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_loss_is_trained_against(model, data, checkpointing, tmp_path):
    """Its weights are the same with checkpointing, and others without the penalty, which is logged by itself."""
    results, logs = [], []
    for balance, again in ((0.0, False), (5.0, False), (5.0, checkpointing)):
        loaded, processor = load_model(str(model), dtype="float32")
        stage = Stage(
            "s", ["projector"], lora=Lora(r=2), lr=0.01, steps=3, batch_size=2, autocast="none", balance=balance,
            gradient_accumulation=2, gradient_checkpointing=again, log_every=1,
        )  # fmt: skip
        folder = tmp_path / f"{balance} {again} {len(results)}"
        conversations = load_conversations([Source(path=str(data))])
        train_stage(loaded, processor, stage, conversations, folder, progress=False)
        results.append(load_file(folder / "trained.safetensors"))
        logs.append([entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry])
    assert same(results[1], results[2]) and not same(results[0], results[1])
    assert logs[0][0]["loss"] == logs[1][0]["loss"]  # the answers' alone, before the first step
    assert "balance" not in logs[0][0]
    loaded, processor = load_model(str(model), dtype="float32")
    measure, penalties = AttentionBalanceLoss(), []
    order = draw_order(have_images(conversations), 2, 2, seed=0)
    for start in (0, 2):
        batch = Collator(processor)([conversations[i] for i in order[start : start + 2]])
        with torch.no_grad(), measure.collect(loaded) as found:
            loaded(**batch)
        penalties.append(torch.stack(found).mean())
    assert_close(torch.tensor(logs[1][0]["balance"]), torch.stack(penalties).mean())


def test_frozen_parts_stay_as_they_are_in_bfloat16(model, pictured, tmp_path):
    loaded, processor = load_model(str(model), dtype="bfloat16")
    patches, norm = loaded.model.vision_tower.embeddings.patch_embedding, torch.nn.BatchNorm2d(3)
    patches.norm = norm.to(torch.bfloat16)
    patches.register_forward_pre_hook(lambda module, inputs: (norm(inputs[0].to(torch.bfloat16)),))
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    stage = Stage("s", ["projector"], lr=0.01, steps=2, batch_size=2)
    conversations = load_conversations([Source(path=str(pictured))])
    loaded = train_stage(loaded, processor, stage, conversations, tmp_path, progress=False)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if "projector" in name else before[name].dtype), name
        assert torch.equal(tensor, before[name]) != ("projector" in name), name


def on_two_ranks(path):
    hide_accelerators(setattr)
    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # the group is there: nobody connects
    train(read_recipe(path), progress=False)


def test_two_processes_equal_one_with_twice_the_batch(model, pictured, tmp_path):
    outputs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        path = write_recipe(folder, model, pictured, batch_size=4 // processes, lora={"r": 2}, steps=3)
        if processes == 1:
            train(read_recipe(path), progress=False)
        else:
            run_ranks(on_two_ranks, 2, tmp_path / "rendezvous", str(path))
        outputs.append(folder / "out")
    one, two = (weights(output, "model.safetensors") for output in outputs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(two[name], tensor)
    losses = [json.loads((output / "instruct/log.json").read_text())[0]["loss"] for output in outputs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_errors(model, data, tmp_path):
    loaded, processor = load_model(str(model), dtype="float32")
    conversations = load_conversations([Source(path=str(data))])
    with pytest.raises(ValueError, match="stage s: the model has no moda to train"):
        train_stage(loaded, processor, Stage("s", ["moda"]), conversations, tmp_path)
    with pytest.raises(ValueError, match="stage s: no conversations"):
        train_stage(loaded, processor, Stage("s", ["projector"]), [], tmp_path)
    with pytest.raises(ValueError, match="stage s: 4 conversations have no image and teach it nothing"):
        train_stage(loaded, processor, Stage("s", ["projector"]), conversations, tmp_path)
    lora = Lora(target_modules=["q_proj", "vproj"])
    with pytest.raises(ValueError, match="stage s: no layer of the language model has a 'vproj', which lora.target"):
        train_stage(loaded, processor, Stage("s", [], lora=lora), conversations, tmp_path)
    stage = Stage("s", ["text"], deficit_every=1, steps=1)
    plain = [c for c in conversations if not c.images]
    with pytest.raises(ValueError, match="deficit_every must be 0"):
        train_stage(loaded, processor, stage, plain, tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    """(1, 2) would be copied into every row of (3, 2)."""
    save_trained(torch.nn.Linear(2, 1, bias=False), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has other weights than the model trains: weight"):
        load_trained(torch.nn.Linear(2, 3, bias=False), tmp_path / "w.safetensors")


def test_steps_of_epochs():
    steps = [steps_of(Stage("s", ["text"], epochs=epochs), 100, 1) for epochs in (0.07, 0.071, 1.0)]
    assert steps == [7, 8, 100]  # 0.07 * 100 is a little more than 7
    assert steps_of(Stage("s", ["text"], epochs=2, batch_size=3), 100, 4) == 17
    assert steps_of(Stage("s", ["text"], epochs=2, steps=5), 100, 4) == 5
