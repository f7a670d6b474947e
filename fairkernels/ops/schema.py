"""THE table: one row an operator. Dispatch, autograd, tests, benchmarks and docs are made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import fakes, samples, traffic
from .reference.confusion_counts import confusion_counts
from .reference.fair_cross_entropy import fair_cross_entropy
from .reference.kl_dro_weights import kl_dro_weights
from .reference.pgd import pgd_step, random_start
from .reference.same_class_mixup import same_class_mixup
from .reference.soft_confusion import soft_confusion
from .reference.spectral_loss import spectral_loss
from .reference.spectral_norm import spectral_norm
from .reference.symmetry import symmetry_gap, symmetry_loss
from .reference.trades_kl import trades_kl
from .samples import Maker, Sample
from .traffic import Traffic

NAMESPACE = "fairkernels"


@dataclass(frozen=True)
class Operator:
    """One operator.

    Every tensor argument carries the full leading batch dimensions (``functional`` expands what is shared). The
    first result is what the operator computes, in the dtype of its first argument. Further results (counts, singular
    vectors, what a backward kernel wants to find again) carry no gradient and have the accumulation dtype.
    """

    name: str
    arguments: str
    """Arguments as in a torch schema, no defaults; the registered op has ``*, str? backend=None`` behind them."""
    results: tuple[str, ...]
    reference: Callable[..., Any]
    """Plain PyTorch, called with every floating tensor in the accumulation dtype; it may leave out the results that
    only a backward kernel reads."""
    fake: Callable[..., Any]
    samples: Callable[[Maker], Iterable[Sample]]
    sized: Callable[[Maker, int], Sample]
    """A call of an ordinary kind at a given batch size (matrices: of that size)."""
    cost: str
    """Time and memory of one problem: of its kernels, where it has none of the reference."""
    traffic: Callable[..., Traffic]
    """What a call must move and compute at least, of the arguments of the public function."""
    differentiable: int = 0
    """How many leading arguments have a gradient."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    """Of the first argument."""
    batched: bool = True
    """Leading dimensions are independent problems; if not, vmap calls the operator slice by slice."""
    writes_into: bool = False
    """The kernel writes into a tensor that it is given behind the arguments."""
    saved: tuple[str, ...] | None = None
    """The further results that the backward kernel reads; if not given all of them."""
    gives_gradient: Callable[[tuple[Any, ...]], bool] | None = None
    """Where a native kernel can give the gradient along with the value: whether for these arguments that is cheaper
    than a forward and a backward. The gradient then only waits to be multiplied with the upstream one."""
    kernels: frozenset[str] = field(default_factory=frozenset)
    """Backends beside the reference that have a kernel for it."""
    accuracy: dict[torch.dtype, float] = field(default_factory=dict)
    """Of kernels that iterate, by accumulation dtype: the error they may have, relative to the largest result; thirty
    times it in the gradient. Without it a kernel rounds and does nothing else wrong."""

    @property
    def function_name(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("_"))

    @cached_property
    def schema(self) -> torch.FunctionSchema:
        results = ", ".join(f"Tensor {name}" for name in self.results)
        return torch._C.parse_schema(f"{self.name}({self.arguments}) -> ({results})")

    @cached_property
    def argument_names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.schema.arguments)

    @cached_property
    def tensor_count(self) -> int:
        """Tensors, also optional ones, stand before all other arguments."""
        return sum("Tensor" in str(argument.type) for argument in self.schema.arguments)

    @cached_property
    def saved_places(self) -> tuple[int, ...]:
        """Where among the results those are that the backward kernel reads."""
        names = self.results[1:] if self.saved is None else self.saved
        return tuple(self.results.index(name) for name in names)

    @property
    def backward_arguments(self) -> str:
        """Schema of the backward op: the upstream gradient, the forward arguments, the results that were saved."""
        saved = (f"Tensor {self.results[place]}" for place in self.saved_places)
        return ", ".join(["Tensor grad", self.arguments, *saved])

    def compute_reference(self, *args: Any) -> tuple[Tensor, ...]:
        """The reference on tensors of any dtype, autocast off, cast to what the fake promises; differentiable."""
        first = args[0]
        accumulate = accumulation_dtype(first.dtype)
        wide = [arg.to(accumulate) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
        device = first.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                outputs = self.reference(*wide)
        else:
            outputs = self.reference(*wide)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not first.is_floating_point():
            return outputs
        return outputs[0].to(first.dtype), *outputs[1:]

    def allowed_error(self, dtype: torch.dtype) -> float:
        """What ``accuracy`` allows a result of this dtype."""
        return self.accuracy.get(accumulation_dtype(dtype), 0.0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32, in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


NATIVE = frozenset({"native"})
COMPILED = frozenset({"native", "triton"})

_SPECTRAL_STEERING = "str method, int? iters, float? tol"
_SPECTRAL_ACCURACY = {torch.float32: 1e-5, torch.float64: 1e-8}


def _fair_cross_entropy_gives_gradient(args: tuple[Any, ...]) -> bool:
    """Reading exponentials again is cheaper than taking them again; but a large gradient should not be multiplied, on a
    GPU only where the host takes longer. Nor one of half precision: without the upstream factor, perhaps that of a loss
    scaler, it would underflow."""
    logits, return_parts = args[0], args[-1]
    most = 2**24 if logits.is_cpu else 2**18
    return not return_parts and logits.dtype in (torch.float32, torch.float64) and logits.numel() <= most


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            name="soft_confusion",
            arguments="Tensor logits, Tensor labels, Tensor? sample_weight, "
            "str normalize, float temperature, int ignore_index",
            results=("confusion", "counts"),
            reference=soft_confusion,
            fake=fakes.soft_confusion,
            samples=samples.soft_confusion,
            sized=samples.sized_batch,
            cost="O(B·K + K²) time, O(B + K²) memory; backward O(B·K) both",
            traffic=traffic.soft_confusion,
            differentiable=1,
            kernels=COMPILED,
        ),
        Operator(
            name="symmetry_gap",
            arguments="Tensor confusion, Tensor? counts, float eps, str absent, str reduction",
            results=("gap",),
            reference=symmetry_gap,
            fake=fakes.per_matrix,
            samples=samples.symmetry_gap,
            sized=samples.sized_square,
            cost="O(K²) time, O(K) memory; backward O(K²) both",
            traffic=traffic.symmetry_gap,
            differentiable=1,
            kernels=COMPILED,
        ),
        Operator(
            name="symmetry_loss",
            arguments="Tensor logits, Tensor labels, Tensor? sample_weight, float eps, "
            "str absent, str reduction, float temperature, int ignore_index",
            results=("loss", "coefficients"),
            reference=symmetry_loss,
            fake=fakes.symmetry_loss,
            samples=samples.symmetry_loss,
            sized=samples.sized_batch,
            cost="O(B·K + P²) time, O(B + K + P²) memory, P = min(B, K), with absent='zero' P·K for P²; "
            "backward O(B·K) both",
            traffic=traffic.logits_loss,
            differentiable=1,
            kernels=COMPILED,
        ),
        Operator(
            name="spectral_norm",
            arguments=f"Tensor matrix, Tensor? start, {_SPECTRAL_STEERING}",
            results=("sigma", "u", "v"),
            reference=spectral_norm,
            fake=fakes.spectral_norm,
            samples=samples.spectral_norm,
            sized=samples.sized_square,
            cost="O(M·N) time a step or, where P = min(M, N) is short, O(P·M·N) once and O(P²) a step; "
            "O(M·N) memory; backward O(M·N) both",
            traffic=traffic.spectral_norm,
            differentiable=1,
            kernels=COMPILED,
            accuracy=_SPECTRAL_ACCURACY,
        ),
        Operator(
            name="spectral_loss",
            arguments="Tensor logits, Tensor labels, Tensor? class_weight, Tensor? start, "
            f"str surrogate, float margin, int ignore_index, {_SPECTRAL_STEERING}",
            results=("loss", "u", "v"),
            reference=spectral_loss,
            fake=fakes.spectral_loss,
            samples=samples.spectral_loss,
            sized=samples.sized_batch,
            cost="O(B·K) time and O(P·K) a step, O(B + P·K) memory, P = min(B, K), with surrogate='kl' O(B) a "
            "step, O(B + K) memory; backward O(B·K) both",
            traffic=traffic.logits_loss,
            differentiable=1,
            kernels=COMPILED,
            accuracy=_SPECTRAL_ACCURACY,
        ),
        Operator(
            name="fair_cross_entropy",
            arguments="Tensor logits, Tensor labels, Tensor? weight, float sym_weight, "
            "float spec_weight, float ce_weight, str reduction, float label_smoothing, "
            "int ignore_index, float eps, str absent, str sym_reduction, "
            "str surrogate, float margin, bool return_parts",
            results=("total", "cross_entropy", "symmetry", "spectral", "confusion", "coefficients", "u", "v"),
            reference=fair_cross_entropy,
            fake=fakes.fair_cross_entropy,
            samples=samples.fair_cross_entropy,
            sized=samples.sized_batch,
            cost="O(B·K + K²) time, with a spectral term O(K³); O(B·K + K²) memory; backward the same",
            traffic=traffic.logits_loss,
            differentiable=1,
            saved=("coefficients", "u", "v"),
            gives_gradient=_fair_cross_entropy_gives_gradient,
            kernels=COMPILED,
            accuracy=_SPECTRAL_ACCURACY,
        ),
        Operator(
            name="pgd_step",
            arguments="Tensor x_adv, Tensor grad, Tensor x, Tensor? alphas, Tensor? epsilons, Tensor? lows, "
            "Tensor? highs, Tensor? mask, float alpha, float eps, float low, float high, "
            "str norm, bool targeted",
            results=("moved",),
            reference=pgd_step,
            fake=fakes.like_first,
            samples=samples.pgd_step,
            sized=samples.sized_step,
            cost="3 reads and 1 write an element (norm='l2': 6 reads, in two passes); no memory beside the result",
            traffic=traffic.pgd_step,
            batched=False,
            writes_into=True,
            kernels=COMPILED,
        ),
        Operator(
            name="random_start",
            arguments="Tensor x, Tensor? epsilons, Tensor? lows, Tensor? highs, float eps, float low, "
            "float high, str norm, int seed",
            results=("start",),
            reference=random_start,
            fake=fakes.like_first,
            samples=samples.random_start,
            sized=samples.sized_start,
            cost="1 read and 1 write an element; no memory beside the result (norm='l2': one sample a thread)",
            traffic=traffic.random_start,
            batched=False,
            kernels=COMPILED,
        ),
        Operator(
            name="confusion_counts",
            arguments="Tensor predictions, Tensor labels, int num_classes, int ignore_index",
            results=("counts",),
            reference=confusion_counts,
            fake=fakes.confusion_counts,
            samples=samples.confusion_counts,
            dtypes=(torch.int64,),
            sized=samples.sized_hard_batch,
            cost="O(B + K²) time, O(K²) memory",
            traffic=traffic.confusion_counts,
            kernels=COMPILED,
        ),
        Operator(
            name="trades_kl",
            arguments="Tensor natural_logits, Tensor adversarial_logits, str reduction",
            results=("divergence",),
            reference=trades_kl,
            fake=fakes.trades_kl,
            samples=samples.trades_kl,
            sized=samples.sized_two_batches,
            cost="O(B·K) time, O(B + K) memory; backward O(B·K) both",
            traffic=traffic.trades_kl,
            differentiable=2,
            kernels=COMPILED,
            accuracy={torch.float64: 2e-15},  # the reference's: its gradient cancels in confident rows
        ),
        Operator(
            name="same_class_mixup",
            arguments="Tensor x, Tensor labels, Tensor? lams, float lam, int seed",
            results=("mixed", "partner"),
            reference=same_class_mixup,
            fake=fakes.same_class_mixup,
            samples=samples.same_class_mixup,
            sized=samples.sized_labelled_images,
            cost="2 reads and 1 write an element; O(B) time and memory for the partners",
            traffic=traffic.same_class_mixup,
            batched=False,
            kernels=COMPILED,
        ),
        Operator(
            name="kl_dro_weights",
            arguments="Tensor class_losses, Tensor? counts, float radius",
            results=("weights",),
            reference=kl_dro_weights,
            fake=fakes.like_first_contiguous,
            samples=samples.kl_dro_weights,
            sized=samples.sized_losses,
            cost="O(K) time, about six evaluations of the divergence, at most some hundred; O(K) memory",
            traffic=traffic.kl_dro_weights,
            kernels=NATIVE,
        ),
    )
}
