"""Tensors whose numbers do not lie in memory as they are: a kernel that took their addresses would read nothing.

Triton's are launched by us, not by PyTorch's dispatcher, which sees to that for all others.
"""

import pytest
import torch
from cases import COMPILED, DIFFERENTIABLE, KERNELS, call, replace_tensors, runs, sized, values_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fairkernels.functional as FK
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

every_kernel = pytest.mark.parametrize(("name", "backend"), KERNELS)


def floating(change):
    return lambda tensor: change(tensor) if tensor.is_floating_point() else tensor


def negative_bit(tensor):
    """The same numbers, of which memory holds the negatives."""
    turned = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert turned.is_neg()
    return turned


class Wrapped(torch.Tensor):
    """Holds another tensor, as DTensor does, and no memory."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(cls, lambda wrapped: wrapped.held, (args, kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


class Named(torch.Tensor):
    """A subclass that keeps its memory."""


@every_kernel
@pytest.mark.parametrize("change", [floating(negative_bit), Named], ids=["negative", "subclass"])
def test_same_numbers(name, backend, change):
    s = sized(name, 6)
    actual = values_and_gradients(name, backend, replace_tensors(s, change))
    plain = [torch.Tensor(result) if type(result) is Named else result for result in actual]
    torch.testing.assert_close(plain, values_and_gradients(name, backend, s), rtol=0, atol=0, equal_nan=True)


@every_kernel
def test_what_holds_another_tensor(name, backend):
    s = sized(name, 6)
    actual = values_and_gradients(name, backend, replace_tensors(s, Wrapped))
    assert {type(result) for result in actual} == {Wrapped}
    expected = values_and_gradients(name, backend, s)
    torch.testing.assert_close([result.held for result in actual], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[0] in DIFFERENTIABLE])
def test_upstream_gradients(name, backend):
    s = sized(name, 6)

    def gradients(change):
        return values_and_gradients(name, backend, s, lambda result: change(torch.full_like(result, 0.75)))

    expected = gradients(lambda upstream: upstream)
    torch.testing.assert_close(gradients(negative_bit), expected, rtol=0, atol=0)

    def zero(result):
        return torch._efficientzerotensor(result.shape, dtype=result.dtype, device=result.device)

    nothing = values_and_gradients(name, backend, s, zero)
    for gradient in nothing[-OPERATORS[name].differentiable :]:
        assert not gradient.any()


@every_kernel
def test_fake_tensors(name, backend):
    s = sized(name, 6)
    real = values_and_gradients(name, backend, s)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = values_and_gradients(name, backend, replace_tensors(s, mode.from_tensor))
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@every_kernel
def test_traced_in_eager(name, backend):
    """A trace holds the operator, not what its results happened to be."""
    first, *rest = sized(name, 6).args
    options = sized(name, 6).kwargs
    other = first.flip(0)

    def results(tensor):
        return call(name, Sample("", (tensor, *rest), options), backend=backend)

    torch.testing.assert_close(make_fx(results)(first)(other), results(other), rtol=0, atol=0, equal_nan=True)


@every_kernel
def test_modes_see_the_call(name, backend):
    class Seen(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    s = sized(name, 6)
    expected = call(name, s, backend=backend)
    with Seen() as seen:
        actual = call(name, s, backend=backend)
    assert seen.calls
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("change", [negative_bit, Wrapped])
def test_into_what_has_no_address(backend, change):
    x_adv, grad, x = sized("pgd_step", 6).args
    out = change(torch.zeros_like(x))
    expected = FK.pgd_step(x_adv, grad, x, alpha=0.1, eps=0.2, backend=backend)
    result = FK.pgd_step(*map(change, (x_adv, grad, x)), alpha=0.1, eps=0.2, out=out, backend=backend)
    assert result is out
    torch.testing.assert_close(getattr(out, "held", out), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in dispatch.BACKENDS if runs(b, "pgd_step")])
def test_what_was_saved_for_a_gradient_is_not_overwritten_unseen(backend):
    x_adv, grad, x = sized("pgd_step", 6).args
    out, factor = torch.ones_like(x), torch.ones_like(x, requires_grad=True)
    product = (factor * out).sum()
    FK.pgd_step(x_adv, grad, x, alpha=0.1, eps=0.2, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        FK.pgd_step(x_adv, grad, x, alpha=0.1, eps=0.2, out=out.clone(), backend=backend)
