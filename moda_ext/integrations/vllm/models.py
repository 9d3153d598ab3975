"""Every family's model class of vLLM, with MODA in its language model.

The classes are made when they are asked for: each costs the import of its family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index

from moda_ext.integrations.settings import FAMILIES, modality_names, token_modalities
from moda_ext.integrations.vllm import ANY_FAMILY
from moda_ext.integrations.vllm.attention import MODALayer, Modalities, convert
from moda_ext.integrations.vllm.metrics import SETTING, AttentionMass, Meter
from moda_ext.integrations.vllm.refusals import check_layer, settings_of

OURS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.moda\.(.+)$")
TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")

if TYPE_CHECKING:

    class _VisionLanguageModel(nn.Module):
        """A vision-language model of vLLM."""

        def get_language_model(self) -> nn.Module: ...

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]: ...
else:
    _VisionLanguageModel = object


class MODAMixin(_VisionLanguageModel):
    """What the classes of this module add to those of vLLM."""

    requires_raw_input_tokens = True  # beside inputs_embeds: token ids say the modality of a token

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, device = vllm_config.model_config.hf_config, vllm_config.device_config.device
        self.moda_settings = settings = settings_of(config)
        self.moda_modalities = Modalities(
            token_modalities(config, settings.modalities),
            config.text_config.vocab_size,
            vllm_config.scheduler_config.max_num_batched_tokens,
            device,
        )
        sums: dict[int, AttentionMass] = {}
        longest = vllm_config.model_config.max_model_len
        self.moda_layers = nn.ModuleDict()  # by layer index
        for index, attention in self._attention_layers():
            moda = MODALayer(settings, attention.num_heads, attention.head_size).to(device)
            self.moda_layers[str(index)] = moda
            if vllm_config.additional_config.get(SETTING):
                heads = attention.num_heads * get_tensor_model_parallel_world_size()
                sums[index] = AttentionMass(settings.num_modalities, heads, device)
            convert(attention, moda, self.moda_modalities, longest, sums.get(index))
        self.moda_meter = Meter(modality_names(settings.modalities), sums) if sums else None

    def _attention_layers(self) -> Iterator[tuple[int, Any]]:
        """Index and module of the layers that get MODA.

        Raises:
            NotImplementedError: a layer cannot have it.
        """
        found = {
            extract_layer_index(module.layer_name): module
            for module in self.get_language_model().modules()
            if isinstance(module, AttentionLayerBase)
        }
        chosen = self.moda_settings.layers
        if chosen is None:  # all with full attention, as in Transformers
            chosen = [index for index, module in found.items() if getattr(module, "sliding_window", None) is None]
        if not chosen or not found.keys() >= set(chosen):
            raise NotImplementedError(
                f"MODA cannot be served here: layers {chosen} should have it, and this model has layers {list(found)}"
            )
        for index in chosen:
            check_layer(found[index], index)
            yield index, found[index]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        self.moda_modalities.set(input_ids)
        # The family's class takes one of both.
        ids = None if inputs_embeds is not None else input_ids
        result = super().forward(ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if self.moda_meter is not None:
            self.moda_meter.publish()
        return result

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the weights of MODA and hands on the others.

        Raises:
            ValueError: there are some for a layer without MODA, or none for one with.
        """
        ours: dict[str, dict[str, Tensor]] = {index: {} for index in self.moda_layers}
        loaded = super().load_weights(self._others(weights, ours))
        unknown = sorted(ours.keys() - self.moda_layers.keys())
        lacking = [index for index, layer in self.moda_layers.items() if layer.state_dict() and not ours[index]]
        if unknown or lacking:
            raise ValueError(
                f"MODA: the checkpoint has weights for layers {unknown} that the settings leave out, and lacks those "
                f"of layers {lacking}"
            )
        for index, layer in self.moda_layers.items():
            assert isinstance(layer, MODALayer), "nothing else is in there"
            layer.load(ours[index])
            loaded |= {f"moda_layers.{index}.{name}" for name in layer.state_dict()}
        return loaded

    def _others(
        self, weights: Iterable[tuple[str, Tensor]], ours: dict[str, dict[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights that are not of MODA, which go to ``ours``, under the names that vLLM knows."""
        # Transformers 5 saves the towers of CLIP and SigLIP without this part of the name.
        tower = hasattr(getattr(self, "vision_tower", None), "vision_model")
        for name, value in weights:
            match = OURS.search(name)
            if match is not None:
                ours.setdefault(match[1], {})[match[2]] = value.clone()  # the file is closed when it is used
            else:
                yield TOWER.sub(r"\1vision_model.", name) if tower else name, value


def _make(name: str, base: type) -> type:
    description = f"{base.__name__} whose language model has MODA."
    return type(name, (MODAMixin, base), {"__module__": __name__, "__doc__": description})


def _make_for_any_family() -> type:
    """On vLLM's Transformers backend, which makes the base model by AutoModel."""
    import transformers
    from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM

    from moda_ext.integrations.vllm.configs import CONFIGS

    for prefix, config in zip(FAMILIES.values(), CONFIGS.values(), strict=True):
        plain = getattr(transformers, f"{prefix}Model")
        members = {"config_class": config, "__module__": plain.__module__}
        transformers.AutoModel.register(config, type(plain.__name__, (plain,), members), exist_ok=True)
    return _make(ANY_FAMILY, TransformersMultiModalForCausalLM)


def __getattr__(name: str) -> type:
    prefix = name.removesuffix("MODAForConditionalGeneration")
    if name == ANY_FAMILY:
        globals()[name] = _make_for_any_family()
    elif prefix != name and prefix in FAMILIES.values():
        registered = ModelRegistry.models[f"{prefix}ForConditionalGeneration"]
        globals()[name] = _make(name, registered.load_model_cls())
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
