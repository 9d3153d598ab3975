"""Checkpoints of models with MODA: shards, resumed training, Auto classes, settings in the config, older ones."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
import transformers
from moved_models import HIDDEN, every_family, every_setting, logits_of, lora, same, two_families
from torch import nn
from trained_models import labels_of, make_trained, randomize
from transformers import AutoModel, AutoModelForImageTextToText
from vision_language import make_inputs, make_model

from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    check_identity,
    load_moda,
    load_moda_state_dict,
    moda_parameters,
    moda_state_dict,
    optimizer_groups,
    save_moda,
    train_only_moda,
)
from moda_ext.integrations.transformers.proof import TRAINED


@every_setting
def test_checkpoints_load_with_a_device_map(settings, tmp_path):
    model, inputs = make_trained("llava", **settings), make_inputs("llava")
    model.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    assert all(p.is_meta for p in moda_parameters(loaded).values())
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    for name, tensor in moda_state_dict(loaded).items():
        assert torch.equal(tensor, moda_state_dict(model)[name]), name


OFF = {"default": MODAConfig(), "hidden": MODAConfig(mask={"prior": HIDDEN}), "fixed": MODAConfig.fixed_prior(HIDDEN)}

every_off = pytest.mark.parametrize("config", OFF.values(), ids=OFF)


@every_off
@two_families
def test_averaged_models_are_finite(family, config):
    """EMA over buffers too, and task vectors."""
    model, inputs = randomize(apply_moda(make_model(family), config)), make_inputs(family)
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5), use_buffers=True)
    others = [randomize(copy.deepcopy(model), seed) for seed in (4, 5)]
    for other in others:
        average.update_parameters(other)
    assert logits_of(average, inputs).isfinite().all()
    a, b = (other.state_dict() for other in others)
    model.load_state_dict({name: a[name] + 0.4 * (b[name] - a[name]) for name in a})
    assert logits_of(model, inputs).isfinite().all()
    assert torch.equal(logits_of(average.module, inputs), logits_of(average, inputs))


def as_before(model):
    """The state dict of a version that kept -inf in buffers."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith("_off")]:
        off = state.pop(name) > 0.5
        state[name.removesuffix("_off")].masked_fill_(off, -math.inf)
    for name in [name for name in state if name.endswith("mask.fixed_decay")]:
        base = name.replace("fixed_decay", "base")
        state.setdefault(base, torch.full_like(state[name], -math.inf))
    return state


@every_off
@pytest.mark.parametrize("way", ("load_state_dict", "from_pretrained", "load_moda_state_dict", "load_moda"))
def test_checkpoints_of_before_load(config, way, tmp_path):
    model, inputs = randomize(apply_moda(make_model("llava"), config)), make_inputs("llava")
    expected, old = logits_of(model, inputs), as_before(model)
    assert any(tensor.isinf().any() for tensor in old.values())
    loaded = apply_moda(make_model("llava"), config)
    moda = {
        name.split("language_model.")[1].replace(".self_attn", ""): t for name, t in old.items() if ".moda." in name
    }
    if way == "load_state_dict":
        loaded.load_state_dict(old)
    elif way == "load_moda_state_dict":
        load_moda_state_dict(loaded, moda)
    elif way == "load_moda":
        safetensors = pytest.importorskip("safetensors.torch")
        metadata = {"moda": json.dumps(config.to_dict())}  # with -Infinity in it
        safetensors.save_file(moda, tmp_path / "moda.safetensors", metadata)
        load_moda(loaded, tmp_path / "moda.safetensors")
        load_moda(make_model("llava"), tmp_path / "moda.safetensors")
    else:
        model.save_pretrained(tmp_path, state_dict=old)
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded.eval()
    assert torch.equal(logits_of(loaded, inputs), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())


def trainer_of(model, inputs, folder, steps, **settings):
    pytest.importorskip("accelerate")
    rows = [{key: value[i] for key, value in {**inputs, "labels": labels_of(inputs)}.items()} for i in range(2)]
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        logging_steps=1,
        **settings,
    )
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-2))
    return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))


RESUMED = {
    "everything": lambda model: model,
    "only moda": lambda model: (train_only_moda(model), model)[1],
    "adapter": lambda model: pytest.importorskip("peft").get_peft_model(model, lora(modules_to_save=["moda"])),
    "adapter, only moda": lambda model: (
        model := pytest.importorskip("peft").get_peft_model(model, lora(modules_to_save=["moda"])),
        train_only_moda(model),
    )[0],
}


@pytest.mark.parametrize(
    ("family", "way"),
    [("llava", "everything"), ("gemma3", "everything"), *(("llava", way) for way in list(RESUMED)[1:])],
)
def test_a_trainer_that_resumes_goes_on_with_the_weights_of_the_checkpoint(family, way, tmp_path):
    """Four steps are two, and two more in another process with the weights from before the first."""
    inputs = make_inputs(family)

    def model():
        torch.manual_seed(7)
        return RESUMED[way](apply_moda(make_model(family), MODAConfig(**TRAINED)))

    whole = model()
    trainer_of(whole, inputs, tmp_path, steps=4).train()
    moved = {name for name, p in whole.named_parameters() if not torch.equal(p, model().state_dict()[name])}
    assert any(".moda." in name for name in moved)

    resumed = model()
    trainer_of(resumed, inputs, tmp_path, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.state_dict()[name]), name


def test_a_trainer_loads_its_best_checkpoint(tmp_path):
    inputs, model = make_inputs("llava"), apply_moda(make_model("llava"), MODAConfig(**TRAINED))
    trainer = trainer_of(model, inputs, tmp_path, steps=2)
    trainer.train()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    assert same(dict(model.state_dict()), expected)


@every_family
def test_what_save_pretrained_wrote_loads_as_a_state_dict(family, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = make_trained(family)
    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    loaded = apply_moda(make_model(family), MODAConfig(**TRAINED))
    for parameter in loaded.parameters():
        parameter.data.zero_()
    missing, unexpected = loaded.load_state_dict(saved, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])  # which is tied
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    wrapper = nn.ModuleDict({"inner": apply_moda(make_model(family), MODAConfig(**TRAINED))})
    wrapper.load_state_dict({f"inner.{name}": tensor for name, tensor in saved.items()}, strict=False)
    assert same(dict(wrapper.inner.state_dict()), dict(model.state_dict()))


def test_a_checkpoint_in_shards_loads_as_the_trainer_does(tmp_path):
    model, loaded = make_trained("llava"), apply_moda(make_model("llava"), MODAConfig(**TRAINED))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for parameter in loaded.parameters():
        parameter.data.zero_()
    transformers.trainer_utils.load_sharded_checkpoint(loaded, tmp_path, strict=False)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_weights_of_moda_that_would_be_lost_are_refused():
    state = make_trained("llava").state_dict()
    one = apply_moda(make_model("llava"), MODAConfig(layers=[1], **TRAINED))
    with pytest.raises(RuntimeError, match="weights of MODA that would be lost, .*layers.0.self_attn.moda.aligner.a1"):
        one.load_state_dict(state, strict=False)
    make_trained("llava").load_state_dict(make_model("llava").state_dict(), strict=False)  # nothing of MODA is lost


@every_family
def test_auto_classes_load_what_they_load_of_the_plain_family(family, tmp_path):
    model, inputs = make_trained(family), make_inputs(family)
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(base).__name__ == type(model).__name__.replace("ForConditionalGeneration", "Model")
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)
        plain = make_model(family).base_model(**inputs).last_hidden_state
        assert not torch.allclose(plain[inputs["attention_mask"] == 1], expected[inputs["attention_mask"] == 1])
        assert same(moda_state_dict(base), moda_state_dict(model))
        base.save_pretrained(tmp_path / "base")
        again = AutoModel.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(again(**inputs).last_hidden_state, expected)
    assert pickle.loads(pickle.dumps(type(base))) is type(base)
    with pytest.raises(ValueError, match="has no logits"):
        check_identity(base, inputs)
    plain_config = type(make_model(family).config)
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto = getattr(transformers, name)
        if auto._model_mapping.get(plain_config, None) is type(make_model(family)):
            assert torch.equal(
                logits_of(auto.from_pretrained(tmp_path / "whole").eval(), inputs), logits_of(model, inputs)
            )


def test_a_fixed_prior_is_there_in_the_base_model_too(tmp_path):
    model, inputs = apply_moda(make_model("llava"), MODAConfig.fixed_prior(HIDDEN)), make_inputs("llava")
    model.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_settings_become_plain_numbers_when_they_are_made(tmp_path):
    config = MODAConfig(
        modalities={"text": np.int64(0), "image": torch.tensor(1), "video": np.int32(1)},
        aligner={"rank": np.int16(4)},
        mask={
            "prior": torch.tensor([[0.0, -math.inf], [0.5, 0.0]], dtype=torch.bfloat16, requires_grad=True),
            "decay": np.array([0.5, 0.25, 0.5, 0.5]),
            "base": (torch.tensor(-1.0), np.float32(-math.inf), -2, np.float64(-3.0)),
            "length": np.int64(40),
            "learn_prior": np.bool_(True),
        },
        layers=np.arange(2),
    )
    assert config.mask["prior"] == [[0.0, -math.inf], [0.5, 0.0]] and config.layers == [0, 1]
    assert config.mask["base"] == [-1.0, -math.inf, -2, -3.0] and config.mask["decay"] == [0.5, 0.25, 0.5, 0.5]
    assert MODAConfig.from_dict(config.to_dict()) == config == MODAConfig.from_json(config.to_json())
    json.loads(config.to_json(), parse_constant=pytest.fail)

    model, inputs = randomize(apply_moda(make_model("llava"), config)), make_inputs("llava")
    model.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert MODAConfig.from_dict(loaded.config.text_config.moda) == config
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    save_moda(model, tmp_path / "moda.safetensors")
    assert torch.equal(
        logits_of(load_moda(make_model("llava"), tmp_path / "moda.safetensors"), inputs), logits_of(model, inputs)
    )
    prior = np.array([[0.0, 0.5], [0.0, -np.inf]], dtype=np.float32)
    assert MODAConfig.fixed_prior(prior) == MODAConfig.fixed_prior(torch.from_numpy(prior))
    assert MODAConfig(mask={"base": -math.inf}) == MODAConfig()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mask": {"prior": [[0.0, math.nan], [0.0, 0.0]]}}, ValueError, r"mask.prior\[0\]\[1\] must be a finite"),
        ({"mask": {"prior": torch.full((2, 2), math.inf)}}, ValueError, r"mask.prior\[0\]\[0\] must be .* got inf"),
        ({"mask": {"decay": -math.inf}}, ValueError, "mask.decay must be a finite number, got -inf"),
        ({"mask": {"prior": [object()]}}, TypeError, r"mask.prior\[0\] must be a number, .* got object"),
        ({"mask": {"base": "-10"}}, TypeError, "mask.base must be a number"),
        ({"aligner": {"rank": 4j}}, TypeError, "aligner.rank must be a number, .* got complex"),
    ],
)
def test_settings_that_are_no_numbers_are_refused_when_they_are_made(settings, error, message):
    with pytest.raises(error, match="MODAConfig: " + message):
        MODAConfig(**settings)


def test_settings_that_were_pickled_under_their_old_name_load():
    config = MODAConfig(aligner={"rank": 4})
    before = pickle.dumps(config, protocol=0).replace(
        b"moda_ext.integrations.settings", b"moda_ext.integrations.transformers.config"
    )
    assert b"transformers.config" in before and pickle.loads(before) == config
