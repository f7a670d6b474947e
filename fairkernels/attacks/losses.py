"""Losses of an attack: one value a sample, which the attack raises.

They are never averaged over the batch: that would divide the gradient by its size, which underflows in float16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.ops import check

Loss = Callable[[Tensor, Tensor, bool], Tensor]
"""``(logits [N, K], labels [N], targeted) -> [N]``; ``labels`` are the targets of a targeted attack."""


def cross_entropy(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return -losses if targeted else losses


def margin(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """By how much another class leads (Carlini and Wagner, arXiv 1608.04644, f6, with κ = ∞); targeted: is led."""
    lead = strongest_other(logits, labels) - of_class(logits, labels)
    return -lead if targeted else lead


def difference_of_logits_ratio(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """DLR (Croce and Hein, arXiv 2003.01690, Eq. 6): the margin in units of a gap that scales with the logits.

    Targeted (Eq. 8) the gap reaches down to the third and fourth class: from the top to the third it would cancel the
    margin, and its gradient, of a target that comes third. The numerator is the lead over all other classes, not over
    the true one alone, which the caller of a targeted attack need not know.
    """
    lead = strongest_other(logits, labels) - of_class(logits, labels)
    wanted = 4 if targeted else 3
    if logits.shape[-1] < wanted:
        raise ValueError(
            f"loss='dlr' needs at least {wanted} classes{' if targeted' if targeted else ''}, got "
            f"{logits.shape[-1]}; take 'ce' or 'margin'"
        )
    ranked = logits.topk(wanted, -1).values
    low = ranked[..., 2:].mean(-1)
    ratio = lead / (ranked[..., 0] - low + 1e-12)
    return -ratio if targeted else ratio


def divergence_from(natural_logits: Tensor) -> Loss:
    """KL(natural ‖ adversarial), what TRADES raises (arXiv 1901.08573, Eq. 7)."""

    def divergence(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        return FK.trades_kl(natural_logits, logits, reduction="none")

    return divergence


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": difference_of_logits_ratio}


def chosen(loss: str | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The loss of that name, or somebody's own ``(logits, labels) -> [N]``, which a targeted attack lowers.

    Raises:
        ValueError: if there is no loss of that name.
    """
    if not callable(loss):
        check.option(loss, "loss", tuple(LOSSES))
        return LOSSES[loss]

    def own(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        losses = loss(logits, labels)
        check.floating(losses, "what loss gives")
        if losses.shape != labels.shape:
            raise ValueError(f"loss must give one value a sample, {list(labels.shape)}, got {list(losses.shape)}")
        return -losses if targeted else losses

    return own


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def strongest_other(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest logit beside the label's own. A label's place is left out, not set to 0: logits may be negative."""
    if logits.shape[-1] < 2:
        raise ValueError(f"a margin needs at least 2 classes, got {logits.shape[-1]}")
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, labels.unsqueeze(-1), True)
    return logits.masked_fill(own, -torch.inf).amax(-1)
