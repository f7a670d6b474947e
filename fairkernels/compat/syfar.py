"""Functions of the Sy-FAR repository (arXiv 2509.12939)."""

from __future__ import annotations

from torch import Tensor

from fairkernels import functional as FK
from fairkernels.ops import check

__all__ = ["symmetry_penalty"]


def symmetry_penalty(adv_outputs: Tensor, labels: Tensor, num_classes: int, eps: float = 0.1) -> Tensor:
    """The official penalty in value and gradient, the charge for classes that did not occur included.

    Equivalent to::

        fairkernels.functional.symmetry_loss(adv_outputs, labels, eps=eps, absent="zero")

    Args:
        adv_outputs: ``[B, K]`` logits of the adversarial samples.
        labels: int ``[B]``, true classes.
        num_classes: K.
        eps: damps pairs of small mass.

    Returns:
        A scalar; use ``symmetry_loss`` with its default ``absent="ignore"`` for the loss without the artefact.

    Raises:
        ValueError: if ``num_classes`` is not the number of columns of ``adv_outputs``.
    """
    check.logits(adv_outputs, "adv_outputs")
    if adv_outputs.shape[-1] != num_classes:
        raise ValueError(f"num_classes must be {adv_outputs.shape[-1]} (adv_outputs), got {num_classes}")
    return FK.symmetry_loss(adv_outputs, labels, eps=eps, absent="zero")
