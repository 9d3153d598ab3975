"""Duplex attention alignment: the Gram matrix of every modality's keys, and queries seen through it.

Each function checks its arguments, brings them to the form the operators take and calls the native operator, or
:mod:`moda_ext.reference` when the native library is not built.
"""

from torch import Tensor

from moda_ext import reference

__all__ = ["causal_gram_projection", "duplex_query_views", "modality_gram", "project_queries"]


def modality_gram(
    key: Tensor,
    modality: Tensor,
    num_modalities: int = 2,
    *,
    include: Tensor | None = None,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
) -> Tensor:
    return reference.modality_gram(
        key, modality, num_modalities, include=include, key_norm=key_norm, normalize=normalize, eps=eps
    )


def project_queries(query: Tensor, gram: Tensor) -> Tensor:
    return reference.project_queries(query, gram)


def causal_gram_projection(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int = 2,
    *,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
):
    return reference.causal_gram_projection(
        query,
        key,
        query_modality,
        key_modality,
        num_modalities,
        key_norm=key_norm,
        normalize=normalize,
        eps=eps,
        state=state,
        return_state=return_state,
    )


def duplex_query_views(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    *,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_indicator: bool = False,
    return_state: bool = False,
):
    return reference.duplex_query_views(
        query,
        key,
        query_modality,
        key_modality,
        a1,
        b1,
        a2,
        b2,
        num_modalities,
        key_norm=key_norm,
        normalize=normalize,
        eps=eps,
        state=state,
        return_indicator=return_indicator,
        return_state=return_state,
    )
