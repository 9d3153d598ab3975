"""Does MODA work with the Transformers that is installed? Shown on a tiny random model of a family, in about a second.

A release that came after moda_ext was tested may hand its caches, masks or keys on in another way, and then a model
would generate other tokens without a word. So the first use of a family under such a release goes through
:func:`prove`: what the tests check at length, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moda_ext.integrations.settings import MODAConfig
from moda_ext.integrations.transformers.versions import versions

if TYPE_CHECKING:
    from moda_ext.integrations.recording import AttentionRecord
    from moda_ext.integrations.transformers.parts import GenerativeModel

__all__ = ["TINY", "prove"]

IMAGE, VIDEO, START, END = 60, 61, 62, 63  # token ids
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
FINE = {**VISION, "patch_size": 2}
CLIP, SIGLIP = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
LLAVA = {"image_token_index": IMAGE, "vision_feature_layer": -1}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2}
QWEN_FINE = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
IDEFICS = {"text_config": {"model_type": "llama", **TEXT}, "vision_config": FINE, "image_token_id": IMAGE}

# The arguments of the smallest useful config of every family, by model type.
TINY = {
    "llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP, "image_seq_length": 4, **LLAVA},
    "llava_next": {
        "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None, "head_dim": 16},
        "vision_config": CLIP,
        "image_grid_pinpoints": [[8, 8]],
        **LLAVA,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[8, 8]],
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1},
        **QWEN,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_FINE, "window_size": 8, "fullatt_block_indexes": [0]},
        **QWEN,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 16},
        "vision_config": {**QWEN_FINE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN,
    },
    "gemma3": {
        "text_config": {
            **TEXT,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        "vision_config": {**SIGLIP, "patch_size": 2, "vision_use_head": False},
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
        "mm_tokens_per_image": 4,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**FINE, "image_size": [8, 8], "patch_size": [2, 2]},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
}

STEPS = 4  # tokens that are generated
TOLERANCE = 1e-4  # of the largest logit; a token that is left out moves it by much more
# A trained model: every parameter random, so that a cache which forgets anything gives other logits.
TRAINED: dict[str, dict] = {
    "aligner": {"rank": 4},
    "mask": {"length": 64, "decay": 0.05, "base": -3.0, "learn_base": True},
}


def prove(
    model_type: str,
    make_model: Callable[[], GenerativeModel],
    attach: Callable[[GenerativeModel, MODAConfig], object],
    recording: Callable[..., contextlib.AbstractContextManager],
) -> None:
    """Raises unless a tiny model computes the same with MODA attached, decodes as it reads, and can be measured.

    Args:
        model_type: a key of ``TINY``, for the error.
        make_model: makes the model of that config.
        attach: ``apply_moda``.
        recording: ``recording`` of this package.

    Raises:
        RuntimeError: it does not. Both versions are named.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            torch.manual_seed(0)
            _prove(make_model, attach, recording)
    except Exception as error:
        raise RuntimeError(
            f"MODA does not work with this Transformers: on a tiny {model_type} model, {error} {versions()}. Install a "
            "tested Transformers, or a newer moda_ext"
        ) from error
    finally:
        torch.set_default_dtype(default)


def _prove(
    make_model: Callable[[], GenerativeModel],
    attach: Callable[[GenerativeModel, MODAConfig], object],
    recording: Callable[..., contextlib.AbstractContextManager],
) -> None:
    model = make_model().eval()
    for name, parameter in model.named_parameters():
        if ".q_proj.weight" in name or ".k_proj.weight" in name:
            parameter.mul_(8)  # as made, random weights attend uniformly
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    ids = torch.tensor(
        [[5, 9, 3, IMAGE, IMAGE, IMAGE, IMAGE, 17, 8, 4], [0, 0, 11, IMAGE, IMAGE, IMAGE, IMAGE, 2, 6, 7]]
    )
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    plain = _full_pass(model, inputs)
    expected = _generate(model, inputs, "dynamic").sequences

    records: list[AttentionRecord] = []
    with recording(model, records.append):
        _same(_full_pass(model, inputs), plain, "logits change while attention is measured")
        first = len(records)
        recorded = _generate(model, inputs, "dynamic").sequences
    if not torch.equal(recorded, expected):
        raise RuntimeError("other tokens are generated while attention is measured")
    count = model.config.text_config.num_hidden_layers
    steps = [records[i : i + count] for i in range(first, len(records), count)]
    for step, layers in enumerate(steps):
        keys = inputs["attention_mask"].sum(dim=1) + step  # so many that a full-attention layer sees
        if max((record.key_modality >= 0).sum(dim=1).tolist() for record in layers) != keys.tolist():
            raise RuntimeError(f"the tokens that are measured in decoding step {step} are not those of the sequence")
    if len(steps) != STEPS:
        raise RuntimeError(f"{len(steps)} passes are measured where {STEPS} tokens are generated")

    attach(model, MODAConfig(aligner=TRAINED["aligner"], mask=TRAINED["mask"]))
    parameters = {name: parameter for name, parameter in model.named_parameters() if ".moda." in name}
    for name, parameter in parameters.items():
        if name.endswith(".base"):
            parameter.fill_(-40.0)  # pseudo scores are no identity
    _same(_full_pass(model, inputs), plain, "attaching MODA changes the logits")
    for name, parameter in parameters.items():
        parameter.fill_(-3.0) if name.endswith(".base") else nn.init.normal_(parameter, std=0.7)
    if torch.allclose(_full_pass(model, inputs), plain, atol=TOLERANCE * plain.abs().max().item()):
        raise RuntimeError("MODA, attached, does not run")
    for cache in ("dynamic", "static"):
        result = _generate(model, inputs, cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), STEPS, dtype=torch.long)], dim=1)
        full = _full_pass(model, {"input_ids": result.sequences, "attention_mask": mask})[:, -STEPS - 1 : -1]
        _same(
            torch.stack(result.logits, dim=1),
            full,
            f"decoding with a {cache} cache does not give the logits of one pass",
        )
    one_row = {name: tensor[:1] for name, tensor in inputs.items()}
    for what, given, options in (
        ("beam search", inputs, {"num_beams": 2}),
        ("prompt lookup", one_row, {"prompt_lookup_num_tokens": 2}),
    ):
        beams = {name: value for name, value in options.items() if name == "num_beams"}
        expected = _generate(model, given, None, use_cache=False, **beams).sequences
        if not torch.equal(_generate(model, given, "dynamic", **options).sequences, expected):
            raise RuntimeError(f"{what} with a cache gives other tokens than without one")


def _full_pass(model: GenerativeModel, inputs: dict) -> torch.Tensor:
    """Logits of one pass without a cache, positions counted without padding as ``generate`` does."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**inputs, position_ids=positions, use_cache=False).logits * inputs["attention_mask"][..., None]


def _generate(model: GenerativeModel, inputs: dict, cache: str | None, **more: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO, START, END]}
    options |= {"cache_implementation": cache, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **options, **more)


def _same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{what} (by {difference:.2g} of the largest one)")
