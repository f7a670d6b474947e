"""Calls of the operators that are larger than those of the table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
from cases import DEVICE
from triton_calls import option_kinds

from fairkernels.ops import samples as samples_module
from fairkernels.ops.samples import Maker, Sample
from fairkernels.ops.schema import OPERATORS


@lru_cache(maxsize=8)  # making some takes longer than testing one
def larger(name: str, dtype: torch.dtype = torch.float32, backend: str = "triton") -> list[Sample]:
    """Calls that reach what the table reaches not at all, or with few blocks of a GPU."""
    make = Maker(dtype, DEVICE)
    return [*of_every_kernel(name, make), *(of_cuda(name, make) if backend == "native" else ())]


def of_every_kernel(name: str, make: Maker) -> Iterator[Sample]:
    if OPERATORS[name].sized is samples_module.sized_batch:
        yield from batches_of_every_kernel(name, make)
    elif name == "symmetry_gap":
        rates, counts = make.uniform(3, 131, 131), make.classes(3, 131, count=3).to(make.dtype)
        yield Sample("many classes", (rates,))
        yield Sample("many classes, counts", (rates, counts), {"reduction": "mean"})
        yield Sample("problems, counts", (rates[:, :9, :9], counts[:, :9]))
    elif name == "spectral_norm":
        yield Sample("in the cache", (make.uniform(3, 100, 90),))
        yield Sample("large", (make.uniform(3, 140, 131),))
        yield Sample("large, signed", (make.normal(3, 131, 140),))
        yield Sample("large, power", (make.uniform(3, 140, 131),), {"method": "power", "iters": 40})
        yield Sample("tall, start", (make.uniform(3, 140, 131),), {"start": make.uniform(3, 131)})
        yield Sample("wide, start", (make.uniform(3, 131, 140),), {"start": make.uniform(3, 140)})
        yield Sample("wide, start, one problem", (make.uniform(131, 140),), {"start": make.uniform(140)})
        yield Sample("large, power, one problem", (make.uniform(140, 131),), {"method": "power", "iters": 40})
    elif name == "trades_kl":
        yield Sample("long rows", (make.normal(5, 4100), Maker(make.dtype, DEVICE, seed=1).normal(5, 4100)))
    elif name == "confusion_counts":
        yield Sample("many classes", (make.classes(2, 700, count=80), make.classes(700, count=79)), {"num_classes": 80})
    elif name == "same_class_mixup":
        yield Sample("many samples", (make.uniform(1100, 3), make.classes(1100, count=7)), {"lam": 0.3, "seed": 1})
    elif name in ("pgd_step", "random_start"):
        for shape in ((40, 2, 5, 7), (3, 3, 77, 79)):
            args = samples_module.attack_points(make, *shape) if name == "pgd_step" else (make.uniform(*shape),)
            options = {"alpha": 0.1} if name == "pgd_step" else {"seed": 1}
            for norm in ("linf", "l2"):
                yield Sample(f"{norm}, {list(shape)}", args, {"norm": norm, "eps": 0.3, **options})


def batches_of_every_kernel(name: str, make: Maker) -> Iterator[Sample]:
    batches = {
        "many classes": (make.normal(3, 70, 131), make.classes(3, 70, count=131)),
        "few of many classes": (make.normal(3, 9, 131), make.classes(3, 9, count=131)),
        "fewer samples than classes": (make.normal(3, 4, 7), make.classes(3, 4, count=7)),
        "many samples": (make.normal(3, 1100, 5), make.classes(3, 1100, count=5)),
    }
    for label, batch in batches.items():
        for s in plain_options(name, make.dtype):
            yield Sample(f"{s.name}, {label}", batch, s.kwargs)
    if name == "fair_cross_entropy":
        options = {"weight": make.uniform(3, 131), "label_smoothing": 0.1}
        yield Sample("weights, smoothing, many classes", batches["many classes"], options)
        options = {"weight": make.uniform(3, 5), "label_smoothing": 0.1}
        yield Sample("weights, smoothing, many samples", batches["many samples"], options)
    if name == "symmetry_loss":
        yield Sample("parts of classes", (make.normal(4300, 67), make.classes(4300, count=67)))
    if name in ("soft_confusion", "symmetry_loss") and make.dtype == torch.float64:
        yield Sample("long rows", (make.normal(5, 4100), make.classes(5, count=4100)))


def of_cuda(name: str, make: Maker) -> Iterator[Sample]:
    """For the CUDA kernels alone; too slow for interpreted ones."""
    if OPERATORS[name].sized is samples_module.sized_batch:
        for label, batch in batches_of_cuda(make.dtype).items():
            for s in plain_options(name, make.dtype):
                if can_be_measured(name, label, s, batch[0]):
                    yield Sample(f"{s.name}, {label}", batch, s.kwargs)
    elif name == "spectral_norm":
        for shape in ((150, 133), (133, 150), (130, 3000), (3000, 130)):
            yield Sample(f"{list(shape)}", (make.uniform(*shape),))


@cache  # in each dtype half a second
def batches_of_cuda(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    make = Maker(dtype, DEVICE)
    return {
        "a cluster": (make.normal(300, 5), make.classes(300, count=5)),
        "clusters, the last block with less": (make.normal(2, 1501, 7), make.classes(2, 1501, count=7)),
        "more samples than a cluster has": (make.normal(8300, 5), make.classes(8300, count=5)),
        "ordered": (make.normal(2100, 300), make.classes(2100, count=300)),
        "rows in pieces": (make.normal(40, 2100), make.classes(40, count=2100)),
        "ordered, rows in pieces": (make.normal(2060, 2060), make.classes(2060, count=9)),
        "more classes than rows that fit": (make.normal(60, 63), make.classes(60, count=63)),
        "rows in pieces, far from 0": (make.normal(9, 2100) - 200, make.classes(9, count=2100)),
    }


SEVERAL_BLOCKS = ("a cluster", "clusters, the last block with less", "more samples than a cluster has")
"""Of ``of_cuda``, what blocks of a cluster work on together."""


def can_be_measured(name: str, label: str, s: Sample, logits: torch.Tensor) -> bool:
    """In seconds, where the reference takes all singular values of the matrix; in float64, where it rounds logits."""
    far = label.endswith("far from 0")
    if logits.numel() >= 10**6 and s.name != "plain":
        return False
    if far and "temperature" in s.kwargs and logits.dtype == torch.float64:
        return False
    spectral = name == "spectral_loss" or s.kwargs.get("spec_weight") or s.kwargs.get("return_parts")
    if spectral and logits.shape[-1] > 2048:  # half a minute each
        few, single = s.name in ("kl-all: plain", "parts"), logits.dtype == torch.float32
        return few and single if far else few or single
    return True


def plain_options(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The calls of the table that differ by their options, of those that have no further tensors."""
    for s in option_kinds(name, dtype):
        labelled = s.args[0].dim() == 2 and s.args[1].dtype == torch.int64
        if labelled and not any(map(torch.is_tensor, s.kwargs.values())):
            yield s
