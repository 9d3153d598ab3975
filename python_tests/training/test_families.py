"""Every family: what its parts are called, and that its loss on answers alone is its own loss."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
pytest.importorskip("accelerate", reason="accelerate is missing: moda_ext[train]")
pytest.importorskip("peft", reason="peft is missing: moda_ext[train]")
pytest.importorskip("yaml", reason="pyyaml is missing: moda_ext[train]")
import transformers
from conversations import write_data
from tolerance import assert_close
from trained_models import family
from vision_language import make_inputs, make_model

from moda_ext.diagnostics import load_model
from moda_ext.diagnostics.tiny import tiny_llava
from moda_ext.integrations.transformers import apply_moda
from moda_ext.training import Lora, Stage, read_recipe, train, train_stage
from moda_ext.training.parts import optimizer_groups, part_of, prepare

RECIPES = Path(__file__).parents[2] / "recipes"


def answered(name):
    """A batch with a label on the last three tokens of each row."""
    inputs = make_inputs(name, padding=None)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return {**inputs, "labels": labels}


@family
def test_parts(family):
    model = apply_moda(make_model(family))
    full = prepare(model, Stage("s", ["text", "vision", "projector", "moda"], lr=1, vision_lr=2, projector_lr=3))
    groups = {group["name"]: group for group in optimizer_groups(full, Stage("s", ["text"], lr=1, vision_lr=2))}
    assert set(groups) == {"text", "vision", "projector", "moda", "moda_fast"}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    stack = {id(p) for p in model.get_decoder().parameters()} | {id(p) for p in model.lm_head.parameters()}
    text = {id(p) for p in groups["text"]["params"]}
    assert text == stack - {id(p) for name in ("moda", "moda_fast") for p in groups[name]["params"]}


@family
def test_low_rank_updates_are_on_the_language_model_alone(family):
    model = prepare(
        apply_moda(make_model(family)).to(torch.bfloat16), Stage("s", ["moda", "projector"], lora=Lora(r=2))
    )
    layers = model.get_base_model().get_decoder().config.num_hidden_layers
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    updated = [name for name in trained if "lora_A" in name]
    assert len(updated) == 4 * layers and all(part_of(name) == "text" for name in updated)
    assert {part_of(name) for name in trained} == {"text", "projector", "moda"}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert not any("original_module" in name for name in trained)
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if part_of(name) == "vision")


@family
def test_a_step_has_the_models_own_loss(family, tmp_path):
    model = apply_moda(make_model(family))
    batch = answered(family)
    with torch.no_grad():
        expected = model(**batch).loss
    stage = Stage(
        "s", ["projector", "moda"], lora=Lora(r=2), lr=0.01, steps=2, batch_size=2, autocast="none", log_every=1
    )
    images = [Image()] * 2
    trained = train_stage(model, None, stage, images, tmp_path, collator=lambda some: dict(batch), progress=False)
    losses = [entry["loss"] for entry in json.loads((tmp_path / "log.json").read_text()) if "loss" in entry]
    assert_close(torch.tensor(losses[0]), expected)
    with torch.no_grad():
        assert trained(**batch).loss < expected


class Image:
    """What the collators of these tests make nothing of."""

    images = (None,)


def save_tiny_llava_next(folder):
    """A checkpoint directory of LLaVA-NeXT with a processor that spells text in bytes."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    plain, processor = tiny_llava(1)
    size = plain.config.vision_config.image_size
    grid = [[size, 2 * size], [2 * size, size]]
    config = transformers.LlavaNextConfig(
        vision_config=plain.config.vision_config.to_dict(),
        text_config=plain.config.text_config.to_dict(),
        image_grid_pinpoints=grid,
        image_token_index=plain.config.image_token_index,
    )
    torch.manual_seed(0)
    transformers.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    square = {"height": size, "width": size}
    transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=grid),
        processor.tokenizer,
        patch_size=plain.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=processor.chat_template,
    ).save_pretrained(folder)


@pytest.mark.parametrize("recipe", ["llava_next_8b_lora", "llava_next_8b_full"])
def test_the_recipes_of_llava_next(recipe, tmp_path):
    save_tiny_llava_next(tmp_path / "model")
    data = f"[{{path: {write_data(tmp_path / 'data', 4, text_only=False)}}}]"
    overrides = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", f"data={data}"]
    overrides += [f"stages.align.data={data}"]
    for stage in ("align", "instruct"):
        small = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "workers": 0}
        overrides += [f"stages.{stage}.{key}={value}" for key, value in small.items()]
    output = train(read_recipe(RECIPES / f"{recipe}.yaml", overrides), progress=False)
    model, _ = load_model(str(output))
    assert model.config.model_type == "llava_next_moda"
    before = load_model(str(tmp_path / "model"), dtype="float32")[0].state_dict()
    after = load_model(str(output), dtype="float32")[0].state_dict()
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"text", "vision", "projector"}
