"""Checks of arguments: each names the argument, says what came and what was expected."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST_CLASSES = 2**20  # of a matrix that is stored: 8 TiB of counts
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


Checked = TypeVar("Checked")


def once(checks: Callable[..., Checked]) -> Callable[..., Checked]:
    """Options that have passed are not checked again: a training loop asks for the same ones in every step."""
    remember = functools.lru_cache(maxsize=64, typed=True)(checks)

    @functools.wraps(checks)
    def checked(*options: Any) -> Checked:
        if torch.compiler.is_compiling():
            return checks(*options)
        try:
            return remember(*options)
        except TypeError:  # perhaps only for want of a hash
            return checks(*options)

    return checked


def tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def floating(value: Any, name: str) -> None:
    tensor(value, name)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def integers(value: Any, name: str) -> None:
    tensor(value, name)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers (class indices, not probabilities), got {value.dtype}")


def logits(value: Any, name: str = "logits") -> None:
    floating(value, name)
    if value.dim() < 2 or value.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., B, K] with K >= 1, got {shape(value)}")


def square(value: Any, name: str) -> None:
    matrix(value, name)
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name} must be [..., K, K], got {shape(value)}")


def matrix(value: Any, name: str) -> None:
    floating(value, name)
    if value.dim() < 2:
        raise ValueError(f"{name} must be [..., M, N], got {shape(value)}")


def same_device(value: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {value.device}")


def detached(value: Tensor, name: str) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} carries no gradient here; pass {name}.detach(), got a tensor that requires grad")


def non_negative(value: Any, name: str) -> None:
    number(value, name)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def positive(value: Any, name: str) -> None:
    number(value, name)
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def number(value: Any, name: str) -> None:
    if isinstance(value, float):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a float64, got an integer beyond its range") from None


def integer(value: Any, name: str) -> int:
    """The same number as Python's own int: NumPy's are as good to a user, to a kernel they are not."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must be an int64, got {value}")
    return int(value)


def class_count(value: Any, name: str) -> int:
    count = integer(value, name)
    if not 1 <= int(count) <= MOST_CLASSES:
        raise ValueError(f"{name} must be >= 1 and <= {MOST_CLASSES}, got {value}")
    return count


def option(value: Any, name: str, options: Sequence[Any]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def shape(value: Tensor) -> str:
    return str(list(value.shape))


def batch(scores: Any, labels: Any) -> Tensor:
    """Logits ``[..., B, K]`` and their labels ``[..., B]`` or ``[B]`` (shared), these as int64 ``[..., B]``."""
    logits(scores)
    integers(labels, "labels")
    same_device(labels, "labels", scores, "logits")
    return rows(labels.to(torch.int64), "labels", scores)


def rows(value: Tensor, name: str, scores: Tensor, scores_name: str = "logits") -> Tensor:
    """One value a row of the scores ``[..., B, K]``: ``[..., B]``, or ``[B]`` for all problems alike."""
    expected = scores.shape[:-1]
    if value.shape == expected:
        return value
    if value.shape != expected[-1:]:
        wanted = f"{list(expected)} or {list(expected[-1:])}" if len(expected) > 1 else f"{list(expected)}"
        raise ValueError(f"{name} must be {wanted} ({scores_name} is {shape(scores)}), got {shape(value)}")
    return value.expand(expected)


def mask(value: Any, name: str) -> None:
    tensor(value, name)
    if value.dtype not in (*FLOATS, torch.bool, torch.uint8):
        raise TypeError(f"{name} must be floating, bool or uint8, got {value.dtype}")


def counts(value: Any, name: str, expected: Sequence[int], beside: Tensor, beside_name: str) -> Tensor:
    """Like :func:`side_values`, but integers are as good."""
    tensor(value, name)
    value = value.to(torch.float64) if value.dtype in INTEGERS else value
    return side_values(value, name, expected, beside, beside_name)


def side_values(value: Any, name: str, expected: Sequence[int], beside: Tensor, beside_name: str) -> Tensor:
    """A floating tensor without gradient that broadcasts over leading dimensions: expanded to ``expected``."""
    floating(value, name)
    same_device(value, name, beside, beside_name)
    detached(value, name)
    if value.shape == tuple(expected):
        return value
    if value.shape != tuple(expected[-1:]):
        raise ValueError(f"{name} must be {list(expected)} or {list(expected[-1:])}, got {shape(value)}")
    return value.expand(tuple(expected))
