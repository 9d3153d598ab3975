"""A tiny random Llava with its processor, to try the diagnosis where no checkpoint is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

IMAGE_SIZE, PATCH_SIZE = 112, 14  # 8 x 8 patches


def tiny_llava(layers: int = 4, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """``(model, processor)``: a Llava of random weights, 0.2 million, and a processor that spells text in bytes.

    Both can be saved with ``save_pretrained`` and are then a checkpoint directory like any other.

    Args:
        layers: layers of the text stack.
        seed: of the weights.

    Raises:
        ImportError: transformers, tokenizers or pillow is not installed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<pad>", "<s>", "</s>", "<image>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelling = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=(
            "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
            "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
            "{% if message.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=IMAGE_SIZE,
                    patch_size=PATCH_SIZE,
                ),
                text_config=LlamaConfig(
                    vocab_size=len(letters),
                    hidden_size=64,
                    intermediate_size=64,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                ),
                image_token_index=letters.index("<image>"),
                image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
            )
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.data.mul_(8)  # as made, random weights attend uniformly
    return model.eval(), processor
