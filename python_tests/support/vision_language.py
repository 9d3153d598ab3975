"""Tiny random vision-language models of every family, and inputs for them. No downloads."""

import dataclasses
from collections.abc import Callable

import torch
import transformers

from moda_ext.integrations.transformers.proof import END, IMAGE, START, TEXT, TINY, VIDEO  # noqa: F401  TEXT: for tests


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


def _qwen(name):
    options = {"images": _qwen_images, "before": (START,), "after": (END,), "extra": _qwen_types}
    return Family(TINY[name], image_tokens=4, **options)


FAMILIES = {
    "llava": Family(TINY["llava"], image_tokens=4, images=_pixels(3, 8, 8)),
    "llava_next": Family(TINY["llava_next"], image_tokens=10, images=_tiles),
    "llava_onevision": Family(TINY["llava_onevision"], image_tokens=10, images=_tiles),
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "qwen3_vl": _qwen("qwen3_vl"),
    "gemma3": Family(
        TINY["gemma3"],
        image_tokens=4,
        images=_pixels(3, 8, 8),
        before=(START,),
        after=(END,),
        extra=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "internvl": Family(TINY["internvl"], image_tokens=4, images=_pixels(3, 8, 8)),
    "idefics3": Family(TINY["idefics3"], image_tokens=4, images=_pixels(1, 3, 8, 8)),
    "smolvlm": Family(TINY["smolvlm"], image_tokens=4, images=_pixels(1, 3, 8, 8)),
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
