"""What cannot be served, each with the reason: refused while vLLM starts, never at the first wrong token."""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.v1.attention.backend import AttentionType

from moda_ext._ops.limits import MAX_RANK
from moda_ext.integrations.settings import SUFFIX, MODAConfig
from moda_ext.integrations.vllm.attention import MODABackend
from moda_ext.integrations.vllm.metrics import SETTING, missing_directory

__all__ = ["Refusals", "check_layer", "settings_of"]


def settings_of(config: Any) -> MODAConfig:
    """The settings in a model's config.

    Raises:
        NotImplementedError: there are none.
    """
    settings = getattr(config.text_config, "moda", None)
    if settings is None:
        raise NotImplementedError(f"MODA: the config of this {config.model_type} has no settings (text_config.moda)")
    return MODAConfig.from_dict(settings)


class Refusals(VerifyAndUpdateConfig):
    """What vLLM asks about the config of a model with MODA, before it starts any process."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """
        Raises:
            NotImplementedError: not a ValueError, which pydantic would wrap.
        """
        model = vllm_config.model_config
        settings = settings_of(model.hf_config)
        reasons = [*_of_settings(settings, model.get_head_size()), *_of_model(model), *_of_engine(vllm_config)]
        if reasons:
            raise NotImplementedError("MODA cannot be served here: " + "; ".join(reasons))


def _of_settings(settings: MODAConfig, head_size: int) -> list[str]:
    reasons = []
    if settings.mode == "release":
        reasons.append("mode='release' aligns a prompt as a whole, and vLLM gives it to a layer in pieces")
    if settings.aligner is not None:
        rank = settings.aligner.get("rank", 16)
        if settings.aligner.get("fusion", "concat") == "add":
            rank, why = max(rank, head_size), f"fusion 'add' has the rank of the head size, {head_size}"
        else:
            why = f"the aligner has rank {rank}"
        if rank > MAX_RANK:
            reasons.append(f"{why}, and the operators take up to {MAX_RANK}")
    return reasons


def _of_model(model: Any) -> list[str]:
    reasons = []
    if model.hf_config.model_type == "gemma3" + SUFFIX:
        reasons.append(
            "the image tokens of Gemma 3 see each other in both directions, and attention on pages is causal"
        )
    if model.runner_type != "generate":
        reasons.append(f"models are served for generation, not with runner {model.runner_type!r}")
    if model.enable_prompt_embeds:
        reasons.append("prompt_embeds have no token ids, which say the modality of a token")
    if not MODABackend.supports_head_size(model.get_head_size()):
        reasons.append(f"the operators take head sizes in multiples of 8 up to 256, this is {model.get_head_size()}")
    if not MODABackend.supports_dtype(model.dtype):
        reasons.append(f"the operators take float32, bfloat16 and float16 here, not {model.dtype}")
    return reasons


def _of_engine(vllm_config: VllmConfig) -> list[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    reasons = []
    if parallel.pipeline_parallel_size > 1:
        reasons.append("with pipeline parallelism the later ranks get no token ids, which say the modality of a token")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        reasons.append(
            "context parallelism splits the keys of a sequence, and the aligner's Gram is made of all of them"
        )
    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        reasons.append(
            "a graph of the whole model would write the modalities of a step after its layers have read them"
        )
    if parallel.use_ubatching:
        reasons.append("two batches at once (DBO) would share one tensor of modalities")
    own = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", own):
        reasons.append(f"the KV cache holds keys in the model's dtype {own}, not as {cache.cache_dtype}")
    if cache.kv_sharing_fast_prefill:
        reasons.append("kv_sharing_fast_prefill leaves out rows whose modalities the pages need")
    if not MODABackend.supports_block_size(cache.block_size):
        reasons.append(f"blocks hold a multiple of 16 tokens, not {cache.block_size}")
    if vllm_config.lora_config is not None:
        reasons.append(
            "LoRA adapters that were trained with MODA may hold parameters of MODA, which vLLM leaves out: merge them "
            "(merge_and_unload of PEFT, then save_pretrained)"
        )
    if (vllm_config.kv_transfer_config or vllm_config.ec_transfer_config or cache.kv_offloading_size) is not None:
        reasons.append("connectors and offloading that carry pages elsewhere are untried with pages of modalities too")
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method != "ngram":
        reasons.append(f"of the methods of speculation, ngram is tested, not {speculation.method}")
    if vllm_config.additional_config.get(SETTING) and (reason := missing_directory()):
        reasons.append(reason)
    return reasons


def check_layer(attention: Attention, index: int) -> None:
    """Raises NotImplementedError where a layer of a model does what attention with MODA does not."""
    impl, why = attention.impl, None
    if type(attention) is not Attention or attention.attn_type != AttentionType.DECODER:
        why = f"is {type(attention).__name__} of type {attention.attn_type!r}, no plain attention of a decoder"
    elif attention.sliding_window is not None:
        why = "has a sliding window, and the Gram of a window would have to forget"
    elif getattr(impl, "alibi_slopes", None) is not None:
        why = "has ALiBi"
    elif getattr(impl, "logits_soft_cap", None):
        why = "has a soft cap on its scores"
    elif attention.has_sink:
        why = "has sinks of its own"
    elif attention.kv_sharing_target_layer_name is not None:
        why = f"has no keys of its own but those of {attention.kv_sharing_target_layer_name}"
    elif attention.head_size_v != attention.head_size:
        why = f"has values of size {attention.head_size_v} and keys of size {attention.head_size}"
    elif attention.kv_cache_torch_dtype != attention.dtype:
        why = f"has its keys in {attention.kv_cache_dtype}, not in the model's dtype {attention.dtype}"
    if why is not None:
        raise NotImplementedError(f"MODA cannot be served here: layer {index} {why}")
