"""Tiny random checkpoints with MODA as a user has them, and the tokens that Transformers generates of them, greedily.

Runs in the environment with Transformers, as vLLM wants an older one: ``python checkpoints.py FOLDER``. For each family
FOLDER/<family> gets images, requests.json, and for each of SETTINGS a checkpoint with expected.json;
FOLDER/stacks/<family> is a checkpoint of another family.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moda_ext.integrations.transformers import FAMILIES as ALL_FAMILIES
from moda_ext.integrations.transformers import MODAConfig, apply_moda, moda_parameters

sys.path.append(str(Path(__file__).parents[1] / "support"))
import vision_language  # noqa: E402  of the tests

NEW_TOKENS = 16
MARGIN = 2e-4  # of the best logit before the next; from the first token on with less, rounding decides
SIDE, PATCH = 56, 14
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
PRIOR = [[[0.0, 0.9], [-0.6, 0.3]], [[0.2, -0.7], [0.5, 0.0]], [[0.0, 1.5], [0.0, 0.0]], [[-0.4, 0.0], [0.8, -0.2]]]
LENGTH = {"base": 0.5, "decay": 0.02, "length": 300}  # pseudo scores that differ from row to row
SETTINGS = {
    "plain": None,
    "full": MODAConfig(aligner={"rank": 8}, mask={**LENGTH, "base": -1.0, "learn_base": True, "learn_decay": True}),
    "layers": MODAConfig(aligner={"rank": 8}, mask={"base": -1.0, "learn_base": True}, layers=[0, 2]),
    "fix": MODAConfig(aligner=None, mask={"variant": "fix", "prior": PRIOR, **LENGTH}),
    "inf": MODAConfig(aligner={"rank": 8}, mask={"variant": "inf"}),
    "learned": MODAConfig(
        aligner={"rank": 8, "fusion": "add", "normalize": "frobenius", "key_norm": None},
        mask={"variant": "learned", "base": 0.0, "softmax": "split"},
    ),
    "hidden": MODAConfig(  # one head's text does not see the image, and only some heads have a sink
        aligner=None,
        mask={
            "variant": "fix",
            "prior": [[[0.0, -math.inf], [0.0, 0.0]], *PRIOR[1:]],
            "base": [-math.inf, 0.0, -math.inf, 1.0],
        },
    ),
}


def tokenizer_of(special: list[str], **roles: str) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte."""
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelling = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelling, pad_token=special[0], additional_special_tokens=special[1:], **roles
    )


def chat_template(image: str) -> str:
    return (
        "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def llava():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tokenizer_of(["<pad>", "<s>", "</s>", "<image>"], bos_token="<s>", eos_token="</s>")
    square = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template("<image>"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=SIDE, patch_size=PATCH),
        text_config=transformers.LlamaConfig(
            **TEXT, vocab_size=len(tokenizer), head_dim=32, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=3,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    return transformers.LlavaForConditionalGeneration(config), processor, "<image>"


class QwenProcessor:
    """Qwen2_5_VLProcessor for images alone: the whole one makes a processor of videos, which needs torchvision."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, size: dict[str, int]):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer, self.image_processor = tokenizer, Qwen2VLImageProcessorPil(size=size)

    def __call__(self, images: list[Image.Image] | None, text: str, return_tensors: str) -> dict:
        vision = {} if images is None else self.image_processor(images, return_tensors=return_tensors)
        pieces = text.split("<|image_pad|>")
        counts = [int(grid.prod()) // 4 for grid in vision.get("image_grid_thw", ())]
        text = pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        inputs = self.tokenizer(text, return_tensors=return_tensors)
        types = (inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
        return {**inputs, **vision, "mm_token_type_ids": types}

    def apply_chat_template(self, *args, **kwargs) -> str:
        return self.tokenizer.apply_chat_template(*args, **kwargs, tokenize=False)

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        image = {**self.image_processor.to_dict(), "image_processor_type": "Qwen2VLImageProcessor"}
        parts = {"image_processor": image, "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}
        whole = {"processor_class": "Qwen2_5_VLProcessor", **parts}
        (folder / "processor_config.json").write_text(json.dumps(whole))


def qwen2_5_vl():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = tokenizer_of([*special, "<|video_pad|>"], eos_token="<|im_end|>")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer.chat_template = chat_template(image)
    processor = QwenProcessor(tokenizer, {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28})
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": 2,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": PATCH,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor, image


FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}
SIZES = {  # of images that no processor has to resize, as they do it differently
    "llava": ((SIDE, SIDE),) * 4,
    "qwen2_5_vl": ((56, 56), (112, 56), (84, 84), (112, 112)),
}


def sharpen(model: torch.nn.Module) -> None:
    """As they are made, random weights attend nearly uniformly, and attention hardly matters."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data.mul_(6)
        elif name.endswith(("v_proj.weight", "o_proj.weight", "lm_head.weight")):
            parameter.data.mul_(8)
        elif "multi_modal_projector" in name or ("merger" in name and parameter.dim() == 2):
            parameter.data.mul_(6)


def randomise_moda(model: torch.nn.Module) -> None:
    """As it is made, MODA is the identity."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in moda_parameters(model).items():
        if not name.endswith((".base", ".raw_decay", ".sink")):
            scale = 1.0 if name.endswith((".prior", ".condition", ".gate")) else 0.35
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        else:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def requests(image: str) -> list[tuple[str, list[int]]]:
    """Prompts, each with the numbers of its images."""
    generator = np.random.default_rng(1)
    long = "".join(chr(97 + int(c)) for c in generator.integers(0, 26, 150))
    return [
        (f"{image} What is on the table?", [0]),
        (f"Look here: {image} and there: {image} Which is brighter?", [1, 2]),
        ("No picture at all, only words.", []),
        (f"{long} {image} {long[:40]}", [3]),
        (f"{long} {image} {long[20:50]}", [3]),  # a long prefix of the one before, image included
        (f"{image} What is in the box?", [0]),
        (f"The end is a picture {image}", [2]),
        ("abc abc abc abc abc abc abc abc", []),  # easy to guess from what was said
        (f"{image} one two one two one two one two", [1]),
        ("x", []),
    ]


def save_images(folder: Path, sizes: tuple[tuple[int, int], ...]) -> list[Image.Image]:
    generator = np.random.default_rng(1)
    images = []
    for i, (width, height) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width] / SIDE
        waves = np.stack([np.sin(5 * x * (i + 1)), np.cos(7 * y + i), np.sin(x * y)], -1) * 110 + 127
        pixels = np.clip(waves + generator.normal(0, 25, waves.shape), 0, 255)
        images.append(Image.fromarray(pixels.astype("uint8")))
        images[-1].save(folder / f"image{i}.png")
    return images


def name_tower_as_vllm_does(path: Path) -> None:
    """Its own LLaVA does not know the name that Transformers 5 gives a tower of CLIP; ours converts it on load."""
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def expected(model, processor, images: list[Image.Image], prompts: list[tuple[str, list[int]]]) -> list[dict]:
    results = []
    for text, which in prompts:
        inputs = processor(images=[images[i] for i in which] or None, text=text, return_tensors="pt")
        out = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = torch.stack(out.scores)[:, 0]
        best = scores.topk(2).values
        sure = int((best[:, 0] - best[:, 1] > MARGIN).cumprod(0).sum())
        prompt = inputs["input_ids"].shape[1]
        tokens = out.sequences[0, prompt : prompt + sure]
        results.append({"prompt": out.sequences[0, :prompt].tolist(), "tokens": tokens.tolist()})
    assert sum(len(result["tokens"]) for result in results) > 0.8 * NEW_TOKENS * len(results), results
    return results


@torch.no_grad()
def answer(model, processor, image: Image.Image, question: str) -> str:
    """What a chat about one image gets."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def save(family: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    images = save_images(folder, SIZES[family])
    for name, settings in SETTINGS.items():
        torch.manual_seed(0)
        model, processor, image = FAMILIES[family]()
        sharpen(model)
        if settings is not None:
            apply_moda(model, settings)
            randomise_moda(model)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        if family == "llava" and settings is None:
            name_tower_as_vllm_does(folder / name / "model.safetensors")
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32).eval()
        prompts = requests(image)
        (folder / "requests.json").write_text(json.dumps(prompts))
        tokens = expected(model, processor, images, prompts)
        chat = answer(model, processor, images[0], "What is on the table?")
        (folder / name / "expected.json").write_text(json.dumps({"requests": tokens, "chat": chat}))
        print(family, name, [result["tokens"][:4] for result in tokens[:4]], repr(chat), flush=True)


@torch.no_grad()
def save_stack(family: str, folder: Path) -> None:
    """A tiny model of any family, and what its text stack generates: images are embeddings of their placeholders."""
    torch.manual_seed(0)
    model = vision_language.make_model(family)
    sharpen(model)
    apply_moda(model, MODAConfig(aligner={"rank": 4}, mask={**LENGTH, "learn_base": True}))
    randomise_moda(model)
    model.save_pretrained(folder)
    generator, results = torch.Generator().manual_seed(2), []
    for length in (5, 12, 33, 70):
        prompt = torch.randint(1, vision_language.IMAGE, (1, length), generator=generator)
        prompt[:, length // 4 : length // 2] = vision_language.IMAGE
        types = {"mm_token_type_ids": torch.zeros_like(prompt)} if family.startswith("qwen") else {}
        out = model.generate(
            input_ids=prompt,
            **types,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = torch.stack(out.scores)[:, 0].topk(2).values
        sure = int((best[:, 0] - best[:, 1] > MARGIN).cumprod(0).sum())
        results.append({"prompt": prompt[0].tolist(), "tokens": out.sequences[0, length : length + sure].tolist()})
    (folder / "expected.json").write_text(json.dumps({"requests": results}))
    print(
        family, [result["tokens"][:4] for result in results], [len(result["tokens"]) for result in results], flush=True
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for name in FAMILIES:
        save(name, root / name)
    for name in ALL_FAMILIES.keys() - {"gemma3"} - FAMILIES.keys():
        save_stack(name, root / "stacks" / name)
