"""Trains MODA alone, the model frozen, then saves it to one small file and loads it into a fresh model.

python examples/finetune.py                                            a tiny random model and coloured squares
python examples/finetune.py --model llava-hf/llava-1.5-7b-hf --data pairs.jsonl --steps 200

Each line of the data is {"image": "photo.jpg", "question": "...", "answer": "..."}.
"""

import argparse
import json

import torch
from PIL import Image

from moda_ext.diagnostics import load_model
from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    check_identity,
    load_moda,
    optimizer_groups,
    save_moda,
    train_only_moda,
)

SQUARES = [("What colour is it?", colour, Image.new("RGB", (112, 112), colour)) for colour in ("red", "green", "blue")]


def read(path: str) -> list:
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    return [(line["question"], line["answer"], Image.open(line["image"]).convert("RGB")) for line in lines]


def encode(model, processor, question: str, answer: str, image) -> dict:
    """The inputs of one example, with labels on the answer only."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    length = processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"].shape[1]
    inputs = processor(images=[image], text=[prompt + answer], return_tensors="pt").to(model.device, model.dtype)
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    return {**inputs, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="checkpoint directory or hub id")
    parser.add_argument("--data", help="a .jsonl file; coloured squares without")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the aligners' low-rank maps")
    parser.add_argument("--fast-lr", type=float, default=1e-2, help="of priors and conditions, which start at 0")
    parser.add_argument("--out", default="moda.safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)

    model, processor = load_model(args.model)
    apply_moda(model, MODAConfig())
    examples = [encode(model, processor, *example) for example in (read(args.data) if args.data else SQUARES)]
    check_identity(model, {name: value for name, value in examples[0].items() if name != "labels"})
    parameters = train_only_moda(model)
    print(f"training {sum(p.numel() for p in parameters):,} of {sum(p.numel() for p in model.parameters()):,} numbers")

    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=args.lr, fast_lr=args.fast_lr))
    for step in range(args.steps):
        loss = model(**examples[step % len(examples)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step < len(examples) or step >= args.steps - len(examples):  # the first and the last time of each example
            print(f"step {step:4}  loss {loss.item():.3f}")

    save_moda(model, args.out)
    fresh, _ = load_model(args.model)
    load_moda(fresh, args.out)
    with torch.no_grad():
        same = torch.equal(fresh(**examples[0]).logits, model(**examples[0]).logits)
    print(f"{args.out}: loaded into a fresh model, the logits are {'the same' if same else 'OTHERS'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
