"""The Triton backend. Triton is imported when a kernel is first asked for: who has none loses nothing but speed.

A module holds the kernels of one operator or of relatives, their launches and, as ``<operator>(*args)`` and
``<operator>_backward(grad, *args, *saved)``, what dispatch calls: arguments and results are those of the table, an
operator that ``writes_into`` gets ``out`` behind its arguments.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULES = {
    "soft_confusion": "class_terms",
    "symmetry_gap": "symmetry_gap",
    "symmetry_loss": "class_terms",
    "spectral_norm": "spectral_norm",
    "spectral_loss": "class_terms",
    "fair_cross_entropy": "class_terms",
    "pgd_step": "pgd_step",
    "random_start": "random_start",
    "confusion_counts": "confusion_counts",
    "trades_kl": "trades_kl",
    "same_class_mixup": "same_class_mixup",
}
"""Where the kernels of an operator are."""

OLDEST_GPU = (8, 0)
"""Compute capability from which on Triton supports GPUs."""


@cache
def missing(device: str) -> str | None:
    """Why there are no Triton kernels for tensors of this device, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        return other_gpu() or no_launcher()
    if device != "cpu":
        return f"there are no triton kernels for {device} tensors"
    return (
        None if interpreted() else "triton kernels need a GPU tensor, or TRITON_INTERPRET=1 before triton is imported"
    )


def other_gpu() -> str | None:
    """Why the GPUs of this machine are none that the kernels are compiled for, or None."""
    if torch.version.hip is not None:
        return "the triton kernels are for NVIDIA's GPUs"
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    oldest = min((torch.cuda.get_device_capability(index) for index in devices), default=OLDEST_GPU)
    return (
        None if oldest >= OLDEST_GPU else f"triton needs GPUs from sm_80 on, there is one of sm_{oldest[0]}{oldest[1]}"
    )


def no_launcher() -> str | None:
    """Why the little C program can not be compiled with which Triton starts its kernels, or None."""
    if os.name == "nt":
        return None  # its builds for Windows bring a compiler
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler (gcc, clang, or what CC names)"
    scheme = sysconfig.get_default_scheme()
    folders = [sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)]  # as Triton does
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        folders += os.environ.get(variable, "").split(os.pathsep)
    if not any(folder and Path(folder, "Python.h").exists() for folder in folders):
        return f"triton needs Python.h, and it is not in {folders[0]} (python3-dev has it, or python3-devel)"
    return None


def interpreted() -> bool:
    """Whether kernels run on the CPU, line by line in NumPy: for tests."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def kernel_of(name: str, module: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{__name__}.{MODULES[module]}"), name)


def call(operator: str, args: tuple[Any, ...], suffix: str = "") -> tuple[Tensor, ...]:
    """All results of an operator (or, with a suffix, of its backward), on the device of its first tensor.

    Raises:
        RuntimeError: if a tensor is on another device, whose addresses a kernel would not reach.
    """
    first = next(arg for arg in args if isinstance(arg, Tensor))
    device = first.device
    for arg in args:
        if isinstance(arg, Tensor) and arg.device != device:
            raise RuntimeError(
                f"all tensors of {operator} must be on the device of the first, {device}, got {arg.device}"
            )
    with torch.cuda.device_of(first):
        results = kernel_of(operator + suffix, operator)(*args)
    return results if isinstance(results, tuple) else (results,)
