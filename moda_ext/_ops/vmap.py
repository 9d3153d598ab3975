"""torch.vmap rules of the native operators.

The dense operators already have a batch dimension, so the mapped dimension is folded into it: one kernel call. A packed
(varlen) call has no batch dimension and is run once per slice. pseudo_score_sink is folded into its heads.
"""

import torch
from torch import Tensor

# Arguments before `num_modalities`, and where the mapped dimension goes: in front of the batch dimension, counted from
# the end because a query with views has one dimension more in front.
_FORWARD_BATCH = (-4, -4, -4, -2, -4, -3)  # query, key, value, key_modality, modality_bias, sink
# grad_out, grad_lse, grad_mass, ..., out, lse, mass, lse_residual
_BACKWARD_BATCH = (-4, -3, -4, *_FORWARD_BATCH, -4, -3, -4, -3)


def _fold(tensor: Tensor | None, mapped: int | None, batch: int, size: int) -> Tensor | None:
    """Merge dimension ``mapped`` (None: repeat ``size`` times) into dimension ``batch`` < 0 of the unmapped tensor."""
    if tensor is None:
        return None
    if mapped is None:
        tensor = tensor.unsqueeze(batch - 1)
        shape = list(tensor.shape)
        shape[batch - 1] = size
        tensor = tensor.expand(shape)
    else:
        tensor = tensor.movedim(mapped, batch - 1)
    tensor = tensor.flatten(batch - 1, batch)
    # Kernels want the last dimension of query, key, value and grad_out contiguous; vmap may have mapped over it.
    return tensor if tensor.stride(-1) == 1 or batch != -4 else tensor.contiguous()


def _fold_all(tensors, in_dims, batches, size):
    return [_fold(t, d, b, size) for t, d, b in zip(tensors, in_dims, batches, strict=False)]


def _unfold(tensor: Tensor, batch: int, size: int) -> Tensor:
    return tensor.unflatten(batch, (size, tensor.shape[batch] // size))


def modular_attention(info, in_dims, *args):
    count = len(_FORWARD_BATCH)
    folded = _fold_all(args, in_dims, _FORWARD_BATCH, info.batch_size)
    results = torch.ops.moda_ext.modular_attention(*folded, *args[count:])
    return tuple(_unfold(result, 0, info.batch_size) for result in results), (0, 0, 0, 0)


def modular_attention_backward(info, in_dims, *args):
    count, size = len(_BACKWARD_BATCH), info.batch_size
    folded = _fold_all(args, in_dims, _BACKWARD_BATCH, size)
    grads = torch.ops.moda_ext.modular_attention_backward(*folded, *args[count:])
    need = args[-5:]
    results, out_dims = [], []
    for grad, batch, needed in zip(grads, (-4, -4, -4, -4, -3), need, strict=True):
        results.append(_unfold(grad, batch, size) if needed else grad)
        out_dims.append(grad.dim() + batch if needed else None)
    return tuple(results), tuple(out_dims)


def _one_by_one(op):
    """The rule that calls ``op`` for every slice, made contiguous, and stacks the results."""

    def select(argument, dim, i):
        return argument if dim is None else argument.select(dim, i).contiguous()

    def rule(info, in_dims, *args):
        slices = [op(*(select(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return results, (0,) * len(results)

    return rule


def pseudo_score_sink(info, in_dims, decay, base, num_rows, length, start):
    size = info.batch_size
    decay, base = _fold_all((decay, base), in_dims, (-1, -1), size)
    return _unfold(torch.ops.moda_ext.pseudo_score_sink(decay, base, num_rows, length, start), 0, size), 0


def pseudo_score_sink_backward(info, in_dims, grad, decay, base, num_rows, length, start):
    size = info.batch_size
    grad, decay, base = _fold_all((grad, decay, base), in_dims, (-2, -1, -1), size)
    grads = torch.ops.moda_ext.pseudo_score_sink_backward(grad, decay, base, num_rows, length, start)
    return tuple(_unfold(g, 0, size) for g in grads), (0, 0)


def modality_gram(info, in_dims, key, modality, *options):
    key, modality = _fold_all((key, modality), in_dims, (-4, -2), info.batch_size)
    return _unfold(torch.ops.moda_ext.modality_gram(key, modality, *options), 0, info.batch_size), 0


def modality_gram_backward(info, in_dims, grad, key, modality, *options):
    grad, key, modality = _fold_all((grad, key, modality), in_dims, (-5, -4, -2), info.batch_size)
    grad_key = torch.ops.moda_ext.modality_gram_backward(grad.contiguous(), key, modality, *options)
    return _unfold(grad_key, 0, info.batch_size), 0


def register() -> None:
    ops = torch.ops.moda_ext
    rules = {
        "modular_attention": modular_attention,
        "modular_attention_backward": modular_attention_backward,
        "modular_attention_varlen": _one_by_one(ops.modular_attention_varlen.default),
        "modular_attention_varlen_backward": _one_by_one(ops.modular_attention_varlen_backward.default),
        "pseudo_score_sink": pseudo_score_sink,
        "pseudo_score_sink_backward": pseudo_score_sink_backward,
        "modality_gram": modality_gram,
        "modality_gram_backward": modality_gram_backward,
    }
    for name in ("causal_gram_projection", "duplex_query_views"):  # sums over the batch make weights' gradients
        for op in (name, f"{name}_backward"):
            rules[op] = _one_by_one(getattr(ops, op).default)
    for op in ("duplex_attention", "duplex_aligned_keys"):
        rules[op] = _one_by_one(getattr(ops, op).default)
    for name, rule in rules.items():
        torch.library.register_vmap(f"moda_ext::{name}", rule)
