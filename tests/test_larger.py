"""What only larger problems reach: many classes, many samples, long rows."""

import pytest
import torch
from cases import KERNELS, ON_GPU, call, reference, reference_gradient
from larger import larger
from tolerance import assert_no_worse

from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch
from fairkernels.ops.schema import OPERATORS

QUICK = ("plain, a cluster", "[150, 133]")


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def every_larger_call():
    for name, backend in KERNELS:
        for dtype in DTYPES if backend != "reference" else ():
            for s in larger(name, dtype, backend):
                if backend == "triton" and s.name == "long rows" and name != "trades_kl" and not ON_GPU:
                    continue  # takes minutes interpreted; test_triton_classes.py has long rows
                marks = [] if s.name in QUICK else [pytest.mark.slow]
                yield pytest.param(name, backend, s.name, dtype, id=f"{name}-{backend}-{s.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("name", "backend", "label", "dtype"), list(every_larger_call()))
def test_larger_problems_are_no_less_accurate(name, backend, label, dtype):
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
