"""Whole models under Transformers' tensor parallelism, with images and padding, against one process."""

import copy

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers", minversion="5.23", reason="moda_ext[transformers] is missing")
from trained_models import NEW, labels_of, make_trained  # noqa: E402  transformers is checked first
from transformers.distributed import DistributedConfig  # noqa: E402
from vision_language import make_inputs  # noqa: E402

from moda_ext.integrations.transformers import moda_parameters  # noqa: E402

FAMILIES = ("llava", "qwen2_vl", "gemma3")
ALL_TENSORS = {"base": -2.0, "learn_base": True, "learn_decay": True, "length": 64}
load = transformers.AutoModelForImageTextToText.from_pretrained


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_trained(family, mask=ALL_TENSORS).save_pretrained(folder / family)
    return str(folder)


def tensor_parallel():
    return {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def error(result, expected):
    return ((full(result) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def gradient_errors(model, whole):
    errors = {}
    for (name, own), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None and other.grad.abs().max() > 1e-7:
            errors[name] = error(own.grad, other.grad)
    return errors


def measure(folder, family):
    inputs, labels = make_inputs(family), labels_of(make_inputs(family))
    import time
    t = time.time()
    whole, model = load(f"{folder}/{family}"), load(f"{folder}/{family}", **tensor_parallel())
    out = {"load": time.time() - t}
    with torch.no_grad():
        out["logits"] = error(model(**inputs).logits, whole(**inputs).logits)
    t = time.time()
    for name, options in {"greedy": {}, "beam": {"num_beams": 3}, "static": {"cache_implementation": "static"}}.items():
        tokens = [m.generate(**copy.deepcopy(inputs), max_new_tokens=NEW, do_sample=False, **options) for m in (model, whole)]
        out[name] = torch.equal(*tokens)
    out["gen"] = time.time() - t
    t = time.time()
    for m in (model, whole):
        m.train()
    for passes in (1, 2):
        for m in (model, whole):
            m.zero_grad()
            for _ in range(passes):
                m(**inputs, labels=labels, use_cache=False).loss.backward()
        e = gradient_errors(model, whole)
        out[f"grad {passes}"] = max(e.values()), max(e, key=e.get), max(v for k, v in e.items() if ".moda." in k)
    for m in (model, whole):
        m.zero_grad()
        m.gradient_checkpointing_enable()
        m(**inputs, labels=labels).loss.backward()
    e = gradient_errors(model, whole)
    out[f"grad ckpt"] = max(e.values()), max(e, key=e.get), max(v for k, v in e.items() if ".moda." in k)
    out["train"] = time.time() - t
    return out


def test_it(two_ranks, checkpoints):
    for f in FAMILIES:
        for r in two_ranks.run(measure, checkpoints, f, patience=100): print(f, r)
