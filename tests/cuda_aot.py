"""Compiles the CUDA kernels for three generations of GPUs, without any, and holds what they need against a budget.

    python tests/cuda_aot.py            every kernel, against tests/budget.json
    python tests/cuda_aot.py --write    renews its part of tests/budget.json, and docs/cuda.md

The commands are those of ``setup.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import budget
from budget import Need, Needs

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "cuda.md"

ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<target>\d+)a?f?'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def setup_module() -> dict[str, Any]:
    """What setup.py defines; it is asked for nothing but the version."""
    before, sys.argv = sys.argv, ["setup.py", "-q", "--version"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        sys.argv = before


def compile_source(source: str, setup: dict[str, Any], cuda: Any, folder: str) -> str:
    command = setup["compile_command"](source, setup["find_tools"](), cuda, "")
    target = Path(folder, source.replace("/", "_") + ".o")
    words = [*command, "-Xptxas=-v", "-c", str(ROOT / source), "-o", str(target)]
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stderr


def needs_in(log: str) -> Iterator[tuple[tuple[str, str, int], Need]]:
    found = list(ENTRY.finditer(log))
    names = demangled([entry["symbol"] for entry in found])
    for entry, (name, text) in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = sum(int(entry[kind]) for kind in ("stack", "stores", "loads"))
        yield (name, text, int(entry["target"])), Need(int(entry["registers"]), int(shared[1]) if shared else 0, spills)


def demangled(symbols: list[str]) -> list[tuple[str, str]]:
    """Of each kernel its name and its template arguments."""
    if not symbols:
        return []
    text = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout
    names = []
    for line in text.replace("fairkernels::", "").replace("(anonymous namespace)::", "").splitlines():
        name, _, arguments = line.removeprefix("void ").partition("(")[0].partition("<")
        names.append((name.strip(), arguments.removesuffix(">").strip() or "-"))
    return names


PROSE = """\
# CUDA kernels

Written in `csrc/cuda/` without a header of torch, built whenever `nvcc` is there, with or without a GPU, and used on
GPUs where there is no Triton or where `backend="native"` asks for them.

## How they are proven

- The tests of the operator table run over their sources, compiled as C++: `tests/cuda_on_cpu` stands in for the GPU,
  the threads of a block are fibers on the CPU. It finds barriers and exchanges that not all threads come to, wrong lane
  masks, and shared memory that is written out of bounds or read before it is written. Races in memory are beyond it: a
  fiber runs until it waits for others. `make test` takes float32 values and gradients of every sample and some of the
  rest, `make test-all` all of them, in forward and in reversed order, and what `make test` takes in random order, with
  AddressSanitizer and UBSan looking on.
- `tests/cuda_aot.py` compiles all of them for sm_80, sm_90 and sm_100: none may spill or keep a stack, and what they
  need is held against `tests/budget.json`.

Nothing is fused unless the source says so (`--fmad=false`), so that they give the same bits as on the CPU where the
order of additions is the same.

## What they need

Written by `make budget`, nvcc {version}: registers of a thread, the shared memory that a kernel declares.
Nothing of it was measured on a GPU.

{table}
"""


def document(part: budget.Part) -> str:
    return PROSE.format(version=part["version"], table=budget.table(part))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()

    start = time.perf_counter()
    setup = setup_module()
    cuda = setup["find_cuda"]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        logs = pool.map(lambda source: compile_source(source, setup, cuda, folder), setup["CUDA_SOURCES"])
        needs: Needs = dict(sorted(need for log in logs for need in needs_in(log)))
        # Two sources must not define the same name.
        subprocess.run(["ld", "-r", *Path(folder).glob("*.o"), "-o", Path(folder, "linked")], check=True)
    print(f"{len(needs)} kernels, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    found = list(budget.complaints(needs, None if options.write else budget.read("cuda"), cuda.version))
    if options.write:
        DOCUMENT.write_text(document(budget.write("cuda", cuda.version, needs)))
    else:
        found += budget.stale(needs, budget.read("cuda"))
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
