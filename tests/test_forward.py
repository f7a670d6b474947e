"""Values: against the equation in float64, in every dtype, layout and edge case; nothing touched, nothing random."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from cases import (
    COMPILED,
    DEVICE,
    DTYPES,
    KERNELS,
    ON_GPU,
    call,
    every_call,
    reference,
    replace_tensors,
    sample,
    samples,
    tensors,
)
from tolerance import assert_no_worse

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops.schema import OPERATORS

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("name", "backend", "label"), every_call())
def test_no_less_accurate_than_plain_pytorch(name, backend, label, dtype):
    s = sample(name, label, dtype)
    operator, args = OPERATORS[name], handed_on(name, s)

    results = call(name, s, backend=backend)
    exact, plain = reference(operator, args, torch.float64), reference(operator, args, args[0].dtype)

    for result, rough, true in zip(results, plain, exact, strict=False):
        assert_no_worse(result, rough, true, accuracy=operator.allowed_error(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_result_has_the_dtype_of_the_first_argument(name, backend, dtype):
    for s in samples(name, dtype):
        result = call(name, s, backend=backend)[0]
        assert result.dtype == (dtype if s.args[0].is_floating_point() else torch.int64), s.name
        assert not result.requires_grad


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else strided(tensor)


def strided(tensor):
    """Every second element of each dimension of a tensor that holds rubbish between them."""
    rubbish = torch.nan if tensor.is_floating_point() else 1
    wide = torch.full([2 * size for size in tensor.shape], rubbish, dtype=tensor.dtype, device=tensor.device)
    inner = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return inner.copy_(tensor)


def offset(tensor):
    """A window of a larger tensor: contiguous rows, but neither the start nor the row length of the storage."""
    rubbish = torch.nan if tensor.is_floating_point() else 1
    wide = torch.full([size + 3 for size in tensor.shape], rubbish, dtype=tensor.dtype, device=tensor.device)
    inner = wide[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return inner.copy_(tensor)


def backwards_dimensions(tensor):
    """Dimensions stored in reverse order; for images that is worse than channels_last."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


@pytest.mark.parametrize("layout", [transposed, strided, offset, backwards_dimensions])
@pytest.mark.parametrize(("name", "backend", "label"), every_call())
def test_any_layout_gives_the_same(name, backend, label, layout):
    s = sample(name, label)
    expected = call(name, s, backend=backend)
    actual = call(name, replace_tensors(s, layout), backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_each_tensor_has_its_own_layout(name, backend):
    s = max(samples(name), key=lambda s: len(list(tensors(s))))
    expected = call(name, s, backend=backend)
    for place in range(len(list(tensors(s)))):
        number = count()
        one_strided = replace_tensors(
            s, lambda t, number=number, place=place: strided(t) if next(number) == place else t
        )
        torch.testing.assert_close(call(name, one_strided, backend=backend), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "backend", "label"), every_call())
def test_stride_zero_gives_the_same(name, backend, label):
    s = replace_tensors(sample(name, label), lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t)
    expected = call(name, replace_tensors(s, torch.clone), backend=backend)
    torch.testing.assert_close(call(name, s, backend=backend), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("name", "backend", "label"), every_call(keep=lambda s: 0 in s.args[0].shape))
def test_stride_zero_of_nothing_gives_the_same(name, backend, label):
    def expanded(tensor):
        return tensor.new_empty([min(size, 1) for size in tensor.shape]).expand(tensor.shape)

    s = sample(name, label)
    empty = replace_tensors(s, lambda t: t if t.numel() else expanded(t))
    torch.testing.assert_close(call(name, empty, backend=backend), call(name, s, backend=backend), equal_nan=True)


@pytest.mark.parametrize(("name", "backend", "label"), every_call())
def test_inputs_and_global_generator_are_untouched(name, backend, label):
    s = sample(name, label)
    before, states = [t.clone() for t in tensors(s)], generator_states()
    call(name, s, backend=backend)
    torch.testing.assert_close(list(tensors(s)), before, rtol=0, atol=0, equal_nan=True)
    assert all(map(torch.equal, generator_states(), states))


def generator_states():
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if ON_GPU else [])


@pytest.mark.parametrize(("name", "backend", "label"), every_call(backends=COMPILED))
def test_threads_and_repetition_change_no_bit(name, backend, label, threads):
    s = sample(name, label)
    results = []
    for number in (1, 2, 2):
        threads(number)
        results.append(call(name, s, backend=backend))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


def test_memory_is_poisoned():
    assert torch.empty(2000, device=DEVICE).isnan().all()


@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_numbers_of_numpy(name, backend):
    """What is computed with NumPy comes as its numbers; all backends take them."""

    def numpys(value):
        if isinstance(value, tuple):
            return tuple(map(numpys, value))
        if type(value) is int:
            return np.int64(value)
        return np.float32(value) if type(value) is float else value

    def pythons(value):
        if isinstance(value, tuple):
            return tuple(map(pythons, value))
        return value.item() if isinstance(value, np.generic) else value

    for s in samples(name):
        theirs = {key: numpys(value) for key, value in s.kwargs.items()}
        if theirs != s.kwargs or any(type(value) is np.int64 for value in theirs.values()):
            ours = {key: pythons(value) for key, value in theirs.items()}
            found = call(name, replace(s, kwargs=theirs), backend=backend)
            torch.testing.assert_close(
                found, call(name, replace(s, kwargs=ours), backend=backend), rtol=0, atol=0, equal_nan=True
            )
