"""What PyTorch must know of a native operator beside its kernels: fake kernel, gradient, autocast and vmap.

An :class:`Operator` is declared once, by the names of its arguments and results, which are those of its schema
(csrc/ops/schemas.cpp). Nothing is found by position, so an argument may be added anywhere in a schema; a name that the
schema lacks is an error at import. The gradient needs no declaration: it follows from the names of the arguments of
the operator ``<name>_backward``,

- ``grad_<result>``: the gradient of that result; None, or zeros if it cannot be None, where there is none;
- ``need_<argument>``: whether the gradient of that argument is asked for;
- a name in ``gradient_options``: what is there; other values are for direct callers;
- any other: the argument or the result of the forward pass of that name,

and of its results, ``grad_<argument>``. A result without a ``grad_<result>`` has no gradient, and one with an argument
``with_<result>`` that is False is an empty tensor.

A gradient is bound twice. ``torch.library.register_autograd`` serves plain autograd, in eager mode as under
torch.compile and torch.export, and direct callers of ``torch.ops.moda_ext``. It fails under torch.func transforms and
gives zero tangents in forward mode; there the package calls the operator through a ``torch.autograd.Function``, which
composes with the former and refuses the latter. (Always taking that way costs 100 us per call, and keeps torch.compile
from caching graphs across processes.)
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moda_ext._ops import autocast, library
from moda_ext._ops.limits import accumulation_dtype

_SAVED, _OPTION, _NEED, _GIVEN, _GRAD, _GRAD_OR_ZEROS = range(6)
FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}  # of every operator
_library = torch.library.Library("moda_ext", "IMPL")  # kept alive: the registrations end with it


def transformed() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def empty_in_layout_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised (..., H, N, D) tensor in the dtype and, as the kernels' results are, in the layout of ``like``.

    Tokens-major (memory order (..., N, H, D), seen as (..., H, N, D)) when ``like`` steps further from row to row than
    from head to head, else contiguous.
    """
    if like.stride(-2) > like.stride(-3):
        *outer, heads, rows, size = shape
        return like.new_empty((*outer, rows, heads, size)).transpose(-3, -2)
    return like.new_empty(shape)


class Operator:
    """An operator of ``torch.ops.moda_ext``, called by keywords. ValueError where a check of csrc refuses an argument.

    Args:
        name: its name. Without the native library it cannot be called.
        fake: from a namespace of all arguments to its results, uninitialised, with the strides of the native kernels;
            None of an operator that writes into an argument.
        tokens: arguments that autocast brings to its dtype.
        sums: arguments that are added to sums over tokens: autocast brings them to the dtype of sums.
        batch: for vmap, the dimension (negative) of every tensor argument and result that the mapped dimension is
            merged with: one call. None: one call for each slice.
        packed: whether tensors of tokens are packed, (T, H, D): their gradients are then contiguous.
        gradient_options: values of arguments of the backward operator that are nothing of the forward pass.
        contiguous: results whose gradient the backward kernels want contiguous; of the others, the last dimension.
        instead: what has the derivative, for an operator that has none: one that does the work of several at once where
            none is asked for. It has kernels for the CPU alone.
        composite: whether functional/composite.py computes it where a device has no kernels.
        flex: whether functional/flex.py does.
    """

    def __init__(
        self,
        name: str,
        fake: Callable[[SimpleNamespace], Tensor | tuple[Tensor, ...] | None],
        *,
        tokens: tuple[str, ...] = (),
        sums: tuple[str, ...] = (),
        batch: Mapping[str, int] | None = None,
        packed: bool = False,
        gradient_options: Mapping[str, Any] | None = None,
        contiguous: tuple[str, ...] = (),
        instead: str = "",
        composite: bool = False,
        flex: bool = False,
    ):
        self.name, self.fake, self.instead = name, fake, instead
        self.composite, self.flex = composite, flex
        self.tokens, self.sums, self.batch = tokens, sums, batch
        self.packed, self.contiguous = packed, contiguous
        self.gradient_options = {} if gradient_options is None else gradient_options
        self.backward: Operator | None = None  # the operator of the gradient
        if not library.native_loaded:
            return
        self._op = getattr(torch.ops.moda_ext, name).default
        schema = self._op._schema
        self.arguments = [argument.name for argument in schema.arguments]
        self.results = [result.name or "result" for result in schema.returns]
        self.tensors = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
        self.mutates = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        self.optional = {a.name for a in schema.arguments if a.type.kind() == "OptionalType"}
        self._check_declaration()
        if hasattr(torch.ops.moda_ext, f"{name}_backward"):
            self.backward = self._declare_backward()
            self._plan_gradient()
        self._register()

    def __call__(self, **arguments: Any) -> Any:
        inputs = [arguments.pop(name) for name in self.arguments]
        if arguments:
            raise TypeError(f"moda_ext::{self.name} has no argument {', '.join(arguments)}")
        return self._call(inputs)

    def _call(self, inputs: list) -> Any:
        try:
            return self._through_function(inputs) if transformed() else self._op(*inputs)
        except RuntimeError as error:  # torch 2.15 makes one of the std::invalid_argument of a check in csrc
            if str(error).startswith(f"{self.name}: "):
                raise ValueError(str(error)) from None
            raise

    def _check_declaration(self) -> None:
        batch = set() if self.batch is None else set(self.batch)
        named = {*self.tokens, *self.sums, *batch}
        unknown = named - {*self.arguments, *self.results}
        missing = set() if self.batch is None else {*self.tensors, *self.results} - batch
        if unknown or missing:
            raise RuntimeError(
                f"moda_ext::{self.name}: declaration and schema differ in {', '.join(sorted(unknown | missing))}"
            )

    def _declare_backward(self) -> "Operator":
        schema = getattr(torch.ops.moda_ext, f"{self.name}_backward").default._schema
        batch = None
        if self.batch is not None:
            sides = [(name, name.removeprefix("grad_")) for name in (a.name for a in schema.arguments)]
            sides += [(result.name, result.name.removeprefix("grad_")) for result in schema.returns]
            batch = {name: self.batch[other] for name, other in sides if other in self.batch}
        contiguous = tuple(f"grad_{name}" for name in self.contiguous)

        def fake(given: SimpleNamespace) -> tuple[Tensor, ...] | Tensor:
            first = getattr(given, self.tokens[0])
            gradients = []
            for name in (result.name.removeprefix("grad_") for result in schema.returns):
                like, is_token = getattr(given, name), name in self.tokens
                if like is None or not getattr(given, f"need_{name}", True):
                    dtype = first.dtype if is_token else accumulation_dtype(first.dtype)
                    gradients.append(first.new_empty(0, dtype=dtype))
                elif is_token and not self.packed:
                    gradients.append(empty_in_layout_of(like, like.shape))
                else:
                    gradients.append(like.new_empty(like.shape))
            return tuple(gradients) if len(gradients) > 1 else gradients[0]

        instead = "moda_ext.reference has second derivatives, by plain PyTorch"
        return Operator(f"{self.name}_backward", fake, batch=batch, contiguous=contiguous, instead=instead)

    def _register(self) -> None:
        qualified = f"moda_ext::{self.name}"
        torch.library.register_fake(qualified, lambda *inputs: self.fake(self._bind(inputs)))
        if self.mutates:  # torch.library has neither autograd nor vmap for it
            return
        torch.library.register_vmap(qualified, self._one_by_one if self.batch is None else self._folded)
        if self.tokens:
            for device_type, key in autocast.DISPATCH_KEYS.items():
                _library.impl(self.name, self._autocast_kernel(device_type), key)

        setup_context, backward = (
            (self._remember, self._differentiate) if self.backward else (self._forget, self._refuse)
        )
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        FUNCTIONS[self.name] = type(
            f"moda_ext_{self.name}",
            (torch.autograd.Function,),
            {
                "generate_vmap_rule": True,
                "forward": staticmethod(lambda *inputs: self._op(*inputs)),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(backward),
                "jvp": staticmethod(self._refuse_forward_mode),
            },
        )

    def _through_function(self, inputs: list) -> Any:
        if not torch.compiler.is_compiling():
            return FUNCTIONS[self.name].apply(*inputs)
        from moda_ext._ops.in_graph import CALLS

        return CALLS[self.name](*inputs)

    def _bind(self, inputs: Sequence) -> SimpleNamespace:
        return SimpleNamespace(**dict(zip(self.arguments, inputs, strict=True)))

    # The gradient. What goes where is looked up by name once; training calls this for every layer and step.

    def _plan_gradient(self) -> None:
        """``_sources``: for every argument of the backward operator where it comes from, and the index there."""
        assert self.backward is not None, "planned where there is one"
        names = [*self.arguments, *self.results]
        arguments, results = self.backward.arguments, self.backward.results
        self._saved = [n for n in arguments if n in names and n in self.backward.tensors]
        self._options = [n for n in arguments if n in names and n not in self.backward.tensors]
        self._saved_from = [names.index(n) for n in self._saved]
        self._options_from = [names.index(n) for n in self._options]
        self._without_gradient = [i for i, n in enumerate(self.results) if f"grad_{n}" not in arguments]
        self._flags = [
            (i, self.arguments.index(f"with_{n}")) for i, n in enumerate(self.results) if f"with_{n}" in names
        ]
        self._sources: list[tuple[int, Any]] = []
        for name in arguments:
            what, _, other = name.partition("_")
            if name in self._saved:
                self._sources.append((_SAVED, self._saved.index(name)))
            elif name in self._options:
                self._sources.append((_OPTION, self._options.index(name)))
            elif what == "need":
                self._sources.append((_NEED, self.arguments.index(other)))
            elif name in self.gradient_options:
                self._sources.append((_GIVEN, self.gradient_options[name]))
            else:
                optional = name in self.backward.optional
                self._sources.append((_GRAD if optional else _GRAD_OR_ZEROS, self.results.index(other)))
        self._sizes_of = [i for source, i in self._sources if source == _GRAD_OR_ZEROS]
        # For every argument: the result that is its gradient, and the saved tensor that says whether it was given.
        self._gradients = [
            (results.index(f"grad_{n}"), self._saved.index(n)) if f"grad_{n}" in results else None
            for n in self.arguments
        ]

    def _remember(self, ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        known = (*inputs, *(output if isinstance(output, tuple) else (output,)))
        first = len(inputs)
        ctx.mark_non_differentiable(*(known[first + i] for i in self._without_gradient))
        ctx.save_for_backward(*(known[i] for i in self._saved_from))
        ctx.options = [known[i] for i in self._options_from]
        ctx.absent = [i for i, flag in self._flags if not inputs[flag]]
        ctx.sizes = {i: (known[first + i].shape, known[first + i].dtype) for i in self._sizes_of}

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert self.backward is not None, "bound where there is one"
        # What is absent has a gradient all the same under torch.compile.
        incoming = [None if i in ctx.absent else grad for i, grad in enumerate(grads)]
        present = [grad for grad in incoming if grad is not None]
        if not present:
            return (None,) * len(self.arguments)
        saved = ctx.saved_tensors  # once: gradient checkpointing unpacks them one time only
        inputs: list[Any] = []
        for source, i in self._sources:
            if source == _SAVED:
                inputs.append(saved[i])
            elif source == _OPTION:
                inputs.append(ctx.options[i])
            elif source == _NEED:
                inputs.append(ctx.needs_input_grad[i])
            elif source == _GIVEN:
                inputs.append(i)
            elif (grad := incoming[i]) is not None:
                inputs.append(_contiguous(grad, whole=self.results[i] in self.contiguous))
            elif source == _GRAD_OR_ZEROS:
                shape, dtype = ctx.sizes[i]
                inputs.append(present[0].new_zeros(shape, dtype=dtype))
            else:
                inputs.append(None)
        gradients = self.backward._call(inputs)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return tuple(
            gradients[places[0]] if needed and places and saved[places[1]] is not None else None
            for places, needed in zip(self._gradients, ctx.needs_input_grad, strict=True)
        )

    def _forget(self, ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        pass

    def _refuse(self, ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(f"moda_ext::{self.name} has no derivative; {self.instead}")

    def _refuse_forward_mode(self, ctx: Any, *tangents: Tensor | None) -> None:
        raise NotImplementedError(
            f"moda_ext::{self.name} has no forward-mode derivative; moda_ext.reference has, by plain PyTorch"
        )

    # Autocast, for direct callers of the operator.

    def _autocast_kernel(self, device_type: str) -> Callable:
        def kernel(*inputs: Any) -> Any:
            given = dict(zip(self.arguments, inputs, strict=True))
            given |= zip(self.tokens, autocast.cast_tokens(*(given[name] for name in self.tokens)), strict=True)
            query = given[self.tokens[0]]
            given |= zip(self.sums, autocast.cast_sums(query, *(given[name] for name in self.sums)), strict=True)
            with torch.autocast(device_type, enabled=False):
                return self._op(*given.values())

        return kernel

    # vmap.

    def _folded(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        assert self.batch is not None, "bound where there is one"
        size, folded = info.batch_size, []
        for name, value, mapped in zip(self.arguments, inputs, in_dims, strict=True):
            value = _fold(value, mapped, self.batch[name], size) if name in self.tensors else value
            folded.append(value.contiguous() if name in self.contiguous and value is not None else value)
        results = self._op(*folded)
        unfolded, out_dims = [], []
        for name, result in zip(self.results, results if isinstance(results, tuple) else (results,), strict=True):
            present = result.dim() >= -self.batch[name]  # a gradient that is not asked for is an empty vector
            unfolded.append(_unfold(result, self.batch[name], size) if present else result)
            out_dims.append(result.dim() + self.batch[name] if present else None)
        return (tuple(unfolded), tuple(out_dims)) if isinstance(results, tuple) else (unfolded[0], out_dims[0])

    def _one_by_one(self, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        def select(argument: Any, dim: int | None, i: int) -> Any:
            return argument if dim is None else argument.select(dim, i).contiguous()

        slices = [
            self._op(*(select(a, d, i) for a, d in zip(inputs, in_dims, strict=True))) for i in range(info.batch_size)
        ]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return results, (0,) * len(results)


def _contiguous(grad: Tensor, *, whole: bool) -> Tensor:
    """The gradient as the kernels take it: that of a plain sum, for example, is expanded."""
    if grad.is_contiguous() if whole else grad.dim() == 0 or grad.stride(-1) == 1:
        return grad
    return grad.contiguous()


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
    # Kernels want the last dimension contiguous; vmap may have mapped over it.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _unfold(tensor: Tensor, batch: int, size: int) -> Tensor:
    return tensor.unflatten(batch, (size, tensor.shape[batch] // size))
