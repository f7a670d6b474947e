"""The CUDA kernels on small calls of the operator table, forward and backward: what compute-sanitizer watches.

``--into FILE`` writes which kernels ran and which of tests/budget.json did not, as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import budget
import torch
from cases import DTYPES, NAMES, ON_GPU, call, plain, runs
from larger import larger
from triton_calls import option_kinds

from fairkernels.app.bench_measure import launches_of
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS


def calls() -> Iterator[tuple[str, Sample]]:
    """Every choice of options, every dtype, and the sizes that reach the other kernels."""
    for name in NAMES:
        if not runs("native", name):
            continue
        dtypes = [dtype for dtype in DTYPES if dtype in OPERATORS[name].dtypes]
        yield from ((name, s) for s in option_kinds(name, torch.float32))
        yield from ((name, plain(name, dtype)) for dtype in dtypes)
        yield from ((name, s) for s in larger(name, backend="native"))


def run(name: str, s: Sample) -> None:
    count = OPERATORS[name].differentiable
    leaves = [arg.detach().requires_grad_() for arg in s.args[:count]]
    results = call(name, Sample(s.name, (*leaves, *s.args[count:]), s.kwargs), backend="native")
    if leaves:
        torch.autograd.grad(results[0], leaves, torch.ones_like(results[0]))


def run_all() -> int:
    found = list(calls())
    for name, s in found:
        run(name, s)
    if ON_GPU:
        torch.cuda.synchronize()
    return len(found)


def kernels() -> dict[str, list[str]]:
    names = {re.sub(r"<.*|\(.*", "", name).rpartition(" ")[2] for name in launches_of(run_all)}
    ours = sorted(name.rpartition("::")[2] for name in names if "fairkernels::" in name)
    known = budget.read("cuda")["kernels"]
    return {"ran": ours, "did_not_run": sorted(known.keys() - set(ours))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    line = {"calls": run_all()}
    if options.into:
        line |= kernels() if ON_GPU else {}
        options.into.write_text(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
