"""Tiny random vision-language models of every family, and inputs for them. No downloads."""

import dataclasses
from collections.abc import Callable

import torch
import transformers

IMAGE, VIDEO, START, END = 60, 61, 62, 63
VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
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
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}


@dataclasses.dataclass
class Family:
    """How to make a model of a family: its config's arguments, and what an image is to it."""

    config: dict
    image_tokens: int
    images: Callable[[int], dict]  # number of images -> keyword arguments
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    extra: Callable[[torch.Tensor], dict] = lambda ids: {}  # token ids -> keyword arguments


def _pixels(*shape):
    return lambda count: {"pixel_values": torch.randn(count, *shape)}


def _tiles(count):
    return {"pixel_values": torch.randn(count, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * count)}


def _qwen_images(count):
    grid = torch.tensor([[1, 4, 4]] * count)
    return {"pixel_values": torch.randn(16 * count, 3 * 2 * 2 * 2), "image_grid_thw": grid}


def _qwen_types(ids):
    return {"mm_token_type_ids": torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))}


def _qwen(text, vision):
    return Family(
        {"text_config": {**TEXT, **text}, "vision_config": {**QWEN_VISION, **vision}, **QWEN_TOKENS},
        image_tokens=4,
        images=_qwen_images,
        before=(START,),
        after=(END,),
        extra=_qwen_types,
    )


def _idefics():
    return Family(
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": FINE, "image_token_id": IMAGE},
        image_tokens=4,
        images=_pixels(1, 3, 8, 8),
    )


GEMMA_TEXT = {
    **TEXT,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}

FAMILIES = {
    "llava": Family(
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
        image_tokens=4,
        images=_pixels(3, 8, 8),
    ),
    "llava_next": Family(
        {
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None, "head_dim": 16},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[8, 8]],
            "vision_feature_layer": -1,
        },
        image_tokens=10,
        images=_tiles,
    ),
    "llava_onevision": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[8, 8]],
        },
        image_tokens=10,
        images=_tiles,
    ),
    "qwen2_vl": _qwen({"rope_parameters": MROPE}, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1}),
    "qwen2_5_vl": _qwen(
        {"rope_parameters": MROPE},
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "window_size": 8,
            "fullatt_block_indexes": [0],
        },
    ),
    "qwen3_vl": _qwen(
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 16},
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
    "gemma3": Family(
        {
            "text_config": GEMMA_TEXT,
            "vision_config": {"model_type": "siglip_vision_model", **FINE, "vision_use_head": False},
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
            "mm_tokens_per_image": 4,
        },
        image_tokens=4,
        images=_pixels(3, 8, 8),
        before=(START,),
        after=(END,),
        extra=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "internvl": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**FINE, "image_size": [8, 8], "patch_size": [2, 2]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        image_tokens=4,
        images=_pixels(3, 8, 8),
    ),
    "idefics3": _idefics(),
    "smolvlm": _idefics(),
}


def make_config(family: str):
    return transformers.AutoConfig.for_model(family, **FAMILIES[family].config)


def make_model(family: str):
    """A random model, in evaluation mode. Weights are large enough that attention is not nearly uniform."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(make_config(family)).eval()
    for name, parameter in model.named_parameters():
        if ".q_proj.weight" in name or ".k_proj.weight" in name:
            parameter.data.mul_(8)
        if name.endswith("mm_input_projection_weight"):  # Gemma 3 starts it at 0, and no image would be seen
            parameter.data.normal_(std=0.2)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def make_inputs(family: str, *, rows: int = 2, padding: str | None = "left", text: int = 5) -> dict:
    """[text 3][image][text] in every row; the second row is two tokens shorter and padded."""
    spec = FAMILIES[family]
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for row in range(rows):
        words = torch.randint(1, IMAGE, (3 + text,), generator=generator).tolist()
        sequence = [*words[:3], *spec.before, *[IMAGE] * spec.image_tokens, *spec.after, *words[3:]]
        if padding and row == 1:
            sequence = sequence[2:]
        sequences.append(sequence)
    length = max(map(len, sequences))
    ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if padding == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    torch.manual_seed(2)
    return {"input_ids": ids, "attention_mask": mask, **spec.images(rows), **spec.extra(ids)}
