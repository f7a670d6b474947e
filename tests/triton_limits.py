"""Limits of the Triton kernels set so low that small problems are what otherwise only large ones are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

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
    """Calls and limits by which ``make test`` reaches the kernels that those of the table do not."""
    make = Maker()

    def batch(*shape: int, present: int | None = None) -> tuple:
        return make.normal(*shape), make.classes(*shape[:-1], count=present or shape[-1])

    few = Sample("few classes present", batch(7, 10, present=4))
    yield "symmetry_loss", Sample("more samples than classes", batch(11, 9)), "longest row 8"
    yield "symmetry_loss", few, "longest row 8"
    yield "symmetry_loss", few, "many classes, sorted"
    yield "symmetry_loss", few, "more classes than bins"
    yield "symmetry_loss", Sample("divided", batch(19, 5)), "many samples"
    yield "spectral_loss", Sample("kl", batch(2, 19, 5), {"surrogate": "kl"}), "many samples of few classes"
    weights = {"weight": make.uniform(3, 20), "label_smoothing": 0.1}
    yield "fair_cross_entropy", Sample("weights, smoothing", batch(3, 9, 20), weights), "many classes"
    yield "spectral_norm", Sample("wide", (make.uniform(3, 9, 12),)), "in the cache"
    yield "spectral_norm", Sample("wide, start", (make.uniform(9, 12),), {"start": make.uniform(12)}), "large"
    yield "spectral_norm", Sample("tall, power", (make.uniform(12, 9),), {"method": "power", "iters": 40}), "large"
