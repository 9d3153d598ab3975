"""Gradients of the native operators; each backward pass is an operator of its own.

Every operator is bound twice. ``torch.library.register_autograd`` serves plain autograd, in eager mode as under
torch.compile and torch.export, and direct callers of ``torch.ops.moda_ext``. It fails under torch.func transforms and
gives zero tangents in forward mode; there the package calls the operator through a ``torch.autograd.Function``, which
composes with the former and refuses the latter. (Always taking that way costs 100 us per call, and keeps torch.compile
from caching graphs across processes.)
"""

import torch

from . import autocast, fake, library, vmap

_GRADIENTS = ("query", "key", "value", "modality_bias", "sink")


def _transformed() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def runs_fused(*tensors: torch.Tensor | None) -> bool:
    """Whether an operator without a derivative, and with kernels on the CPU alone, may take these tensors.

    All must be there: weights that are elsewhere until their module is called (offloading) want it to be called.
    """
    given = [t for t in tensors if isinstance(t, torch.Tensor)]
    if not library.native_loaded or any(t.device.type != "cpu" for t in given):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in given)) and not _transformed()


def _differentiable(name: str, setup_context, backward):
    """A callable that runs operator ``name`` and records ``backward`` for it."""
    op = getattr(torch.ops.moda_ext, name).default

    def refuse_forward_mode(ctx, *tangents):
        raise NotImplementedError(
            f"moda_ext::{name} has no forward-mode derivative; moda_ext.reference has, by plain PyTorch"
        )

    function = type(
        f"moda_ext_{name}",
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *inputs: op(*inputs)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "jvp": staticmethod(refuse_forward_mode),
        },
    )
    torch.library.register_autograd(f"moda_ext::{name}", backward, setup_context=setup_context)

    @torch.compiler.allow_in_graph
    def through_function(*inputs):
        return function.apply(*inputs)

    def call(*inputs):
        try:
            return through_function(*inputs) if _transformed() else op(*inputs)
        except RuntimeError as error:  # torch 2.15 makes one of the std::invalid_argument of a check in csrc
            if str(error).startswith(f"{name}: "):
                raise ValueError(str(error)) from None
            raise

    return call


def _not_differentiable(name: str, instead: str):
    """An operator that is usable under every transform, but has no derivative."""

    def setup_context(ctx, inputs, output):
        pass

    def backward(ctx, *grads):
        raise NotImplementedError(f"moda_ext::{name} has no derivative; {instead}")

    return _differentiable(name, setup_context, backward)


def _first_order_only(name: str):
    """The operator of a backward pass, which cannot be differentiated once more."""
    return _not_differentiable(name, "moda_ext.reference has second derivatives, by plain PyTorch")


def _attention(name: str, options):
    """Dense and varlen differ only in their ``options``: the operator's arguments after key_modality, by name."""
    arguments = ("query", "key", "value", "key_modality", *options)
    saved = [n for n in arguments if n in _TENSORS]
    plain = [n for n in arguments if n not in _TENSORS]
    run_backward = _first_order_only(f"{name}_backward")

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        given = dict(zip(arguments, inputs, strict=True))
        ctx.mark_non_differentiable(output[3])  # lse_residual: what the backward pass needs beside the rounded lse
        ctx.save_for_backward(*(given[n] for n in saved), *output)
        ctx.options = [given[n] for n in plain]

    def backward(ctx, grad_out, grad_lse, grad_mass, _):
        if grad_out is None and grad_lse is None and grad_mass is None:
            return (None,) * len(arguments)
        if grad_out is not None and grad_out.stride(-1) != 1:  # the gradient of a plain sum is expanded
            grad_out = grad_out.contiguous()
        need = [ctx.needs_input_grad[arguments.index(n)] for n in _GRADIENTS]
        grads = run_backward(grad_out, grad_lse, grad_mass, *ctx.saved_tensors, *ctx.options, *need)
        by_name = {n: grad for n, grad, needed in zip(_GRADIENTS, grads, need, strict=True) if needed}
        return tuple(by_name.get(n) for n in arguments)

    return _differentiable(name, setup_context, backward)


_TENSORS = ("query", "key", "value", "key_modality", "cu_seqlens_q", "cu_seqlens_k", "modality_bias", "sink")


def _sink_operator():
    run_backward = _first_order_only("pseudo_score_sink_backward")

    def setup_context(ctx, inputs, output):
        decay, base, *ctx.options = inputs
        ctx.save_for_backward(decay, base)

    def backward(ctx, grad):
        decay, base = ctx.saved_tensors
        return (*run_backward(grad, decay, base, *ctx.options), None, None, None)

    return _differentiable("pseudo_score_sink", setup_context, backward)


def _gram_operator():
    run_backward = _first_order_only("modality_gram_backward")

    def setup_context(ctx, inputs, output):
        key, modality, *ctx.options = inputs
        ctx.save_for_backward(key, modality)

    def backward(ctx, grad):
        return (run_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None)

    return _differentiable("modality_gram", setup_context, backward)


def _projection_operator():
    run_backward = _first_order_only("causal_gram_projection_backward")

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *tensors, num_modalities, unit_keys, eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = (num_modalities, unit_keys, eps)

    def backward(ctx, grad_projection, grad_gram):
        saved = ctx.saved_tensors  # once: gradient checkpointing unpacks them one time only
        query, initial = saved[0], saved[-1]
        if grad_projection is None and grad_gram is None:
            return (None,) * 8
        grads = run_backward(
            _rows(grad_projection, query, (ctx.options[0], *query.shape)),
            None if grad_gram is None else grad_gram.contiguous(),
            *saved,
            *ctx.options,
        )
        grad_query, grad_key, grad_scale, grad_initial = grads
        return (grad_query, grad_key, None, grad_scale, None if initial is None else grad_initial, None, None, None)

    return _differentiable("causal_gram_projection", setup_context, backward)


def _views_operator():
    run_backward = _first_order_only("duplex_query_views_backward")

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *tensors, num_modalities, unit_keys, eps, ctx.with_indicator, ctx.with_gram = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.options = (num_modalities, unit_keys, eps)

    def backward(ctx, grad_views, grad_indicator, grad_gram):
        saved = ctx.saved_tensors  # once: gradient checkpointing unpacks them one time only
        query, initial = saved[0], saved[-2]
        # What was not asked for is an empty tensor, and under torch.compile has a gradient all the same.
        grad_indicator = grad_indicator if ctx.with_indicator else None
        grad_gram = grad_gram if ctx.with_gram else None
        if grad_views is None and grad_indicator is None and grad_gram is None:
            return (None,) * 14
        grads = run_backward(
            _rows(grad_views, query, (ctx.options[0], *query.shape)),
            grad_indicator,
            None if grad_gram is None else grad_gram.contiguous(),
            *saved,
            *ctx.options,
        )
        grad_query, grad_key, *rest, grad_initial = grads
        return (grad_query, grad_key, None, *rest, None if initial is None else grad_initial, *(None,) * 5)

    return _differentiable("duplex_query_views", setup_context, backward)


def _rows(grad, like, shape):
    """A gradient with a contiguous last dimension; zeros where autograd has none."""
    if grad is None:
        return like.new_zeros(shape)
    return grad if grad.stride(-1) == 1 else grad.contiguous()  # the gradient of a plain sum is expanded


if library.native_loaded:
    for concern in (fake, vmap, autocast):
        concern.register()
    modular_attention = _attention(
        "modular_attention", ("modality_bias", "sink", "num_modalities", "is_causal", "scale")
    )
    modular_attention_varlen = _attention(
        "modular_attention_varlen",
        (
            "cu_seqlens_q",
            "cu_seqlens_k",
            "modality_bias",
            "sink",
            "max_seqlen_q",
            "max_seqlen_k",
            "num_modalities",
            "is_causal",
            "scale",
        ),
    )
    pseudo_score_sink = _sink_operator()
    modality_gram = _gram_operator()
    causal_gram_projection = _projection_operator()
    duplex_query_views = _views_operator()
    duplex_attention = _not_differentiable(
        "duplex_attention", "moda_ext.attention.duplex_attention has, by way of its two halves"
    )
    duplex_aligned_keys = _not_differentiable(
        "duplex_aligned_keys", "moda_ext.alignment.DuplexAligner.align_keys has, by way of other operators"
    )
