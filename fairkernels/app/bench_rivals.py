"""What a user would otherwise call: plain PyTorch, torch.compile, and slow transcriptions of what others published.

Every formula takes the arguments of the public function and returns the same, written from the papers and from
descriptions of the code, not copied from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairkernels import functional as FK
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

EAGER, COMPILE = "eager PyTorch", "torch.compile"
FLOAT = 4  # bytes: the grid is in float32


@dataclass(frozen=True)
class Problem:
    """One size and kind of input; the cells of the grid are a case, a problem, a pass and a number of threads."""

    kind: str
    sizes: tuple[tuple[str, int], ...]

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        return ", ".join([*(f"{name}={size}" for name, size in self.sizes), self.kind])


Formula = Callable[..., Tensor]
Prepared = Callable[[], Any]


def elements(problem: Problem) -> float:
    """The product of all sizes: steps of a call whose time grows with its input."""
    product = 1.0
    for _, size in problem.sizes:
        product *= size
    return product


def batch_and_matrix(problem: Problem) -> float:
    """Steps of what looks at B x K logits and at a K x K matrix, some ten times at that."""
    return problem["B"] * problem["K"] + 5.0 * problem["K"] ** 2


def decomposition(problem: Problem) -> float:
    """Steps of what decomposes a K x K matrix as well."""
    return batch_and_matrix(problem) + 10.0 * problem["K"] ** 3


@dataclass(frozen=True)
class Rival:
    """Another way to compute an operator, or a call that gives the scale."""

    prepare: Callable[[str, Sample], Prepared]
    """Makes the call from the operator's name and the arguments; what is done here is not timed."""
    work: Callable[[Problem], float] = elements
    """Steps of a call, in any unit: with the time of the last cell they say how long the next one will take."""
    memory: Callable[[Problem], float] = lambda problem: 8 * FLOAT * elements(problem)
    """Bytes beyond the inputs, roughly."""
    why_not: Callable[[Problem], str | None] = lambda _: None
    """Why it is not there, here or at all."""
    scale: bool = False
    """Another function; its time is there for scale."""
    other_numbers: bool = False
    """It draws random numbers of its own: there is nothing to compare."""
    inexact: str | None = None
    """Why its errors are reported but not judged."""
    exact_options: dict[str, Any] = field(default_factory=dict)
    """Options of ours with which it agrees, where they are not those that are timed."""
    python_loop: bool = False
    """A step of its work is one of the interpreter, with calls of PyTorch, not an element in a kernel."""
    warms_up: bool = False
    """Its first call at a new size does more than the others."""
    passes: tuple[str, ...] = ("forward+backward", "forward")
    """Those in which it takes part, of an operator that has both."""

    def takes_part(self, name: str, passes: tuple[str, ...]) -> bool:
        return name in self.passes or len(passes) == 1


def formula(function: Formula) -> Callable[[str, Sample], Prepared]:
    return lambda _, sample: partial(function, *sample.args, **sample.kwargs)


# --- plain PyTorch ------------------------------------------------------------------------------------------------


class _HandedOn(Exception):
    pass


def handed_on(name: str, sample: Sample) -> tuple[Any, ...]:
    """The arguments with which the public function calls its operator; nothing is computed."""
    found: list[tuple[Any, ...]] = []

    def record(_: str, *args: Any, **__: Any) -> None:
        found.append(args)
        raise _HandedOn

    with (
        mock.patch.multiple(FK, run=record, run_unchecked=lambda *_, **__: None),
        contextlib.suppress(_HandedOn),
    ):
        getattr(FK, name)(*sample.args, **{k: v for k, v in sample.kwargs.items() if k != "out"})
    return found[0]


def first(results: Any) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def eager(name: str, sample: Sample) -> Prepared:
    """The reference as it reads, through autograd, without our checks and dispatch."""
    args, reference = handed_on(name, sample), OPERATORS[name].reference
    return partial(reference, *args)


@cache
def compiled_reference(name: str, mode: str | None = None) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(OPERATORS[name].reference, dynamic=True, mode=mode)


def compiled(name: str, sample: Sample) -> Prepared:
    args, reference = handed_on(name, sample), compiled_reference(name)
    return partial(reference, *args)


def compiled_into_graphs(name: str, sample: Sample) -> Prepared:
    """With ``mode="reduce-overhead"``, for GPUs: replayed as a CUDA graph, whose results the next call overwrites."""
    args, reference = handed_on(name, sample), compiled_reference(name, "reduce-overhead")

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return reference(*args)

    return call


def not_of_size_one(problem: Problem) -> str | None:
    alone = any(size == 1 for name, size in problem.sizes if name in "BNK")
    return "torch.compile compiles once more for a size of 1" if alone else None


def plain(
    work: Callable[[Problem], float] = elements,
    floats: Callable[[Problem], float] | None = None,
    compile: str | None = None,
) -> dict[str, Rival]:
    """The two rivals that every operator has; ``compile`` is the reason why it is not compiled."""
    memory = (lambda p: FLOAT * floats(p)) if floats else Rival.memory
    return {
        EAGER: Rival(eager, work, memory),
        COMPILE: Rival(
            compiled,
            work,
            memory,
            not_of_size_one if compile is None else lambda _: compile,
            warms_up=True,
            passes=("forward+backward",),
        ),
    }


def cross_entropy(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits, labels)


CROSS_ENTROPY = {"F.cross_entropy": Rival(formula(cross_entropy), scale=True)}


# --- the official loops -------------------------------------------------------------------------------------------


def double_loop_loss(logits: Tensor, labels: Tensor, eps: float = 0.1) -> Tensor:
    """The way of the official Sy-FAR code: rows added in place sample by sample, then one pair of classes at a time."""
    classes = logits.shape[-1]
    probabilities = logits.softmax(-1)
    rates, counts = logits.new_zeros(classes, classes), logits.new_zeros(classes)
    for b in range(len(labels)):
        rates[labels[b]] += probabilities[b]
        counts[labels[b]] += 1
    for i in range(classes):
        if counts[i] > 0:
            rates[i] /= counts[i]

    penalty = logits.new_zeros(())
    for i in range(classes):
        for j in range(i + 1, classes):
            mass = rates[i, j] + rates[j, i]
            penalty = penalty + (rates[i, j] - rates[j, i]).abs() / (mass + eps) * mass
    return penalty


def sample_loop_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The way of the official spectral regularisers: the matrix is filled sample by sample, then decomposed."""
    classes = logits.shape[-1]
    matrix, counts = logits.new_zeros(classes, classes), logits.new_zeros(classes)
    for z, label in zip(logits, labels.tolist(), strict=True):
        counts[label] += 1
        rivals = z.detach().clone()
        rivals[label] = -torch.inf
        strongest = int(rivals.argmax())
        if z[label].item() <= z[strongest].item():
            one_hot = F.one_hot(labels.new_tensor(label), classes).to(z.dtype)
            matrix[label, strongest] += F.kl_div(z.log_softmax(0), one_hot, reduction="sum")
    sigma = torch.linalg.matrix_norm(matrix / counts.clamp(min=1)[:, None], 2)
    return sigma + 0 * logits.sum()  # without an error there is nothing to differentiate


def pairs_and_samples(problem: Problem) -> float:
    """Steps of the double loop: one a pair of classes and one a sample, whose update autograd copies the matrix for."""
    return problem["B"] * (1 + problem["K"] ** 2 / 1e4) + problem["K"] ** 2 / 2


def samples(problem: Problem) -> float:
    """Steps of the sample loop: the same, and the decomposition."""
    return problem["B"] * (1 + problem["K"] ** 2 / 1e4) + 1e-5 * decomposition(problem)


def loops(problem: Problem) -> str | None:
    return "a Python loop takes as long on any logits: see the normal ones" if problem.kind == "trained" else None


# --- steps of attacks ---------------------------------------------------------------------------------------------


def torchattacks_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, **_: Any) -> Tensor:
    """PGD of torchattacks: seven kernels."""
    moved = x_adv.detach() + alpha * grad.sign()
    delta = torch.clamp(moved - x, min=-eps, max=eps)
    return torch.clamp(x + delta, min=0, max=1).detach()


def foolbox_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, **_: Any) -> Tensor:
    """LinfPGD of foolbox: normalised gradient, step, projection around the start, clip to the bounds."""
    moved = x_adv + 1.0 * alpha * grad.sign()
    moved = x + torch.clamp(moved - x, -eps, eps)
    return torch.clamp(moved, 0, 1)


def torchattacks_l2_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, **_: Any) -> Tensor:
    """PGDL2 of torchattacks."""
    per_sample = (-1, *[1] * (x.dim() - 1))
    length = grad.flatten(1).norm(p=2, dim=1) + 1e-10
    moved = x_adv.detach() + alpha * (grad / length.view(per_sample))
    delta = moved - x
    factor = torch.clamp(eps / delta.flatten(1).norm(p=2, dim=1), max=1)
    return torch.clamp(x + delta * factor.view(per_sample), min=0, max=1).detach()


def rand_like_start(x: Tensor, eps: float, **_: Any) -> Tensor:
    """torchattacks' random start, from the global generator."""
    return torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), min=0, max=1)


def class_loop_mixup(x: Tensor, labels: Tensor, lam: float, **_: Any) -> Tensor:
    """Partners drawn class by class in Python."""
    partner = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        partner[members] = members[torch.randperm(len(members))]
    return lam * x + (1 - lam) * x[partner]


# --- counts, singular values, weights -----------------------------------------------------------------------------


def bincount_counts(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    cells = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def torchmetrics_counts(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predictions, labels, num_classes)


def without(package: str) -> Callable[[Problem], str | None]:
    """The reason of a rival that is not installed."""
    reason = None if find_spec(package) else f"{package} is not installed"
    return lambda _: reason


def svdvals(matrix: Tensor, **_: Any) -> Tensor:
    return torch.linalg.svdvals(matrix)[0]


def matrix_norm(matrix: Tensor, **_: Any) -> Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def parametrization(_: str, sample: Sample) -> Prepared:
    """``nn.utils.parametrizations.spectral_norm``: one power step a call, after the fifteen of its construction."""
    matrix = sample.args[0].detach()
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device=matrix.device)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    nn.utils.parametrizations.spectral_norm(layer)
    row, column = divmod(int(matrix.abs().argmax()), matrix.shape[1])
    return lambda: matrix[row, column] / layer.weight[row, column]


def cvxpy_weights(_: str, sample: Sample) -> Prepared:
    """FAAL's own way, a conic program; made once and solved anew in every call, which is the kindest to it."""
    import cvxpy

    losses = sample.args[0]
    classes = len(losses)
    weights, objective = cvxpy.Variable(classes), cvxpy.Parameter(classes)
    uniform = 1 / classes
    divergence = cvxpy.sum(cvxpy.rel_entr([uniform] * classes, weights))
    program = cvxpy.Problem(cvxpy.Maximize(objective @ weights), [cvxpy.sum(weights) == 1, divergence <= 0.5])

    def solve() -> Tensor:
        objective.value = losses.double().numpy()
        program.solve()
        return torch.from_numpy(weights.value).to(losses)

    return solve
