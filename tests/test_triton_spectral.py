"""The spectral kernels and the symmetry gap on Triton: matrices of more than one program, however they are cut."""

import itertools

import pytest
import torch
from test_spectral import CONTRACT, F64, FAMILIES, normal, uniform

from fairkernels.ops import triton_kernels
from fairkernels.ops.reference.symmetry import symmetry_gap as exact_gap

pytest.importorskip("triton")

import triton
import triton.language as tl

from fairkernels.ops.triton_kernels import launch, spectral_tile
from fairkernels.ops.triton_kernels import spectral_norm as spectral
from fairkernels.ops.triton_kernels import symmetry_gap as symmetry

pytestmark = pytest.mark.skipif(not triton_kernels.interpreted(), reason="needs TRITON_INTERPRET=1")

ENOUGH = {"locg": 20, "power": 40}
"""Steps that the matrices here need at most."""


@pytest.fixture(params=["in the cache", "in steps"])
def beyond_registers(request, monkeypatch):
    """Also small matrices are read again for every product, or go by their Gram matrix, cut into many small blocks."""
    monkeypatch.setattr(spectral, "fits_registers", lambda _: False)
    if request.param == "in steps":
        monkeypatch.setattr(spectral, "fits_cache", lambda _: False)
    monkeypatch.setattr(spectral.Steps, "BLOCK", 16)
    monkeypatch.setattr(spectral.Steps, "STRETCH", 32)
    monkeypatch.setattr(spectral_tile, "BLOCK_IN_CACHE", tl.constexpr(2048))


def assert_leading_pair(matrix, found, allowed):
    exact = torch.linalg.matrix_norm(matrix.double(), 2)
    sigma, u, v = (result.double() for result in found)
    length = (sigma > 0).double()
    assert ((sigma - exact).abs() <= allowed * exact).all(), (sigma, exact)
    torch.testing.assert_close(u.norm(dim=-1), length, rtol=0, atol=2e-6)
    torch.testing.assert_close(v.norm(dim=-1), length, rtol=0, atol=2e-6)
    scale = exact.clamp(min=1e-300)[..., None]
    image = (matrix.double() / scale[..., None] @ v[..., None])[..., 0]
    torch.testing.assert_close(image, sigma[..., None] / scale * u, rtol=0, atol=1e-5)
    assert (v.sum(-1) >= -1e-6).all()


SLOW = (
    "softmax, sharp",
    "graded",
    "tied",
    "signed",
    "signed, symmetric",
    "rows sum to 0",
    "huge",
    "wide",
    "blocks",
    "very tall",
)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", ["locg", "power"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_steps(family, method, dtype, beyond_registers):
    if method == "power" and family in SLOW:
        pytest.skip("takes hundreds of steps")
    matrix = FAMILIES[family](11).to(dtype)
    found = spectral.spectral_norm(matrix, None, method, ENOUGH[method], None)
    assert_leading_pair(matrix, found, CONTRACT[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(150, 133), (133, 150), (100, 90), (90, 100)])
def test_beyond_registers(shape, dtype):
    matrix = (uniform(2, *shape) - 0.3).to(dtype)
    found = spectral.leading_pair(matrix.mT.contiguous().mT, None, "locg", 12, None, False)
    assert [result.dtype for result in found] == [F64 if dtype == F64 else torch.float32] * 3
    assert_leading_pair(matrix, found, 1e-5)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_rows_of_zeros(nonnegative, beyond_registers):
    matrix = uniform(14, 14)
    matrix[[0, 3, 8]] = 0
    _, u, _ = found = spectral.leading_pair(matrix, None, "locg", 20, None, nonnegative)
    assert_leading_pair(matrix, found, 1e-8)
    assert (u[[0, 3, 8]] == 0).all()


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (12, 12)])
def test_a_start_in_steps(shape, beyond_registers):
    matrix = normal(2, *shape)
    _, _, vh = torch.linalg.svd(matrix)
    nothing, nonsense = torch.zeros(2, shape[1], dtype=F64), torch.full((2, shape[1]), torch.nan, dtype=F64)
    for start in (vh[..., 0, :], vh[..., 1, :], nothing, nonsense, normal(2, shape[1], seed=1)):
        assert_leading_pair(matrix, spectral.spectral_norm(matrix, start, "locg", 20, None), 1e-8)
    cold, warm = (spectral.spectral_norm(matrix, start, "locg", 2, None)[0] for start in (None, vh[..., 0, :]))
    exact = torch.linalg.matrix_norm(matrix, 2)
    assert ((warm - exact).abs() < (cold - exact).abs()).all()


@pytest.mark.parametrize("shape", [(7, 40), (40, 7)])
def test_a_start_of_any_stride(shape, beyond_registers):
    """Seen where the iteration has not converged."""
    matrix, start = normal(2, *shape), normal(2, shape[1], 2)
    found, expected = (
        spectral.spectral_norm(matrix, hint, "locg", 0, None) for hint in (start[..., 0], start[..., 0].contiguous())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["locg", "power"])
def test_steps_are_those_of_a_tile(method, monkeypatch):
    """The same iteration, step by step: what they give before they have converged."""
    tall, wide = uniform(12, 9), uniform(9, 12)
    calls = ((tall, None), (tall, normal(9, seed=1)), (wide, normal(12, seed=1)))
    for (matrix, start), iters in itertools.product(calls, (0, 1, 2, 4)):
        alone = spectral.spectral_norm(matrix, start, method, iters, None)
        with monkeypatch.context() as context:
            for place in ("fits_registers", "fits_cache"):
                context.setattr(spectral, place, lambda _: False)
                steps = spectral.leading_pair(matrix, start, method, iters, None, True)
                torch.testing.assert_close(steps, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["locg", "power"])
def test_a_step_after_the_end_changes_nothing(method, beyond_registers):
    matrix = uniform(3, 10, 10) * torch.tensor([1.0, 1e-20, 0.0])[:, None, None]
    matrix[1] = torch.diag(1.0 + torch.arange(10) / 10)  # converges later than its neighbours
    few, many = (spectral.spectral_norm(matrix, None, method, iters, 1e-2) for iters in (30, 33))
    torch.testing.assert_close(few, many, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(5, 20), (20, 5)])
def test_what_is_not_finite_in_steps(shape, value, beyond_registers):
    matrix = uniform(3, *shape)
    matrix[1, -1, -1] = value
    found = spectral.spectral_norm(matrix, None, "locg", 20, None)
    for result in found:
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("method", ["locg", "power"])
def test_a_first_direction_that_is_lost(method, beyond_registers):
    """Two steps are enough: another direction, and what it gives."""
    for matrix in (
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
        torch.zeros(6, 6).index_put_((torch.tensor(5),) * 2, torch.tensor(3.0)),
    ):
        found = spectral.leading_pair(matrix, None, method, 2, None, True)
        assert_leading_pair(matrix, found, 1e-6)


def matrix_that_loses_its_start(place, dtype):
    """40 x 3; the only row that is not 0 is orthogonal to the first direction of the iteration, to the last bit."""
    turn = 0.618034 * torch.arange(3, dtype=F64)
    x = 1 + (turn - turn.floor()) / 2
    x = (x / x.norm()).to(dtype)
    matrix = torch.zeros(40, 3, dtype=dtype)
    matrix[place, 0], matrix[place, 2] = x[2], -x[0]
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", ["locg", "power"])
@pytest.mark.parametrize("place", [4, 36])
@pytest.mark.parametrize("kept", ["in registers", "in the cache", "in steps"])
def test_a_first_direction_that_a_signed_matrix_loses(kept, place, method, dtype, monkeypatch):
    monkeypatch.setattr(spectral, "fits_registers", lambda _: kept == "in registers")
    monkeypatch.setattr(spectral, "fits_cache", lambda _: kept == "in the cache")
    monkeypatch.setattr(spectral_tile, "BLOCK_IN_CACHE", tl.constexpr(2048))
    matrix = matrix_that_loses_its_start(place, dtype)
    assert_leading_pair(matrix, spectral.spectral_norm(matrix, None, method, 5, None), 1e-6)


@pytest.mark.slow
def test_a_long_side_is_split(monkeypatch):
    """Sums over many terms stay as accurate as those over a few."""
    matrix = uniform(2, 3, 3000).float()
    monkeypatch.setattr(spectral, "fits_cache", lambda _: False)
    with launch.recorded() as launches:
        found = spectral.spectral_norm(matrix, None, "locg", 6, None)
    gram = next(this for this in launches if this.name == "gram_matrix")
    assert gram.grid[1] > 1
    assert_leading_pair(matrix, found, 2e-7)


def test_one_launch_a_step():
    matrix = torch.empty(2, 300, 400, device="meta")
    with launch.recorded(run=False) as launches:
        spectral.spectral_norm(matrix, None, "locg", 17, None)
    names = [this.name for this in launches]
    assert names == ["gram_matrix", "begin_steps", *["locg_step"] * 17, "end_steps"]


@pytest.mark.slow
def test_gram_matrix_of_many_stretches(monkeypatch):
    """Some of its tiles are sums of several, each of several products."""
    monkeypatch.setattr(spectral.Steps, "STRETCH", 32)
    matrix = uniform(130, 1300).float()
    matrix[0, 0] = 1
    gram = spectral.Steps(matrix, (1, 0.0, 0.0, True), False).gram()[0]
    torch.testing.assert_close(gram[:, :130], matrix @ matrix.mT)
    torch.testing.assert_close(gram[:, 130], matrix.sum(1))


@pytest.mark.parametrize("shape", [(3, 600), (40, 600), (600, 3)])
def test_gradient_of_many_blocks(shape):
    grad, u, v = normal(2), normal(2, shape[0]), normal(2, shape[1])
    found = spectral.spectral_norm_backward(grad, uniform(2, *shape), None, "locg", None, None, u, v)
    torch.testing.assert_close(found, torch.einsum("p,pm,pn->pmn", grad, u, v))


# --- the symmetry gap ---------------------------------------------------------------------------------------------


@triton.jit
def all_tiles(rows, columns, tiles):
    part = tl.program_id(0)
    row, column = symmetry.tile_of(part, tiles)
    tl.store(rows + part, row)
    tl.store(columns + part, column)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 6, 7])
def test_tiles_are_each_visited_once(tiles):
    parts = -(-tiles // 2) * (tiles + 1)
    rows, columns = torch.empty(2, parts, dtype=torch.int32)
    all_tiles[(parts,)](rows, columns, tiles)
    found = [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if i >= 0]
    assert sorted(found) == [(i, j) for i in range(tiles) for j in range(i, tiles)]


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("absent", ["ignore", "zero"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("size", [129, 200])
def test_gap_of_many_tiles(size, with_counts, reduction, absent, dtype):
    rates = uniform(2, size, size).to(dtype)
    rates[:, [3, size - 1]] = 0
    rates[:, 5, : size - 1] = 0
    rates[:, 6, 128:] = 0
    counts = (torch.arange(2 * size).view(2, size) % 5).to(dtype) if with_counts else None
    if with_counts:
        counts[1, :40] = 0
    grad = torch.tensor([1.0, -2.5], dtype=dtype)
    leaf = rates.double().requires_grad_()
    exact = exact_gap(leaf, None if counts is None else counts.double(), 0.1, absent, reduction)
    exact.backward(grad.double())

    gap = symmetry.symmetry_gap(rates, counts, 0.1, absent, reduction)
    slope = symmetry.symmetry_gap_backward(grad, rates, counts, 0.1, absent, reduction)

    bound = {torch.float32: 1e-6, F64: 1e-13, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(gap.double(), exact.detach(), rtol=bound, atol=0)
    torch.testing.assert_close(slope.double(), leaf.grad, rtol=bound, atol=bound * leaf.grad.abs().max().item())


@pytest.mark.parametrize("parts", [5, 2500])
def test_total_of_many_tiles(parts):
    sums, gap = uniform(2, parts), torch.empty(2, dtype=F64)
    symmetry.symmetry_gap_total[(2,)](sums, None, gap, 3, parts, 0, (1,), (0,), MEAN=False, REAL=tl.float64, BLOCK=1024)
    torch.testing.assert_close(gap, sums.sum(1))


@pytest.mark.parametrize("absent", ["ignore", "zero"])
def test_nan_of_many_tiles(absent):
    """Of a pair that is compared it is never lost; of one that is not it is not seen."""
    rates, counts = uniform(150, 150).float(), torch.ones(150)
    counts[7] = 0
    for place, seen in (((3, 140), True), ((140, 3), True), ((7, 140), absent == "zero"), ((5, 5), False)):
        broken = rates.index_put((torch.tensor(place[0]), torch.tensor(place[1])), torch.tensor(torch.nan))
        gap = symmetry.symmetry_gap(broken, counts, 0.1, absent, "sum")
        slope = symmetry.symmetry_gap_backward(torch.ones(()), broken, counts, 0.1, absent, "sum")
        assert gap.isnan().item() == seen
        assert sorted(slope.isnan().nonzero().tolist()) == (sorted([list(place), list(place[::-1])]) if seen else [])
