"""Modular duplex attention as an attention backend of vLLM, and how it gets into a layer that vLLM has made.

Keys, values and the modality of every token lie in the layer's pages: a cell, one token of one key head, is
[key D | value D | modality | unused]. So whatever vLLM does with pages (shared prefixes, preemption, drafts taken back,
copies) needs nothing of ours. There is no other state: the Gram of the aligner is made of the keys in the pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from moda_ext._ops.limits import HEAD_SIZE_STEP, MAX_HEAD_SIZE
from moda_ext.integrations.settings import PSEUDO_SCORES_ARE_OFF, MODAConfig
from moda_ext.integrations.vllm import BACKEND
from moda_ext.integrations.vllm.metrics import AttentionMass
from moda_ext.nn.paged import PagedAttention, Pages, Rows

__all__ = ["MODABackend", "MODALayer", "Modalities", "convert"]

TAIL_BYTES = 16  # of a cell behind key and value: the modality, and what keeps the next cell aligned


class MODALayer(nn.Module):
    """Aligner and mask of one layer, those of the heads of this tensor-parallel rank.

    Args:
        config: the settings.
        num_heads: Hq of this rank.
        head_dim: D.
    """

    def __init__(self, config: MODAConfig, num_heads: int, head_dim: int):
        super().__init__()
        with torch.device("cpu"):  # also where vLLM makes a model on the meta device: the mask checks its values
            self.aligner = config.make_aligner(head_dim)
            self.mask = config.make_mask(num_heads * get_tensor_model_parallel_world_size())
        if self.mask is not None:  # settings may have a value for each of all heads, so they are made for all
            for tensor in self.mask.state_dict(keep_vars=True).values():
                tensor.data = _own_heads(tensor.data)
            self.mask.num_heads = num_heads
        self.requires_grad_(False)
        self.num_modalities = config.num_modalities
        self._prepared: PagedAttention | None = None

    def attention(self, scale: float, dtype: torch.dtype, max_positions: int) -> PagedAttention:
        """Made of the weights when it is first asked for, and again when others are loaded."""
        if self._prepared is None:
            terms = self.aligner, self.mask, self.num_modalities
            self._prepared = PagedAttention(*terms, scale, dtype, max_positions)
        return self._prepared

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copies the weights of a checkpoint, which are those of all heads.

        Raises:
            RuntimeError: one is missing, unknown, or of another shape.
            ValueError: they have pseudo scores, which the settings switch off.
            NotImplementedError: vLLM reloads weights in place, and would put these old ones back.
        """
        if any(tensor.is_meta for tensor in self.state_dict().values()):
            raise NotImplementedError(
                "MODA: aligner and mask cannot be reloaded in place (reload_weights, sleep level 2); start the engine "
                "anew with the new checkpoint"
            )
        if self.mask is not None and self.mask.is_off_unlike(weights, "mask."):
            raise ValueError(f"MODA: {PSEUDO_SCORES_ARE_OFF}")
        own = {name: _own_heads(value) if name.startswith("mask.") else value for name, value in weights.items()}
        self.load_state_dict(own)
        self._prepared = None


def _own_heads(tensor: Tensor) -> Tensor:
    """What is this rank's of a tensor of the mask, which all have the heads first."""
    return tensor.chunk(get_tensor_model_parallel_world_size())[get_tensor_model_parallel_rank()].clone()


class Modalities:
    """The modality of every token of the step that runs. The model writes it, its layers read it.

    One tensor for the life of the model, so a CUDA graph may hold it.

    Args:
        of_token: {token id: modality}; every other token is text, 0.
        vocabulary: how many token ids there are.
        max_tokens: the most tokens of a step.
        device: of the model.
    """

    def __init__(self, of_token: dict[int, int], vocabulary: int, max_tokens: int, device: torch.device):
        self.table = torch.zeros(max(vocabulary, *of_token) + 1, dtype=torch.int32, device=device)
        for token, modality in of_token.items():
            self.table[token] = modality
        self.current = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def set(self, input_ids: Tensor) -> None:
        """input_ids: (T,), integer, padding at the end included."""
        torch.index_select(self.table, 0, input_ids.clamp(0, len(self.table) - 1), out=self.current[: len(input_ids)])


@dataclass
class MODAMetadata(AttentionMetadata):
    """Of one step: the pages, without their cache, and the cells of its tokens."""

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    slot_mapping: Tensor
    rows: Rows | None = None  # made by the first layer, for all

    def of_rows(self, count: int, modalities: Modalities) -> Rows:
        """The step's tokens."""
        if self.rows is None or len(self.rows.modality) != count:
            slots = self.slot_mapping  # of all tokens, or without those that pad the step
            slots = slots[:count] if len(slots) >= count else pad(slots, (0, count - len(slots)), value=-1)
            self.rows = Rows(modalities.current[:count], slots)
        return self.rows

    def pages(self, kv_cache: Tensor) -> Pages:
        return Pages(
            kv_cache, self.block_table, self.seq_lens, self.query_start_loc, self.max_query_len, self.max_seq_len
        )


class MODAMetadataBuilder(AttentionMetadataBuilder[MODAMetadata]):
    """Takes what vLLM has of a step as it is."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MODAMetadata:
        of_step = common_attn_metadata
        if of_step.causal is not True:
            raise NotImplementedError("attention with MODA is causal, and this step is not")
        return MODAMetadata(
            of_step.block_table_tensor,
            of_step.seq_lens,
            of_step.query_start_loc,
            of_step.max_query_len,
            of_step.max_seq_len,
            of_step.slot_mapping,
        )


class MODABackend(AttentionBackend):
    """The attention backend "MODA" of vLLM."""

    forward_includes_kv_cache_update = True  # a call of the engine's less for each layer
    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[MODAImpl]:
        return MODAImpl

    @staticmethod
    def get_builder_cls() -> type[MODAMetadataBuilder]:
        return MODAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(HEAD_SIZE_STEP, MAX_HEAD_SIZE + 1, HEAD_SIZE_STEP))

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if spec.state_content_bytes is not None:  # vLLM asks again with what it got
            return spec
        return replace(spec, state_content_bytes=spec.state_content_size_bytes + TAIL_BYTES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class MODAImpl(AttentionImpl[MODAMetadata]):
    """The attention of one layer.

    Args:
        num_heads, head_size, scale, num_kv_heads: Hq, D, the factor of the scores, Hkv, of this rank.
        moda: aligner and mask.
        modalities: of the tokens of the step.
        max_positions: the most tokens of a sequence.
        mass: where the layer's attention mass is summed up, None for nowhere.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        moda: MODALayer,
        modalities: Modalities,
        max_positions: int,
        mass: AttentionMass | None,
    ):
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.moda, self.modalities, self.max_positions, self.mass = moda, modalities, max_positions, mass

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: MODAMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention with MODA has no quantised output")
        if attn_metadata is None:  # profiling
            return output.zero_()
        attention = self.moda.attention(self.scale, query.dtype, self.max_positions)
        rows = attn_metadata.of_rows(query.shape[0], self.modalities)
        _, mass = attention(query, key, value, rows, attn_metadata.pages(kv_cache), output)
        if self.mass is not None:
            self.mass.add(mass, rows.modality, attn_metadata.query_start_loc[-1])
        return output


def convert(
    attention: Attention, moda: MODALayer, modalities: Modalities, max_positions: int, mass: AttentionMass | None
) -> None:
    """Turns an attention layer that a model of vLLM has made into one with MODA, in place: its name, its place in
    vLLM's tables and its callers stay. What it cannot do must have been refused."""
    attention.attn_backend = MODABackend
    attention.backend = AttentionBackendEnum[BACKEND]
    attention.impl = MODAImpl(
        attention.num_heads,
        attention.head_size,
        float(attention.impl.scale),
        attention.num_kv_heads,
        moda,
        modalities,
        max_positions,
        mass,
    )
