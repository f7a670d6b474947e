"""Every operator and its rivals under pytest-benchmark, from the same cases as ``fairkernels bench``.

::

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-group-by=group

A few sizes of each case, one thread; results are checked before they are timed.
"""

import pytest

from fairkernels.app.bench import Task, implementations
from fairkernels.app.bench_cases import every_case
from fairkernels.app.bench_measure import available_memory, threads
from fairkernels.app.bench_rivals import elements

SIZES = (10**3, 10**5, 10**6)
"""Elements: the largest problem within each of them is taken."""

LONGEST_LOOP = 5000


def few_problems(case):
    """Of the first kind of input."""
    usable = [p for p in case.problems if case.why_not(p) is None]
    alike = [p for p in usable if p.kind == usable[0].kind and elements(p) <= max(SIZES)]
    return dict.fromkeys(
        max((p for p in alike if elements(p) <= size), key=elements, default=alike[0]) for size in SIZES
    )


@pytest.mark.parametrize(
    ("case", "problem", "implementation"),
    [
        pytest.param(case, problem, name, id=f"{case.name}-{problem}-{name}")
        for case in every_case()
        for problem in few_problems(case)
        for name in implementations(case)
    ],
)
def test_operator(benchmark, case, problem, implementation):
    rival = implementations(case)[implementation]
    benchmark.group = f"{case.name}, {problem}"
    reason = rival.why_not(problem)
    if reason:
        pytest.skip(reason)
    if rival.python_loop and rival.work(problem) > LONGEST_LOOP:
        pytest.skip(f"a Python loop of {rival.work(problem):.0f} steps")
    if rival.memory(problem) > available_memory() / 2:
        pytest.skip(f"needs about {rival.memory(problem) / 1e9:.0f} GB")
    with threads(1):
        task = Task.of(case, problem)
        call = task.call(rival, next(name for name in case.passes if rival.takes_part(name, case.passes)))
        task.check(implementation, rival, call())
        benchmark.pedantic(call, rounds=10, iterations=1, warmup_rounds=1)
