"""Random calls of the public functions: options from their signatures, shapes from the names of their tensors."""

from __future__ import annotations

import random
import typing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fairkernels.functional as FK
from fairkernels.ops import check
from fairkernels.ops.schema import OPERATORS

LONGEST = 70
DTYPES = (*check.FLOATS, *check.INTEGERS, torch.bool, torch.complex64)
KERNELS = tuple(name for name, operator in OPERATORS.items() if "native" in operator.kernels)

# "." stands for the leading dimensions, "x" for the shape of an image batch.
SHAPES = {
    **dict.fromkeys(("logits", "natural_logits", "adversarial_logits"), ".BK"),
    **dict.fromkeys(("labels", "sample_weight", "predictions"), ".B"),
    **dict.fromkeys(("counts", "class_weight", "weight", "class_losses", "start"), ".K"),
    **dict.fromkeys(("x_adv", "grad", "x", "out"), "x"),
    **dict.fromkeys(("alpha", "eps", "bounds", "mask"), "broadcast"),
    "matrix": ".BK",
    "confusion": ".KK",
    "lam": "N",
}
CLASSES = ("labels", "predictions")
SHARED = ("labels", "sample_weight", "counts", "class_weight", "weight", "start")  # leading dimensions may be left out

NUMBERS = (0.0, 1e-30, 1e-3, 0.1, 0.5, 1.0, 3.0, 1e30)
UNUSUAL_NUMBERS = (-1.0, -0.3, float("inf"), float("nan"))
INTEGERS = {
    "ignore_index": (-100, -100, -1, 0, 1, 5, 2**62),
    "iters": (1, 2, 7, 40),
    "seed": (0, 1, -(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class Call:
    """``fairkernels.functional.<name>(**arguments)``."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={described(value)}' for key, value in self.arguments.items())})"

    def misses_a_class(self) -> bool:
        """Whether a label that counts, or the prediction beside it, is no class."""
        named = self.arguments
        if "labels" not in named or "ignore_index" not in named:
            return False
        if "predictions" in named:
            classes, rows, beside = named["num_classes"], named["predictions"].shape, [named["predictions"]]
        else:
            classes, rows, beside = named["logits"].shape[-1], named["logits"].shape[:-1], []
        labels = named["labels"].long().expand(rows)
        kept = labels != named["ignore_index"]
        return any(bool((kept & ((value < 0) | (value >= classes))).any()) for value in (labels, *beside))


def described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    if not isinstance(value, Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype}{list(value.shape)} strides {list(value.stride())} offset {value.storage_offset()}"


class Calls:
    """Random calls; the same ones for the same generator."""

    def __init__(self, generator: random.Random):
        self.random = generator
        self.torch = torch.Generator().manual_seed(generator.getrandbits(62))

    def chance(self, percent: float) -> bool:
        return self.random.random() * 100 < percent

    def size(self) -> int:
        return self.random.randint(0, 2 if self.chance(15) else LONGEST)

    def draw(self) -> Call:
        name = self.random.choice(KERNELS)
        self.dtype = self.random.choice(check.FLOATS)
        self.sizes = {"B": self.size(), "K": 1 if self.chance(10) else self.size()}
        leading = self.random.choices((0, 1, 2, 3), (6, 2, 1, 1))[0]
        self.leading = [self.random.randint(0 if self.chance(10) else 1, 3) for _ in range(leading)]
        self.images = [self.size(), *(self.random.randint(0 if self.chance(5) else 1, 9) for _ in range(leading))]
        self.specials = self.chance(30)
        self.label_error = self.chance(8)

        annotations = typing.get_type_hints(getattr(FK, name))
        del annotations["return"], annotations["backend"]
        drawn = {key: self.argument(key, annotation) for key, annotation in annotations.items()}
        return Call(name, drawn)

    def argument(self, name: str, annotation: Any) -> Any:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if type(None) in typing.get_args(annotation) and self.chance(50):
            return None
        if typing.get_origin(annotation) is typing.Literal:
            return self.random.choice(kinds)
        if typing.get_origin(annotation) is tuple:
            return self.bounds()
        return self.value(name, self.random.choice(kinds or [annotation]))

    def value(self, name: str, kind: Any) -> Any:
        if typing.get_origin(kind) is typing.Literal:
            return self.random.choice(typing.get_args(kind))
        if kind is Tensor:
            return self.tensor(name)
        if kind is bool:
            return self.chance(50)
        if kind is float:
            return self.random.choice(UNUSUAL_NUMBERS if self.chance(10) else NUMBERS)
        if name == "num_classes":
            return self.sizes["K"]
        return self.random.choice(INTEGERS[name])

    def bounds(self) -> tuple[Any, Any]:
        low, high = sorted((self.value("bounds", float), self.value("bounds", float)))
        return tuple(self.tensor("bounds") if self.chance(20) else bound for bound in (low, high))

    # --- tensors --------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        shape = self.shape(name)
        if name in CLASSES:
            return self.laid_out(shape, self.random.choice((torch.int64, torch.int64, *check.INTEGERS)))
        side = name not in ("logits", "natural_logits", "adversarial_logits", "x_adv", "grad", "x", "out")
        dtype = self.random.choice(check.FLOATS) if side and self.chance(30) else self.dtype
        if name == "mask" and self.chance(30):
            dtype = torch.bool
        return self.laid_out(shape, dtype, may_overlap=name != "out")

    def shape(self, name: str) -> list[int]:
        letters = SHAPES[name]
        if letters == "x":
            return self.images
        if letters == "N":
            return self.images[:1]
        if letters == "broadcast":
            if name != "mask" and self.chance(50):
                return [self.images[0], *[1] * (len(self.images) - 1)]
            kept = [size if self.chance(60) else 1 for size in self.images]
            return kept[self.random.randint(0, len(kept)) :]
        leading = [] if name in SHARED and self.chance(30) else self.leading
        return [*leading, *(self.sizes[letter] for letter in letters.strip("."))]

    def laid_out(self, shape: list[int], dtype: torch.dtype, may_overlap: bool = True) -> Tensor:
        """Any order of the dimensions, steps, an offset, strides of 0; the storage ends at the last element."""
        strides, step = [0] * len(shape), 1
        order = list(range(len(shape)))
        if self.chance(40):
            self.random.shuffle(order)
        for d in reversed(order):
            if may_overlap and self.chance(5):
                continue
            step *= 2 if self.chance(8) else 1
            strides[d] = step
            step *= max(shape[d], 1)
        offset = self.random.randint(1, 9) if self.chance(20) else 0
        numel = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return self.contents(offset + numel, dtype).as_strided(shape, strides, offset)

    def contents(self, numel: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool or dtype.is_complex:
            return torch.randn(numel, generator=self.torch).to(dtype)
        if not dtype.is_floating_point:
            return self.classes(numel, dtype)
        scale = self.random.choice((1e-3, 1.0, 1.0, 30.0))
        values = scale * torch.randn(numel, generator=self.torch, dtype=torch.float64)
        values = values.abs() if self.chance(30) else values
        values = values.to(dtype)
        if self.specials and numel:
            limits = torch.finfo(dtype)
            special = (torch.nan, torch.inf, -torch.inf, limits.max, limits.min, limits.tiny, limits.smallest_normal, 0)
            for _ in range(self.random.randint(1, 4)):
                values[self.random.randrange(numel)] = self.random.choice(special)
        return values

    def classes(self, numel: int, dtype: torch.dtype) -> Tensor:
        most = min(max(self.sizes["K"], 1), torch.iinfo(dtype).max)
        values = torch.randint(most, (numel,), generator=self.torch)
        if self.chance(30):
            values[torch.rand(numel, generator=self.torch) < 0.3] = -100
        if self.label_error and numel:
            values[self.random.randrange(numel)] = self.random.choice((-1, most, most + 1, 2**31, 2**63 - 1, -(2**63)))
        return values.to(dtype)

    # --- what no caller should do -----------------------------------------------------------------------------------

    def corrupted(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of an operator with one or two of them as they must not be."""
        args = list(args)
        for _ in range(self.random.randint(1, 2)):
            at = self.random.randrange(len(args))
            args[at] = self.wrong(args[at])
        return tuple(args)

    def wrong(self, value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, str):
            return self.random.choice(("", "none", "mean", "true", "l2", "power", "kl", "zero"))
        if isinstance(value, float):
            return self.random.choice((*NUMBERS, *UNUSUAL_NUMBERS, 1e308))
        if isinstance(value, int):
            return self.random.choice((0, 1, -1, 3, 71, 2**31, 2**62, 2**63 - 1, -(2**63)))
        if value is None or self.chance(5):
            return self.random.choice((None, self.laid_out([self.size()], self.random.choice(DTYPES))))
        return self.wrong_tensor(value)

    def wrong_tensor(self, tensor: Tensor) -> Tensor:
        shape, dtype = list(tensor.shape), tensor.dtype
        if self.chance(30):
            dtype = self.random.choice(DTYPES)
        else:
            change = self.random.choice(("resize", "drop", "add", "relayout"))
            at = self.random.randrange(len(shape)) if shape else 0
            if change == "add":
                shape.insert(at, self.random.choice((0, 1, 2)))
            elif change == "drop" and shape:
                del shape[at]
            elif change == "resize" and shape:
                shape[at] = self.random.choice((0, 1, max(shape[at] - 1, 0), shape[at] + 1, 2 * shape[at]))
        return self.laid_out(shape, dtype)
