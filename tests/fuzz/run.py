"""Builds the native library with AddressSanitizer and UBSan and makes random calls of it; one finding ends it.

``python tests/fuzz/run.py --calls 20000``; the call of a finding alone: ``--seed S --first N --calls 1``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")
"""Wanted in the process from its start: the sanitizers, and what lets them see exceptions."""
COMPILER = os.environ.get("CXX") or "g++"


def missing() -> str | None:
    """Why there is nothing to run, or None."""
    try:
        absent = [library for library in LIBRARIES if not location(library).is_absolute()]
    except OSError as error:
        return f"the sanitizers need gcc: {error}"
    return f"{COMPILER} has no {', '.join(absent)}" if absent else None


def location(library: str) -> Path:
    command = [*shlex.split(COMPILER), f"-print-file-name={library}"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def build() -> Path:
    """A copy of the package with instrumented kernels; objects are kept, so that it takes seconds the next time."""
    environment = {
        **os.environ,
        "CXX": f"{COMPILER} -fsanitize=address,undefined",
        "CXXFLAGS": "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=undefined",
        "FAIRKERNELS_NATIVE": "1",
        "FAIRKERNELS_CUDA": "0",
    }
    folders = ["--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", "build", *folders], cwd=ROOT, env=environment, check=True)
    return BUILD / "lib"


def environment() -> dict[str, str]:
    """What a process needs in which instrumented code runs."""
    return {
        "LD_PRELOAD": " ".join(str(location(library)) for library in LIBRARIES),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def start(package: Path, seed: int, first: int, calls: int) -> subprocess.Popen[str]:
    script = [sys.executable, str(ROOT / "tests/fuzz/fuzz.py")]
    options = ["--seed", str(seed), "--first", str(first), "--calls", str(calls)]
    steered = {**os.environ, "PYTHONPATH": str(package), **environment()}
    return subprocess.Popen([*script, *options], env=steered, stdout=subprocess.PIPE, text=True)


def follow(process: subprocess.Popen[str], calls: int) -> list[str]:
    """The lines of the last call: the public one and what came of it."""
    last: list[str] = []
    columns = (TextColumn("calls"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with process, Progress(*columns) as progress:
        task = progress.add_task("calls", total=calls)
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(" "):
                last.clear()
                progress.advance(task)
            last.append(line.rstrip())
    return last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=20_000)
    options = parser.parse_args()

    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    process = start(build(), options.seed, options.first, options.calls)
    last = follow(process, options.calls)
    if process.returncode == 0:
        print(f"{options.calls:,} calls of seed {options.seed}, no finding: {last[-1].strip()}")
        return 0
    number = last[0].partition(" ")[0] if last else "0"
    print("\nFinding in this call:", *last, sep="\n", file=sys.stderr)
    print(f"Again: python tests/fuzz/run.py --seed {options.seed} --first {number} --calls 1", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
