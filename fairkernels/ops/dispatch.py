"""THE choice of a backend, and the call of what was chosen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import check, library, triton_kernels
from .schema import NAMESPACE, OPERATORS, Operator

Backend = Literal["native", "triton", "reference"]

BACKENDS: tuple[Backend, ...] = ("native", "triton", "reference")


class Preference(NamedTuple):
    """In which order backends are tried, and why in this."""

    order: tuple[Backend, ...]
    why: str


PREFERRED: dict[str, Preference] = {
    "cpu": Preference(("native", "reference"), "triton runs there for tests alone, interpreted"),
    "cuda": Preference(("triton", "native", "reference"), "this order was not measured on a GPU yet"),
}
"""By the kind of device."""

OTHERWISE = Preference(("reference",), "there are no kernels for such tensors")

_environment: str | None = os.environ.get("FAIRKERNELS_BACKEND") or None
_scopes: list[list[str | None]] = []  # those that are open, of all threads; each is one list of its own
_scoped: str | None = None  # the last one's; a plain global: torch.compile does not see a ContextVar change


# --- which backend ------------------------------------------------------------------------------------------------


def check_backend(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")


@contextlib.contextmanager
def use_backend(name: Backend | None) -> Iterator[None]:
    """Every call inside runs on this backend or raises; ``backend=`` of a call goes before it.

    ``None`` gives the choice back to the dispatcher. The scope holds for all threads of the process.

    Raises:
        ValueError: if ``name`` is no backend.
    """
    global _scoped
    check_backend(name)
    scope: list[str | None] = [name]
    _scopes.append(scope)
    _scoped = name
    try:
        yield
    finally:
        _scopes[:] = [other for other in _scopes if other is not scope]
        _scoped = _scopes[-1][0] if _scopes else None


def forced_backend(argument: str | None) -> str | None:
    """The backend somebody asked for: the argument, else the scope, else ``FAIRKERNELS_BACKEND``."""
    if argument is not None:
        check_backend(argument)
        return argument
    return _scoped or _environment


def can_run(backend: str, operator: Operator, device: str, dtype: torch.dtype) -> str | None:
    """Why this backend can not run the operator on such tensors, or None if it can."""
    if backend == "reference":
        return None
    if backend not in operator.kernels:
        return f"there is no {backend} kernel of {operator.name} yet"
    if backend == "native" and library.MISSING:
        return library.MISSING
    if backend == "native" and device == "cuda" and (reason := library.cuda_missing(operator.name)):
        return reason
    if backend == "native" and device not in ("cpu", "cuda"):
        return f"there are no native kernels for {device} tensors"
    if backend == "triton" and (reason := triton_kernels.missing(device)):
        return reason
    if dtype not in operator.dtypes:
        return f"{operator.name} takes {', '.join(str(known) for known in operator.dtypes)}, not {dtype}"
    return None


def preferred(device: str) -> Preference:
    return PREFERRED.get(device, OTHERWISE)


@cache
def choose(name: str, device: str, dtype: torch.dtype, forced: str | None) -> Backend:
    """The backend that runs; a forced one runs or raises with the reason, it never falls back."""
    check_backend(forced)
    operator = OPERATORS[name]
    if forced is None:
        return next(backend for backend in preferred(device).order if can_run(backend, operator, device, dtype) is None)
    reason = can_run(forced, operator, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} was asked for {name}, but {reason}")
    return forced  # type: ignore[return-value]


def explain(op: str | Callable[..., Any], *tensors: Tensor) -> str:
    """Which backend runs an operator on these tensors, and why not the others.

    Args:
        op: name of the operator, or its function in ``fairkernels.functional``.
        tensors: the tensors of the call, in its order; without any, ordinary ones on the CPU are meant.

    Returns:
        One line for the choice and one for every backend.

    Raises:
        ValueError: if there is no such operator.
        TypeError: if something else than tensors is given.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}, got {name!r}")
    for tensor in tensors:
        check.tensor(tensor, "tensors")
    first = tensors[0] if tensors else torch.empty(0, dtype=OPERATORS[name].dtypes[0])
    device, dtype = first.device.type, first.dtype
    forced = forced_backend(None)

    lines = []
    for backend in BACKENDS:
        reason = can_run(backend, OPERATORS[name], device, dtype)
        lines.append(f"  {backend:<10} {'can run' if reason is None else 'can not run: ' + reason}")
    try:
        choice: str = choose(name, device, dtype, forced)
    except RuntimeError as error:
        choice = f"nothing: {error}"
    order, why = preferred(device)
    by = f"forced: {forced}" if forced else f"on {device} the first of {', '.join(order)} that can run: {why}"
    return "\n".join([f"{name} on {device} {str(dtype).removeprefix('torch.')}: {choice} ({by})", *lines])


# --- the call -----------------------------------------------------------------------------------------------------


@cache
def native_op(name: str) -> Callable[..., Any]:
    """The private op of a kernel, without the Python around it that torch puts there."""
    overload = getattr(getattr(torch.ops, NAMESPACE), f"_{name}_native").default
    return getattr(overload, "_op", overload)


def choose_for(operator: Operator, first: Tensor, forced: str | None) -> Backend:
    """The backend that runs for a call, by its first tensor."""
    device = "cpu" if first.is_cpu else first.device.type  # the latter makes a new string each time
    return choose(operator.name, device, first.dtype, forced)


ORDINARY = {Tensor, torch.nn.Parameter}
OPTIONS = {float, int, bool, str, type(None)}


def have_addresses(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are memory that holds their numbers, and nobody (a mode, a trace) wants to see the call."""
    for arg in args:
        kind = type(arg)
        if kind not in OPTIONS and (kind not in ORDINARY or arg.is_neg() or arg._is_zerotensor()):
            return False
    return not torch._C._len_torch_dispatch_stack()


def registered(name: str, args: tuple[Any, ...], backend: str | None) -> tuple[Tensor, ...]:
    """By way of ``torch.ops``, below whose dispatcher tensors have addresses."""
    results = getattr(getattr(torch.ops, NAMESPACE), name)(*args, backend=backend)
    return results if isinstance(results, tuple) else (results,)


def forward(operator: Operator, args: tuple[Any, ...], backend: str | None) -> tuple[Tensor, ...]:
    """All results of an operator, from the chosen backend; nothing of it is recorded for autograd."""
    chosen = choose_for(operator, args[0], backend)
    if chosen == "triton" and not have_addresses(args):
        with torch.no_grad():
            return registered(operator.name, args, chosen)
    return compute(operator, args, chosen)


def compute(operator: Operator, args: tuple[Any, ...], chosen: Backend) -> tuple[Tensor, ...]:
    """The forward on tensors that have addresses, below PyTorch's dispatcher or where it has nothing to do."""
    if operator.writes_into and chosen != "reference":
        return (compute_into(operator, args, operator.fake(*args), chosen),)
    if chosen == "native":
        return call_native(operator.name, args)
    check_classes(operator, args)
    with torch.no_grad():
        if chosen == "triton":
            return triton_kernels.call(operator.name, args)
        return conform(operator, args, operator.compute_reference(*args))


def backward(
    operator: Operator, grad: Tensor, args: tuple[Any, ...], saved: tuple[Tensor, ...], backend: str | None
) -> tuple[Tensor, ...]:
    """Gradients of the leading differentiable arguments, from the chosen backend; not differentiable again."""
    chosen = choose_for(operator, args[0], backend)
    if chosen == "triton" and not have_addresses((grad, *args, *saved)):
        return registered(f"{operator.name}_backward", (grad, *args, *saved), chosen)
    return compute_backward(operator, grad, args, saved, chosen)


def compute_backward(
    operator: Operator, grad: Tensor, args: tuple[Any, ...], saved: tuple[Tensor, ...], chosen: Backend
) -> tuple[Tensor, ...]:
    """The backward, likewise."""
    if chosen == "native":
        return call_native(f"{operator.name}_backward", (grad, *args, *saved))
    with torch.no_grad():
        if chosen == "triton":
            return triton_kernels.call(operator.name, (grad, *args, *saved), "_backward")
        return tuple(gradient.contiguous() for gradient in reference_backward(operator, grad, args))


def reference_backward(operator: Operator, grad: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Gradients by plain PyTorch, themselves differentiable in the arguments and in the upstream gradient."""
    leading, rest = args[: operator.differentiable], args[operator.differentiable :]
    pullback = torch.func.vjp(lambda *inputs: operator.compute_reference(*inputs, *rest)[0], *leading)[1]
    return tuple(pullback(grad))


def call_native(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    try:
        results = native_op(name)(*args)
    except RuntimeError as error:
        raise documented(error) from None
    return results if isinstance(results, tuple) else (results,)


def compute_into(operator: Operator, args: tuple[Any, ...], out: Tensor, chosen: Backend) -> Tensor:
    """What ``writes_into`` promises, by the native or the Triton kernel."""
    if chosen == "native":
        call_native(operator.name, (*args, out))
    else:
        triton_kernels.call(operator.name, (*args, out))
    return out


def documented(error: RuntimeError) -> Exception:
    """Operators raise RuntimeError (all that the stable ABI can); a label out of range is documented as IndexError."""
    _, marker, text = str(error).partition("IndexError: ")
    return IndexError(text.partition("\n")[0]) if marker else error


def check_classes(operator: Operator, args: tuple[Any, ...]) -> None:
    """The check of the labels that kernels make themselves; on a GPU nobody waits for it, the result is NaN."""
    if operator.name == "confusion_counts":
        predictions, labels, num_classes, ignore_index = args
    elif "ignore_index" in operator.argument_names:
        predictions, labels, num_classes = None, args[1], args[0].shape[-1]
        ignore_index = args[operator.argument_names.index("ignore_index")]
    else:
        return
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor) or get_proxy_mode() is not None:
        return
    kept = labels != ignore_index
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if classes is None:
            continue
        wrong = kept & ((classes < 0) | (classes >= num_classes))
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            raise IndexError(
                f"{name}{where} is {classes[tuple(where)].item()}, expected a class in [0, {num_classes}) "
                f"or ignore_index {ignore_index}"
            )


def conform(operator: Operator, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reference's results in the layout of the fake; what only a backward kernel reads is filled with zeros."""
    promised = operator.fake(*args)
    promised = promised if isinstance(promised, tuple) else (promised,)
    kept = (
        result if result.stride() == promise.stride() else promise.copy_(result)
        for result, promise in zip(results, promised, strict=False)
    )
    return *kept, *(promise.zero_() for promise in promised[len(results) :])
