"""The compiled library: loaded once, without Python in it; when it is not there, why."""

from __future__ import annotations

import importlib
from functools import cache
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
            f"the native library does not load: {error.__cause__ or error} "  # torch says only that it could not
            f"(built for torch >= {info.get('torch_target', '?')}, this is torch {torch.__version__})"
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


@cache
def cuda_missing(operator: str) -> str | None:
    """Why the kernels of an operator can not run on the GPUs of this machine, or None."""
    build = build_info()
    archs = build.get("cuda_archs")
    if not archs:
        return "this build has no CUDA kernels"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fairkernels::_{operator}_native", "CUDA"):
        return f"there is no CUDA kernel of {operator} yet"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if driver // 1000 < int(build["cuda_version"].partition(".")[0]):
        version = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the driver is of CUDA {version}, the kernels were built with CUDA {build['cuda_version']}"
    devices = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    strangers = [f"sm_{major}{minor}" for major, minor in sorted(devices) if not covers(archs, major, minor)]
    if strangers:
        return f"the kernels were built for sm_{', sm_'.join(archs)}, not for {', '.join(strangers)}"
    return None


def covers(archs: list[str], major: int, minor: int) -> bool:
    """Whether a GPU runs code for one of these compute capabilities: of its generation and no newer, or of just itself
    where the name ends with ``a``, or translated from PTX that is kept for GPUs from the last one on; that of ``a`` and
    ``f`` is not for later generations."""
    built = {arch: divmod(int(arch.rstrip("af")), 10) for arch in archs}
    newest = archs[-1]
    if newest[-1].isdigit() and built[newest] <= (major, minor):
        return True
    return any(
        (m, n) == (major, minor) if arch.endswith("a") else m == major and n <= minor for arch, (m, n) in built.items()
    )
