"""MODA in vLLM: serves what ``save_pretrained`` wrote of a model with MODA.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes, so that
``vllm.LLM("llava-moda")`` works where moda_ext is installed. ``moda-ext serve`` starts the server. Needs the extra
``moda_ext[vllm]``; ``moda_ext.integrations.transformers`` has no part in it, which wants a newer Transformers.
"""

import logging

from moda_ext.integrations.settings import FAMILIES
from moda_ext.integrations.vllm.versions import unsupported_vllm

__all__ = ["architectures", "register"]

logger = logging.getLogger(__name__)

BACKEND = "MODA"  # the name of the attention backend in vLLM
ANY_FAMILY = "TransformersMODAForConditionalGeneration"  # on vLLM's Transformers backend


def architectures() -> list[str]:
    """The names of the model classes, as ``architectures`` of a model's config has them."""
    return [*(f"{prefix}MODAForConditionalGeneration" for prefix in FAMILIES.values()), ANY_FAMILY]


def register() -> None:
    """Makes the ``..._moda`` model types, their classes and the attention backend known to vLLM.

    Under a vLLM that is not supported it does nothing but say so: other models are none of its business.
    """
    reason = unsupported_vllm()
    if reason is not None:
        logger.warning("models with MODA cannot be served: %s", reason)
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from moda_ext.integrations.vllm.configs import CONFIGS
    from moda_ext.integrations.vllm.refusals import Refusals

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, "moda_ext.integrations.vllm.attention.MODABackend")
    for model_type, config in CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    for name in architectures():
        ModelRegistry.register_model(name, f"moda_ext.integrations.vllm.models:{name}")  # imported when one is served
        MODELS_CONFIG_MAP[name] = Refusals
