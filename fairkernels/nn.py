"""Drop-in loss modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce as distributed_sum

from fairkernels import functional as FK
from fairkernels.ops import check
from fairkernels.ops.dispatch import Backend

__all__ = ["FairCrossEntropyLoss", "SoftConfusionMatrix", "SpectralLoss", "SymmetryLoss", "TRADESLoss"]


class _Options(nn.Module):
    """A loss that is one function and its options; the options are plain attributes and show in ``repr``."""

    names: tuple[str, ...]

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value is not None)


class SymmetryLoss(_Options):
    """Symmetry gap of the soft confusion matrix of a batch, see :func:`fairkernels.functional.symmetry_loss`.

    Called with logits ``[..., B, K]``, labels ``[..., B]`` and optionally ``sample_weight=`` ``[..., B]``.
    """

    names = ("eps", "absent", "reduction", "temperature", "ignore_index", "backend")

    def __init__(
        self,
        *,
        eps: float = 0.1,
        absent: FK.Absent = "ignore",
        reduction: FK.Reduction = "sum",
        temperature: float = 1.0,
        ignore_index: int = -100,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.absent, self.reduction = eps, absent, reduction
        self.temperature, self.ignore_index, self.backend = temperature, ignore_index, backend

    def forward(self, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        return FK.symmetry_loss(logits, labels, sample_weight=sample_weight, **self.options())


class SpectralLoss(_Options):
    """Spectral norm of a trainable confusion matrix, see :func:`fairkernels.functional.spectral_loss`.

    ``class_weight`` (``[K]``) is a buffer: it moves with the module. Called with logits ``[..., B, K]`` and labels
    ``[..., B]``.
    """

    names = ("surrogate", "margin", "ignore_index", "method", "iters", "tol", "backend")
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        surrogate: FK.Surrogate = "kl",
        margin: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        method: FK.Method = "locg",
        iters: int | None = None,
        tol: float | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.surrogate, self.margin, self.ignore_index = surrogate, margin, ignore_index
        self.method, self.iters, self.tol, self.backend = method, iters, tol, backend
        self.register_buffer("class_weight", class_weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return FK.spectral_loss(logits, labels, class_weight=self.class_weight, **self.options())


class FairCrossEntropyLoss(_Options):
    """Cross-entropy with the fairness terms, see :func:`fairkernels.functional.fair_cross_entropy`.

    ``weight``, ``ignore_index``, ``reduction`` and ``label_smoothing`` are those of ``torch.nn.CrossEntropyLoss``;
    ``weight`` is a buffer. Called with logits ``[..., B, K]`` and labels ``[..., B]``.
    """

    names = (
        *(
            "ignore_index",
            "reduction",
            "label_smoothing",
            "sym_weight",
            "spec_weight",
            "ce_weight",
            "eps",
            "absent",
        ),
        *("sym_reduction", "surrogate", "margin", "return_parts", "backend"),
    )
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: FK.Reduction = "mean",
        label_smoothing: float = 0.0,
        sym_weight: float = 1.0,
        spec_weight: float = 0.0,
        ce_weight: float = 1.0,
        eps: float = 0.1,
        absent: FK.Absent = "ignore",
        sym_reduction: FK.Reduction = "sum",
        surrogate: FK.Surrogate = "soft",
        margin: float = 0.0,
        return_parts: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.sym_weight, self.spec_weight, self.ce_weight = sym_weight, spec_weight, ce_weight
        self.eps, self.absent, self.sym_reduction = eps, absent, sym_reduction
        self.surrogate, self.margin, self.return_parts, self.backend = (
            surrogate,
            margin,
            return_parts,
            backend,
        )

    def forward(self, logits: Tensor, labels: Tensor) -> Any:
        return FK.fair_cross_entropy(logits, labels, weight=self.weight, **self.options())


class TRADESLoss(_Options):
    """TRADES (arXiv 1901.08573, Eq. 5): cross-entropy of the natural samples + ``beta`` · KL(natural ‖ adversarial).

    Called with natural logits ``[..., B, K]``, adversarial logits of that shape, and labels ``[..., B]``.
    """

    names = ("beta", "label_smoothing", "backend")

    def __init__(self, beta: float = 6.0, *, label_smoothing: float = 0.0, backend: Backend | None = None) -> None:
        super().__init__()
        self.beta, self.label_smoothing, self.backend = beta, label_smoothing, backend

    def forward(self, natural_logits: Tensor, adversarial_logits: Tensor, labels: Tensor) -> Tensor:
        natural = FK.fair_cross_entropy(natural_logits, labels, sym_weight=0.0, label_smoothing=self.label_smoothing)
        return natural + self.beta * FK.trades_kl(natural_logits, adversarial_logits, backend=self.backend)


class SoftConfusionMatrix(nn.Module):
    r"""Soft confusion matrix of a stream of batches: a bias-corrected moving average, row by row.

    .. math:: \hat C_{t,i} = (1 - \beta_{i,t}) C_i + \beta_{i,t} \, \mathrm{sg}(\hat C_{t-1,i}), \qquad
              \beta_{i,t} = \beta \, \frac{1 - \beta^{m_i - 1}}{1 - \beta^{m_i}}

    Row i moves only when class i occurs; :math:`m_i` counts these times, so that the first batch is not damped. The
    gradient flows through the current batch only. In eval mode the matrix stands still and is returned detached.

    With ``process_group`` the sums and counts of all its processes are added before they are divided: matrix and,
    after the averaging of gradients by ``DistributedDataParallel``, gradient are those of the joined batch.

    Args:
        num_classes: K.
        momentum: β, the weight of the **old** value (unlike that of ``BatchNorm``), in [0, 1); 0 keeps the batch's.
        temperature, ignore_index: as in :func:`fairkernels.functional.soft_confusion`.
        process_group: sums go over this group; None: this process alone.

    Called with logits ``[B, K]``, labels ``[B]`` and optionally ``sample_weight=`` ``[B]``; returns ``[K, K]`` in the
    dtype of the logits. ``confusion``, ``[K, K]``, and ``seen``, ``[K]``, are kept in the ``state_dict``.
    """

    confusion: Tensor
    seen: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        momentum: float = 0.9,
        temperature: float = 1.0,
        ignore_index: int = -100,
        process_group: Any = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        check.class_count(num_classes, "num_classes")
        check.non_negative(momentum, "momentum")
        if momentum >= 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.num_classes, self.momentum, self.temperature = num_classes, momentum, temperature
        self.ignore_index, self.process_group, self.backend = ignore_index, process_group, backend
        self.register_buffer("confusion", torch.zeros(num_classes, num_classes))
        self.register_buffer("seen", torch.zeros(num_classes))

    def reset(self) -> None:
        """Forget all batches."""
        self.confusion.zero_()
        self.seen.zero_()

    def forward(self, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        if not self.training:
            return self.confusion.to(logits.dtype, copy=True)
        if logits.dim() != 2 or logits.shape[-1] != self.num_classes:
            raise ValueError(f"logits must be [B, {self.num_classes}], got {check.shape(logits)}")

        mass, counts = self.sums(logits, labels, sample_weight)
        present = counts != 0
        rates = mass / torch.where(present, counts, 1).unsqueeze(-1)
        seen = self.seen + present
        old_share = self.old_share(seen).unsqueeze(-1).to(rates.dtype)
        moved = (1 - old_share) * rates + old_share * self.confusion.to(rates.dtype)
        current = torch.where(present.unsqueeze(-1), moved, self.confusion.to(rates.dtype))

        self.confusion, self.seen = current.detach().to(self.confusion.dtype), seen
        return current.to(logits.dtype)

    def sums(self, logits: Tensor, labels: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums of probabilities by class, and counts, over all processes; float32 at least, float64 for float64."""
        accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mass, counts = FK.soft_confusion(
            logits.to(accumulate),
            labels,
            sample_weight=sample_weight,
            normalize=None,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            return_counts=True,
            backend=self.backend,
        )
        if self.process_group is None:
            return mass, counts
        # The sum's backward adds the gradients of all processes, which see the same loss: W times what is wanted of
        # each, and DistributedDataParallel divides by W.
        both = torch.cat([mass, counts.unsqueeze(-1)], -1)
        mass, counts = distributed_sum(both, group=self.process_group).split((self.num_classes, 1), -1)
        return mass, counts.squeeze(-1).detach()

    def old_share(self, seen: Tensor) -> Tensor:
        """β of each row at its m-th batch, m >= 1: from 0 towards the momentum."""
        met = seen.double().clamp(min=1)
        return self.momentum * (1 - self.momentum ** (met - 1)) / (1 - self.momentum**met)

    def extra_repr(self) -> str:
        return f"{self.num_classes}, momentum={self.momentum}, temperature={self.temperature}"
