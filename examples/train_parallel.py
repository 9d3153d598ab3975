"""Trains MODA, the model frozen, on one device or many: the same script, and the same losses, whatever holds the model.

python examples/train_parallel.py                                             a tiny random model and coloured squares
torchrun --nproc-per-node 4 examples/train_parallel.py --tp 2 --cp 2 --fsdp
torchrun --nproc-per-node 8 examples/train_parallel.py --model llava-hf/llava-1.5-7b-hf --data pairs.jsonl --cp 8 --fsdp

Of W processes each --tp share the heads of a layer, each --cp of the others share a sequence, and the rest have batches
of their own. With --fsdp the weights are spread over all but the --tp. Which to take: docs/distributed.md.
"""

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.distributed import DistributedConfig

from moda_ext.diagnostics import load_model
from moda_ext.integrations.transformers import (
    MODAConfig,
    context_parallel,
    optimizer_groups,
    save_moda,
    train_only_moda,
)

SQUARES = [
    ("What colour is it?", colour, Image.new("RGB", (112, 112), colour))
    for colour in ("red", "green", "blue", "yellow")
]


def load(name: str, tp: int, sharded: int, device: str):
    """The model with new MODA, split over ``tp`` processes and sharded over ``sharded``, and its processor."""
    with tempfile.TemporaryDirectory() as own:
        if name == "random":
            folder = [own]
            dist.broadcast_object_list(folder)  # of the first process, which saves
            (name,) = folder
            for part in load_model("random", device="cpu"):
                part.save_pretrained(name)
            dist.barrier()
        config = AutoConfig.from_pretrained(name)
        config.text_config.moda = MODAConfig().to_dict()
        parallel = {"distributed_config": DistributedConfig(tp_size=tp, fsdp_size=sharded)} if tp * sharded > 1 else {}
        model = AutoModelForImageTextToText.from_pretrained(name, config=config, attn_implementation="moda", **parallel)
        processor = AutoProcessor.from_pretrained(name)
        dist.barrier()  # before the folder is gone
    return (model if parallel else model.to(device)), processor


def encode(model, processor, question: str, answer: str, image, multiple: int) -> dict:
    """The inputs of one example, with labels on the answer only, padded to a multiple of tokens."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    length = processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"].shape[1]
    padding = {"padding": True, "pad_to_multiple_of": multiple}
    inputs = processor(images=[image], text=[prompt + answer], return_tensors="pt", padding_side="right", **padding)
    inputs = inputs.to(model.device, model.dtype)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :length] = -100
    return {**inputs, "labels": labels}


def read(path: str) -> list:
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    return [(line["question"], line["answer"], Image.open(line["image"]).convert("RGB")) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="checkpoint directory or hub id")
    parser.add_argument("--data", help="a .jsonl file of image, question, answer; coloured squares without")
    parser.add_argument("--tp", type=int, default=1, help="processes that share the heads (default: 1)")
    parser.add_argument("--cp", type=int, default=1, help="processes that share a sequence (default: 1)")
    parser.add_argument("--fsdp", action="store_true", help="spread the weights too")
    parser.add_argument("--batch", type=int, default=4, help="examples of a step, of all processes (default: 4)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the aligners' low-rank maps")
    parser.add_argument("--fast-lr", type=float, default=1e-2, help="of priors and conditions, which start at 0")
    parser.add_argument("--out", type=Path, default=Path("moda.safetensors"))
    args = parser.parse_args()

    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world % (args.tp * args.cp) or args.batch % (world // (args.tp * args.cp)):
        parser.error(f"--tp times --cp must divide the {world} processes, and what is left of them --batch")
    if 1 < args.tp < world and not args.fsdp:
        parser.error("--tp of some of the processes needs --fsdp: Transformers has no mesh with others in it")
    replicas = world // (args.tp * args.cp)
    if world == 1:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device, (replicas, args.cp, args.tp), mesh_dim_names=("dp", "cp", "tp"))
    seen_apart = mesh["dp", "cp"]._flatten("seen_apart").get_group()  # its processes see different tokens
    torch.manual_seed(0)

    model, processor = load(args.model, args.tp, replicas * args.cp if args.fsdp else 1, device)
    parameters = train_only_moda(model)
    raw = read(args.data) if args.data else SQUARES
    examples = [encode(model, processor, *example, multiple=2 * args.cp) for example in raw]
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=args.lr, fast_lr=args.fast_lr))
    share = args.batch // replicas  # examples of this process in a step
    for step in range(args.steps):
        total = torch.zeros((), device=device)
        with context_parallel(model, mesh["cp"]) if args.cp > 1 else contextlib.nullcontext():
            for i in range(share):
                at = step * args.batch + mesh["dp"].get_local_rank() * share + i
                loss = model(**examples[at % len(examples)]).loss / share
                loss.backward()
                total += loss.detach()
        # The mean over the processes is the loss, and that of the gradients the gradient.
        for tensor in (total, *(p.grad for p in parameters if p.grad is not None and not args.fsdp)):
            dist.all_reduce(tensor, group=seen_apart)
            tensor /= seen_apart.size()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step:4}  loss {total.item():.6f}", flush=True)
    save_moda(model, args.out)  # every process calls it
    if rank == 0:
        print(f"saved {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
