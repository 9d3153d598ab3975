"""MODA in a vision-language model of Hugging Face: nothing moves at first, then a prior moves attention to the image.

python examples/replace_attention.py                                          a tiny random model
python examples/replace_attention.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?"
"""

import argparse

import torch
from PIL import Image

from moda_ext.diagnostics import load_model
from moda_ext.integrations.transformers import MODAConfig, apply_moda, check_identity, recording


def image_share(model, inputs: dict) -> float:
    """The share of its attention that the last token of the prompt gives to the image, mean over layers and heads."""
    shares = []
    with torch.no_grad(), recording(model, lambda record: shares.append(record.mass[0, :, -1, 1].mean())):
        model(**inputs, use_cache=False)
    return torch.stack(shares).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="checkpoint directory or hub id")
    parser.add_argument("--image", help="a file; a blue square without")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--prior", type=float, default=1.0, help="added to the scores of text rows with image keys")
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    model, processor = load_model(args.model)
    image = Image.open(args.image).convert("RGB") if args.image else Image.new("RGB", (112, 112), "steelblue")
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device, model.dtype)

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
        return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    plain, share = answer(), image_share(model, inputs)
    apply_moda(model, MODAConfig())
    moved = check_identity(model, inputs)
    print(f"MODA attached: logits differ by {moved:.1e} of the largest one, answers are equal: {answer() == plain}")

    with torch.no_grad():  # what training would do; for a prior alone see MODAConfig.fixed_prior
        for name, parameter in model.named_parameters():
            if name.endswith(".moda.mask.prior"):
                parameter[:, 0, 1] = args.prior
    print(f"attention on the image: {100 * share:.1f} %, with the prior {100 * image_share(model, inputs):.1f} %")
    print(f"answer: {plain!r}\nwith the prior: {answer()!r}")


if __name__ == "__main__":
    main()
