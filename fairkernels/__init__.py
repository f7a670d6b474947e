"""Fair adversarial robustness for PyTorch: fused kernels behind drop-in losses and attacks."""

from fairkernels import autograd, compat, functional, nn
from fairkernels.ops.dispatch import Backend, explain, use_backend

__version__ = "0.1.0"

__all__ = ["Backend", "__version__", "autograd", "compat", "explain", "functional", "nn", "use_backend"]
