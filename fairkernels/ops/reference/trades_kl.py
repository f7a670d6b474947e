"""The robust term of TRADES (arXiv 1901.08573)."""

import torch
from torch import Tensor


def trades_kl(natural_logits: Tensor, adversarial_logits: Tensor, reduction: str) -> Tensor:
    log_p, log_q = torch.log_softmax(natural_logits, -1), torch.log_softmax(adversarial_logits, -1)
    p, q = log_p.exp(), log_q.exp()
    possible = ~(p == 0)  # p log p is 0 there, whatever its logarithm has become; NaN is possible, too
    ratio = torch.where(possible, log_q, 0) - torch.where(possible, log_p, 0)

    # Terms p (e^r - 1 - r) add up to the same as p (-r), because p and q have the same sum, but none is negative and
    # nothing cancels where p and q are close.
    near = torch.clamp(ratio, max=1)
    terms = torch.where(ratio > 1, q - p - p * ratio, p * (torch.expm1(near) - near))
    divergence = torch.where(possible, terms, q).sum(-1)

    if reduction == "none":
        return divergence
    total = divergence.sum(-1)
    return total / max(divergence.shape[-1], 1) if reduction == "batchmean" else total
