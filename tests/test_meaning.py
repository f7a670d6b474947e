"""The references themselves: against loops, PyTorch and SciPy, with the numbers of the specification by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import COMPILED, DEVICE, ON_GPU

import fairkernels.functional as FK
from fairkernels.ops.reference._philox import philox
from fairkernels.ops.reference.spectral_norm import resolvent
from fairkernels.ops.samples import Maker

pytestmark = pytest.mark.usefixtures("on_the_device")


def batch(samples=30, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=dtype, device="cpu")
    labels = torch.randint(classes, (samples,), generator=generator, device="cpu")
    return logits.to(DEVICE), labels.to(DEVICE)


def loop_confusion(logits, labels, weights=None, temperature=1.0):
    """S and n, one sample at a time."""
    classes = logits.shape[1]
    sums, counts = torch.zeros(classes, classes, dtype=logits.dtype), torch.zeros(classes, dtype=logits.dtype)
    for b, y in enumerate(labels.tolist()):
        weight = 1.0 if weights is None else weights[b]
        sums[y] += weight * torch.softmax(logits[b] / temperature, 0)
        counts[y] += weight
    return sums, counts


def loop_gap(rates, present, eps):
    """The equation, one pair at a time; returns the sum and the number of pairs."""
    total, pairs = 0.0, 0
    for i in range(len(rates)):
        for j in range(i + 1, len(rates)):
            if present[i] and present[j]:
                gap, mass = abs(rates[i, j] - rates[j, i]), rates[i, j] + rates[j, i]
                total, pairs = total + (gap * mass / (mass + eps) if mass > 0 else 0.0), pairs + 1
    return total, pairs


def test_soft_confusion(backend):
    logits, labels = batch()
    weights = torch.rand(len(labels), dtype=logits.dtype)
    sums, counts = loop_confusion(logits, labels, weights, temperature=1.7)
    options = {"sample_weight": weights, "temperature": 1.7, "backend": backend}
    rates, n = FK.soft_confusion(logits, labels, **options, return_counts=True)
    torch.testing.assert_close(n, counts)
    torch.testing.assert_close(rates, sums / counts[:, None])
    torch.testing.assert_close(FK.soft_confusion(logits, labels, normalize=None, **options), sums)
    torch.testing.assert_close(FK.soft_confusion(logits, labels, normalize="all", **options), sums / counts.sum())


def test_soft_confusion_rows_sum_to_one_or_zero(backend):
    logits, _ = batch(classes=6)
    rates = FK.soft_confusion(logits, torch.arange(30) % 4, backend=backend)
    torch.testing.assert_close(rates.sum(-1), torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=rates.dtype))


@pytest.mark.parametrize("absent", ["ignore", "zero"])
@pytest.mark.parametrize("eps", [0.1, 0.0, 1 / 7])
def test_symmetry(backend, absent, eps):
    logits, _ = batch(12, 7)
    labels = torch.tensor([0, 2, 2, 5, 5, 5, 0, 6, 6, 2, 0, 5])
    sums, counts = loop_confusion(logits, labels)
    rates = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), 0)
    present = [bool(n > 0) or absent == "zero" for n in counts]
    total, pairs = loop_gap(rates, present, eps)
    options = {"eps": eps, "absent": absent, "backend": backend}

    assert pairs == (21 if absent == "zero" else 6)
    for reduction, expected in (("sum", total), ("mean", total / pairs)):
        for value in (
            FK.symmetry_gap(rates, counts, reduction=reduction, **options),
            FK.symmetry_gap(rates, reduction=reduction, **options),  # a row of zeros is an absent class
            FK.symmetry_loss(logits, labels, reduction=reduction, **options),
        ):
            assert value.item() == pytest.approx(float(expected), rel=1e-12)


def test_a_hand_made_gap(backend):
    rates = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = 0.2 * 0.4 / 0.5  # |0.1 - 0.3| · s / (s + 0.1) with s = 0.4; the other pairs have no mass
    assert FK.symmetry_gap(rates, backend=backend).item() == pytest.approx(expected, rel=1e-14)
    assert FK.symmetry_gap(rates, reduction="mean", backend=backend).item() == pytest.approx(expected / 3, rel=1e-14)


def test_absent_classes_are_charged_only_where_asked(backend):
    logits = torch.zeros(2, 10, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert FK.symmetry_loss(logits, labels, backend=backend).item() == 0
    charged = 16 * 0.1 * 0.1 / 0.2  # two present classes, eight absent ones, each predicted with 0.1
    assert FK.symmetry_loss(logits, labels, absent="zero", backend=backend).item() == pytest.approx(charged)


@pytest.mark.parametrize("classes", [3, 70])
def test_a_mean_of_no_pairs_is_a_zero_on_the_graph(backend, classes):
    logits, labels = batch(4, classes)
    loss = FK.symmetry_loss(logits.requires_grad_(), torch.full_like(labels, 2), reduction="mean", backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_ignored_rows_do_not_exist(backend):
    logits, labels = batch()
    logits[::3], kept = torch.nan, torch.arange(30) % 3 != 0
    labels[::3] = 77
    leaf = logits.clone().requires_grad_()
    for function in (FK.soft_confusion, FK.symmetry_loss, FK.spectral_loss, FK.fair_cross_entropy):
        result = function(leaf, labels, ignore_index=77, backend=backend)
        expected = function(logits[kept], labels[kept], backend=backend)
        torch.testing.assert_close(result, expected)
        (grad,) = torch.autograd.grad(result.square().sum(), leaf)
        assert (grad[~kept] == 0).all()
        assert grad.isfinite().all()


def test_confident_rows_keep_their_gradient(backend):
    """∂L/∂z of the top class: the difference of two nearly equal numbers, wrong by 100 % if taken naively."""
    for margin in (5.0, 10.0, 15.0, 20.0, 30.0):
        logits = torch.zeros(2, 3, dtype=torch.float64)
        logits[0, 0], logits[0, 1], logits[1, 1] = margin, 0.5, 1.0
        labels, grads = torch.tensor([0, 1]), []
        for dtype in (torch.float32, torch.float64):
            leaf = logits.to(dtype).requires_grad_()
            FK.symmetry_loss(leaf, labels, backend=backend).backward()
            grads.append(leaf.grad[0, 0].double())
        assert grads[0].item() == pytest.approx(grads[1].item(), rel=1e-4 if backend != "reference" else 2)


def test_small_rates_do_not_underflow(backend):
    """In float32 (mass + eps)² is 0 at 1e-24; in float16 gap · mass is."""
    rates = torch.tensor([[1.0, 3e-24], [1e-24, 1.0]], requires_grad=True)
    value = FK.symmetry_gap(rates, eps=1e-24, backend=backend)
    assert value.item() == pytest.approx(2e-24 * 4 / 5, rel=1e-5)
    (grad,) = torch.autograd.grad(value, rates)
    together, down = 4 / 5, 2 / 5 * 1 / 5
    assert grad[0, 1].item() == pytest.approx(down + together, rel=1e-5)
    assert grad[1, 0].item() == pytest.approx(down - together, rel=1e-5)


def test_second_derivative_without_damping_is_finite_where_rates_underflow():
    logits = (60 * Maker(device=DEVICE).normal(20, 10)).requires_grad_()
    loss = FK.symmetry_loss(logits, torch.arange(20) % 10, eps=0.0)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), logits)[0].isfinite().all()


def test_kl_all_compares_logits_at_no_margin():
    """Rounded probabilities tie, or vanish, where logits do not."""
    logits = 60 * Maker(torch.float32, DEVICE).normal(200, 10)
    labels = torch.arange(200) % 10
    value = FK.spectral_loss(logits, labels, surrogate="kl-all")
    matrix = loop_spectral_matrix(logits.double(), labels, "kl-all", 0.0)
    assert value.item() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-5)


def test_counts_may_be_integers(backend):
    rates, counts = torch.rand(3, 3), torch.tensor([2, 0, 1])
    expected = FK.symmetry_gap(rates, counts.float(), backend=backend)
    torch.testing.assert_close(FK.symmetry_gap(rates, counts, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_beyond_its_integers(backend, dtype):
    labels = torch.zeros(5000, dtype=torch.int64)
    _, counts = FK.soft_confusion(torch.zeros(5000, 2, dtype=dtype), labels, return_counts=True, backend=backend)
    assert counts.tolist() == [5000, 0]


@pytest.mark.parametrize("function", [FK.symmetry_loss, FK.spectral_loss, FK.fair_cross_entropy])
def test_nan_is_never_lost(function, backend):
    for labels in ([0, 1, 2, 1], [3, 3, 3, 3], [0, 0, 1, 0]):
        for row in range(4):
            logits = torch.randn(4, 4)
            logits[row, 2] = torch.nan
            assert function(logits, torch.tensor(labels), backend=backend).isnan(), (labels, row)


@pytest.mark.parametrize("surrogate", ["kl", "kl-all", "soft", "gated"])
@pytest.mark.parametrize(("samples", "classes"), [(3, 1), (6, 4), (600, 3), (9, 300)])
def test_a_row_without_a_softmax_is_not_lost(samples, classes, surrogate, backend):
    """Its class may seem to be ahead of all others, so that nothing would be charged."""
    logits, labels = batch(samples, classes)
    for value in (torch.inf, -torch.inf, torch.nan):
        broken = logits.clone()
        broken[1, labels[1] if value > 0 else slice(None)] = value
        assert FK.spectral_loss(broken, labels, surrogate=surrogate, backend=backend).isnan(), value


def test_a_nan_among_many_samples_is_not_lost(backend):
    logits, labels = batch(1100, 3)
    logits[700, 1] = torch.nan
    rates = FK.soft_confusion(logits, labels, backend=backend)
    assert rates.isnan().all(1).tolist() == (torch.arange(3) == labels[700]).tolist()


def skip_where_many_classes_take_long(backend):
    if backend == "reference":
        pytest.skip("takes K x K numbers")
    if backend == "triton" and not ON_GPU:
        pytest.skip("takes minutes on Triton's interpreter")


@pytest.mark.parametrize("absent", ["ignore", "zero"])
@pytest.mark.parametrize(
    ("samples", "classes"),
    [(5, 70_000), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((3, 1_000_000), (2060, 2070)))],
)
def test_symmetry_loss_of_few_of_many_classes(samples, classes, absent, backend):
    """More than what a block of a GPU marks in its shared memory; two problems, in which other classes occur."""
    skip_where_many_classes_take_long(backend)
    occurs = torch.tensor([[0, classes // 3, classes - 1], [1, classes // 2, classes - 3]])
    place = torch.arange(samples) % 3
    logits = torch.randn(2, samples, classes)
    logits.scatter_add_(2, occurs[:, None].expand(-1, samples, -1), torch.full((2, samples, 3), math.log(classes)))

    def equation(rows, occurs):
        sums = torch.zeros(3, classes, dtype=rows.dtype).index_add(0, place, rows.softmax(1))
        rates = sums / place.bincount()[:, None]
        gap = FK.symmetry_gap(rates[:, occurs], backend="reference")
        others = rates.masked_fill(torch.zeros(classes, dtype=torch.bool).scatter(0, occurs, True), 0)
        return gap + (others * others / (others + 0.1)).sum() * (absent == "zero")

    values, slopes = [], []
    for rows, own in zip(logits.double(), occurs, strict=True):
        slope, value = torch.func.grad_and_value(equation)(rows, own)
        values.append(value)
        slopes.append(slope)
    leaf = logits.requires_grad_()
    value = FK.symmetry_loss(leaf, occurs[:, place], absent=absent, backend=backend)
    value.sum().backward()
    true = torch.stack(slopes)
    torch.testing.assert_close(value.double(), torch.stack(values), rtol=1e-4, atol=0)
    torch.testing.assert_close(leaf.grad.double(), true, rtol=1e-4, atol=1e-4 * true.abs().max().item())


@pytest.mark.parametrize("function", [FK.symmetry_loss, FK.spectral_loss])
def test_empty_batch_is_a_zero_on_the_graph(function, backend):
    logits = torch.zeros(0, 4, requires_grad=True)
    result = function(
        logits, torch.zeros(0, dtype=torch.int64), backend=backend if function is FK.symmetry_loss else None
    )
    result.backward()
    assert result.item() == 0
    assert logits.grad.shape == (0, 4)


def test_confusion_counts(backend):
    metrics = pytest.importorskip("sklearn.metrics")
    predictions, labels = torch.randint(6, (2, 500))
    counts = FK.confusion_counts(predictions, labels, num_classes=6, backend=backend)
    assert counts.tolist() == metrics.confusion_matrix(labels.tolist(), predictions.tolist()).tolist()


# --- spectral norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (7, 3)])
def test_spectral_norm_and_vectors(shape, backend):
    matrix = torch.randn(2, *shape, dtype=torch.float64)
    sigma, u, v = FK.spectral_norm(matrix, return_vectors=True, backend=backend)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix, 2))
    torch.testing.assert_close((matrix @ v.unsqueeze(-1)).squeeze(-1), sigma.unsqueeze(-1) * u)
    torch.testing.assert_close((u.norm(dim=-1), v.norm(dim=-1)), (torch.ones(2).double(),) * 2)


def test_spectral_norm_second_derivative_is_that_of_autograd_where_autograd_has_one():
    matrix = torch.randn(3, 4, dtype=torch.float64)
    ours = torch.autograd.functional.hessian(FK.spectral_norm, matrix)
    theirs = torch.autograd.functional.hessian(lambda m: torch.linalg.matrix_norm(m, 2), matrix)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 3), torch.eye(3), torch.ones(3, 1) @ torch.ones(1, 3), torch.ones(2, 4)]
)
def test_spectral_norm_is_twice_differentiable_where_autograd_is_nan(matrix):
    matrix = matrix.double().requires_grad_()
    (grad,) = torch.autograd.grad(FK.spectral_norm(matrix), matrix, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum() + grad[0, 0], matrix)
    assert grad.isfinite().all()
    assert second.isfinite().all()


def test_resolvent_is_symmetric():
    matrix, a, b = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close((resolvent(matrix, a) * b).sum(), (resolvent(matrix, b) * a).sum())


def loop_spectral_matrix(logits, labels, surrogate, margin):
    """The four matrices, one sample at a time."""
    classes = logits.shape[1]
    matrix = torch.zeros(classes, classes, dtype=logits.dtype)
    counts = torch.bincount(labels, minlength=classes)
    for z, y in zip(logits, labels.tolist(), strict=True):
        p = z.softmax(0)
        wrong = [j for j in range(classes) if j != y]
        if surrogate == "kl":
            top = max(wrong, key=lambda j: z[j])
            if z[y] <= margin + z[top]:
                shifted = z + margin
                shifted[y] = z[y]
                matrix[y, top] += -shifted.log_softmax(0)[y] / counts[y]
        for j in wrong:
            if surrogate == "kl-all" and p[y] <= margin + p[j]:
                matrix[y, j] += -p[y].log() / len(labels)
            if surrogate == "soft":
                matrix[y, j] += p[j] / counts[y]
            if surrogate == "gated":
                matrix[y, j] += torch.sigmoid(margin + z[j] - z[y]) * p[j] / counts[y]
    return matrix


@pytest.mark.parametrize("surrogate", ["kl", "kl-all", "soft", "gated"])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_spectral_loss(surrogate, margin, backend):
    logits, labels = batch(classes=6)
    weight = torch.rand(6, dtype=torch.float64)
    matrix = loop_spectral_matrix(logits, labels, surrogate, margin)
    for class_weight, expected in ((None, matrix), (weight, weight[:, None] * matrix)):
        options = {"surrogate": surrogate, "margin": margin, "class_weight": class_weight, "backend": backend}
        value = FK.spectral_loss(logits, labels, **options)
        torch.testing.assert_close(value, torch.linalg.matrix_norm(expected, 2))


@pytest.mark.parametrize("classes", [5, 70])
def test_a_start_of_any_stride(classes, backend):
    """Seen where the iteration has not converged."""
    logits, labels = batch(classes=classes)
    start = torch.rand(classes, 2, dtype=logits.dtype)
    found, expected = (
        FK.spectral_loss(logits, labels, start=hint, iters=1, backend=backend)
        for hint in (start[:, 0], start[:, 0].contiguous())
    )
    torch.testing.assert_close(found, expected)


def test_gate_carries_no_gradient(backend):
    logits, labels = batch()
    leaf = logits.clone().requires_grad_()
    value = FK.spectral_loss(leaf, labels, surrogate="gated", margin=0.3, backend=backend)
    (grad,) = torch.autograd.grad(value, leaf)
    gates = torch.sigmoid(0.3 + logits - logits.gather(1, labels[:, None]))
    gates = gates.scatter(1, labels[:, None], 0.0)
    rows = gates * leaf.softmax(1)
    counts = torch.bincount(labels, minlength=5)
    matrix = torch.zeros(5, 5, dtype=torch.float64).index_add(0, labels, rows) / counts[:, None]
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, 2), leaf)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("surrogate", ["kl", "kl-all"])
def test_no_error_inside_the_margin_is_a_zero_on_the_graph(surrogate, backend):
    labels = torch.arange(4)
    logits = (9 * F.one_hot(labels).double()).requires_grad_()
    value = FK.spectral_loss(logits, labels, surrogate=surrogate, backend=backend)
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


def test_underflowing_probability_has_a_finite_loss(backend):
    logits = torch.tensor([[0.0, 1e4], [1e4, 0.0]])
    for surrogate in ("kl", "kl-all"):
        value = FK.spectral_loss(logits, torch.tensor([0, 0]), surrogate=surrogate, backend=backend)
        assert value.item() == pytest.approx(5000)


# --- fair cross-entropy -------------------------------------------------------------------------------------------


def test_fair_cross_entropy_is_the_sum_of_its_terms(backend):
    logits, labels = batch()
    logits.requires_grad_()
    options = {"weight": torch.rand(5).double(), "label_smoothing": 0.1, "reduction": "sum"}
    total, parts = FK.fair_cross_entropy(
        logits,
        labels,
        ce_weight=0.5,
        sym_weight=2.0,
        spec_weight=3.0,
        surrogate="kl",
        return_parts=True,
        backend=backend,
        **options,
    )
    terms = (
        F.cross_entropy(logits, labels, **options),
        FK.symmetry_loss(logits, labels, backend="reference"),
        FK.spectral_loss(logits, labels, surrogate="kl", backend="reference"),
    )
    for part, term in zip(parts, terms, strict=False):
        torch.testing.assert_close(part, term.detach())
    torch.testing.assert_close(parts.confusion, FK.soft_confusion(logits, labels).detach())
    expected = 0.5 * terms[0] + 2 * terms[1] + 3 * terms[2]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (total, expected)))


@pytest.mark.parametrize("samples", [0, 1, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_fairness_it_is_cross_entropy(samples, reduction, smoothing, weighted, backend):
    logits, labels = batch(samples, 4, dtype=torch.float32)
    labels[2:4] = -100
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "weight": torch.rand(4) if weighted else None,
    }
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = (
        FK.fair_cross_entropy(ours, labels, sym_weight=0, backend=backend, **options),
        F.cross_entropy(theirs, labels, **options),
    )
    torch.testing.assert_close(value, expected, equal_nan=True)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


def test_fair_cross_entropy_of_many_weighted_classes(backend):
    skip_where_many_classes_take_long(backend)
    logits, labels = batch(5, 30_000, dtype=torch.float32)
    options = {"label_smoothing": 0.2, "weight": torch.rand(30_000)}
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = FK.fair_cross_entropy(ours, labels, sym_weight=0, backend=backend, **options)
    expected = F.cross_entropy(theirs, labels, **options)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_weight_of_zero_skips_an_infinite_term():
    logits = torch.tensor([[0.0, torch.inf]])
    labels = torch.tensor([0])
    assert FK.fair_cross_entropy(logits, labels, ce_weight=0.0, sym_weight=0.0).item() == 0


# --- attack step --------------------------------------------------------------------------------------------------


def attack_point(*shape, dtype=torch.float64):
    x = torch.rand(*shape, dtype=dtype)
    return x + 0.03 * torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype), x


@pytest.mark.parametrize("targeted", [False, True])
def test_linf_step(backend, targeted):
    x_adv, grad, x = attack_point(4, 3, 5, 5)
    delta = x_adv + (-1 if targeted else 1) * 0.01 * grad.sign() - x
    expected = (x + delta.clamp(-0.02, 0.02)).clamp(0.1, 0.9)
    moved = FK.pgd_step(x_adv, grad, x, alpha=0.01, eps=0.02, bounds=(0.1, 0.9), targeted=targeted, backend=backend)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("targeted", [False, True])
def test_l2_step(backend, targeted):
    x_adv, grad, x = attack_point(4, 3, 5, 5)
    alpha, eps = torch.tensor([0.01, 0.1, 1.0, 10.0]).double(), torch.tensor([0.5, 0.1, 0.3, 5.0]).double()
    norms = grad.flatten(1).norm(dim=1)[:, None, None, None]
    delta = x_adv - x + (-1 if targeted else 1) * alpha[:, None, None, None] * grad / norms
    lengths = delta.flatten(1).norm(dim=1)
    delta = delta * (eps / lengths).clamp(max=1)[:, None, None, None]
    moved = FK.pgd_step(x_adv, grad, x, alpha=alpha, eps=eps, norm="l2", targeted=targeted, backend=backend)
    torch.testing.assert_close(moved, (x + delta).clamp(0, 1))


def test_l2_step_near_the_centre_moves(backend):
    """In float32 the three-dot form of the new length may be negative here; its square root throws the step back."""
    x = torch.full((50, 3, 8, 8), 0.5)
    x_adv = x + 1e-7 * torch.randn(x.shape)
    moved = FK.pgd_step(x_adv, x_adv - x, x, alpha=1e-3, eps=1.0, norm="l2", targeted=True, backend=backend)
    lengths = (moved - x).flatten(1).norm(dim=1)
    assert (lengths > 0.9e-3).all()


def test_elements_without_a_sign_move_only_by_projection(backend):
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    x_adv = torch.tensor([[0.5, 0.9, 0.5, 0.5]])
    grad = torch.tensor([[torch.nan, torch.nan, 0.0, -torch.inf]])
    moved = FK.pgd_step(x_adv, grad, x, alpha=0.05, eps=0.1, backend=backend)
    torch.testing.assert_close(moved, torch.tensor([[0.5, 0.6, 0.5, 0.45]]))


def test_a_nan_image_stays_nan(backend):
    x = torch.full((1, 40), 0.5)
    for place in ("x_adv", "x"):
        images = {"x_adv": x.clone(), "x": x.clone()}
        images[place][0, 7] = torch.nan
        moved = FK.pgd_step(images["x_adv"], torch.ones(1, 40), images["x"], alpha=0.1, eps=0.1, backend=backend)
        assert moved.isnan().nonzero().tolist() == [[0, 7]]


SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.3, 1.0, -2.0], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_native_steps_treat_every_special_value_as_the_reference_does(dtype, as_tensors):
    """All triples of special values in the images; parameters as numbers, and as tensors that change everywhere."""
    x_adv, grad, x = (images.to(dtype) for images in torch.cartesian_prod(SPECIAL, SPECIAL, SPECIAL).T[:, None])
    highs = [1.0, torch.inf, *([torch.nan] if as_tensors else [])]
    lows = [0.0, -torch.inf, *([torch.nan] if as_tensors else [])]
    for alpha, eps, low, high in itertools.product([0.1, torch.inf], [0.0, 0.2, torch.inf], lows, highs):
        numbers = [alpha, eps, low, high]
        if as_tensors:
            numbers = [torch.where(torch.arange(x.numel()) % 2 == 0, number, 0.5)[None] for number in numbers]
        alphas, radii, *bounds = numbers
        ours, theirs = (
            FK.pgd_step(x_adv, grad, x, alpha=alphas, eps=radii, bounds=tuple(bounds), backend=backend)
            for backend in ("native", "reference")
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(27, 31), (40, 50), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_change_anywhere_in_large_images(memory_format, size, dtype):
    """Kernels work in chunks of 1024 elements: parameters change within them, on their edges and beyond."""
    x_adv, grad, x = (images.to(dtype).contiguous(memory_format=memory_format) for images in attack_point(7, 3, *size))
    sample, channel = torch.linspace(0.02, 0.3, 7), torch.linspace(0.05, 0.2, 3).view(1, 3, 1, 1)
    place, everywhere = torch.rand(7, 1, *size).round(), torch.rand(x.shape)
    bounds = (0.1 + channel / 4, 0.9 - channel / 4)
    cases = [
        {"alpha": 0.1, "eps": sample},
        {"alpha": channel, "eps": channel, "bounds": bounds},
        {"alpha": sample, "eps": channel, "mask": place},
        {"alpha": everywhere, "eps": sample, "bounds": (0.2, bounds[1]), "mask": place.bool()},
        {"alpha": sample, "eps": sample, "bounds": bounds, "mask": place, "norm": "l2"},
    ]
    for case in cases:
        ours, theirs = (FK.pgd_step(x_adv, grad, x, **case, backend=backend) for backend in ("native", "reference"))
        torch.testing.assert_close(ours, theirs)
        if "mask" not in case:
            start = {key: case[key] for key in case if key != "alpha"}
            ours, theirs = (FK.random_start(x, **start, seed=5, backend=backend) for backend in ("native", "reference"))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_out_may_be_any_tensor(backend, norm):
    x_adv, grad, x = attack_point(4, 3, 6, 6, dtype=torch.float32)
    options = {"alpha": 0.05, "eps": 0.1, "norm": norm, "backend": backend}
    expected = FK.pgd_step(x_adv, grad, x, **options)
    fresh = torch.empty_like(x_adv, memory_format=torch.channels_last)
    for out in (fresh, x_adv.clone()):
        assert FK.pgd_step(x_adv, grad, x, out=out, **options) is out
        torch.testing.assert_close(out, expected)
    for number in range(3):
        tensors = [x_adv.clone(), grad.clone(), x.clone()]
        assert FK.pgd_step(*tensors, out=tensors[number], **options) is tensors[number]
        torch.testing.assert_close(tensors[number], expected)


def test_out_that_overlaps_an_input_elsewhere_is_still_right(backend):
    _, grad, x = attack_point(4, 9, dtype=torch.float32)
    storage = torch.rand(45)
    x_adv, out = storage[:36].view(4, 9), storage[9:].view(4, 9)
    expected = FK.pgd_step(x_adv.clone(), grad, x, alpha=0.05, eps=0.1, backend=backend)
    torch.testing.assert_close(FK.pgd_step(x_adv, grad, x, alpha=0.05, eps=0.1, out=out, backend=backend), expected)


def test_out_may_overlap_the_mask(backend):
    x, grad = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    storage = torch.rand(200)
    mask, out = storage[4:100].view(2, 3, 4, 4), storage[8:104].view(2, 3, 4, 4)
    options = {"alpha": 0.1, "eps": 0.1, "norm": "l2", "backend": backend}
    expected = FK.pgd_step(x, grad, x, mask=mask.clone(), **options)
    torch.testing.assert_close(FK.pgd_step(x, grad, x, mask=mask, out=out, **options), expected)


def test_channels_last_stays_channels_last(backend):
    x_adv, grad, x = (t.contiguous(memory_format=torch.channels_last) for t in attack_point(2, 3, 4, 4))
    moved = FK.pgd_step(x_adv, grad, x, alpha=0.05, eps=0.1, backend=backend)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert FK.random_start(x, eps=0.1, seed=0, backend=backend).is_contiguous(memory_format=torch.channels_last)


def test_philox_known_answer():
    """Random123's known-answer vectors for philox4x32-10."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(word) for word in philox((zero, zero, zero, zero), (0, 0))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = zero + 0xFFFFFFFF
    words = [int(word) for word in philox((ones, ones, ones, ones), (0xFFFFFFFF, 0xFFFFFFFF))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, -5])
def test_every_backend_draws_the_same_numbers(backend, seed):
    x = torch.full((3, 3, 17, 5), 0.5, dtype=torch.float64)
    for norm in ("linf", "l2"):
        ours, reference = (
            FK.random_start(x, eps=0.3, norm=norm, seed=seed, backend=used) for used in (backend, "reference")
        )
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_random_start_is_uniform_in_the_box(backend):
    stats = pytest.importorskip("scipy.stats")
    x = torch.full((8, 3, 32, 32), 0.5, dtype=torch.float64)
    noise = ((FK.random_start(x, eps=0.25, seed=1, backend=backend) - x) / 0.25).cpu()
    assert stats.kstest(noise.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    other = ((FK.random_start(x, eps=0.25, seed=2, backend=backend) - x) / 0.25).cpu()
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.03


def test_random_start_is_uniform_in_the_ball(backend):
    stats = pytest.importorskip("scipy.stats")
    dimensions, samples = 12, 4000
    x = torch.full((samples, dimensions), 0.5, dtype=torch.float64)
    noise = ((FK.random_start(x, eps=0.25, norm="l2", seed=1, backend=backend) - x) / 0.25).cpu()
    radii = noise.norm(dim=1)
    assert radii.max() <= 1 + 1e-12
    assert stats.kstest((radii**dimensions).numpy(), "uniform").pvalue > 1e-3  # the share of volume below a radius
    angles = noise[:, 0] / radii  # of a random direction with a fixed one
    assert (
        stats.kstest(((angles + 1) / 2).numpy(), stats.beta((dimensions - 1) / 2, (dimensions - 1) / 2).cdf).pvalue
        > 1e-3
    )
    assert noise.mean(0).abs().max() < 4 / math.sqrt(samples * dimensions)
