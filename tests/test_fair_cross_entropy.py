"""Fair cross-entropy as one kernel: what it promises beyond its value."""

import itertools
import locale
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import COMPILED, reference, reference_gradient, samples
from tolerance import assert_no_worse

import fairkernels.functional as FK
from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

pytestmark = pytest.mark.skipif("native" not in COMPILED, reason="the native library was not built")

WITHOUT_ITERATION = [s.name for s in samples("fair_cross_entropy") if not s.kwargs.get("spec_weight")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", WITHOUT_ITERATION)
def test_cross_entropy_and_symmetry_are_no_less_accurate_than_plain_pytorch(label, dtype):
    """The table's test allows for the spectral iteration; without it nothing is allowed for."""
    s = next(s for s in samples("fair_cross_entropy", dtype) if s.name == label)
    operator = OPERATORS["fair_cross_entropy"]
    args = (*handed_on("fair_cross_entropy", s)[:-1], False)
    leaf = args[0].detach().requires_grad_()

    total = FK.fair_cross_entropy(leaf, *s.args[1:], **{**s.kwargs, "return_parts": False}, backend="native")
    exact, plain = (reference(operator, args, wide)[0] for wide in (torch.float64, dtype))
    assert_no_worse(total.detach(), plain, exact)

    (grad,) = torch.autograd.grad(total.sum(), leaf)
    exact, plain = (reference_gradient(operator, args, torch.ones_like(total), wide) for wide in (torch.float64, dtype))
    assert_no_worse(grad, plain, exact, size=0)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_confident_and_far_off_logits(scale, smoothing):
    """Offsets of the logits do not enter: log-sum-exp and the smoothed sum are taken from the row's largest."""
    logits = scale * torch.randn(64, 40) + 1000 * torch.randn(64, 1)
    labels = torch.where(torch.arange(64) % 4 > 0, logits.argmax(1), torch.arange(64) % 40)
    options = {"label_smoothing": smoothing, "sym_weight": 0.0}
    exact = torch.nn.functional.cross_entropy(logits.double(), labels, label_smoothing=smoothing)
    plain = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert_no_worse(FK.fair_cross_entropy(logits, labels, **options, backend="native"), plain, exact, size=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("absent", ["ignore", "zero"])
@pytest.mark.parametrize(
    ("surrogate", "margin"), [("soft", 0.0), ("gated", 0.5), ("kl", 0.0), ("kl", 2.0), ("kl-all", 0.1)]
)
def test_one_call_is_the_sum_of_its_native_parts(surrogate, margin, absent, dtype):
    logits = (2 * torch.randn(3, 50, 12, dtype=dtype)).requires_grad_()
    labels = torch.randint(9, (3, 50))
    labels[:, 4] = -100
    spectral = {"surrogate": surrogate, "margin": margin}
    total, parts = FK.fair_cross_entropy(
        logits,
        labels,
        ce_weight=0.5,
        sym_weight=2.0,
        spec_weight=3.0,
        absent=absent,
        return_parts=True,
        backend="native",
        **spectral,
    )
    alone = (
        torch.stack([torch.nn.functional.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]),
        FK.symmetry_loss(logits, labels, absent=absent, backend="native"),
        FK.spectral_loss(logits, labels, backend="native", **spectral),
    )
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    for part, other in zip(parts, alone, strict=False):
        torch.testing.assert_close(part, other.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(parts.confusion, FK.soft_confusion(logits, labels, backend="native").detach())

    expected = 0.5 * alone[0] + 2 * alone[1] + 3 * alone[2]
    torch.testing.assert_close(total, expected, rtol=4 * tolerance, atol=4 * tolerance)
    grads = [torch.autograd.grad(value.sum(), logits)[0] for value in (total, expected)]
    torch.testing.assert_close(*grads, rtol=100 * tolerance, atol=tolerance)


def regime(name, sure=25):
    """Logits and labels for each way in which the kernel goes through a batch, with confident rows of every kind."""
    rows, classes, occurring = {
        "few classes": (500, 5, 5),
        "blocks": (70_000, 4, 3),
        "blocks of sorted rows": (3000, 90, 90),
        "rates picked": (40, 700, 30),
        "labels sorted": (6, 3000, 3000),
        "half of the classes": (300, 130, 64),
    }[name]
    logits, labels = 3 * torch.randn(rows, classes), torch.randint(occurring, (rows,))
    peaks = torch.randint(classes, (rows,))
    peaks[::3] = labels[::3]  # right
    peaks[1::3] = labels[1::3].roll(1)  # wrong, and the class occurs
    logits[torch.arange(rows), peaks] += sure * torch.rand(rows)
    labels[::7] = -100
    logits[::14] = math.nan  # nobody looks
    return logits, labels


REGIMES = ("few classes", "blocks", "blocks of sorted rows", "rates picked", "labels sorted", "half of the classes")


def every_way():
    for name, dtype in itertools.product(REGIMES, (torch.float32, torch.float64)):
        slow = name == "labels sorted" and dtype == torch.float64  # six seconds each
        yield pytest.param(name, dtype, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("options", [{}, {"sym_weight": 0.0, "label_smoothing": 0.1}, {"absent": "zero"}])
@pytest.mark.parametrize(("name", "dtype"), every_way())
def test_every_way_through_a_batch(name, options, dtype):
    logits, labels = regime(name, sure=25 if dtype == torch.float32 else 5)  # of surer ones float64 is no measure
    leaf = logits.to(dtype).requires_grad_()
    operator = OPERATORS["fair_cross_entropy"]
    args = (*handed_on("fair_cross_entropy", Sample(name, (leaf.detach(), labels), options))[:-1], False)
    total = FK.fair_cross_entropy(leaf, labels, **options, backend="native")
    (grad,) = torch.autograd.grad(total, leaf)
    exact, plain = (reference(operator, args, wide)[0] for wide in (torch.float64, dtype))
    assert_no_worse(total.detach(), plain, exact)
    exact, plain = (reference_gradient(operator, args, torch.ones_like(total), wide) for wide in (torch.float64, dtype))
    # Against sums in long double PyTorch's gradient in float64 is off by 37 ulps, the kernel's by less than one.
    assert_no_worse(grad, plain, exact, size=0, accuracy=1e-14 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("name", REGIMES)
def test_threads_change_no_bit_of_any_of_them(name, threads):
    logits, labels = regime(name)
    leaf, found = logits.requires_grad_(), []
    for count in (1, 2, 3):
        threads(count)
        total = FK.fair_cross_entropy(leaf, labels, spec_weight=0.5, backend="native")
        found.append((total.detach(), *torch.autograd.grad(total, leaf)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", REGIMES)
def test_nothing_counts(name):
    logits, labels = regime(name)
    leaf, labels = logits.requires_grad_(), torch.full_like(labels, -100)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        total = FK.fair_cross_entropy(leaf, labels, reduction=reduction, backend="native")
        torch.testing.assert_close(total.detach(), torch.tensor(expected), equal_nan=True)
        assert torch.autograd.grad(total, leaf)[0].eq(0).all()


@pytest.mark.parametrize("name", REGIMES)
def test_a_nan_is_seen_in_all_of_them(name):
    logits, labels = regime(name)
    logits[1, -1] = math.nan
    leaf = logits.requires_grad_()
    total = FK.fair_cross_entropy(leaf, labels, backend="native")
    assert total.isnan()
    assert torch.autograd.grad(total, leaf)[0][1].isnan().all()


PEAK = """
import resource, torch
import fairkernels.functional as FK
from fairkernels.app.bench_rivals import handed_on

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(2)
small = torch.randn(8, 30, requires_grad=True)
FK.fair_cross_entropy(small, torch.arange(8), spec_weight=1.0, surrogate={surrogate!r}, backend="native").backward()
logits, labels = torch.randn(256, 20000, requires_grad=True), torch.arange(256) * 78
before = peak()
FK.fair_cross_entropy(logits, labels, spec_weight={spec_weight}, surrogate={surrogate!r}, backend="native").backward()
print((peak() - before) / logits.nbytes)
"""


@pytest.mark.parametrize(
    ("surrogate", "spec_weight", "matrices"),
    [
        ("soft", 0.0, 1),
        ("soft", 1.0, 2),
        pytest.param("gated", 1.0, 2, marks=pytest.mark.slow),
        pytest.param("kl-all", 1.0, 2, marks=pytest.mark.slow),
        ("kl", 1.0, 1),
    ],
)
def test_memory(surrogate, spec_weight, matrices):
    """The gradient and, with a dense surrogate, one matrix of the classes that occur; K x K is 78 times the logits."""
    code = PEAK.format(surrogate=surrogate, spec_weight=spec_weight)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < matrices + 0.5


def test_the_gradient_that_came_with_the_value_can_be_asked_for_again():
    """Whatever was done to it in between, and whatever it is multiplied with."""
    logits, labels = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
    loss = FK.fair_cross_entropy(logits, labels)
    expected = torch.autograd.grad(FK.fair_cross_entropy(logits, labels, backend="reference"), logits)[0]
    for factor in (1.0, 3.0, 1.0):
        (grad,) = torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(grad, factor * expected)
        grad.zero_()
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_half_precision_is_scaled_before_it_is_rounded():
    """What a loss scaler is for: without it a tenth of these gradients would be 0."""
    logits, labels = 2 * torch.randn(4096, 100).half(), torch.arange(4096) % 100
    exact = torch.autograd.grad(FK.fair_cross_entropy(leaf := logits.double().requires_grad_(), labels), leaf)[0]
    loss = FK.fair_cross_entropy(leaf := logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(8192.0, dtype=torch.float16))
    assert ((grad.double() / 8192 - exact).norm() / exact.norm()).item() < 1e-3
    assert ((grad == 0) == (exact == 0)).float().mean() > 0.999


OPTIONS = ({"eps": 1e-310}, {"sym_weight": 1e-320}, {"margin": math.inf}, {"return_parts": 0})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_reach_the_kernel_bit_for_bit(options):
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    with_gradient = FK.fair_cross_entropy(logits.clone().requires_grad_(), labels, **options)
    torch.testing.assert_close(with_gradient.detach(), FK.fair_cross_entropy(logits, labels, **options), rtol=0, atol=0)


def test_options_do_not_depend_on_the_locale():
    before = locale.setlocale(locale.LC_NUMERIC)
    logits, labels = torch.randn(8, 3, requires_grad=True), torch.arange(8) % 3
    options = {"eps": 0.28125, "sym_weight": 1.75}
    try:
        for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "de_DE.utf8", "C"):
            try:
                locale.setlocale(locale.LC_NUMERIC, name)
            except locale.Error:
                continue
            loss = FK.fair_cross_entropy(logits, labels, **options)
            torch.testing.assert_close(loss, FK.fair_cross_entropy(logits, labels, backend="reference", **options))
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)


def test_many_upstream_gradients_at_once():
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    one_by_one = torch.autograd.functional.jacobian(lambda z: FK.fair_cross_entropy(z, labels), logits)
    together = torch.autograd.functional.jacobian(lambda z: FK.fair_cross_entropy(z, labels), logits, vectorize=True)
    torch.testing.assert_close(together, one_by_one)


def test_backward_of_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        logits = torch.randn(8, 3, requires_grad=True)
        FK.fair_cross_entropy(logits, torch.zeros(8, dtype=torch.int64)).backward()
        assert logits.grad.shape == (8, 3)


def test_a_mean_over_weights_of_zero_is_nan_with_smoothing_too():
    logits, labels, weight = torch.randn(2, 3), torch.tensor([1, 1]), torch.tensor([1.0, 0.0, 2.0])
    options = {"weight": weight, "label_smoothing": 0.1}
    for backend in (*COMPILED, "reference"):
        assert FK.fair_cross_entropy(logits, labels, sym_weight=0.0, backend=backend, **options).isnan()
    assert F.cross_entropy(logits, labels, **options).isnan()


@pytest.mark.parametrize("margin", [10.0, 20.0, 30.0])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_gradients_of_confident_rows_do_not_cancel(margin, ahead):
    """At the class that a row is sure of, right or wrong, the derivative is a difference of nearly equal numbers."""
    labels = torch.arange(40) % 20
    logits = torch.randn(40, 20, dtype=torch.float64).float().double()
    logits[torch.arange(40), (labels + ahead * (labels % 3)) % 20] = margin
    narrow, exact = logits.float().requires_grad_(), logits.requires_grad_()
    for leaf in (narrow, exact):
        FK.fair_cross_entropy(leaf, labels, ce_weight=0.0).backward()
    error = (narrow.grad.double() - exact.grad).abs() / exact.grad.abs().clamp(min=1e-20)
    assert error.max() < 1e-3


def test_what_leaks_from_a_transform_keeps_its_gradient():
    """torch.autograd.Function unwraps it; a way around that must not lose it."""
    leaf, leaked = torch.randn(6, 4, requires_grad=True), []
    torch.func.grad(lambda x: (leaked.append(2 * x), x.sum())[1])(leaf)
    labels = torch.arange(6) % 4
    FK.fair_cross_entropy(leaked[0], labels).backward()
    (expected,) = torch.autograd.grad(FK.fair_cross_entropy(2 * leaf, labels), leaf)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("kind", ["int32", "shared", "expanded", "int64"])
def test_no_usual_call_is_refused_first(kind, monkeypatch):
    """A kernel that refuses raises, which takes longer than the checks in Python that it spares."""
    calls = []
    original = dispatch.call_native
    monkeypatch.setattr(dispatch, "call_native", lambda *args: (calls.append(args[0]), original(*args))[1])
    logits, labels = torch.randn(2, 6, 4, requires_grad=True), torch.arange(6) % 4
    made = {"int32": labels.int().repeat(2, 1), "shared": labels, "expanded": labels.expand(2, 6)}
    labels = made.get(kind, labels.repeat(2, 1))
    FK.fair_cross_entropy(logits, labels, backend="native").sum().backward()
    FK.confusion_counts(logits.argmax(-1), labels, num_classes=4, backend="native")
    assert calls == ["fair_cross_entropy_with_gradient", "confusion_counts"]


def test_python_threads_with_different_options():
    """Options are remembered for each thread."""
    logits, labels = torch.randn(16, 5), torch.arange(16) % 5

    def gradient(weight):
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(FK.fair_cross_entropy(leaf, labels, sym_weight=weight, backend="native"), leaf)[0]

    weights = [0.5 * i for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradient, weights * 50))
    for weight, grad in zip(weights * 50, found, strict=True):
        assert torch.equal(grad, gradient(weight))


@pytest.mark.parametrize(("rows", "classes"), [(6, 3), (40, 8), (40, 30), (6, 200)])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("backend", "left_out"),
    [(backend, "ce_weight") for backend in COMPILED]
    + [(backend, "sym_weight") for backend in COMPILED if backend != "native"],
)
def test_gradients_of_sure_rows(backend, left_out, rows, classes, right):
    """Each row is measured by itself: beside unsure ones they are small, and the half of a difference that cancels."""
    labels = torch.arange(rows) % min(classes, 4)
    top = labels if right else (labels + 1) % min(classes, 4)
    logits = torch.randn(rows, classes)
    logits[torch.arange(rows), top] += 18
    options = {left_out: 0.0, "backend": backend}
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(FK.fair_cross_entropy(leaf, labels, **options), leaf)[0].double())
    scale = grads[1].abs().amax(1, keepdim=True)
    assert scale.gt(0).all()
    torch.testing.assert_close(grads[0] / scale, grads[1] / scale, rtol=0, atol=2e-4)
