"""What kernels may need: nothing spills, and the check finds what exceeds it."""

import json

import budget
import pytest


@pytest.mark.parametrize("compiler", ["cuda", "triton"])
def test_nothing_spills(compiler):
    kernels = budget.read(compiler)["kernels"]
    assert kernels
    for name, found in kernels.items():
        for text, needs in found.items():
            assert set(needs) == {f"sm_{target}" for target in budget.TARGETS}, f"{name} [{text}]"
            assert [spills for _, _, spills in needs.values()] == [0, 0, 0], f"{name} [{text}]"


def test_the_file_is_as_it_is_written():
    assert budget.PATH.read_text() == budget.as_json(json.loads(budget.PATH.read_text()))


KEY = ("kernel", "fp32: x", 90)
PART = {"version": "1", "kernels": {"kernel": {"fp32: x": {"sm_90": [40, 1024, 0]}}}}


@pytest.mark.parametrize(
    ("need", "complaint"),
    [
        (budget.Need(40, 1024, 0), None),
        (budget.Need(52, 1100, 0), None),
        (budget.Need(60, 1024, 0), "takes 60 registers, its budget is 40"),
        (budget.Need(40, 2048, 0), "takes 2048 bytes of shared memory, its budget is 1024"),
        (budget.Need(40, 1024, 8), "spills 8 bytes"),
        (budget.Need(40, 300_000, 0), "needs 300000 bytes of shared memory, there are 232448"),
        ("does not compile: CompileError: no", "does not compile: CompileError: no"),
    ],
)
def test_what_exceeds_its_budget_is_found(need, complaint):
    found = list(budget.complaints({KEY: need}, PART, "1"))
    assert (complaint in found[0]) if complaint else not found


def test_another_compiler_may_need_more():
    assert not list(budget.complaints({KEY: budget.Need(90, 2048, 0)}, PART, "2"))


def test_what_is_not_in_the_budget_is_found_and_what_is_there_in_vain():
    other = {("other", "fp32: x", 90): budget.Need(1, 1, 0)}
    assert "is not in the budget" in next(budget.complaints(other, PART, "1"))
    assert "nothing asks for it" in next(budget.stale(other, PART))
