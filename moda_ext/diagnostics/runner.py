"""Images and prompts through a vision-language model under a meter: what ``moda-ext diagnose`` does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moda_ext.conversations import load_picture
from moda_ext.diagnostics.meter import AttentionMeter
from moda_ext.diagnostics.results import Diagnosis

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, ProcessorMixin

    from moda_ext.integrations.transformers.parts import GenerativeModel

__all__ = ["Picture", "diagnose", "load_model"]

RANDOM = "random"
# Families that cut an image into tiles, by the place of the whole image, made small, among them. Gemma 3's is the first
# too, and its tiles have equally many tokens, as those of the families with the last.
WHOLE_IMAGE_FIRST = ("llava_next", "llava_onevision")
WHOLE_IMAGE_LAST = ("internvl", "idefics3", "smolvlm")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass
class Picture:
    """Where the text of one prompt looks in its image.

    Attributes:
        title: file and prompt.
        image: (height, width, 3), float in 0 to 1: what the model saw.
        grid: (h, w): the image's tokens, row by row.
        scores: (h * w,), mean over layers.
        uniform: (h * w,), for uniform attention.
    """

    title: str
    image: Tensor
    grid: tuple[int, int]
    scores: Tensor
    uniform: Tensor


def load_model(name: str, *, device: str | None = None, dtype: str = "auto") -> tuple[GenerativeModel, ProcessorMixin]:
    """``(model, processor)`` of a checkpoint directory, of an id on the Hugging Face hub, or ``"random"``.

    Args:
        name: the directory or id; ``"random"`` is a tiny random Llava (:mod:`moda_ext.diagnostics.tiny`).
        device: where to, by default the accelerator if there is one.
        dtype: of the weights: ``"auto"`` is that of the checkpoint, or ``"float32"``, ``"bfloat16"``, ``"float16"``.

    Raises:
        ImportError: transformers or pillow is not installed.
        OSError: there is no such checkpoint.
        ValueError: a dtype that is none, or a model of a family not known here.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"load_model: dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    from moda_ext.integrations.transformers import text_stack

    model: Any  # the stubs hide what .to takes
    processor: Any
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if accelerator is None else accelerator.type
    if name == RANDOM:
        from moda_ext.diagnostics.tiny import tiny_llava

        model, processor = tiny_llava()
        return (model if dtype == "auto" else model.to(getattr(torch, dtype))).to(device), processor
    from transformers import AutoModelForImageTextToText

    processor = load_processor(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    text_stack(model)  # refuses a family that is not known
    return model.to(device).eval(), processor


def load_processor(name: str) -> ProcessorMixin | None:
    """The processor of :func:`load_model` alone, which raises most of what that raises, and takes no time."""
    if name == RANDOM:
        return None
    from transformers import AutoProcessor

    # They make the model types with MODA known, and the vision tower of the small model.
    import moda_ext.integrations.transformers
    import moda_ext.small.tower  # noqa: F401

    return AutoProcessor.from_pretrained(name)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files, and those in directories, sorted.

    Raises:
        FileNotFoundError: a path that does not exist, or a directory without images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in the directory {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no such image: {path}")
    return found


@torch.no_grad()
def diagnose(
    model: GenerativeModel,
    processor: ProcessorMixin,
    images: Sequence[str | Path],
    prompts: Sequence[str],
    *,
    name: str | None = None,
    modalities: dict[str, int] | None = None,
    new_tokens: int = 0,
    num_pictures: int = 4,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Diagnosis, list[Picture], list[str]]:
    """Asks every prompt about every image, and measures.

    Args:
        model, processor: of a family that :mod:`moda_ext.integrations.transformers` knows.
        images: files.
        prompts: without image placeholder; the processor's chat template adds it.
        name: of the model, in the results.
        modalities: see :class:`AttentionMeter`.
        new_tokens: how many tokens to generate (greedily) for each. Their rows are measured too, but for the last
            token's, and are those of ``rows="generated"``.
        num_pictures: for how many pairs to keep where text looks in the image.
        progress: wraps the list of pairs, for a progress bar.

    Returns:
        ``(diagnosis, pictures, notes)``, notes being sentences about pictures that cannot be drawn.

    Raises:
        ValueError: no images, no prompts, or a model of an unknown family.
    """
    if not images or not prompts:
        raise ValueError(f"diagnose: needs images and prompts, got {len(images)} and {len(prompts)}")
    meter = AttentionMeter(model, name=name, modalities=modalities, token_scores=num_pictures, similarity=True)
    looks, notes = [], []
    with meter:
        for path, prompt in progress([(path, prompt) for path in images for prompt in prompts]):
            image = load_picture(path)
            inputs = processor(images=[image], text=[format_prompt(processor, prompt)], return_tensors="pt")
            inputs = inputs.to(model.device, model.dtype)  # of these, floating-point ones only
            scored = meter.num_scored
            if new_tokens:
                model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            else:
                model(**inputs, use_cache=False)
            title = f"{Path(path).name}: {prompt}"
            if meter.num_scored > scored:
                looks.append((title, *image_layout(model, processor, inputs, image)))
            elif scored < num_pictures:
                notes.append(f"No picture for “{title}”: no text row sees the image.")
    diagnosis, pictures = meter.result(), []
    for scores, (title, picture, grid, start, reason) in zip(diagnosis.token_scores, looks, strict=True):
        if picture is None or grid is None or start is None:
            notes.append(f"No picture for “{title}”: {reason}.")
            continue
        cells = slice(start, start + grid[0] * grid[1])
        pictures.append(Picture(title, picture, grid, scores.scores[:, cells].mean(dim=0), scores.uniform[cells]))
    return diagnosis, pictures, notes


def format_prompt(processor: Any, prompt: str) -> str:
    """A prompt about one image, in the form the model was trained on, as far as the processor knows it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{processor.image_token}\n{prompt}"


def image_layout(
    model: GenerativeModel, processor: ProcessorMixin, inputs: BatchFeature, image: Image
) -> tuple[Tensor | None, tuple[int, int] | None, int | None, str | None]:
    """Where the tokens of an image are in a prompt about one image, and what the model saw of it.

    Args:
        model, processor: of a family that :mod:`moda_ext.integrations.transformers` knows.
        inputs: of one prompt.
        image: in RGB.

    Returns:
        ``(picture, grid, start, reason)``: the pixels (height, width, 3) in 0 to 1, the grid (h, w) of tokens that is
        over all of them, and the place of its first token in the prompt, with no reason; or None and the reason why
        there is no such grid.
    """
    from moda_ext.integrations.settings import SUFFIX, placeholder

    places = (inputs["input_ids"][0] == placeholder(model.config, "image")).nonzero()[:, 0].tolist()
    family, tile = model.config.model_type.removesuffix(SUFFIX), 0
    if inputs.get("image_grid_thw") is not None:  # Qwen: the whole image, in patches that are merged
        merge = model.config.vision_config.spatial_merge_size
        _, height, width = inputs["image_grid_thw"][0].tolist()
        picture, grid = _pixels(image), (height // merge, width // merge)
    else:
        tiles = inputs["pixel_values"].flatten(0, -4)  # (tiles, 3, height, width)
        tile = -1 if family in WHOLE_IMAGE_LAST else 0
        if family in WHOLE_IMAGE_FIRST:  # the other tiles' tokens depend on the shape of the image
            side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        else:
            side = math.isqrt(len(places) // len(tiles))
            if side * side * len(tiles) != len(places):
                return None, None, None, f"its {len(places)} tokens are not {len(tiles)} square tiles"
        picture, grid = _seen(processor, tiles[tile]), (side, side)
    count = grid[0] * grid[1]
    places = places[-count:] if tile else places[:count]
    if len(places) < count or places[-1] - places[0] + 1 != count:
        return None, None, None, f"its tokens do not hold a grid of {grid[0]} x {grid[1]} in one piece"
    return picture, grid, places[0], None


def _seen(processor: ProcessorMixin, pixels: Tensor) -> Tensor:
    """(height, width, 3) of normalised pixels (3, height, width)."""
    of_image = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (of_image.image_mean, of_image.image_std))
    return (pixels.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def _pixels(image: Image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255)
