"""Runs random calls of the native kernels in this process; ``run.py`` runs it under the sanitizers.

Call number n of a seed is always the same one. Each call is announced by a line on stdout before it is made: when the
process dies, the last line is the finding.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from typing import Any

import torch
from calls import Call, Calls
from torch import Tensor

import fairkernels.functional as FK
from fairkernels.ops import dispatch
from fairkernels.ops.schema import OPERATORS

MISMATCHED = 30  # percent of the calls whose operators are then called with arguments that do not fit

native_calls: list[tuple[str, tuple[Any, ...]]] = []
outcomes = dict.fromkeys(
    ("computed", "differentiated", "refused", "mismatched and refused", "mismatched and computed"), 0
)


def record_native_calls() -> None:
    call_native = dispatch.call_native

    def recording(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        native_calls.append((name, args))
        return call_native(name, args)

    dispatch.call_native = recording


def run_call(seed: int, number: int) -> None:
    calls = Calls(random.Random(f"{seed} {number}"))
    call = calls.draw()
    print(f"{number} {call}", flush=True)
    native_calls.clear()
    run_public(call, calls)
    if native_calls and calls.chance(MISMATCHED):
        run_mismatched(calls)


def run_public(call: Call, calls: Calls) -> None:
    operator = OPERATORS[call.name]
    inputs = list(call.arguments.values())[: operator.differentiable]
    for tensor in inputs:
        tensor.requires_grad_()
    wrong_class = call.misses_a_class()
    try:
        results = getattr(FK, call.name)(**call.arguments, backend="native")
    except IndexError:
        if not wrong_class:
            raise
        outcomes["refused"] += 1
        return
    except (TypeError, ValueError):
        outcomes["refused"] += 1
        return
    outcomes["computed"] += 1
    assert not wrong_class, "a class out of range was accepted"

    result = results[0] if isinstance(results, tuple) else results
    if result.requires_grad:
        upstream = calls.laid_out(list(result.shape), result.dtype)
        for tensor, gradient in zip(inputs, torch.autograd.grad(result, inputs, upstream), strict=True):
            assert gradient.shape == tensor.shape
            assert gradient.dtype == tensor.dtype
        outcomes["differentiated"] += 1


def run_mismatched(calls: Calls) -> None:
    """Straight into the compiled operator, whose own checks are all that is left."""
    for name, args in native_calls:
        args = calls.corrupted(args)
        print(f"  _{name}_native: {Call(name, dict(enumerate(args)))}", flush=True)
        try:
            dispatch.native_op(name)(*args)
            outcomes["mismatched and computed"] += 1
        except RuntimeError:
            outcomes["mismatched and refused"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()

    record_native_calls()
    for number in range(options.first, options.first + options.calls):
        try:
            run_call(options.seed, number)
        except Exception:
            traceback.print_exc()
            return 1
    print(f"  {', '.join(f'{count:,} {outcome}' for outcome, count in outcomes.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
