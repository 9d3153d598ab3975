"""Models with MODA to cast, quantise, offload, wrap, adapt, save and load, and what they compute."""

import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
import transformers
from vision_language import FAMILIES

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HIDDEN = [[0.0, 1.5], [-math.inf, 0.0]]  # images do not see text

SETTINGS = {
    "concat": {},
    "add": {"aligner": {"rank": 4, "fusion": "add"}},
    "split": {"mask": {"softmax": "split", "base": -1.0}},
    "learned sink": {"mask": {"variant": "learned", "base": 0.0}},
    "learned decay": {"mask": {"learn_decay": True, "learn_base": True, "base": 0.0, "length": 40}},
    "hidden": {"mask": {"prior": HIDDEN}},
    "no aligner": {"aligner": None, "mask": {"variant": "fix", "prior": HIDDEN, "base": -1.0}},
    "release": {"mode": "release", "aligner": None, "mask": None},
}

every_family = pytest.mark.parametrize("family", FAMILIES)

two_families = pytest.mark.parametrize("family", ("llava", "qwen2_vl"))

every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@torch.no_grad()
def logits_of(model, inputs):
    """Without padding."""
    return model(**inputs, use_cache=False).logits[inputs["attention_mask"] == 1]


def offload(model, way, folder):
    accelerate = pytest.importorskip("accelerate")
    if way == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    if way == "disk":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)
    names = {name: "disk" for name, _ in model.named_children()}  # a device map; lm_head stays
    names["lm_head"] = "cpu"
    return accelerate.dispatch_model(model, names, main_device="cpu", offload_dir=folder, force_hooks=True)


def lora(**settings):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=r".*(language_model|text_model).*\.(q|v)_proj", r=2, **settings)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
