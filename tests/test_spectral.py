"""The spectral kernels: families of matrices that break iterations, and the official loop of the Sy-FAR baseline."""

import math

import pytest
import torch
from cases import COMPILED, DEVICE, ON_GPU

import fairkernels.functional as FK
from fairkernels.ops.schema import OPERATORS

pytestmark = [
    pytest.mark.skipif(not COMPILED, reason="the native library was not built"),
    pytest.mark.usefixtures("on_the_device"),
]

LARGE_ENOUGH = 40
"""The side of a matrix beyond which interpreted kernels take too long for these tests."""


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def not_interpreted(backend, size):
    if backend == "triton" and size > LARGE_ENOUGH and not ON_GPU:
        pytest.skip("takes too long on Triton's interpreter")


F64 = torch.float64
CONTRACT = OPERATORS["spectral_norm"].accuracy


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64, device="cpu").to(DEVICE)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64, device="cpu").to(DEVICE)


def blocks(size):
    """Two tied blocks and a smaller one, disjoint: ones overlap with both of the former."""
    part = max(size // 3, 1)
    block = uniform(part, part) / part
    rest = max(size - 2 * part, 0)
    return torch.block_diag(block, block, 0.9 * uniform(rest, rest, seed=1) / size)


FAMILIES = {
    "softmax": lambda k: normal(k, k).softmax(-1),
    "softmax, sharp": lambda k: (4 * normal(k, k)).softmax(-1),
    "off diagonal": lambda k: normal(k, k).softmax(-1).fill_diagonal_(0),
    "blocks": blocks,
    "graded": lambda k: uniform(k, k) * torch.logspace(0, -8, k, dtype=F64),
    "sparse": lambda k: uniform(k, k) * (uniform(k, k, seed=1) < 2 / k),
    "permutation": lambda k: torch.eye(k, dtype=F64).roll(1, 0),
    "identity": lambda k: torch.eye(k, dtype=F64),
    "rank one": lambda k: uniform(k, 1) @ uniform(1, k, seed=1),
    "rank one, signed": lambda k: normal(k, 1) @ normal(1, k, seed=1),
    "one entry": lambda k: torch.zeros(k, k, dtype=F64).index_put(
        (torch.tensor(k - 1), torch.tensor(0)), uniform(1)[0]
    ),
    "zero": lambda k: torch.zeros(k, k, dtype=F64),
    "tied": lambda k: torch.linalg.qr(normal(k, k))[0],
    "signed": lambda k: normal(k, k),
    "signed, symmetric": lambda k: normal(k, k) + normal(k, k).mT,
    "rows sum to 0": lambda k: normal(k, k) - normal(k, k).mean(-1, keepdim=True),
    "negative": lambda k: -uniform(k, k),
    "tall": lambda k: uniform(4 * k, k),
    "wide": lambda k: normal(k, 4 * k),
    "very tall": lambda k: normal(20 * k, 3),
    "very wide": lambda k: uniform(3, 20 * k),
    "tiny": lambda k: 1e-30 * uniform(k, k),
    "huge": lambda k: 1e30 * normal(k, k),
}


def relative_error(matrix, backend, **options):
    sigma, exact = (
        FK.spectral_norm(matrix, backend=backend, **options).double(),
        torch.linalg.matrix_norm(matrix.double(), 2),
    )
    return ((sigma - exact).abs() / exact.clamp(min=torch.finfo(F64).tiny)).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", ["locg", "power"])
@pytest.mark.parametrize("size", [1, 2, 10, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_sigma(family, size, method, dtype, backend):
    not_interpreted(backend, size)
    matrix = FAMILIES[family](size).to(dtype)
    slow = method == "power" and nearly_tied(matrix)  # a thousand steps are not enough there
    assert relative_error(matrix, backend, method=method) <= (1e-3 if slow else CONTRACT[dtype])


def nearly_tied(matrix):
    values = torch.linalg.svdvals(matrix.double())
    below = values[values < (1 - 1e-6) * values[0]]
    return len(below) > 0 and bool(below[0] > 0.99 * values[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("family", ["softmax", "blocks", "signed", "graded"])
def test_sigma_of_a_thousand_classes(family, dtype, backend):
    not_interpreted(backend, 1000)
    assert relative_error(FAMILIES[family](1000).to(dtype), backend) <= CONTRACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sigma_near_ties(dtype, backend):
    """Where the residual of the iteration says least of σ."""
    for seed in range(30):
        for spread in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            matrix = torch.diag(1 - spread * uniform(10, seed=seed)).to(dtype)
            assert relative_error(matrix, backend) <= CONTRACT[dtype], (seed, spread)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e-6, 1e6, 1e20, 1e37])
def test_scale(scale, dtype, backend):
    matrix = (scale * uniform(6, 6)).to(dtype)
    allowed = CONTRACT[dtype] if scale > 1e-40 else 1e-3  # float32 has few bits left there
    assert relative_error(matrix, backend) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_more_steps_do_no_harm(dtype, backend):
    for family in ("softmax", "signed", "blocks", "rank one", "tied"):
        for size in (5, 40):
            error = relative_error(FAMILIES[family](size).to(dtype), backend, tol=0.0, iters=500)
            assert error <= CONTRACT[dtype], family


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_a_pair(family, backend):
    matrix = FAMILIES[family](12)
    sigma, u, v = FK.spectral_norm(matrix, return_vectors=True, backend=backend)
    length = 1.0 if sigma > 0 else 0.0
    assert (u.norm().item(), v.norm().item()) == (pytest.approx(length), pytest.approx(length))
    assert v.sum() >= 0
    size = max(sigma.item(), 1e-300)
    torch.testing.assert_close(matrix @ v / size, sigma / size * u, rtol=0, atol=1e-8)
    torch.testing.assert_close(matrix.mT @ u / size, sigma / size * v, rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_is_never_worse(family, backend):
    """Also one that is the wrong vector, orthogonal to the right one, or nonsense."""
    matrix = FAMILIES[family](12)
    _, _, vh = torch.linalg.svd(matrix)
    starts = [*vh, *-vh, matrix.new_zeros(matrix.shape[1]), matrix.new_full((matrix.shape[1],), torch.nan)]
    for start in (*starts, 1e200 * vh[0], 1e-200 * vh[0], normal(matrix.shape[1], seed=3)):
        for dtype in (torch.float32, F64):
            assert relative_error(matrix.to(dtype), backend, start=start.to(dtype)) <= CONTRACT[dtype]


def test_a_warm_start_saves_steps(backend):
    size = LARGE_ENOUGH
    matrix = FAMILIES["softmax, sharp"](size)
    _, _, v = FK.spectral_norm(matrix, return_vectors=True, backend=backend)
    moved = matrix + 1e-3 * uniform(size, size, seed=2) / size
    exact = torch.linalg.matrix_norm(moved, 2)
    cold, warm = (FK.spectral_norm(moved, iters=2, start=start, backend=backend) for start in (None, v))
    assert (warm - exact).abs() < (cold - exact).abs()


@pytest.mark.parametrize("method", ["locg", "power"])
def test_it_stops_at_the_tolerance(method, backend):
    """Steps that change nothing would not show in σ, only in the time."""
    matrix = FAMILIES["softmax"](LARGE_ENOUGH)

    def vector(tol, iters):
        return FK.spectral_norm(matrix, method=method, tol=tol, iters=iters, return_vectors=True, backend=backend)[2]

    def steps(tol):
        stopped = vector(tol, 1000)
        return next(n for n in range(1, 1000) if torch.equal(vector(tol, n), stopped))

    assert 0 < steps(1e-3) < steps(1e-5) < steps(1e-10) < 100


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_gives_nan(value, backend):
    for shape in ((4, 4), (3, 200), (200, 3)):
        matrix = uniform(*shape)
        matrix[-1, -1] = value
        assert all(result.isnan().all() for result in FK.spectral_norm(matrix, return_vectors=True, backend=backend))


def test_gradient_away_from_ties(backend):
    for seed in range(20):
        for shape in ((5, 5), (12, 7), (3, 60), (60, 3)):
            ours, theirs = (normal(*shape, seed=seed).requires_grad_() for _ in range(2))
            first, second = torch.linalg.svdvals(ours.detach())[:2]
            if first - second < 0.05 * first:
                continue
            FK.spectral_norm(ours, backend=backend).backward()
            torch.linalg.matrix_norm(theirs, 2).backward()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)


def official_loop(logits, labels, margin):
    """The per-sample loop of the baseline: probabilities, their logarithm, one entry at a time."""
    classes = logits.shape[1]
    entries = [[logits.new_zeros(()) for _ in range(classes)] for _ in range(classes)]
    for z, y in zip(logits, labels.tolist(), strict=True):
        p = torch.softmax(z, 0)
        for j in range(classes):
            if j != y and p[y] <= margin + p[j]:
                entries[y][j] = entries[y][j] - torch.log(p[y]) / len(labels)
    return torch.linalg.matrix_norm(torch.stack([torch.stack(row) for row in entries]), 2)


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_kl_all_is_the_official_loop(margin, backend):
    compared = 0
    for seed in range(25):
        torch.manual_seed(seed)
        classes, samples = int(torch.randint(2, 7, ())), int(torch.randint(1, 16, ()))
        labels = torch.randint(classes, (samples,))
        ours, theirs = ((2 * normal(samples, classes, seed=seed)).requires_grad_() for _ in range(2))
        value = FK.spectral_loss(ours, labels, surrogate="kl-all", margin=margin, backend=backend)
        expected = official_loop(theirs, labels, margin)
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)
        expected.backward()
        value.backward()
        if theirs.grad.isfinite().all():  # autograd of matrix_norm is NaN for a matrix of zeros
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
            compared += 1
    assert compared > 10


def test_kl_all_where_the_official_loop_is_nan(backend):
    logits = torch.tensor([[0.0, 900.0, -1.0], [800.0, 0.0, -1.0], [-1.0, -2.0, 0.0]], dtype=F64)
    labels = torch.tensor([0, 1, 2])
    assert not official_loop(logits, labels, 0.0).isfinite()
    leaf = logits.requires_grad_()
    value = FK.spectral_loss(leaf, labels, surrogate="kl-all", backend=backend)
    value.backward()
    assert value.item() == pytest.approx(300)  # 900 / 3
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("surrogate", ["kl", "kl-all", "soft", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_surrogates_are_finite_and_right_for_extreme_logits(surrogate, dtype, backend):
    for scale in (1.0, 30.0, 300.0, 3e4):
        logits = (scale * normal(20, 6)).to(dtype)
        labels = torch.arange(20) % 6
        leaves = [logits.clone().requires_grad_(), logits.double().requires_grad_()]
        options = {"surrogate": surrogate, "margin": 0.25}
        results = [
            FK.spectral_loss(leaf, labels, backend=each, **options)
            for leaf, each in zip(leaves, (backend, "reference"), strict=True)
        ]
        assert results[0].item() == pytest.approx(results[1].item(), rel=CONTRACT[dtype])
        for result in results:
            result.backward()
        size = leaves[1].grad.abs().max().item()
        allowed = 300 * CONTRACT[dtype] * size + 1e-30  # where float32 underflows
        torch.testing.assert_close(leaves[0].grad.double(), leaves[1].grad, rtol=0, atol=allowed)


@pytest.mark.parametrize("surrogate", ["kl", "kl-all", "soft", "gated"])
def test_a_nan_logit_is_never_lost(surrogate, backend):
    for labels in ([0, 1, 2, 1], [3, 3, 3, 3], [0, 0, 1, 0]):
        for place in range(16):
            logits = 3 * normal(4, 4, seed=place)
            logits.view(-1)[place] = torch.nan
            leaf = logits.requires_grad_()
            value = FK.spectral_loss(leaf, torch.tensor(labels), surrogate=surrogate, backend=backend)
            value.backward()
            assert value.isnan(), (labels, place)
            assert leaf.grad[place // 4].isnan().any(), (labels, place)


@pytest.mark.parametrize("surrogate", ["kl", "kl-all"])
def test_no_error_within_the_margin(surrogate, backend):
    labels = torch.arange(4)
    for each in (backend, "reference"):
        leaf = (9 * torch.eye(4)).requires_grad_()
        value = FK.spectral_loss(leaf, labels, surrogate=surrogate, margin=0.5, backend=each)
        value.backward()
        assert value.item() == 0
        assert (leaf.grad == 0).all()


def test_kl_of_very_many_classes(backend):
    """One entry a sample: no matrix of B x K beside the gradient, let alone K x K."""
    not_interpreted(backend, 100_000)
    classes, samples = 100_000, 32
    logits = normal(samples, classes).float()
    labels = torch.arange(samples) * 3001
    wrong = logits.scatter(1, labels[:, None], -torch.inf).max(1)
    own = logits.gather(1, labels[:, None])[:, 0]
    loss = torch.logsumexp(logits.double(), 1) - own
    matrix = torch.zeros(samples, samples, dtype=F64)
    columns = {column: place for place, column in enumerate(sorted(set(wrong.indices.tolist())))}
    for b, column in enumerate(wrong.indices.tolist()):
        matrix[b, columns[column]] = loss[b]
    leaf = logits.requires_grad_()
    value, u, v = FK.spectral_loss(leaf, labels, return_vectors=True, backend=backend)
    assert value.item() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-5)
    assert set(v.nonzero()[:, 0].tolist()) <= set(columns)
    assert set(u.nonzero()[:, 0].tolist()) <= set(labels.tolist())
    value.backward()
    assert math.isclose(leaf.grad.sum().item(), 0, abs_tol=1e-3)


@pytest.mark.parametrize("surrogate", ["kl", "kl-all", "soft", "gated"])
def test_start_from_the_vectors_of_the_last_batch(surrogate, backend):
    logits, labels = 2 * normal(60, 8), torch.arange(60) % 8
    loss, _, v = FK.spectral_loss(logits, labels, surrogate=surrogate, return_vectors=True, backend=backend)
    for start in (v, -v, normal(8), torch.zeros(8, dtype=F64)):
        again = FK.spectral_loss(logits, labels, surrogate=surrogate, start=start, backend=backend)
        torch.testing.assert_close(again, loss, rtol=1e-8, atol=0)
