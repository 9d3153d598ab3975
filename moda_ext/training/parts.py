"""Which parameter belongs to which part of a vision-language model, and how fast each part is trained."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

import moda_ext.integrations.transformers as integration
from moda_ext.training.recipe import Stage

__all__ = ["optimizer_groups", "part_of", "prepare"]

# The names of the families' modules, the inner ones first: a merger is inside of Qwen's tower.
NAMES = {
    "moda": {"moda"},
    "projector": {
        "multi_modal_projector",
        "connector",
        "merger",
        "deepstack_merger_list",
        "image_newline",  # a parameter of LLaVA-NeXT beside the projector
    },
    "vision": {"vision_tower", "visual", "vision_model"},
}
TARGETED = r".*(language_model|text_model)\..*\.({names})"  # modules of the language model, by the ends of their names


def part_of(name: str) -> str:
    """``"moda"``, ``"projector"``, ``"vision"`` or ``"text"``: where a parameter or a module is, by its name."""
    places = set(name.split("."))
    return next((part for part, names in NAMES.items() if places & names), "text")


def prepare(model: Any, stage: Stage) -> Any:
    """The model with the parameters that a stage trains in float32, and all others frozen.

    Args:
        model: of one of the families.
        stage: what to train. Low-rank updates are on the language model alone.

    Returns:
        ``model``, or PEFT's around it.

    Raises:
        ValueError: a part that the model does not have, or a target of ``lora`` that its language model does not have.
        ImportError: peft is not installed, and the stage has ``lora``.
    """
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith(".moda") and "moda" in stage.train:
            module.float()  # with its buffers
    if stage.lora is not None:
        import peft

        check_targets(model, stage)
        names = "|".join(map(re.escape, stage.lora.target_modules))
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=stage.lora.r,
                lora_alpha=stage.lora.alpha,
                lora_dropout=stage.lora.dropout,
                target_modules=TARGETED.format(names=names),
                modules_to_save=["moda"] if "moda" in stage.train else None,
            ),
        )
    found = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part in stage.train and ".original_module." not in name and not (part == "moda" and stage.lora):
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            found.add(part)
            parameter.data = parameter.data.to(torch.float32)
    missing = [part for part in stage.train if part not in found]
    if missing:
        raise ValueError(f"stage {stage.name}: the model has no {', '.join(missing)} to train")
    return model


def check_targets(model: nn.Module, stage: Stage) -> None:
    """PEFT says nothing where some of several targets are not there.

    Raises:
        ValueError: the language model has no module of such a name.
    """
    assert stage.lora is not None, "asked for where there are targets"
    for target in stage.lora.target_modules:
        pattern = re.compile(TARGETED.format(names=re.escape(target)))
        if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
            raise ValueError(
                f"stage {stage.name}: no layer of the language model has a {target!r}, which lora.target_modules names"
            )


def optimizer_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Groups named ``"text"``, ``"vision"``, ``"projector"``, ``"moda"`` and ``"moda_fast"``, those with parameters."""
    rates = {
        "text": stage.lr,
        "vision": stage.vision_lr,
        "projector": stage.lr if stage.projector_lr is None else stage.projector_lr,
    }
    groups = integration.optimizer_groups(
        model, stage.lr, moda_lr=stage.moda_lr, fast_lr=stage.fast_lr, weight_decay=stage.weight_decay
    )
    own = {id(p) for group in groups if group["name"] == "model" for p in group["params"]}
    result = []
    for part, lr in rates.items():
        parameters = [p for name, p in model.named_parameters() if id(p) in own and part_of(name) == part]
        if parameters:
            result.append({"name": part, "params": parameters, "lr": lr, "weight_decay": stage.weight_decay})
    return result + [group for group in groups if group["name"] != "model"]
