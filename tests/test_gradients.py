"""Derivatives: against autograd in float64, numerically, of second order, through every way in."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from cases import (
    BACKENDS,
    COMPILED,
    DIFFERENTIABLE,
    DTYPES,
    KERNELS,
    call,
    every_call,
    plain,
    reference_gradient,
    replace_tensors,
    runs,
    sample,
)
from test_forward import offset, strided, transposed
from tolerance import assert_no_worse

import fairkernels
from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops.samples import Maker
from fairkernels.ops.schema import OPERATORS

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def smooth(s):
    return s.smooth


def small(s):
    return s.smooth and 0 < s.args[0].numel() <= 150


TWO_KERNELS = "native, forward and backward"


def every_route(keep=lambda _: True, backends=BACKENDS):
    """Every call; a second time where the kernel gives the gradient along with the value, as for larger problems."""
    twice = tuple(name for name in DIFFERENTIABLE if OPERATORS[name].gives_gradient)
    again = [pytest.param(c.values[0], TWO_KERNELS, c.values[2]) for c in every_call(twice, keep, ["native"])]
    return every_call(DIFFERENTIABLE, keep, backends) + again


def differentiable_call(name, backend, s):
    """The first argument as a leaf, and the operator's first result as a function of it."""
    leaf = s.args[0].detach().requires_grad_()

    def function(first):
        forced = backend.partition(",")[0]
        with patch.dict(OPERATORS, {name: replace(OPERATORS[name], gives_gradient=None)} if forced != backend else {}):
            return call(name, type(s)(s.name, (first, *s.args[1:]), s.kwargs), backend=forced)[0]

    return leaf, function


def upstream_of(result, seed=5):
    return Maker(result.dtype, result.device.type, seed).normal(*result.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("name", "backend", "label"), every_route())
def test_gradient_no_less_accurate_than_plain_pytorch(name, backend, label, dtype):
    s = sample(name, label, dtype)
    operator, args = OPERATORS[name], handed_on(name, s)
    leaf, function = differentiable_call(name, backend, s)

    result = function(leaf)
    upstream = upstream_of(result)
    (grad,) = torch.autograd.grad(result, leaf, upstream)
    exact = reference_gradient(operator, args, upstream, torch.float64)

    assert grad.dtype == dtype
    if not exact.isfinite().all():
        assert not grad.isfinite().all()
    elif s.unique or backend == "reference":
        plain = reference_gradient(operator, args, upstream, dtype)
        assert_no_worse(grad, plain, exact, size=0, accuracy=30 * operator.allowed_error(dtype))
    else:
        assert grad.isfinite().all()


@pytest.mark.parametrize("layout", [transposed, strided, offset])
@pytest.mark.parametrize(("name", "backend", "label"), every_route(smooth))
def test_gradient_of_any_layout(name, backend, label, layout):
    s = sample(name, label, torch.float64)
    leaf, function = differentiable_call(name, backend, s)
    result = function(leaf)
    upstream = upstream_of(result)
    (expected,) = torch.autograd.grad(result, leaf, upstream)

    leaf, function = differentiable_call(name, backend, replace_tensors(s, layout))
    (grad,) = torch.autograd.grad(function(leaf), leaf, layout(upstream))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "backend", "label"), every_route(small))
def test_gradcheck(name, backend, label):
    leaf, function = differentiable_call(name, backend, sample(name, label, torch.float64))
    assert torch.autograd.gradcheck(function, leaf, fast_mode=leaf.numel() > 60)


@pytest.mark.parametrize(("name", "backend", "label"), every_route(small))
def test_gradgradcheck(name, backend, label):
    leaf, function = differentiable_call(name, backend, sample(name, label, torch.float64))
    assert torch.autograd.gradgradcheck(function, leaf, fast_mode=leaf.numel() > 30)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[0] in DIFFERENTIABLE])
def test_second_derivative_is_not_lost_beside_another_term(name, backend):
    """A kernel's backward that autograd can not see through gives a silent 0 here."""
    s = plain(name, torch.float64)
    leaf, function = differentiable_call(name, backend, s)
    result = function(leaf)
    upstream = upstream_of(result)
    (grad,) = torch.autograd.grad(result, leaf, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(4).sum() + leaf.sum(), leaf)

    args = handed_on(name, s)
    _, pullback = torch.func.vjp(lambda first: OPERATORS[name].compute_reference(first, *args[1:])[0], leaf)
    (expected,) = torch.autograd.grad(pullback(upstream)[0].pow(4).sum() + leaf.sum(), leaf)

    assert not torch.equal(second, torch.ones_like(second))
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize(("name", "backend", "label"), every_route(smooth, COMPILED))
def test_backward_changes_no_input_and_no_bit_with_threads(name, backend, label, threads):
    s = sample(name, label)
    before, grads = s.args[0].clone(), []
    for count in (1, 2, 2):
        threads(count)
        leaf, function = differentiable_call(name, backend, s)
        result = function(leaf)
        upstream = upstream_of(result)
        kept = upstream.clone()
        grads.append(torch.autograd.grad(result, leaf, upstream)[0])
        assert torch.equal(upstream, kept)
    torch.testing.assert_close(s.args[0].detach(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_public_function_class(name, backend):
    function = getattr(fairkernels.autograd, OPERATORS[name].function_name)
    assert issubclass(function, torch.autograd.Function)
    s = plain(name)
    args = handed_on(name, s)
    with fairkernels.use_backend(backend if runs(backend, name) else "reference"):
        first = args[0].clone().requires_grad_()
        results = function.apply(first, *args[1:])
        torch.testing.assert_close(results[0], call(name, s)[0])
        results[0].square().sum().backward()
        assert first.grad.abs().sum() > 0
        assert not any(result.requires_grad for result in results[1:])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensors_are_freed_and_checked(name):
    """Writing into what backward needs is an error, as for PyTorch's own functions."""
    s = plain(name)
    first = s.args[0].clone().requires_grad_()
    inner = first * 1.0
    result = call(name, type(s)(s.name, (inner, *s.args[1:]), s.kwargs))[0]
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
