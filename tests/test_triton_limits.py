"""The kernels for large problems on small ones: values and gradients are as near to float64 as plain PyTorch's."""

import pytest

from fairkernels.ops import triton_kernels

pytest.importorskip("triton")

from test_triton_classes import check
from triton_limits import beyond_the_table, limited

from fairkernels.ops.schema import OPERATORS

pytestmark = pytest.mark.skipif(not triton_kernels.interpreted(), reason="needs TRITON_INTERPRET=1")

CALLS = [pytest.param(name, s, limit, id=f"{name}-{s.name}-{limit}") for name, s, limit in beyond_the_table()]


@pytest.mark.parametrize(("name", "s", "limit"), CALLS)
def test_no_less_accurate_than_plain_pytorch(name, s, limit):
    with limited(limit):
        check(name, s, gradient=OPERATORS[name].differentiable)
