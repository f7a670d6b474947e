"""Drop-in loss modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fairkernels import functional as FK
from fairkernels.ops.dispatch import Backend

__all__ = ["FairCrossEntropyLoss", "SpectralLoss", "SymmetryLoss"]


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
