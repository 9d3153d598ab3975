"""Does a model starve its image tokens? Measured while it answers, beside what uniform attention would give.

python examples/diagnose.py                                            a tiny random model
python examples/diagnose.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?"

MDI: the weight of a text token over that of an image token, seen from generated tokens; 1 is balanced. `moda-ext
diagnose` writes a report with more figures.
"""

import argparse

import torch
from PIL import Image

from moda_ext.diagnostics import AttentionMeter, Diagnosis, load_model
from moda_ext.integrations.transformers import MODAConfig, apply_moda


def measure(model, inputs: dict, new_tokens: int) -> Diagnosis:
    with torch.no_grad(), AttentionMeter(model) as meter:
        model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    return meter.result()


def show(name: str, diagnosis: Diagnosis) -> None:
    mdi, null = (diagnosis.thirds("mdi", null=uniform)[:, 1] for uniform in (False, True))
    cells = "".join(f"{value:10.2f} ({uniform:.2f})" for value, uniform in zip(mdi, null, strict=True))
    print(f"{name:16}{cells}{100 * diagnosis.mass(rows='generated')[:, 0, 1].mean():12.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="checkpoint directory or hub id")
    parser.add_argument("--image", help="a file; a blue square without")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--prior", type=float, default=1.0, help="measured too: a fixed prior on image keys")
    args = parser.parse_args()

    model, processor = load_model(args.model)
    image = Image.open(args.image).convert("RGB") if args.image else Image.new("RGB", (112, 112), "steelblue")
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device, model.dtype)

    print("MDI as generated tokens see their prompt, in layers that are (uniform attention in parentheses)")
    print(f"{'':16}{'early':>17}{'middle':>17}{'late':>17}{'on the image':>14}")
    plain = measure(model, inputs, args.new_tokens)
    show("the model", plain)
    apply_moda(model, MODAConfig.fixed_prior([[0.0, args.prior], [0.0, 0.0]]))
    show(f"prior of {args.prior}", measure(model, inputs, args.new_tokens))
    for sentence in plain.undefined():
        print(f"note: {sentence}")


if __name__ == "__main__":
    main()
