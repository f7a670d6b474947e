"""What ``make gpu`` runs in processes of their own: ``python benchmarks/gpu_steps.py STEP --into FILE``.

A step writes a line of JSON as soon as something is known: what it had found stays where it is ended or breaks down.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Line = dict[str, Any]

CARD = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
"""What nvidia-smi is asked; nothing is set."""


def machine(_: argparse.Namespace) -> Iterator[Line]:
    """What the results come from."""
    import torch

    from fairkernels.app import bench, machine

    yield {"machine": machine.describe(), "commit": bench.commit()}
    yield {"nvcc": last_line("nvcc", "--version"), "compute_sanitizer": last_line("compute-sanitizer", "--version")}
    yield {"torch_cuda": torch.version.cuda}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        yield {
            "capability": f"{card.major}{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory": card.total_memory,
            "l2": getattr(card, "L2_cache_size", None),
        }
        values = last_line("nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader")
        yield {"card": dict(zip(CARD, map(str.strip, values.split(",")), strict=False)) if values else None}


def last_line(*command: str) -> str | None:
    """Of what a program says; None where there is no such program."""
    if shutil.which(command[0]) is None:
        return None
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return said[-1] if said else None


def compile_triton(options: argparse.Namespace) -> Iterator[Line]:
    """Fills Triton's cache with the kernels that the tests will ask for, while the CUDA kernels are built."""
    import triton_aot
    from cases import DTYPES
    from larger import larger
    from triton_calls import WITH_KERNELS, kinds, launches_of, operator_arguments, without_data

    triton_aot.activate(triton_aot.TARGETS[0])
    with without_data():
        chosen = triton_aot.distinct(
            launch
            for dtype in DTYPES
            for name in WITH_KERNELS
            for s in (*kinds(name, dtype), *larger(name, dtype))
            for launch in launches_of(name, operator_arguments(name, s))
        )
    yield {"kernels": len(chosen)}
    done = 0
    for done in compiled(chosen, options.target, options.processes, options.deadline):
        if done % 50 == 0:
            yield {"compiled": done}
    yield {"compiled": done}


def compiled(chosen: list[Any], target: int, processes: int, deadline: float) -> Iterator[int]:
    """How many are there, one after the other; those that fail will say so where they are run."""
    import multiprocessing

    import triton_aot

    triton_aot._jobs[:] = [(this, target) for this in chosen]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        results = pool.imap_unordered(compile_job, range(len(chosen)))
        for number in range(1, len(chosen) + 1):
            try:
                results.next(max(deadline - time.time(), 0))
            except multiprocessing.TimeoutError:
                return
            yield number


def compile_job(number: int) -> bool:
    import triton_aot

    this, target = triton_aot._jobs[number]
    triton_aot.activate(target)
    try:
        this.kernel.warmup(*this.args, grid=(1,), **dict(this.options))
    except Exception:  # the compiler's, whatever it is
        return False
    return True


def selftest(options: argparse.Namespace) -> Iterator[Line]:
    """Of the GPU where there is one, until the deadline."""
    from fairkernels.app import selftest

    device = selftest.devices()[-1]
    for run in selftest.runs([device]):
        if options.only and run.operator.name not in options.only:
            continue
        about = {"operator": run.operator.name, "device": run.device, "backend": run.backend}
        if time.time() > options.deadline:
            yield {**about, "left_out": "no time was left"}
            continue
        found = selftest.verdict(run)
        yield {**about, "samples": found.samples, "error": f"{found.error:.1e}", "sound": found.sound}


def bench(options: argparse.Namespace) -> Iterator[Line]:
    import torch

    from fairkernels.app import bench_gpu

    on_gpu = torch.cuda.is_available()
    problems = bench_gpu.PROBLEMS if on_gpu else bench_gpu.DRY_RUN
    run = bench_gpu.GpuBench("cuda" if on_gpu else "cpu", options.deadline, options.compiler, problems)
    yield from run.lines()


STEPS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "machine": machine,
    "triton": compile_triton,
    "selftest": selftest,
    "bench": bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="on the clock of time.time()")
    parser.add_argument("--compiler", action="store_true", help="bench: torch.compile alone")
    parser.add_argument("--only", nargs="*", help="self-test: these operators")
    parser.add_argument("--target", type=int, default=90, help="triton: compute capability")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with options.into.open("w", buffering=1) as file:
        for line in STEPS[options.step](options):
            file.write(json.dumps(line, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
