"""The small picture of README.md and docs/index.md, made with the layer of moda_ext.demo: its weights are random.

python3 tools/attention_picture.py [--out docs/images/attention.png]
"""

import argparse

import torch

from moda_ext import demo

WORD = "steelblue"
NAMES = {"prior": "with a prior", "prior + pseudo scores": "prior, pseudo scores", demo.ALIGNER: "aligner, trained"}
GREY, TEXT_COLOUR, PICTURE_COLOUR = "0.85", "#0072b2", "#d55e00"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="docs/images/attention.png")
    path = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    tokens = demo.make_tokens()
    layer = demo.Layer(tokens)
    question = slice(tokens.after_start, None)
    (_, trained), _ = demo.train_aligner(layer, question, lambda steps, description: steps)
    plain, prior, pseudo = demo.make_settings(tokens.modality)
    with torch.no_grad():
        shares = {
            NAMES.get(s.name, s.name): layer.attend(s)[2][0, :, question].mean(dim=(0, 1)).tolist()
            for s in (plain, prior, pseudo, trained)
        }
    vision = tokens.modality[0] == demo.VISION
    maps = [100 * layer.attention_of_rows(s, [tokens.row_of(WORD)])[0, vision] for s in (plain, prior)]

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.4), width_ratios=[1, 1, 1, 1.6], layout="constrained")
    square = {"extent": (0, demo.GRID, demo.GRID, 0)}
    axes[0].imshow(tokens.photo.numpy(), **square)
    axes[0].set_title(f"a photograph in\n{demo.GRID} x {demo.GRID} patches", fontsize=8)
    top = torch.cat(maps).quantile(0.995).item()
    grey = (0.5 + 0.5 * tokens.photo.mean(dim=-1, keepdim=True)).expand(-1, -1, 3)
    for axis, weight, name in zip(axes[1:3], maps, ("plain", "prior"), strict=True):
        axis.imshow(grey.numpy(), **square)
        opacity = (weight / top).clamp(0, 1).sqrt().view(demo.GRID, demo.GRID).numpy()
        shown = weight.view(demo.GRID, demo.GRID).numpy()
        axis.imshow(shown, cmap="YlOrRd", vmin=0, vmax=top, alpha=opacity, **square)
        axis.set_title(f"“{WORD}” looks here,\n{name}: {weight.sum():.0f} %", fontsize=8)
    for axis in axes[:3]:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)

    bars, labels = axes[3], list(shares)
    text, picture = (100 * torch.tensor([share[m] for share in shares.values()]) for m in (demo.TEXT, demo.VISION))
    bars.barh(labels, picture, color=PICTURE_COLOUR, label="picture")
    bars.barh(labels, text, left=picture, color=TEXT_COLOUR, label="text")
    bars.barh(labels, 100 - text - picture, left=text + picture, color=GREY, label="no token")
    for line, share in enumerate(picture):
        bars.text(share.item() - 1, line, f"{share:.0f} %", color="white", ha="right", va="center")
    bars.invert_yaxis()
    bars.set(xlim=(0, 100), title="the question's attention, %")
    bars.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncol=3, frameon=False)
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)  # a third of the bytes
    print(path)


if __name__ == "__main__":
    main()
