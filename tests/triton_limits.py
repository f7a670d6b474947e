"""Limits of the Triton kernels set so low that small problems are what otherwise only large ones are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from test_triton_classes import batch

from fairkernels.ops.samples import Maker, Sample
from fairkernels.ops.triton_kernels import (
    class_order,
    class_rates,
    class_terms,
    class_terms_small,
    spectral_norm,
    trades_kl,
)


def never(*_: Any) -> bool:
    return False


def rows_of(most: int) -> dict:
    return dict.fromkeys(class_rates.LONGEST_ROW, most)


MANY_CLASSES = (class_terms, "fits_one_program", never)

LIMITS = {
    "long rows": ((class_rates, "LONGEST_ROW", rows_of(64)), (trades_kl, "LONGEST_ROW", rows_of(64))),
    "longest row 8": (MANY_CLASSES, (class_rates, "LONGEST_ROW", rows_of(8))),
    "sorted": ((class_order, "MOST_COUNTED", -1),),
    "many classes": (MANY_CLASSES,),
    "many classes, sorted": (MANY_CLASSES, (class_order, "MOST_COUNTED", -1)),
    "more classes than bins": (MANY_CLASSES, (class_order, "MOST_COUNTED", -1), (class_order, "MOST_BINS", 4)),
    "many samples": (MANY_CLASSES, (class_rates, "SAMPLES_OF_A_PART", 1)),
    "many samples of few classes": ((class_terms_small, "FEW", 8),),
    "in the cache": ((spectral_norm, "fits_registers", never),),
    "large": ((spectral_norm, "fits_registers", never), (spectral_norm, "fits_cache", never)),
}


@contextlib.contextmanager
def limited(limit: str) -> Iterator[None]:
    """``limit``: which of ``LIMITS`` hold inside; "" for none."""
    with contextlib.ExitStack() as limits:
        for place, attribute, value in LIMITS[limit] if limit else ():
            limits.enter_context(patch.object(place, attribute, value))
        yield


def beyond_the_table() -> Iterator[tuple[str, Sample, str]]:
    """Calls and limits by which ``make test`` reaches kernels, several programs and tails where the table does not."""
    make = Maker()
    few = Sample("few classes present", batch(make, 7, 11, present=4))
    yield "symmetry_loss", few, "longest row 8"
    yield "symmetry_loss", Sample("more samples than classes", batch(make, 11, 9)), "longest row 8"
    several = Sample("problems, few classes present", batch(make, 7, 11, 3, present=4))
    yield "symmetry_loss", several, "many classes, sorted"
    yield "symmetry_loss", several, "more classes than bins"
    yield "symmetry_loss", Sample("more slots than a tile has", batch(make, 40, 45)), "many classes"
    yield "symmetry_loss", Sample("problems", batch(make, 13, 7, 3)), "many classes"
    yield "symmetry_loss", Sample("divided", batch(make, 19, 5)), "many samples"
    yield (
        "spectral_loss",
        Sample("problems, kl", batch(make, 19, 5, 3), {"surrogate": "kl"}),
        "many samples of few classes",
    )
    weights = {"weight": make.uniform(3, 20), "label_smoothing": 0.1}
    yield "fair_cross_entropy", Sample("problems, weights, smoothing", batch(make, 9, 20, 3), weights), "many classes"
    yield "spectral_norm", Sample("problems, wide", (make.uniform(3, 9, 12),)), "in the cache"
    yield "spectral_norm", Sample("wide, start", (make.uniform(66, 70),), {"start": make.uniform(70)}), "large"
    yield "spectral_norm", Sample("tall, power", (make.uniform(70, 66),), {"method": "power", "iters": 40}), "large"
    # several problems of what a program does alone
    yield "fair_cross_entropy", Sample("problems, few samples", batch(make, 4, 7, 3), {"spec_weight": 0.3}), ""
    yield "spectral_norm", Sample("problems, wide", (make.uniform(3, 5, 12),)), ""
    yield "symmetry_gap", Sample("problems", (make.uniform(3, 9, 9),)), ""
    yield "symmetry_gap", Sample("problems, counts", (make.uniform(3, 9, 9), make.classes(3, 9, count=3).float())), ""
    yield (
        "confusion_counts",
        Sample("problems", (make.classes(3, 70, count=80), make.classes(3, 70, count=79)), {"num_classes": 80}),
        "",
    )
