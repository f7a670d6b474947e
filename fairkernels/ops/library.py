"""The compiled library: loaded once, without Python in it; when it is not there, why."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "_kernels.so"
REASON_FILE = PACKAGE / "_build_reason.txt"


def load() -> str | None:
    """Load the kernels; returns why not, or None."""
    if not LIBRARY.exists():
        if REASON_FILE.exists():
            return f"the native library was not built: {REASON_FILE.read_text().strip()}"
        return "the native library was not built (no reason was recorded)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        info = build_info()
        return (
            f"the native library does not load: {error} (built for torch >= {info.get('torch_target', '?')}, "
            f"this is torch {torch.__version__})"
        )
    return None


def build_info() -> dict[str, Any]:
    """What ``fairkernels._C`` says of the build; empty where nothing was built."""
    try:
        return dict(importlib.import_module("fairkernels._C").build_info())
    except ImportError:
        return {}


MISSING: str | None = load()
"""Why there are no native kernels, or None."""
