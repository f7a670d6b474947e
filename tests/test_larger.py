"""What only larger problems reach: many classes, many samples, long rows."""

import os

import pytest
import torch
from cases import KERNELS, LARGER_IN_CI, ON_GPU, call, reference, reference_gradient
from larger import SEVERAL_BLOCKS, larger
from tolerance import assert_no_worse

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch
from fairkernels.ops.schema import OPERATORS

QUICK = ("plain, a cluster", "plain, clusters, the last block with less", "[150, 133]")

STAND_IN = "FAIRKERNELS_FIBERS" in os.environ

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def every_larger_call():
    for name, backend in KERNELS:
        for dtype in DTYPES if backend != "reference" else ():
            for s in larger(name, dtype, backend):
                if backend == "triton" and s.name == "long rows" and name != "trades_kl" and not ON_GPU:
                    continue  # takes minutes interpreted; test_triton_classes.py has long rows
                in_ci = backend == "triton" and dtype == torch.float32 and (name, s.name) in LARGER_IN_CI
                marks = [] if s.name in QUICK or in_ci else [pytest.mark.slow]
                yield pytest.param(name, backend, s.name, dtype, id=f"{name}-{backend}-{s.name}-{dtype}", marks=marks)


def calls_of_several_blocks():
    for name, backend in KERNELS:
        for s in larger(name, torch.float32, backend) if STAND_IN and backend == "native" else ():
            if s.name.partition(", ")[2] in SEVERAL_BLOCKS:
                marks = [] if s.name in QUICK else [pytest.mark.slow]
                for most in (1, 3):
                    label = f"{name}-{backend}-{s.name}-{most}-float32"
                    yield pytest.param(name, backend, s.name, most, id=label, marks=marks)


@pytest.mark.skipif(not STAND_IN, reason="a GPU has clusters or has none; what stands in for one can be either")
@pytest.mark.parametrize(("name", "backend", "label", "most"), list(calls_of_several_blocks()))
def test_smaller_clusters_are_no_less_accurate(name, backend, label, most, monkeypatch):
    monkeypatch.setenv("FAIRKERNELS_CLUSTER", str(most))
    check_larger(name, backend, label, torch.float32)


@pytest.mark.parametrize(("name", "backend", "label", "dtype"), list(every_larger_call()))
def test_larger_problems_are_no_less_accurate(name, backend, label, dtype):
    check_larger(name, backend, label, dtype)


def check_larger(name, backend, label, dtype):
    operator = OPERATORS[name]
    s = next(s for s in larger(name, dtype, backend) if s.name == label)
    args = handed_on(name, s)
    accuracy = operator.allowed_error(dtype)
    exact, plain = reference(operator, args, torch.float64), reference(operator, args, dtype)
    for result, rough, true in zip(call(name, s, backend=backend), plain, exact, strict=False):
        assert_no_worse(result, rough, true, accuracy=accuracy)
    if operator.differentiable and s.unique:
        results = dispatch.forward(operator, args, backend)
        upstream = torch.ones_like(results[0])
        saved = tuple(results[place] for place in operator.saved_places)
        grad = dispatch.backward(operator, upstream, args, saved, backend)[0]
        true = reference_gradient(operator, args, upstream, torch.float64)
        rough = reference_gradient(operator, args, upstream, dtype)
        assert_no_worse(grad, rough, true, accuracy=30 * accuracy)
