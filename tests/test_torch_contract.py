"""What PyTorch expects of an operator: registration, fakes, compile, export, autocast, vmap, functorch."""

from unittest import mock

import pytest
import torch
from cases import (
    BACKENDS,
    COMPILED,
    DEVICE,
    DIFFERENTIABLE,
    KERNELS,
    NAMES,
    call,
    every_call,
    flat,
    plain,
    runs,
    sample,
    sized,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fairkernels
import fairkernels.functional as FK
from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

ONE_OF_EACH = [(name, backend) for name, backend in KERNELS]


def registered(name):
    return getattr(torch.ops.fairkernels, name).default


def few(calls):
    """The first two samples of each operator and backend quickly, the others with the slow tests."""
    seen, marked = {}, []
    for param in calls:
        key = param.values[:2]
        seen[key] = seen.get(key, 0) + 1
        marked.append(pytest.param(*param.values, marks=[pytest.mark.slow] if seen[key] > 2 else []))
    return marked


@pytest.mark.parametrize(("name", "backend", "label"), few(every_call()))
def test_opcheck(name, backend, label):
    s = sample(name, label)
    args = handed_on(name, s)
    if name in DIFFERENTIABLE and s.smooth:
        args = (args[0].clone().requires_grad_(), *args[1:])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not any(result.is_floating_point() and result.isnan().any() for result in call(name, s, backend=backend)):
        checks.append("test_aot_dispatch_dynamic")  # takes NaN for a difference
    torch.library.opcheck(registered(name), args, {"backend": backend}, test_utils=checks)


@pytest.mark.parametrize(("name", "backend", "label"), every_call())
def test_fake_promises_what_comes(name, backend, label):
    args = handed_on(name, sample(name, label))
    real = flat(registered(name)(*args, backend=backend))
    promised = flat(OPERATORS[name].fake(*args))
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in promised]


@pytest.mark.parametrize(("name", "backend", "label"), every_call(keep=lambda s: s.smooth, backends=COMPILED))
def test_every_element_of_every_result_is_written(name, backend, label):
    """Also of those that only a backward kernel reads: fresh memory is NaN."""
    results = flat(registered(name)(*handed_on(name, sample(name, label)), backend=backend))
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[0] in DIFFERENTIABLE])
def test_registered_op_has_the_gradient_of_the_function(name, backend):
    s = plain(name, torch.float64)
    args = handed_on(name, s)
    first, second = (args[0].clone().requires_grad_() for _ in range(2))
    torch.autograd.backward(flat(registered(name)(first, *args[1:], backend=backend))[0].sum())
    torch.autograd.backward(call(name, Sample("", (second, *s.args[1:]), s.kwargs), backend=backend)[0].sum())
    torch.testing.assert_close(first.grad, second.grad)
    assert torch.autograd.gradgradcheck(
        lambda z: flat(registered(name)(z, *args[1:], backend=backend))[0], first, fast_mode=True
    )


class KernelsThatRan(TorchDispatchMode):
    """Names of the compiled kernels that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fairkernels":
            self.names.append(func._schema.name.removeprefix("fairkernels::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("native" not in COMPILED, reason="the native library was not built")
@pytest.mark.parametrize("name", [name for name in NAMES if runs("native", name)])
def test_the_kernel_that_was_asked_for_is_the_one_that_runs(name):
    s = plain(name)
    leaf = s.args[0].clone()
    if name in DIFFERENTIABLE:
        leaf.requires_grad_()
    with KernelsThatRan() as native:
        result = call(name, Sample("", (leaf, *s.args[1:]), s.kwargs), backend="native")[0]
        if name in DIFFERENTIABLE:
            result.sum().backward()
    expected = [f"_{name}_native"] + ([f"_{name}_backward_native"] if name in DIFFERENTIABLE else [])
    expected = [f"_{name}_with_gradient_native"] if OPERATORS[name].gives_gradient else expected
    assert native.names == expected

    leaf = leaf.detach().requires_grad_(name in DIFFERENTIABLE)
    with KernelsThatRan() as reference:
        result = call(name, Sample("", (leaf, *s.args[1:]), s.kwargs), backend="reference")[0]
        if name in DIFFERENTIABLE:
            result.sum().backward()
    assert reference.names == []


def check_compiled(name, backend, compiler, sizes):
    options = sized(name, 7).kwargs

    def function(*args):
        return flat(getattr(FK, name)(*args, **options, backend=backend))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for size in sizes:
        args = sized(name, size).args
        if name not in DIFFERENTIABLE:
            torch.testing.assert_close(compiled(*args), function(*args))
            continue
        ours, eager = (args[0].clone().requires_grad_() for _ in range(2))
        value, expected = compiled(ours, *args[1:])[0], function(eager, *args[1:])[0]
        torch.testing.assert_close(value, expected)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, eager.grad)


@pytest.mark.parametrize(("name", "backend"), ONE_OF_EACH)
def test_compile_fullgraph_dynamic(name, backend):
    check_compiled(name, backend, "aot_eager", (7, 9, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), ONE_OF_EACH)
def test_compile_with_inductor(name, backend):
    check_compiled(name, backend, "inductor", (7, 9))


@pytest.mark.parametrize(("name", "backend"), [pair for pair in ONE_OF_EACH if pair[0] in DIFFERENTIABLE])
def test_compile_of_the_function_class(name, backend):
    first, *rest = handed_on(name, sized(name, 6))
    function = getattr(fairkernels.autograd, OPERATORS[name].function_name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: function.apply(z, *rest, backend)[0], fullgraph=True, backend="aot_eager")
    ours, eager = (first.clone().requires_grad_() for _ in range(2))
    value, expected = compiled(ours), function.apply(eager, *rest, backend)[0]
    torch.testing.assert_close(value, expected)
    value.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, eager.grad)


choose_for = dispatch.choose_for


@pytest.mark.parametrize("backend", COMPILED)
def test_compile_keeps_the_scoped_backend(backend):
    logits, labels = sized("symmetry_loss", 8).args

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits):
        return FK.symmetry_loss(logits, labels)

    chosen = []
    with mock.patch.object(dispatch, "choose_for", lambda *call: chosen.append(choose_for(*call)) or chosen[-1]):
        for scope in (backend, "reference"):
            torch._dynamo.reset()
            with fairkernels.use_backend(scope):
                loss(logits)
            assert chosen[-1] == scope


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_export(name):
    args = sized(name, 8).args

    class Module(torch.nn.Module):
        def forward(self, *args):
            return getattr(FK, name)(*args)

    program = torch.export.export(Module(), args)
    assert f"fairkernels.{name}" in program.graph_module.code
    torch.testing.assert_close(program.module()(*args), getattr(FK, name)(*args))


@pytest.mark.parametrize(("name", "backend", "label"), few(every_call()))
def test_autocast_changes_nothing(name, backend, label):
    s = sample(name, label)
    expected = call(name, s, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = call(name, s, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[0] in DIFFERENTIABLE])
def test_autocast_training_step(name, backend):
    weight = torch.eye(5, device=DEVICE, requires_grad=True)
    first, *rest = sized(name, 5, torch.bfloat16).args
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = first @ weight
        result = getattr(FK, name)(outputs, *rest, backend=backend)
    assert outputs.dtype == result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    assert weight.grad.isfinite().all()


def stacked(name, count=3):
    """Three different calls of an operator that differ in their tensors only, and the same in one batch."""
    args = sized(name, 6).args
    calls = [tuple(t.roll(number * (place + 1), 0) for place, t in enumerate(args)) for number in range(count)]
    return calls, [torch.stack(tensors) for tensors in zip(*calls, strict=True)]


@pytest.mark.parametrize(("name", "backend"), ONE_OF_EACH)
def test_vmap_is_the_loop(name, backend):
    options = sized(name, 6).kwargs

    def function(*args):
        return flat(getattr(FK, name)(*args, **options, backend=backend))

    def loop(calls):
        return tuple(torch.stack(parts) for parts in zip(*(function(*args) for args in calls), strict=True))

    calls, batches = stacked(name)
    expected = loop(calls)
    torch.testing.assert_close(torch.func.vmap(function)(*batches), expected)

    moved = [batch.movedim(0, -1) for batch in batches]
    torch.testing.assert_close(torch.func.vmap(function, in_dims=-1)(*moved), expected)

    first = loop([(args[0], *calls[0][1:]) for args in calls])
    in_dims = (0, *[None] * (len(batches) - 1))
    torch.testing.assert_close(torch.func.vmap(function, in_dims=in_dims)(batches[0], *calls[0][1:]), first)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[0] in DIFFERENTIABLE])
def test_functorch_gradients(name, backend):
    def total(*args):
        return getattr(FK, name)(*args, backend=backend).square().sum()

    calls, batches = stacked(name)
    expected = []
    for first, *rest in calls:
        leaf = first.clone().requires_grad_()
        expected.append(torch.autograd.grad(total(leaf, *rest), leaf)[0])
    torch.testing.assert_close(torch.func.grad(total)(*calls[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(*batches), torch.stack(expected))


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[0] in DIFFERENTIABLE])
def test_functorch_hessian(name, backend):
    def total(leaf, *rest):
        return getattr(FK, name)(leaf, *rest, backend=backend).square().sum()

    first, *rest = sized(name, 4, torch.float64).args
    hessian = torch.func.jacrev(torch.func.jacrev(total))(first, *rest)
    expected = torch.autograd.functional.hessian(lambda z: total(z, *rest), first)
    torch.testing.assert_close(hessian, expected)


def test_compiled_functorch_transform_is_refused():
    logits, labels = sized("symmetry_loss", 6).args
    gradient = torch.func.grad(lambda z: FK.symmetry_loss(z, labels))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="ignores custom backwards"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(logits)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, b) for name, b in KERNELS if name not in DIFFERENTIABLE and plain(name).args[0].is_floating_point()],
)
def test_what_is_not_differentiable_is_detached(name, backend):
    s = plain(name)
    leaf = s.args[0].clone().requires_grad_()
    assert not call(name, Sample("", (leaf, *s.args[1:]), s.kwargs), backend=backend)[0].requires_grad


@pytest.mark.parametrize(("name", "backend"), ONE_OF_EACH)
def test_vmap_over_nothing(name, backend):
    s = sized(name, 6)
    batches = [torch.stack([t])[:0] for t in s.args]
    results = torch.func.vmap(lambda *args: flat(getattr(FK, name)(*args, **s.kwargs, backend=backend)))(*batches)
    assert [result.shape for result in results] == [(0, *result.shape) for result in call(name, s)]


def test_vmap_of_a_registered_op_keeps_the_backend():
    args = handed_on("kl_dro_weights", sized("kl_dro_weights", 6))  # there is no such kernel
    with pytest.raises(RuntimeError, match="'triton' was asked for"):
        torch.func.vmap(lambda z: registered("kl_dro_weights")(z, *args[1:], backend="triton"))(args[0][None])


def test_every_backend_is_tested():
    assert "reference" in BACKENDS
