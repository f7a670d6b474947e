"""Official functions by their own names, signatures and conventions, fast."""

from fairkernels.compat import syfar

__all__ = ["syfar"]
