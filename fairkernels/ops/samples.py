"""Sample inputs of every operator: what tests, the self-test and benchmarks call it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One call ``fairkernels.functional.<operator>(*args, **kwargs)``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True
    """Derivatives exist here and finite differences find them (no ties, no NaN, no saturated softmax)."""
    unique: bool = True
    """Its gradient is the only one (singular values that tie have many, each right)."""


@dataclass(frozen=True)
class Maker:
    """Random tensors of one dtype on one device, the same ones every time."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * scale
        return values.to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.to(self.device, self.dtype)

    def classes(self, *shape: int, count: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator, device="cpu").to(self.device)

    def every_class(self, batch: int, count: int) -> Tensor:
        return (torch.arange(batch, device=self.device) * 7 + 3) % count

    def labels(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)


def with_rows(values: Tensor, rows: tuple[int, ...], content: float | Tensor) -> Tensor:
    """A copy with other rows, filled with one value or all of them this row."""
    values = values.clone()
    values[..., list(rows), :] = content
    return values


# --- one call at any size -----------------------------------------------------------------------------------------


def sized_batch(make: Maker, size: int, classes: int = 5) -> Sample:
    return Sample("sized", (make.normal(size, classes), make.every_class(size, classes)))


def sized_two_batches(make: Maker, size: int) -> Sample:
    return Sample("sized", (make.normal(size, 5), Maker(make.dtype, make.device, 1).normal(size, 5)))


def sized_hard_batch(make: Maker, size: int) -> Sample:
    return Sample("sized", (make.classes(size, count=5), make.every_class(size, 5)), {"num_classes": 5})


def sized_square(make: Maker, size: int) -> Sample:
    return Sample("sized", (make.uniform(size, size),))


def sized_losses(make: Maker, size: int) -> Sample:
    return Sample("sized", (make.normal(size),))


def sized_step(make: Maker, size: int) -> Sample:
    return Sample("sized", attack_points(make, size, 3, 4), {"alpha": 0.01, "eps": 0.03})


def sized_start(make: Maker, size: int) -> Sample:
    return Sample("sized", (make.uniform(size, 3, 4),), {"eps": 0.1, "seed": 3})


def sized_labelled_images(make: Maker, size: int) -> Sample:
    return Sample("sized", (make.uniform(size, 3, 4), make.every_class(size, 3)), {"lam": 0.3, "seed": 3})


# --- calls of every kind ------------------------------------------------------------------------------------------


def classifier_batches(make: Maker, longest: int = 600) -> Iterator[Sample]:
    """Logits and labels: sizes, shapes and contents that every loss on a batch must survive."""
    yield Sample("plain", (make.normal(12, 5), make.every_class(12, 5)))
    yield Sample("one row", (make.normal(1, 4), make.labels(2)))
    yield Sample("one class", (make.normal(6, 1), make.labels(*[0] * 6)))
    yield Sample("one class present", (make.normal(6, 4), make.labels(*[2] * 6)))
    yield Sample("absent classes", (make.normal(9, 11), make.classes(9, count=4)))
    yield Sample("more classes than rows", (make.normal(5, 40), make.labels(39, 3, 17, 3, 0)))
    labels = make.labels(66, IGNORE, 66, 5)  # the last one is the first of its class
    yield Sample("many more classes than rows", (make.normal(4, 67), labels))
    yield Sample("long rows", (make.normal(3, longest), make.labels(0, longest - 1, longest // 2)))
    yield Sample("many rows", (make.normal(700, 3), make.classes(700, count=3)))
    yield Sample("tails", (make.normal(67, 33), make.every_class(67, 33)))
    yield Sample("problems", (make.normal(2, 3, 8, 4), make.classes(2, 3, 8, count=4)))
    yield Sample("shared labels", (make.normal(3, 8, 4), make.classes(8, count=4)))
    yield Sample("empty batch", (make.normal(0, 4), make.labels().long()))
    yield Sample("no problems", (make.normal(0, 6, 4), make.classes(0, 6, count=4)))
    ignored = make.labels(0, IGNORE, 1, 2, IGNORE, 1, 0, 3)
    yield Sample("ignored rows hold NaN", (with_rows(make.normal(8, 4), (1, 4), torch.nan), ignored))
    yield Sample("all ignored", (make.normal(4, 3), make.labels(*[IGNORE] * 4)))
    yield Sample("int32 labels", (make.normal(6, 3), make.every_class(6, 3).int()))
    yield Sample("confident", (make.normal(12, 4, scale=12.0), make.every_class(12, 4)), smooth=False)
    yield Sample("extreme", (make.normal(12, 5, scale=1e4), make.every_class(12, 5)), smooth=False)
    yield Sample("ties", (torch.zeros_like(make.normal(6, 3)), make.every_class(6, 3)), smooth=False)
    yield Sample("NaN row", (with_rows(make.normal(8, 4), (2,), torch.nan), make.every_class(8, 4)), smooth=False)
    yield Sample(
        "NaN, one class present",
        (with_rows(make.normal(3, 4), (2,), torch.nan), make.labels(1, 1, 1)),
        smooth=False,
    )
    yield Sample("NaN, one class", (with_rows(make.normal(3, 1), (1,), torch.nan), make.labels(0, 0, 0)), smooth=False)
    for name, value in (("infinite", torch.inf), ("impossible", -torch.inf)):
        logits, labels = make.normal(8, 6), make.classes(8, count=6)
        yield Sample(f"{name} row", (with_rows(logits, (2,), value), labels), smooth=False)
        row = torch.where(torch.arange(6, device=labels.device) == labels[2], value, logits[2])
        yield Sample(f"{name} logit of the class", (with_rows(logits, (2,), row), labels), smooth=False)


def weighted(make: Maker) -> Iterator[Sample]:
    logits, labels = make.normal(10, 4), make.every_class(10, 4)
    yield Sample("sample weights", (logits, labels), {"sample_weight": make.uniform(10)})
    yield Sample("weights of 0", (logits, labels), {"sample_weight": (labels != 1).to(make.dtype) * make.uniform(10)})
    weights = (labels != 1).to(make.dtype) * make.uniform(10)
    nan_in_class_1 = with_rows(logits, (2, 6), torch.nan)
    yield Sample("NaN of weight 0", (nan_in_class_1, labels), {"sample_weight": weights}, smooth=False)
    yield Sample("shared weights", (make.normal(2, 10, 4), labels), {"sample_weight": make.uniform(10)})
    yield Sample("temperature", (logits, labels), {"temperature": 2.5})
    yield Sample("cold", (logits, labels), {"temperature": 0.3})
    yield Sample("other ignore_index", (logits, labels), {"ignore_index": 2})


def soft_confusion(make: Maker) -> Iterator[Sample]:
    yield from classifier_batches(make)
    yield from weighted(make)
    weights = {"sample_weight": make.uniform(2, 10)}
    batch = (make.normal(2, 10, 4), make.classes(2, 10, count=4))
    yield Sample("normalize all", batch, {"normalize": "all", **weights})
    yield Sample("normalize none", batch, {"normalize": None, **weights})
    yield Sample("normalize all, empty", (make.normal(0, 3), make.labels().long()), {"normalize": "all"})
    yield Sample("counts", batch, {"return_counts": True, **weights})


def symmetry_gap(make: Maker) -> Iterator[Sample]:
    rates = make.uniform(6, 6)
    yield Sample("plain", (rates,))
    yield Sample("tiles", (make.uniform(70, 70),))
    yield Sample("problems", (make.uniform(2, 3, 5, 5),))
    yield Sample("counts", (rates, make.labels(3, 0, 2, 1, 0, 4).to(make.dtype)))
    yield Sample("shared counts", (make.uniform(2, 3, 3), make.labels(1, 0, 2).to(make.dtype)))
    yield Sample("rows of 0", (with_rows(rates, (1, 3), 0.0),), smooth=False)
    yield Sample("mean", (rates, make.labels(3, 0, 2, 1, 0, 4).to(make.dtype)), {"reduction": "mean"})
    yield Sample("zero", (with_rows(rates, (1, 3), 0.0),), {"absent": "zero"}, smooth=False)
    yield Sample("zero, mean", (rates,), {"absent": "zero", "reduction": "mean"})
    yield Sample("eps", (rates,), {"eps": 1 / 6})
    yield Sample("eps of 0", (rates,), {"eps": 0.0})
    yield Sample("tiny rates", (rates * 1e-6,), {"eps": 1e-6}, smooth=False)
    yield Sample("symmetric", (rates + rates.mT,), smooth=False)
    yield Sample("one class", (make.uniform(1, 1),))
    yield Sample("no class", (make.uniform(0, 0),))
    yield Sample("no problems", (make.uniform(0, 4, 4),))
    yield Sample("nobody present", (torch.zeros_like(rates),), {"reduction": "mean"}, smooth=False)
    yield Sample("NaN row", (with_rows(rates, (2,), torch.nan),), smooth=False)


def symmetry_loss(make: Maker) -> Iterator[Sample]:
    yield from classifier_batches(make)
    yield from weighted(make)
    for absent in ("ignore", "zero"):
        for reduction in ("sum", "mean"):
            options = {"absent": absent, "reduction": reduction}
            yield Sample(f"{absent}, {reduction}", (make.normal(9, 11), make.classes(9, count=6)), options)
            batch = (make.normal(2, 10, 4), make.classes(2, 10, count=4))
            yield Sample(f"problems, {absent}, {reduction}", batch, {**options, "sample_weight": make.uniform(2, 10)})
        some = {"absent": absent, "sample_weight": make.labels(0, 1, 2, 1).to(make.dtype)}
        yield Sample(f"class without weight, {absent}", (make.normal(4, 6), make.labels(3, 1, 2, 5)), some)
    yield Sample("eps of 0", (make.normal(9, 4), make.every_class(9, 4)), {"eps": 0.0})


def spectral_norm(make: Maker) -> Iterator[Sample]:
    yield Sample("plain", (make.normal(5, 5),))
    yield Sample("tall", (make.normal(7, 3),))
    yield Sample("wide", (make.normal(3, 7),))
    yield Sample("one entry", (make.normal(1, 1),))
    yield Sample("very tall", (make.uniform(150, 3) - 0.2,))
    yield Sample("very wide", (make.uniform(3, 150) - 0.2,))
    yield Sample("square", (make.uniform(40, 40),))
    yield Sample("signed square", (make.normal(40, 40),))
    yield Sample("rectangle", (make.uniform(70, 30),))
    yield Sample("signed rectangle", (make.normal(30, 70) + 0.4,))
    yield Sample("problems", (make.uniform(2, 3, 4, 4),))
    yield Sample("blocks", (torch.block_diag(make.uniform(4, 4), 2 * make.uniform(3, 5), make.uniform(2, 2)),))
    yield Sample("start", (make.uniform(5, 5),), {"start": make.normal(5)})
    yield Sample("start of each problem", (make.normal(2, 4, 5),), {"start": make.uniform(2, 5)})
    yield Sample(
        "start of 0, NaN", (make.normal(2, 4, 3),), {"start": with_rows(make.uniform(2, 3) * 0, (1,), torch.nan)}
    )
    yield Sample("power", (make.uniform(6, 6),), {"method": "power"})
    yield Sample("power, signed", (make.normal(7, 3),), {"method": "power"})
    yield Sample("tolerance", (make.uniform(6, 6),), {"tol": 0.0, "iters": 40})
    yield Sample("tiny", (1e-30 * make.uniform(4, 4),), smooth=False)
    yield Sample("huge", (1e30 * make.normal(4, 4),), smooth=False)
    yield Sample("rank one", (make.uniform(4, 1) @ make.uniform(1, 4) + 0,), smooth=False)
    yield Sample("zero", (torch.zeros_like(make.normal(4, 4)),), smooth=False)
    yield Sample("ties", (torch.eye(4, dtype=make.dtype, device=make.device),), smooth=False, unique=False)
    yield Sample(
        "ones cancel", (torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=make.dtype, device=make.device),), smooth=False
    )
    yield Sample("empty", (make.normal(0, 4),), smooth=False)
    yield Sample("no problems", (make.normal(0, 3, 4),), smooth=False)
    yield Sample("NaN", (with_rows(make.normal(4, 4), (2,), torch.nan),), smooth=False)
    yield Sample("infinite", (with_rows(make.uniform(4, 4), (2,), torch.inf),), smooth=False)


def spectral_loss(make: Maker) -> Iterator[Sample]:
    for surrogate in ("kl", "kl-all", "soft", "gated"):
        for sample in classifier_batches(make, longest=150):
            # "kl-all" jumps where a class enters the margin; the gate of "gated" is not differentiated
            smooth = sample.smooth and surrogate in ("kl", "soft") and sample.args[0].numel() > 0
            yield Sample(f"{surrogate}: {sample.name}", sample.args, {"surrogate": surrogate}, smooth)
    batch = (make.normal(2, 10, 4), make.classes(2, 10, count=4))
    for surrogate, margin in (("kl", 0.5), ("gated", 0.5), ("kl-all", 0.1)):
        options = {"surrogate": surrogate, "margin": margin, "class_weight": make.uniform(4)}
        yield Sample(f"{surrogate}: margin, class weights", batch, options, smooth=surrogate == "kl")
    for rows, classes in ((10, 6), (40, 34)):
        some, inverse_counts = absent_classes(make, rows, classes)
        for surrogate in ("kl", "kl-all", "soft"):
            options = {"surrogate": surrogate, "class_weight": inverse_counts}
            yield Sample(f"{surrogate}: class weights 1 / n, {classes} classes", some, options, smooth=False)
    for surrogate in ("kl", "kl-all", "soft", "gated"):
        smooth = surrogate in ("kl", "soft")
        many = (make.normal(90, 45), make.classes(90, count=45))
        yield Sample(f"{surrogate}: many classes", many, {"surrogate": surrogate}, smooth)
        options = {"surrogate": surrogate, "margin": 2.0, "start": make.uniform(2, 4), "method": "power"}
        yield Sample(f"{surrogate}: wide margin, start, power", batch, options, smooth)
        options = {"surrogate": surrogate, "margin": -0.3, "class_weight": make.normal(2, 4), "ignore_index": 1}
        yield Sample(f"{surrogate}: negative margin and weights", batch, options, smooth)


def absent_classes(make: Maker, rows: int, classes: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A batch without some of the classes, and weights that are infinite for these."""
    weights = torch.full((classes,), torch.inf)
    weights[: classes - 2] = 1 / torch.arange(1, classes - 1)
    batch = (make.normal(rows, classes), make.classes(rows, count=classes - 2))
    return batch, weights.to(make.device, make.dtype)


def fair_cross_entropy(make: Maker) -> Iterator[Sample]:
    for sample in classifier_batches(make, longest=150):
        smooth = sample.smooth and sample.name not in (
            "empty batch",
            "all ignored",
        )  # NaN, as F.cross_entropy's mean
        yield Sample(sample.name, sample.args, {"spec_weight": 0.3}, smooth)
    batch = (make.normal(10, 4), make.every_class(10, 4))
    weights = {"weight": make.uniform(4), "label_smoothing": 0.1}
    yield Sample("cross-entropy alone", batch, {"sym_weight": 0.0, **weights})
    yield Sample("weights, smoothing, sum", batch, {"reduction": "sum", **weights})
    yield Sample("without cross-entropy", batch, {"ce_weight": 0.0})
    for rows, classes in ((10, 6), (5, 70)):
        some, _ = absent_classes(make, rows, classes)
        yield Sample(f"nothing counts, {classes} classes", some, {"sym_weight": 0.0, "ce_weight": 0.0})
    for rows, classes in ((10, 6), (40, 34)):
        some, inverse_counts = absent_classes(make, rows, classes)
        yield Sample(f"weights 1 / n, {classes} classes", some, {"weight": inverse_counts, "spec_weight": 0.3}, False)
    yield Sample("kl", batch, {"spec_weight": 0.5, "surrogate": "kl", "margin": 0.2})
    yield Sample("zero, mean", batch, {"absent": "zero", "sym_reduction": "mean", "eps": 0.25})
    yield Sample("parts", batch, {"spec_weight": 0.5, "return_parts": True})
    yield Sample("parts, symmetry alone", batch, {"ce_weight": 0.0, "return_parts": True})
    options: dict[str, Any]
    problems = (make.normal(2, 9, 6), make.classes(2, 9, count=4))
    for absent in ("ignore", "zero"):
        for reduction in ("mean", "sum"):
            options = {"absent": absent, "sym_reduction": reduction, "reduction": reduction}
            yield Sample(f"{absent}, {reduction}", problems, options)
            per_problem = {"weight": make.uniform(2, 6), "label_smoothing": 0.2, "ignore_index": 1}
            yield Sample(f"{absent}, {reduction}, weights, smoothing", problems, {**options, **per_problem})
        for surrogate, margin in (("soft", 0.0), ("gated", 0.5), ("kl", 0.4), ("kl-all", 0.1)):
            smooth = surrogate in ("soft", "kl")  # as for the spectral loss
            options = {"absent": absent, "spec_weight": 0.7, "surrogate": surrogate, "margin": margin}
            yield Sample(f"{surrogate}, {absent}", problems, options, smooth)
            options |= {"weight": make.uniform(6), "label_smoothing": 0.2, "reduction": "sum", "ignore_index": 2}
            yield Sample(f"{surrogate}, {absent}, weights, smoothing, sum", problems, options, smooth)
            options |= {"ce_weight": 0.0, "sym_weight": 0.0}
            yield Sample(f"{surrogate} alone, {absent}", problems, options, smooth)
    many = (make.normal(90, 45), make.classes(90, count=45))
    for surrogate in ("soft", "gated", "kl", "kl-all"):
        options = {"spec_weight": 0.3, "surrogate": surrogate, "return_parts": True}
        yield Sample(f"{surrogate}: many classes, parts", many, options, smooth=surrogate in ("soft", "kl"))


def attack_points(make: Maker, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """A point inside a ball, the gradient there, the centre."""
    x = make.uniform(*shape)
    return (
        x + 0.02 * Maker(make.dtype, make.device, 1).normal(*shape),
        Maker(make.dtype, make.device, 2).normal(*shape),
        x,
    )


def pgd_step(make: Maker) -> Iterator[Sample]:
    points = attack_points(make, 3, 2, 5, 7)
    per_sample, per_channel = (
        make.labels(1, 2, 3).to(make.dtype) / 50,
        make.labels(1, 2).to(make.dtype)[:, None, None],
    )
    mask = make.uniform(5, 7) > 0.4
    broken = points[1].clone()
    broken[0], broken[1, 0, 0], broken[2, 1] = 0, torch.nan, torch.inf
    for norm, sizes in (("linf", {"alpha": 0.01, "eps": 0.03}), ("l2", {"alpha": 0.1, "eps": 0.3})):
        options = {"norm": norm, **sizes}
        yield Sample(f"{norm}", points, options)
        yield Sample(f"{norm}, targeted", points, {**options, "targeted": True})
        yield Sample(f"{norm}, mask", points, {**options, "mask": mask})
        yield Sample(f"{norm}, soft mask", points, {**options, "mask": make.uniform(3, 1, 5, 7)})
        yield Sample(f"{norm}, per sample", points, {**options, "alpha": per_sample, "eps": 3 * per_sample})
        yield Sample(f"{norm}, other bounds", points, {**options, "bounds": (-0.5, 0.6)})
        yield Sample(f"{norm}, bounds per channel", points, {**options, "bounds": (-per_channel, per_channel / 3)})
        yield Sample(f"{norm}, start", (points[2], points[1], points[2]), options)
        yield Sample(f"{norm}, no radius", points, {**options, "eps": 0.0})
        yield Sample(f"{norm}, large", attack_points(make, 2, 3, 40, 33), options)
        yield Sample(f"{norm}, vectors", attack_points(make, 3, 5), options)
        yield Sample(f"{norm}, scalars", attack_points(make, 7), options)
        yield Sample(f"{norm}, empty", attack_points(make, 0, 3, 4), options)
        yield Sample(f"{norm}, gradient of 0, NaN, inf", (points[0], broken, points[2]), options, smooth=False)
    yield Sample("l2, many samples", attack_points(make, 40, 70), {"norm": "l2", "alpha": 0.1, "eps": 0.3})
    vanishing = (points[2], points[1] * 1e-30, points[2])  # to a step whose square is denormal in float32
    yield Sample("l2, no radius, a vanishing gradient", vanishing, {"norm": "l2", "alpha": 0.01, "eps": 0.0})
    yield Sample("per channel", points, {"alpha": per_channel / 100, "eps": per_channel / 50})


def random_start(make: Maker) -> Iterator[Sample]:
    x, radii = make.uniform(3, 2, 5, 7), make.labels(1, 2, 3).to(make.dtype) / 50
    for norm in ("linf", "l2"):
        yield Sample(f"{norm}", (x,), {"norm": norm, "eps": 0.1, "seed": 0})
        yield Sample(f"{norm}, other seed", (x,), {"norm": norm, "eps": 0.1, "seed": -(2**62) + 12345})
        yield Sample(f"{norm}, per sample", (x,), {"norm": norm, "eps": radii, "seed": 7, "bounds": (0.2, 0.8)})
        yield Sample(f"{norm}, odd", (make.uniform(3, 5),), {"norm": norm, "eps": 0.1, "seed": 3})
        yield Sample(f"{norm}, large", (make.uniform(2, 3, 40, 33),), {"norm": norm, "eps": 0.1, "seed": 3})
        yield Sample(f"{norm}, many samples", (make.uniform(40, 70),), {"norm": norm, "eps": 0.1, "seed": 3})
        yield Sample(f"{norm}, empty", (make.uniform(0, 5),), {"norm": norm, "eps": 0.1, "seed": 3})


def confusion_counts(make: Maker) -> Iterator[Sample]:
    predictions, labels = make.classes(50, count=4), make.every_class(50, 4)
    yield Sample("plain", (predictions, labels), {"num_classes": 4})
    yield Sample("absent classes", (predictions, labels), {"num_classes": 9})
    yield Sample("problems", (make.classes(2, 3, 20, count=4), make.every_class(20, 4)), {"num_classes": 4})
    yield Sample("empty", (predictions[:0], labels[:0]), {"num_classes": 3})
    ignored = torch.where(labels == 1, IGNORE, labels)
    yield Sample("ignored", (torch.where(labels == 1, 99, predictions), ignored), {"num_classes": 4})
    yield Sample("int32", (predictions.int(), labels.to(torch.uint8)), {"num_classes": 4})


def trades_kl(make: Maker) -> Iterator[Sample]:
    def pair(*shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return make.normal(*shape, scale=scale), Maker(make.dtype, make.device, 1).normal(*shape, scale=scale)

    impossible = make.normal(3, 4)
    impossible[0, 1] = impossible[2, 3] = -torch.inf
    for reduction in ("batchmean", "sum", "none"):
        yield Sample(reduction, pair(6, 5), {"reduction": reduction})
        yield Sample(f"problems, {reduction}", pair(2, 3, 4, 5), {"reduction": reduction})
        yield Sample(f"empty batch, {reduction}", pair(0, 5), {"reduction": reduction})
    yield Sample("one class", pair(3, 1))
    yield Sample("confident", pair(6, 5, scale=12.0), smooth=False)
    yield Sample("extreme", pair(6, 5, scale=1e4), smooth=False)
    yield Sample("equal", (make.normal(6, 5),) * 2, smooth=False)
    yield Sample("impossible classes", (impossible, impossible + make.normal(3, 4)), smooth=False)
    yield Sample("NaN row", (with_rows(make.normal(6, 5), (2,), torch.nan), make.normal(6, 5)), smooth=False)


def same_class_mixup(make: Maker) -> Iterator[Sample]:
    images, labels = make.uniform(9, 2, 3, 3), make.classes(9, count=3)
    yield Sample("plain", (images, labels), {"lam": 0.3, "seed": 0})
    yield Sample("per sample", (images, labels), {"lam": make.uniform(9), "seed": -5})
    yield Sample("alone", (images, torch.arange(9, device=make.device)), {"lam": 0.3, "seed": 1})
    yield Sample("one class", (images, torch.zeros_like(labels)), {"lam": 0.5, "seed": 2})
    yield Sample("empty", (images[:0], labels[:0]), {"lam": 0.5, "seed": 2})
    yield Sample("vectors", (make.uniform(9, 4), labels.int()), {"lam": 0.5, "seed": 2})


def kl_dro_weights(make: Maker) -> Iterator[Sample]:
    losses = make.normal(6)
    yield Sample("plain", (losses,))
    yield Sample("problems", (make.normal(2, 3, 5),), {"radius": 0.1})
    yield Sample("counts", (losses, make.labels(3, 0, 1, 0, 2, 5).to(make.dtype)))
    yield Sample("one class present", (losses, make.labels(0, 0, 1, 0, 0, 0).to(make.dtype)))
    yield Sample("nobody present", (losses, torch.zeros_like(losses)))
    yield Sample("equal losses", (torch.ones_like(losses),))
    yield Sample("nearly equal losses", (1 + losses * 1e-3,))
    yield Sample("ties at the top", (losses.clamp(max=0),))
    yield Sample("radius of 0", (losses,), {"radius": 0.0})
    yield Sample("large radius", (losses,), {"radius": 20.0})
    yield Sample("large losses", (losses * 1e4,))
    yield Sample("one class", (make.normal(1),))
    yield Sample("NaN", (torch.where(losses > 0, torch.nan, losses),), smooth=False)
