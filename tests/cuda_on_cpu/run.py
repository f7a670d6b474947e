"""Runs the operator table's tests over the CUDA kernels, on the CPU: ``python tests/cuda_on_cpu/run.py -m "not slow"``.

Builds a copy of the package in which operators with CUDA kernels run these on tensors of the CPU, and starts pytest
with its further arguments. ``--order forward|reversed|random`` says in which order the threads of a block run,
``--sanitize`` builds with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))

import run as sanitized  # noqa: E402

FAILURES = "-fsanitize=address,undefined"


def operators() -> list[str]:
    """Those with CUDA kernels."""
    return [source.stem for source in sorted(ROOT.glob("csrc/*.cpp")) if "fairkernels, CUDA" in source.read_text()]


def build(sanitize: bool) -> Path:
    """The package; objects are kept, so that it takes seconds the next time."""
    folder = ROOT / "build" / ("cuda_on_cpu_sanitized" if sanitize else "cuda_on_cpu")
    compiler = os.environ.get("CXX") or "g++"
    flags = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=undefined" if sanitize else "-O1"
    environment = {
        **os.environ,
        "CUDA_HOME": str(FOLDER),  # its nvcc
        "CXX": f"{compiler} {FAILURES if sanitize else ''} -DFK_CUDA_ON_CPU",
        "CXXFLAGS": flags,
        "FAIRKERNELS_NATIVE": "1",
        "FAIRKERNELS_CUDA": "1",
    }
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", "build", *places], cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", choices=("forward", "reversed", "random"), default="forward")
    parser.add_argument("--sanitize", action="store_true")
    options, further = parser.parse_known_args()
    if options.sanitize and (reason := sanitized.missing()):
        print(reason, file=sys.stderr)
        return 1

    package = build(options.sanitize)
    environment = {**os.environ, "PYTHONPATH": str(package), "FAIRKERNELS_FIBERS": options.order}
    if options.sanitize:
        environment |= sanitized.environment()
    named = f"native and ({' or '.join(operators())})"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", named]
    command = [*pytest, *further, str(ROOT / "tests")]
    return subprocess.run(command, env=environment, cwd=package, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
