"""Tiny random models of every family with MODA.

A "trained" model has random MODA parameters of a size that moves the logits, a finite pseudo-score length and a finite
base, so that a cache that forgets anything gives other logits.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
import transformers
from tolerance import assert_close
from transformers import DynamicCache, StaticCache
from vision_language import FAMILIES, make_config, make_inputs, make_model

from moda_ext.integrations.transformers import MODAConfig, apply_moda, moda_parameters
from moda_ext.integrations.transformers.proof import TRAINED

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL = [60, 61, 62, 63]
NEW = 6  # tokens that are generated
SPLIT = 9  # where a prompt is cut in two
PRIOR = [[0.0, 1.5], [0.0, 0.0]]  # text looks more at images
CACHES = {"dynamic": DynamicCache, "static": lambda: StaticCache(config=make_config("llava"), max_cache_len=32)}

family = pytest.mark.parametrize("family", FAMILIES)


def randomize(model, seed=3):
    """Values for MODA's parameters that move the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in moda_parameters(model).items():
        if not name.endswith("base"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model


def make_trained(name, **settings):
    return randomize(apply_moda(make_model(name), MODAConfig(**{**TRAINED, **settings})))


def positions_of(name, mask):
    """Positions that leave padding out, as generate() counts them. The Qwen families make their own."""
    return {} if "qwen" in name else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def logits_of(name, model, inputs, **arguments):
    arguments = {**inputs, **positions_of(name, inputs["attention_mask"]), **arguments}
    return model(**{"use_cache": False, **arguments}).logits


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def one_row(name):
    return make_inputs(name, rows=1)


def extended(name, inputs, sequences):
    """The inputs of one forward pass over the prompt and what was generated."""
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], sequences.shape[1] - mask.shape[1])], dim=1)
    return {**inputs, "input_ids": sequences, "attention_mask": mask, **FAMILIES[name].extra(sequences)}


def check_generation(name, model, inputs, **options):
    result = model.generate(
        **copy.deepcopy(inputs),
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=SPECIAL,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    full = logits_of(name, model, extended(name, inputs, result.sequences))[:, -NEW - 1 : -1]
    assert torch.equal(full[..., :60].argmax(-1), result.sequences[:, -NEW:])
    if "assistant_model" not in options and "prompt_lookup_num_tokens" not in options:
        assert_close(torch.stack(result.logits, dim=1), full)
    return result


def two_passes(name, model, inputs, cache, between=lambda cache: None, order=(0, 1)):
    """Logits of the tokens from ``SPLIT`` on, after the ones before went into ``cache`` in a pass of their own.

    The second pass has the rows in another order.
    """
    positions = positions_of(name, inputs["attention_mask"])
    first = {"input_ids": inputs["input_ids"][:, :SPLIT], "attention_mask": inputs["attention_mask"][:, :SPLIT]}
    second = {"input_ids": inputs["input_ids"][:, SPLIT:], "attention_mask": inputs["attention_mask"]}
    if positions:
        first["position_ids"], second["position_ids"] = positions["position_ids"].tensor_split([SPLIT], dim=1)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**first, **rest, past_key_values=cache)
        between(cache)
        return model(**{key: value[list(order)] for key, value in second.items()}, past_key_values=cache).logits
