"""One ``torch.autograd.Function`` per differentiable operator, for people who build on Functions."""

from fairkernels.ops.autograd import FUNCTIONS
from fairkernels.ops.schema import OPERATORS

globals().update({FUNCTIONS[o.name].__name__: FUNCTIONS[o.name] for o in OPERATORS.values() if o.differentiable})

__all__ = sorted(FUNCTIONS[o.name].__name__ for o in OPERATORS.values() if o.differentiable)
