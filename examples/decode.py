"""The complete attention layer, decoding with a state: a prompt, then token by token, then back and another way.

python examples/decode.py
python examples/decode.py --embed-dim 4096 --heads 32 --kv-heads 8 --image-tokens 2880 --new-tokens 32
"""

import argparse
import math
import time

import torch

from moda_ext.attention import AttentionState, ModularDuplexAttention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    # base=-inf: no pseudo scores, so a new layer is plain attention. Random numbers stand for training.
    layer = ModularDuplexAttention(args.embed_dim, args.heads, args.kv_heads, mask={"base": -math.inf}).to(args.device)
    with torch.no_grad():
        torch.nn.init.normal_(layer.aligner.b2, std=0.1)
        torch.nn.init.normal_(layer.mask.prior, std=0.5)
    ids = [0] * 32 + [1] * args.image_tokens + [0] * 32 + [0] * args.new_tokens  # text, image, question, answer
    modality = torch.tensor([ids], device=args.device)
    tokens = torch.randn(1, len(ids), args.embed_dim, device=args.device)
    prompt = len(ids) - args.new_tokens

    with torch.no_grad():
        whole, mass = layer(tokens, modality, return_mass=True)

        state = AttentionState()
        start = time.perf_counter()
        layer(tokens[:, :prompt], modality[:, :prompt], state=state)
        read = time.perf_counter()
        steps = [layer(tokens[:, i : i + 1], modality[:, i : i + 1], state=state) for i in range(prompt, len(ids))]
        end = time.perf_counter()
        difference = (torch.cat(steps, dim=1) - whole[:, prompt:]).abs().max() / whole.abs().max()

        shorter = state.crop(prompt)  # drafts are taken back; the old state stays as it is
        beams = shorter.reorder(torch.tensor([0, 0, 0], device=args.device))  # three ways to go on
        first = slice(prompt, prompt + 1)
        again = layer(tokens[:, first].expand(3, -1, -1), modality[:, first].expand(3, -1), state=beams)

    per_token = 1e3 * (end - read) / args.new_tokens
    print(f"prompt of {prompt} tokens: {1e3 * (read - start):.1f} ms, each new token: {per_token:.2f} ms")
    print(f"answer rows: {100 * mass[0, :, prompt:, 1].mean():.0f} % of their attention goes to the image")
    print(f"decoding and one pass differ by {difference:.1e} of the largest number")
    print(f"after going back, the first token differs by {(again - whole[:, first]).abs().max():.1e}")
    if not difference < 1e-4:
        raise SystemExit("decoding does not agree with one pass")


if __name__ == "__main__":
    main()
