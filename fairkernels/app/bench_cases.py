"""The grid of the benchmark as data: per operator its inputs, its rivals, and what its result is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairkernels.app import bench_rivals as rivals
from fairkernels.app.bench_rivals import CROSS_ENTROPY, Problem, Rival, elements, formula, plain
from fairkernels.ops.reference.spectral_loss import surrogate_rows
from fairkernels.ops.reference.symmetry import symmetry_loss
from fairkernels.ops.samples import Maker, Sample
from fairkernels.ops.schema import OPERATORS

BATCHES = (1, 8, 128, 1024, 8192, 65536)
CLASSES = (2, 10, 100, 1000, 10_000, 100_000)
MOST_LOGITS = 2**27
LOGITS = ("normal", "trained")
IMAGES = ((8, 3, 32, 32), (256, 3, 32, 32), (128, 3, 224, 224))
MATRICES = (10, 100, 1000)
MATRIX_KINDS = ("Gaussian", "softmax noise", "blocks")
PREDICTED_CLASSES = (2, 10, 100, 1000)
WEIGHTED_CLASSES = (2, 10, 100, 1000, 10_000)
THREADS = (1, 2)
ALL_THREADS = 2**24
"""Elements up to which every kind of input is measured on every number of threads. Of larger ones, half of the time as
it is, normal logits are measured on the first number of threads and trained ones on the last."""

OURS = "fairkernels"


@dataclass(frozen=True)
class Case:
    """An operator with its options, the problems on which it is measured, and its rivals."""

    operator: str
    problems: tuple[Problem, ...]
    sample: Callable[[Problem], Sample]
    rivals: dict[str, Rival]
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    why_not: Callable[[Problem], str | None] = lambda _: None
    """Why ours is not run on a problem, nor anybody else."""
    exact: Callable[..., Tensor] | None = None
    """The result in few steps where the reference takes too many: ``exact(*args)`` of the sample."""
    unchecked: Callable[[Problem], str | None] = lambda _: None
    """Why nothing exact is affordable."""

    @property
    def name(self) -> str:
        return f"{self.operator} ({self.variant})" if self.variant else self.operator

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward+backward", "forward") if OPERATORS[self.operator].differentiable else ("forward",)

    def call(self, problem: Problem, device: str = "cpu") -> Sample:
        """The call that is measured; what it differentiates are leaves that require a gradient."""
        found = self.sample(problem)
        count = OPERATORS[self.operator].differentiable
        args = tuple(argument.to(device) for argument in found.args)
        kwargs = {name: on_device(value, device) for name, value in {**found.kwargs, **self.options}.items()}
        leaves = tuple(argument.detach().requires_grad_() for argument in args[:count])
        return Sample(found.name, (*leaves, *args[count:]), kwargs)


def thread_counts(problem: Problem, counts: tuple[int, ...]) -> tuple[int, ...]:
    if elements(problem) <= ALL_THREADS:
        return counts
    return counts[-1:] if problem.kind == "trained" else counts[:1]


def only_normal_ones(problem: Problem, size: Callable[[Problem], float] = elements) -> str | None:
    """Why the result on a large input is not checked."""
    again = size(problem) > ALL_THREADS and problem.kind == "trained"
    return "not checked: the normal logits of this size are" if again else None


def on_device(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


# --- inputs -------------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=1)
def batch(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logits and labels: ``normal`` of an untrained network, ``trained`` of one that is sure and right nine times in
    ten."""
    rows, classes, source = problem["B"], problem["K"], generator()
    labels = torch.randint(classes, (rows,), generator=source)
    logits = torch.randn(rows, classes, generator=source)
    if problem.kind == "trained":
        wrong = torch.rand(rows, generator=source) < 0.1
        predicted = torch.where(wrong, torch.randint(classes, (rows,), generator=source), labels)
        logits[torch.arange(rows), predicted] += 10
    return logits, labels


def logits_and_labels(problem: Problem) -> Sample:
    return Sample(str(problem), batch(problem))


def two_logits(problem: Problem) -> Sample:
    """The second ones are a little off, as those of an adversarial example."""
    logits = batch(problem)[0]
    return Sample(str(problem), (logits, logits.roll(1, 0).mul_(0.1).add_(logits)))


def hard_predictions(problem: Problem) -> Sample:
    rows, classes = problem["B"], problem["K"]
    labels = torch.randint(classes, (rows,), generator=generator())
    wrong = torch.rand(rows, generator=generator(1)) < 0.3
    predictions = torch.where(wrong, torch.randint(classes, (rows,), generator=generator(2)), labels)
    return Sample(str(problem), (predictions, labels), {"num_classes": classes})


def image_shape(problem: Problem) -> tuple[int, ...]:
    return tuple(size for _, size in problem.sizes)


def images(problem: Problem) -> Sample:
    return Sample(str(problem), (torch.rand(image_shape(problem), generator=generator()),))


def labelled_images(problem: Problem) -> Sample:
    labels = torch.randint(10, (problem["N"],), generator=generator(1))
    return Sample(str(problem), (*images(problem).args, labels), {"lam": 0.5, "seed": 0})


def attack_points(problem: Problem) -> Sample:
    shape = image_shape(problem)
    x, grad = torch.rand(shape, generator=generator()), torch.randn(shape, generator=generator(1))
    x_adv = (x + 0.06 * (torch.rand(shape, generator=generator(2)) - 0.5)).clamp_(0, 1)
    return Sample(str(problem), (x_adv, grad, x))


def into_given_memory(problem: Problem) -> Sample:
    points = attack_points(problem)
    return Sample(points.name, points.args, {"out": torch.empty_like(points.args[0])})


def matrix(problem: Problem) -> Sample:
    """``softmax noise``: rows as of a soft confusion matrix; ``blocks``: ten groups of classes that are confused."""
    classes = problem["K"]
    noise = torch.randn(classes, classes, generator=generator())
    if problem.kind == "Gaussian":
        return Sample(str(problem), (noise,))
    if problem.kind == "blocks":
        group = torch.arange(classes) * 10 // classes
        noise = noise + 4 * (group[:, None] == group)
    return Sample(str(problem), (noise.softmax(1),))


def class_losses(problem: Problem) -> Sample:
    return Sample(str(problem), (torch.rand(problem["K"], generator=generator()) * 3,))


# --- what results are held against --------------------------------------------------------------------------------


def narrow(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same problem with all absent classes in one: the symmetry loss (absent="ignore") does not notice."""
    present, narrow_labels = labels.unique(return_inverse=True)
    absent = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    absent[present] = False
    if not absent.any():
        return logits, labels
    rest = logits.masked_fill(~absent, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat((logits[:, present], rest), 1), narrow_labels


def narrow_symmetry(logits: Tensor, labels: Tensor) -> Tensor:
    return symmetry_loss(*narrow(logits, labels), None, 0.1, "ignore", "sum", 1.0, -100)


def narrow_fair(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + narrow_symmetry(logits, labels)


def narrow_spectral(logits: Tensor, labels: Tensor, surrogate: str = "kl") -> Tensor:
    """The rows of the present classes alone; their leading vectors from the products of the rows with one another."""
    present, narrow_labels = labels.unique(return_inverse=True)
    true = labels.unsqueeze(1) == torch.arange(logits.shape[-1], device=logits.device)
    rows = surrogate_rows(logits, true, surrogate, 0.0)
    sums = rows.new_zeros(len(present), logits.shape[-1]).index_add(0, narrow_labels, rows)
    rates = sums / torch.bincount(narrow_labels)[:, None]
    with torch.no_grad():
        u = torch.linalg.eigh(rates @ rates.mT)[1][:, -1]
        v = F.normalize(u @ rates, dim=0)
    return u @ rates @ v


def too_many_classes(problem: Problem) -> str | None:
    many = problem["K"] > 1000 and problem["B"] > 2000
    return "not checked: it would take the decomposition of thousands of classes" if many else None


def narrow_fair_and_spectral(logits: Tensor, labels: Tensor) -> Tensor:
    return narrow_fair(logits, labels) + narrow_spectral(logits, labels, "soft")


# --- the grid -----------------------------------------------------------------------------------------------------


def grid(
    batches: tuple[int, ...] = BATCHES, classes: tuple[int, ...] = CLASSES, kinds: tuple[str, ...] = LOGITS
) -> tuple[Problem, ...]:
    """Small problems first: what they took says what larger ones will take."""
    shapes = sorted(((b, k) for b in batches for k in classes if b * k <= MOST_LOGITS), key=lambda s: (s[0] * s[1], s))
    return tuple(Problem(kind, (("B", b), ("K", k))) for b, k in shapes for kind in kinds)


def image_grid() -> tuple[Problem, ...]:
    return tuple(Problem("images", tuple(zip("NCHW", shape, strict=True))) for shape in IMAGES)


def matrix_grid() -> tuple[Problem, ...]:
    return tuple(Problem(kind, (("K", size),)) for size in MATRICES for kind in MATRIX_KINDS)


def result_fits(problem: Problem) -> str | None:
    """Of the K x K result: it must fit the memory, and not be all there is to do."""
    size = 4 * problem["K"] ** 2
    if size > 1 << 30:
        return f"its K x K result has {size / 1e9:.0f} GB"
    alone = problem["K"] > 1000 and problem["K"] > 1000 * problem["B"]
    return "its K x K result is more than 1000 times as large as the logits" if alone else None


def few_classes(floats_per_entry: float) -> Callable[[Problem], float]:
    """Floats of plain PyTorch that keeps some K x K matrices for autograd."""
    return lambda problem: 10 * problem["B"] * problem["K"] + floats_per_entry * problem["K"] ** 2


def square(problem: Problem) -> float:
    return float(problem["K"]) ** 2


def cube(problem: Problem) -> float:
    return float(problem["K"]) ** 3


SYMMETRY = plain(rivals.batch_and_matrix, few_classes(14))
SPECTRAL = plain(rivals.decomposition, few_classes(20))

CASES: tuple[Case, ...] = (
    Case(
        "soft_confusion",
        grid(),
        logits_and_labels,
        plain(rivals.batch_and_matrix, few_classes(6)),
        why_not=result_fits,
        unchecked=lambda p: only_normal_ones(p, square),
    ),
    Case(
        "symmetry_loss",
        grid(),
        logits_and_labels,
        {
            **SYMMETRY,
            **CROSS_ENTROPY,
            "double loop (Sy-FAR's way)": Rival(
                formula(rivals.double_loop_loss),
                rivals.pairs_and_samples,
                lambda p: 8 * square(p),
                exact_options={"absent": "zero"},
                why_not=rivals.loops,
                python_loop=True,
                passes=("forward+backward",),
            ),
        },
        exact=narrow_symmetry,
    ),
    Case(
        "spectral_loss",
        grid(),
        logits_and_labels,
        {
            **SPECTRAL,
            **CROSS_ENTROPY,
            "sample loop (SpecNorm's way)": Rival(
                formula(rivals.sample_loop_loss),
                rivals.samples,
                lambda p: 8 * square(p),
                inexact="its gradient is NaN where singular values tie",
                why_not=rivals.loops,
                python_loop=True,
                passes=("forward+backward",),
            ),
        },
        exact=narrow_spectral,
        unchecked=too_many_classes,
    ),
    Case("fair_cross_entropy", grid(), logits_and_labels, {**SYMMETRY, **CROSS_ENTROPY}, exact=narrow_fair),
    Case(
        "fair_cross_entropy",
        grid(),
        logits_and_labels,
        {**SPECTRAL, **CROSS_ENTROPY},
        variant="spec_weight=1",
        options={"spec_weight": 1.0},
        exact=narrow_fair_and_spectral,
        unchecked=too_many_classes,
    ),
    Case("trades_kl", grid(), two_logits, plain(floats=lambda p: 16 * elements(p))),
    Case(
        "symmetry_gap",
        matrix_grid(),
        matrix,
        plain(square, lambda p: 14 * square(p)),
        why_not=lambda p: "rates are not negative" if p.kind == "Gaussian" else None,
    ),
    Case(
        "spectral_norm",
        matrix_grid(),
        matrix,
        {
            **plain(cube, lambda p: 20 * square(p), compile="it would call the same decomposition"),
            "svdvals": Rival(formula(rivals.svdvals), cube),
            "matrix_norm": Rival(formula(rivals.matrix_norm), cube),
            "parametrizations.spectral_norm": Rival(
                rivals.parametrization, square, inexact="one power step a call", passes=("forward",)
            ),
        },
    ),
    *(
        Case(
            "pgd_step",
            image_grid(),
            sample,
            {**plain(), **others},
            variant=variant,
            options={"alpha": 2 / 255 * scale, "eps": 8 / 255 * scale, "norm": norm},
        )
        for variant, sample, norm, scale, others in (
            (
                "linf, into given memory",
                into_given_memory,
                "linf",
                1,
                {
                    "torchattacks' formula": Rival(formula(rivals.torchattacks_step)),
                    "foolbox's formula": Rival(formula(rivals.foolbox_step)),
                },
            ),
            ("linf, new result", attack_points, "linf", 1, {}),
            (
                "l2, into given memory",
                into_given_memory,
                "l2",
                16,
                {"torchattacks' formula": Rival(formula(rivals.torchattacks_l2_step))},
            ),
        )
    ),
    Case(
        "random_start",
        image_grid(),
        images,
        {
            **plain(
                floats=lambda p: 40 * elements(p),
                compile="its generator takes too long to compile",
            ),
            "torchattacks' formula": Rival(formula(rivals.rand_like_start), other_numbers=True),
        },
        options={"eps": 8 / 255, "seed": 0},
    ),
    Case(
        "confusion_counts",
        grid(classes=PREDICTED_CLASSES, kinds=("predictions",)),
        hard_predictions,
        {
            **plain(lambda p: p["B"] + square(p)),
            "bincount": Rival(formula(rivals.bincount_counts), lambda p: p["B"] + square(p)),
            "torchmetrics": Rival(
                formula(rivals.torchmetrics_counts),
                lambda p: p["B"] + square(p),
                why_not=rivals.without("torchmetrics"),
            ),
        },
    ),
    Case(
        "same_class_mixup",
        image_grid(),
        labelled_images,
        {
            **plain(compile="compiles for long and fails: in the search for partners sizes depend on the labels"),
            "loop over the classes": Rival(formula(rivals.class_loop_mixup), other_numbers=True),
        },
    ),
    Case(
        "kl_dro_weights",
        tuple(Problem("losses", (("K", classes),)) for classes in WEIGHTED_CLASSES),
        class_losses,
        {
            **plain(compile="its unrolled halvings take too long to compile"),
            "cvxpy": Rival(rivals.cvxpy_weights, inexact="a solver's tolerance", why_not=rivals.without("cvxpy")),
        },
    ),
)


def every_case() -> tuple[Case, ...]:
    """The declared cases, and a plain one of every operator of the table that has none."""
    missing = OPERATORS.keys() - {case.operator for case in CASES}
    return (*CASES, *(default_case(name) for name in sorted(missing)))


def default_case(name: str) -> Case:
    problems = tuple(Problem("sized", (("N", size),)) for size in (16, 256))
    return Case(name, problems, lambda problem: OPERATORS[name].sized(Maker(), problem["N"]), plain())
