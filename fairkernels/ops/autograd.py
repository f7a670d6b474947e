"""From the table to callable, differentiable, compilable operators.

Every operator gets one ``torch.autograd.Function`` (public as ``fairkernels.autograd.<Operator>``) and one registered
op ``torch.ops.fairkernels.<operator>``. ``run`` is the one entrance: in eager it goes through the Function, under
``torch.compile`` and ``torch.export`` through the registered op.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, library
from .schema import NAMESPACE, OPERATORS, Operator

_functorch_is_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def run(name: str, *args: Any, backend: str | None = None) -> tuple[Tensor, ...]:
    """All results of an operator; the first carries the gradient. What is forced here is forced in backward, too."""
    backend = dispatch.forced_backend(backend)
    if torch.compiler.is_compiling():
        return run_registered(name, args, backend)
    operator = OPERATORS[name]
    if _functorch_is_active():
        return FUNCTIONS[name].apply(*args, backend)
    if not torch.is_grad_enabled():
        return dispatch.forward(operator, args, backend)
    leading = operator.differentiable
    if not (args[0].requires_grad if leading == 1 else any(arg.requires_grad for arg in args[:leading])):
        return without_gradient(operator, args, backend)
    if gives_gradient(operator, args, backend):
        count = operator.tensor_count
        return (VALUES_WITH_GRADIENT[name](*args[:count], args[count:]),)
    return FUNCTIONS[name].apply(*args, backend)


def run_unchecked(name: str, *args: Any, backend: str | None = None) -> Tensor | None:
    """The first result of a native kernel called with plain tensors on the CPU that nobody has checked yet: the kernel
    does, and Python's own checks take longer than a small operator. Of what has a gradient only where the kernel gives
    it along with the value.

    None where that is not the way to go or the call fails: then the checks say what is wrong, and of what they do not
    know the call fails once more.
    """
    if torch.compiler.is_compiling() or _functorch_is_active():
        return None
    operator = OPERATORS[name]
    backend = dispatch.forced_backend(backend)
    try:
        if not operator.differentiable:
            if _is_wrapped(args[0]) or dispatch.choose_for(operator, args[0], backend) != "native":
                return None
            return dispatch.call_native(name, args)[0]
        if torch.is_grad_enabled() and args[0].requires_grad and gives_gradient(operator, args, backend):
            count = operator.tensor_count
            return VALUES_WITH_GRADIENT[name](*args[:count], args[count:])
    except (IndexError, RuntimeError, TypeError):
        pass
    return None


def gives_gradient(operator: Operator, args: tuple[Any, ...], backend: str | None) -> bool:
    """Whether the kernel that gives the gradient is the way to go; not for what has leaked from a transform."""
    return (
        operator.gives_gradient is not None
        and operator.gives_gradient(args)
        and not _is_wrapped(args[0])
        and dispatch.choose_for(operator, args[0], backend) == "native"
    )


def without_gradient(operator: Operator, args: tuple[Any, ...], backend: str | None) -> tuple[Tensor, ...]:
    """Switches autograd off only where it might see something: that takes as long as a small operator."""
    for arg in args[: operator.tensor_count]:
        if arg is not None and arg.requires_grad:
            with torch.no_grad():
                return dispatch.forward(operator, args, backend)
    return dispatch.forward(operator, args, backend)


def run_registered(name: str, args: tuple[Any, ...], backend: str | None) -> tuple[Tensor, ...]:
    if _functorch_is_active():
        raise RuntimeError(
            f"fairkernels {name}: torch.compile of a torch.func transform ignores custom backwards and would give "
            "wrong gradients; apply torch.func to the compiled function instead, or leave one of them out"
        )
    operator = OPERATORS[name]
    if not operator.differentiable:
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    return dispatch.registered(name, args, backend)


# --- one Function class an operator -------------------------------------------------------------------------------


def call_and_backend(operator: Operator, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], str | None]:
    """The arguments of ``Function.apply``: those of the operator and, where it was given, a backend behind them."""
    count = len(operator.argument_names)
    return args[:count], dispatch.forced_backend(args[count] if len(args) > count else None)


def save(ctx: Any, operator: Operator, args: tuple[Any, ...], backend: str | None, results: tuple[Tensor, ...]) -> None:
    """Keep the call for backward: tensors the way autograd wants them kept, the rest as it is."""
    ctx.set_materialize_grads(False)
    if not operator.differentiable:
        ctx.mark_non_differentiable(*results)
        return
    ctx.mark_non_differentiable(*results[1:])
    ctx.backend = backend
    ctx.computed_by = None if torch.compiler.is_compiling() else dispatch.choose_for(operator, args[0], backend)
    ctx.rest = args[operator.tensor_count :]
    ctx.save_for_backward(*args[: operator.tensor_count], *[results[place] for place in operator.saved_places])


def saved_call(ctx: Any, operator: Operator) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """The arguments of the call and the results that were saved."""
    tensors = ctx.saved_tensors
    return (*tensors[: operator.tensor_count], *ctx.rest), tensors[operator.tensor_count :]


def gradients(ctx: Any, operator: Operator, grad: Tensor | None, kernel: Callable[..., Any]) -> tuple[Any, ...]:
    """One gradient an argument. A kernel is not differentiable: where a second derivative may follow, the reference."""
    nothing = (None,) * len(ctx.needs_input_grad)
    if grad is None or not operator.differentiable:
        return nothing
    args, saved = saved_call(ctx, operator)
    if torch.is_grad_enabled():
        grads = dispatch.reference_backward(operator, grad, args)
    else:
        forced = dispatch.forced_backend(ctx.backend)
        if ctx.computed_by and forced not in (None, ctx.computed_by):  # each backend saves what its own backward reads
            saved = tuple(dispatch.forward(operator, args, forced)[place] for place in operator.saved_places)
        grads = kernel(operator, grad, args, saved, forced)
    return (*grads, *nothing[len(grads) :])


def vmap_rule(operator: Operator, call: Callable[..., Any]) -> Callable[..., Any]:
    """The batch rule: a further leading dimension of every tensor where the operator has such, a loop where not."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def lifted(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        full = [lifted(arg, dim) for arg, dim in zip(args, in_dims, strict=False)]
        if operator.batched:
            results = call(*full)
        elif info.batch_size == 0:
            one = operator.fake(*(arg.new_empty(arg.shape[1:]) if isinstance(arg, Tensor) else arg for arg in full))
            results = tuple(result.new_empty((0, *result.shape)) for result in results_of(one))
        else:
            slices = [
                call(*(arg[i] if isinstance(arg, Tensor) else arg for arg in full)) for i in range(info.batch_size)
            ]
            results = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return results, (0,) * len(results)

    return rule


def make_function(operator: Operator) -> type[torch.autograd.Function]:
    """The Function of one operator: old style in eager, the cheapest; ``setup_context`` style under functorch."""

    def forward(*args: Any) -> tuple[Tensor, ...]:
        call, backend = call_and_backend(operator, args)
        if torch.compiler.is_compiling():  # torch.compile traces into a Function
            return run_registered(operator.name, call, backend)
        return dispatch.forward(operator, call, backend)

    def forward_and_save(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        results = forward(*args)
        save(ctx, operator, *call_and_backend(operator, args), results)
        return results

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, operator, *call_and_backend(operator, inputs), output)

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        kernel = registered_backward if torch.compiler.is_compiling() else dispatch.backward
        return gradients(ctx, operator, grad, kernel)

    def apply(cls: type, *args: Any) -> Any:
        if _functorch_is_active():
            return under_functorch.apply(*args)
        return super(function, cls).apply(*args)

    under_functorch = new_class(
        operator,
        forward=forward,
        setup_context=setup_context,
        backward=backward,
        vmap=vmap_rule(operator, lambda *args: under_functorch.apply(*args)),
    )
    function = new_class(operator, forward=forward_and_save, backward=backward)
    function.apply = classmethod(apply)
    return function


def is_one(grad: Tensor) -> bool:
    """Whether it is a plain number that is known to be 1; under a transform or a trace it is not known, nor on a GPU,
    for which the host would have to wait."""
    if (
        grad.dim()
        or not grad.is_cpu
        or type(grad) is not Tensor
        or _functorch_is_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    try:
        return grad.item() == 1
    except RuntimeError:  # a batch of numbers that looks like one
        return False


def make_value_with_gradient(operator: Operator) -> Callable[..., Tensor]:
    """``apply(*tensors, options)`` of a native kernel that gives the gradient along with the value alone."""
    name = f"{operator.name}_with_gradient"
    count = operator.tensor_count
    nothing = (None,) * count

    def forward(ctx: Any, *args: Any) -> Tensor:
        tensors, ctx.options = args[:count], args[count]
        value, gradient = dispatch.call_native(name, (*tensors, as_text(ctx.options)))
        ctx.save_for_backward(gradient, *tensors)
        return value

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradient, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            return *dispatch.reference_backward(operator, grad, (*tensors, *ctx.options)), *nothing
        if not graph_is_kept() and is_one(grad):
            return gradient, *nothing  # nobody will ask for it again
        return gradient * (grad[..., None, None] if grad.dim() else grad), *nothing

    function = new_class(operator, forward=forward, backward=backward)
    return super(torch.autograd.Function, function).apply  # that of Function itself asks for functorch, as is done here


@functools.lru_cache(maxsize=64)
def as_text(options: tuple[Any, ...]) -> str:
    """Options as the kernels that give the gradient read them: in words; of a number with a fraction its bits, which
    are the same in every locale."""

    def word(option: Any) -> str:
        return str(struct.unpack("<Q", struct.pack("<d", option))[0]) if isinstance(option, float) else str(option)

    return " ".join(map(word, options))


def new_class(operator: Operator, **methods: Callable[..., Any]) -> Any:
    signature = ", ".join((*operator.argument_names, "backend=None"))
    text = (
        f"``apply({signature})``, positional -> ``({', '.join(operator.results)})``.\n\n"
        f"What :func:`fairkernels.functional.{operator.name}` calls: every tensor carries the full leading batch "
        "dimensions, the first result carries the gradient."
    )
    static = {name: staticmethod(method) for name, method in methods.items()}
    return type(operator.function_name, (torch.autograd.Function,), {**static, "__doc__": text})


FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    name: make_function(operator) for name, operator in OPERATORS.items()
}


VALUES_WITH_GRADIENT: dict[str, Callable[..., Tensor]] = {
    name: make_value_with_gradient(operator) for name, operator in OPERATORS.items() if operator.gives_gradient
}


# --- one registered op an operator --------------------------------------------------------------------------------

_definitions = torch.library.Library(NAMESPACE, "DEF")


def register(operator: Operator) -> None:
    """Define the op with kernels for CPU and CUDA tensors, fake, autograd and vmap rule; its backward likewise."""
    name, qualified = operator.name, f"{NAMESPACE}::{operator.name}"
    results = ", ".join("Tensor" for _ in operator.results)

    def kernel(*args: Any, backend: str | None = None) -> Any:
        chosen = dispatch.choose_for(operator, args[0], dispatch.forced_backend(backend))
        outputs = dispatch.compute(operator, args, chosen)
        return outputs if len(outputs) > 1 else outputs[0]

    define(f"{name}({operator.arguments}, *, str? backend=None) -> ({results})", kernel)
    torch.library.register_fake(qualified, without_backend(operator.fake), lib=_definitions)
    if "native" in operator.kernels and library.MISSING is None:
        register_native_fakes(operator)
    if operator.differentiable:
        register_backward(operator)
    call = getattr(torch.ops.fairkernels, name)

    def vmap(info: Any, dims: tuple[int | None, ...], *args: Any, backend: str | None = None) -> tuple[Any, Any]:
        rule = vmap_rule(operator, lambda *full: results_of(call(*full, backend=backend)))
        return one_or_all(*rule(info, dims, *args))

    torch.library.register_vmap(qualified, vmap)


def register_native_fakes(operator: Operator) -> None:
    """For tracing in eager, where the kernels are called without the registered op around them."""
    written = (lambda *_: None) if operator.writes_into else operator.fake
    torch.library.register_fake(f"{NAMESPACE}::_{operator.name}_native", written, lib=_definitions)
    if operator.differentiable:
        name = f"{NAMESPACE}::_{operator.name}_backward_native"
        torch.library.register_fake(name, fake_backward(operator), lib=_definitions)
    if operator.gives_gradient:
        name = f"{NAMESPACE}::_{operator.name}_with_gradient_native"
        torch.library.register_fake(name, fake_with_gradient(), lib=_definitions)


def fake_with_gradient() -> Callable[..., Any]:
    def fake(first: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return first.new_empty(first.shape[:-2]), first.new_empty(first.shape)

    return fake


def fake_backward(operator: Operator) -> Callable[..., Any]:
    leading = operator.differentiable

    def fake(grad: Tensor, *args: Any, **_: Any) -> Any:
        grads = tuple(arg.new_empty(arg.shape) for arg in args[:leading])
        return grads if leading > 1 else grads[0]

    return fake


def registered_backward(
    operator: Operator, grad: Tensor, args: tuple[Any, ...], saved: tuple[Tensor, ...], backend: str | None
) -> tuple[Tensor, ...]:
    return dispatch.registered(f"{operator.name}_backward", (grad, *args, *saved), backend)


def register_backward(operator: Operator) -> None:
    name = f"{operator.name}_backward"
    count, leading = len(operator.argument_names), operator.differentiable

    def kernel(grad: Tensor, *args: Any, backend: str | None = None) -> Any:
        chosen = dispatch.choose_for(operator, args[0], dispatch.forced_backend(backend))
        grads = dispatch.compute_backward(operator, grad, args[:count], args[count:], chosen)
        return grads if len(grads) > 1 else grads[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        save(ctx, operator, inputs, keyword_only_inputs["backend"], results_of(output))  # forced stays forced

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return gradients(ctx, operator, grad, registered_backward)

    define(
        f"{name}({operator.backward_arguments}, *, str? backend=None) -> ({', '.join(['Tensor'] * leading)})",
        kernel,
    )
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_backward(operator), lib=_definitions)
    torch.library.register_autograd(
        f"{NAMESPACE}::{operator.name}", backward, setup_context=setup_context, lib=_definitions
    )


def define(schema: str, kernel: Callable[..., Any]) -> None:
    _definitions.define(schema)
    for key in ("CPU", "CUDA"):
        _definitions.impl(schema.partition("(")[0], kernel, key)


def without_backend(fake: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, backend=None: fake(*args)


def results_of(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def one_or_all(results: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, Any]:
    return (results, dims) if len(results) > 1 else (results[0], dims[0])


for _operator in OPERATORS.values():
    register(_operator)
