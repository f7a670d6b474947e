"""Compiles the Triton kernels for three generations of GPUs, without any, and holds what they need against a budget.

    python tests/triton_aot.py              every kernel, regime, dtype and flag, against tests/budget.json
    python tests/triton_aot.py --quick      float32 on sm_90 alone, and few choices of blocks
    python tests/triton_aot.py --all        also all combinations of these, which takes hours, against no budget
    python tests/triton_aot.py --all --kernel class_terms    those of one kernel
    python tests/triton_aot.py --write      renews tests/budget.json and docs/triton.md
    python tests/triton_aot.py --batches    whether another batch size compiles a kernel again; --quick: of four
    python tests/triton_aot.py --wide       whether a step of the attack reads and writes 16 bytes at a time

Calls are those of the operator table, as they stand and at further sizes (``triton_calls``); their launches are listed,
not run, and specialised by Triton itself, as on a GPU. A process of its own: interpreted kernels can not be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import budget
from budget import TARGETS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "triton.md"

BATCHES = (2, 3, 16, 17, 32, 48, 100, 128, 1000, 1024, 4096, 65_536)
"""Not 1: a batch of one sample may lie in memory as if there were no batch."""

FEW_BATCHES = (17, 100, 128, 4096)
"""Multiples of 16 and others, each of them twice, so that either may share a form."""

FORMS = 6
"""How many forms (block sizes, numbers of warps) a kernel may take over all these batch sizes."""

TRANSPOSED = 2
"""How often a form may be compiled where logits lie transposed: for batches that are multiples of 16, and others."""

ITERATIONS = ("spectral_norm_on_chip", "spectral_norm_in_cache")
"""Their registers depend on the flags as much as on the sizes."""


class Driver:
    """What Triton wants to know of a GPU when it compiles."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # kernels are kept by device

    def get_current_stream(self, _: int) -> int:
        return 0


@dataclass(frozen=True)
class Pointer:
    """A tensor as the compiler sees it: its type and whether it lies on 16 bytes."""

    dtype: Any
    offset: int

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel in one specialisation: a fixed value, or a type and what is known of the value."""

    name: str
    type: Any
    known: Any

    @property
    def fixed(self) -> bool:
        return self.type == "constexpr"

    @property
    def is_pointer(self) -> bool:
        return str(self.type).startswith("*")


@dataclass(frozen=True, eq=False)
class Specialisation:
    """A kernel as it is compiled once, and a launch that asks for it."""

    kernel: Any
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    parameters: tuple[Parameter, ...]
    settings: tuple[tuple[str, Any], ...]
    """Numbers of warps, of stages and the like."""

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> Hashable:
        return self.name, self.parameters, self.settings

    @property
    def form(self) -> Hashable:
        """What the host function chooses: fixed values, options, types of pointers; not the numbers it hands over."""
        chosen = [(p.name, p.type, p.known if p.fixed else None) for p in self.parameters if p.is_pointer or p.fixed]
        return self.name, tuple(chosen), self.settings

    @property
    def is_double(self) -> bool:
        return any(p.type == "*fp64" for p in self.parameters)

    def features(self, *, with_blocks: bool) -> Iterator[Hashable]:
        """What must have been compiled once: each type of a pointer, each flag and option; ``with_blocks`` each of
        these with each choice of blocks, for either precision, and for ``ITERATIONS`` with all flags."""
        sizes = tuple(p for p in self.parameters if p.fixed and type(p.known) is int and p.name.isupper())
        flags = tuple(p for p in self.parameters if p.fixed and type(p.known) is bool)
        blocks: Hashable = self.kernel
        if with_blocks:
            blocks = self.kernel, sizes, self.settings
            yield blocks, self.is_double, flags if self.name in ITERATIONS else ()
        for p in self.parameters:
            if p.is_pointer or (p.fixed and (with_blocks or p not in sizes)):
                yield blocks, p.name, p.type, p.known if p.fixed else None

    def __str__(self) -> str:
        """Types of pointers, fixed values (those that are None or False are left out), what is known of the others."""
        types: dict[str, list[str]] = defaultdict(list)
        others = []
        for p in self.parameters:
            if p.is_pointer:
                types[p.type[1:]].append(p.name + ("" if p.known == "D" else " (not aligned)"))
            elif p.type == "constexpr" and p.known is True:
                others.append(p.name)
            elif p.type == "constexpr" and p.known is not None and p.known is not False:
                others.append(f"{p.name}={p.known}")
            elif p.type != "constexpr" and number(p.type, p.known) not in ("n", "x"):
                others.append(f"{p.name}={number(p.type, p.known)}")
        settings = [f"{name}={value}" for name, value in self.settings]
        return "; ".join([*(f"{dtype}: {' '.join(names)}" for dtype, names in types.items()), *others, *settings])


def number(type_: Any, known: Any) -> str:
    """What is known of a number or a tuple of numbers: its value, that it is a multiple of 16, that it is wide."""
    if isinstance(type_, tuple):
        return "(" + " ".join(map(number, type_, known)) + ")"
    if type_ == "constexpr":
        return str(known)
    return ("16" if known == "D" else "") + {"i32": "n", "i64": "N", "fp32": "x", "fp64": "x"}.get(type_, str(type_))


# --- which specialisations there are ------------------------------------------------------------------------------


def activate(target: int) -> None:
    import triton

    triton.runtime.driver.set_active(Driver(target))


def distinct(launches: Iterable[Any]) -> list[Specialisation]:
    """As Triton's own binder tells them apart."""
    from torch import Tensor

    found: dict[Hashable, Specialisation] = {}
    for launch in launches:
        kernel, options = launch.kernel, launch.settings
        args = tuple(
            Pointer(arg.dtype, arg.storage_offset() * arg.itemsize % 16) if isinstance(arg, Tensor) else arg
            for arg in launch.args
        )
        binder = kernel.device_caches[TARGETS[0]][4]
        _, kinds, _ = binder(*args, **options, debug=False)
        key = kernel, tuple(kinds), tuple(sorted(options.items()))
        if key not in found:
            found[key] = specialisation(kernel, args, options, kinds)
    return list(found.values())


def specialisation(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], kinds: Iterable[Any]) -> Specialisation:
    parameters = tuple(Parameter(p.name, *as_text(kind)) for p, kind in zip(kernel.params, kinds, strict=False))
    names = {p.name for p in kernel.params}
    settings = tuple(sorted((name, value) for name, value in options.items() if name not in names))
    return Specialisation(kernel, args, tuple(options.items()), parameters, settings)


def as_text(kind: tuple[Any, Any]) -> tuple[Any, Any]:
    type_, known = kind
    return type_, getattr(known, "__name__", None) or getattr(known, "name", known)


def every_specialisation(quick: bool) -> list[Specialisation]:
    from cases import DTYPES, torch
    from triton_calls import WITH_KERNELS, calls, launches_of, operator_arguments, without_data

    activate(TARGETS[0])
    dtypes = (torch.float32,) if quick else DTYPES
    with without_data():
        return distinct(
            launch
            for name in WITH_KERNELS
            for dtype in dtypes
            for s in calls(name, dtype)
            for launch in launches_of(name, operator_arguments(name, s))
        )


def covering(every: list[Specialisation], *, with_blocks: bool) -> list[Specialisation]:
    """Few of them that have all features; those with most features that are still missing first."""
    features = {this: frozenset(this.features(with_blocks=with_blocks)) for this in sorted(every, key=in_words)}
    missing = set().union(*features.values())
    chosen: list[Specialisation] = []
    while missing:
        gains = {this: len(missing & has) for this, has in features.items()}
        best = max(gains, key=lambda this: gains[this])
        missing -= features.pop(best)
        features = {this: has for this, has in features.items() if gains[this]}
        chosen.append(best)
    return sorted(chosen, key=in_words)


def in_words(this: Specialisation) -> tuple[str, str]:
    return this.name, str(this)


# --- compiling ----------------------------------------------------------------------------------------------------


_jobs: list[tuple[Specialisation, int]] = []  # handed to the worker processes by the fork


def compile_job(number: int) -> budget.Need | str:
    """What a kernel needs, or what is wrong with it."""
    this, target = _jobs[number]
    activate(target)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = this.kernel.warmup(*this.args, grid=(1,), **dict(this.options))
    except Exception as error:  # the compiler's, whatever it is: the others are compiled all the same
        return f"does not compile: {reason(error)}"
    if compiled.metadata.enable_fp_fusion and takes_its_way_by_floats(compiled.asm["ttir"]):
        return "branches on floating numbers that lanes may have rounded differently, and is not launched AS_WRITTEN"
    if "tf32" in compiled.asm["ptx"]:
        return "multiplies in TF32"
    first, again = handed_over(this)
    if first != again:
        return f"is handed {again} when it is launched again, at first {first}"
    stores, loads = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())[-2:]
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())[-1:]
    return budget.Need(int(registers), compiled.metadata.shared, int(stores) + int(loads))


def handed_over(this: Specialisation) -> list[tuple[Any, ...]]:
    """The grids and arguments that reach the GPU's driver at the first launch, which is Triton's, and at the second."""
    from triton.compiler import CompiledKernel

    from fairkernels.ops.triton_kernels import launch

    handed: list[tuple[Any, ...]] = []

    def without_gpu(kernel: Any) -> None:
        kernel.module = kernel.function = kernel
        kernel._run = lambda x, y, z, stream, function, packed, metadata, enter, leave, *args: handed.append(
            (x, y, z, function.hash, args)
        )

    with mock.patch.object(CompiledKernel, "_init_handles", without_gpu):
        for _ in range(2):
            launch.launch_again(this.kernel, (5, 3), this.args, dict(this.options))
    return handed


def takes_its_way_by_floats(ttir: str) -> bool:
    """Whether a loop or a branch depends on a comparison of floating numbers, however indirectly."""
    sources = dict(re.findall(r"^\s*(%\w+)(?::\d+)? = (.*)", ttir, re.MULTILINE))
    sources |= dict(re.findall(r"[(,] ?(%\w+) = (%\w+)", ttir))  # what a loop carries round
    ways = re.findall(r"scf\.(?:if|condition)[ (](%\w+)", ttir)
    for bounds in re.findall(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)", ttir):
        ways += bounds
    seen: set[str] = set()
    while ways:
        name = ways.pop()
        if name in seen or name not in sources:
            continue
        seen.add(name)
        if sources[name].startswith("arith.cmpf"):
            return True
        ways += re.findall(r"%\w+", sources[name])
    return False


def reason(error: BaseException) -> str:
    """The innermost of nested compile errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def compile_all(
    chosen: list[Specialisation], targets: Iterable[int], processes: int
) -> Iterator[tuple[budget.Key, budget.Need | str]]:
    from rich.console import Console
    from rich.progress import track
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = True
    _jobs[:] = [(this, target) for this in chosen for target in targets]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        needs = pool.map(compile_job, range(len(_jobs)))
        console = Console(stderr=True)
        followed = track(needs, "compiling", total=len(_jobs), console=console)
        for done, ((this, target), need) in enumerate(zip(_jobs, followed, strict=True), 1):
            if not console.is_terminal and done % 500 == 0:
                console.print(f"compiled {done} of {len(_jobs)}")
            yield (this.name, str(this), target), need


# --- another batch size -------------------------------------------------------------------------------------------


def recompilations(quick: bool) -> Iterator[str]:
    """Kernels that are compiled again for another batch size or number of problems although nothing else changed.

    ``quick``: over ``FEW_BATCHES``.
    """
    from triton_calls import FEW_AND_MANY, SIZES, WITH_KERNELS, launches_of, of_every_batch, without_data

    activate(TARGETS[0])
    batches = FEW_BATCHES if quick else BATCHES
    with without_data():
        for name in WITH_KERNELS:
            for size in SIZES[name][::3]:
                for sample, several in of_every_batch(name, size, batches):
                    launches = (launch for args in several for launch in launches_of(name, args))
                    yield from repeated(f"{name} {list(size)}, {sample}", distinct(launches))
                    if size in FEW_AND_MANY[::6] and name != "confusion_counts":
                        launches = (launch for args in several for launch in launches_of(name, transposed(args)))
                        yield from repeated(
                            f"{name} {list(size)}, {sample}, transposed", distinct(launches), TRANSPOSED
                        )


def transposed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Logits whose samples lie side by side: their columns are as far apart as there are samples."""
    from torch import Tensor

    logits = args[0].shape
    return tuple(arg.mT.contiguous().mT if isinstance(arg, Tensor) and arg.shape == logits else arg for arg in args)


def repeated(where: str, found: list[Specialisation], most: int = 1) -> Iterator[str]:
    """``most``: how often each form may be compiled."""
    forms: dict[Hashable, list[Specialisation]] = defaultdict(list)
    kernels: dict[str, set[Hashable]] = defaultdict(set)
    for this in found:
        forms[this.form].append(this)
        kernels[this.name].add(this.form)
    for same in forms.values():
        first = same[0]
        for other in same[most:]:
            pairs = zip(first.parameters, other.parameters, strict=True)
            changed = ", ".join(f"{a.name} {a.type} {a.known!r} / {b.type} {b.known!r}" for a, b in pairs if a != b)
            yield f"{where}: {first.name} is compiled again for another {changed}"
    for name, several in kernels.items():
        if len(several) > FORMS:
            yield f"{where}: {name} has {len(several)} forms over all batch sizes, allowed are {FORMS}"


# --- 16 bytes at a time -------------------------------------------------------------------------------------------

WIDE = r"\b{}\.global\S*\.(?:v4\.[a-z]32|v2\.[a-z]64)\s"
"""In PTX, of 16 bytes: two words of 64 bits, or four of 32, in which halves come in pairs."""

WIDE_SIZES = ((64, 3, 32, 32), (64, 3, 224, 224))
"""Of images, in samples of a multiple of 16 elements; for l2 the smaller ones fit a block."""


def narrow_accesses() -> Iterator[str]:
    """What of images that lie alike ``pgd_step`` does not read or write 16 bytes at a time."""
    from cases import DTYPES, sample, torch
    from triton_calls import launches_of, of_size, operator_arguments, without_data

    def laid_out(arg: Any, layout: Any) -> Any:
        return arg.contiguous(memory_format=layout) if torch.is_tensor(arg) and arg.dim() == 4 else arg

    activate(90)
    with without_data():
        steps = distinct(
            launch
            for norm in ("linf", "l2")
            for dtype in DTYPES
            for size in WIDE_SIZES
            for layout in (torch.contiguous_format, torch.channels_last)
            for args in [operator_arguments("pgd_step", of_size("pgd_step", sample("pgd_step", norm, dtype), size))]
            for launch in launches_of("pgd_step", tuple(laid_out(arg, layout) for arg in args))
        )
    for step in steps:
        yield from narrow_accesses_of(step)


def narrow_accesses_of(step: Specialisation) -> Iterator[str]:
    """A masked block beside a whole one is not counted: its mask splits the accesses."""
    options = dict(step.options)
    elements = options["BLOCK"] if "BLOCK" in options else options["ROWS"] * options["COLUMNS"]
    accesses = math.ceil(elements * step.args[0].dtype.itemsize / (16 * 32 * options["num_warps"]))
    text = step.kernel.warmup(*step.args, grid=(1,), **options).asm["ptx"]
    for what, opcode, images in (("loads", "ld", ("x_adv", "grad", "x")), ("stores", "st", ("out",))):
        expected = accesses * sum(p.name in images for p in step.parameters)
        found = len(re.findall(WIDE.format(opcode), text))
        if found != expected:
            yield f"{step.name}, {step}: {found} {what} of 16 bytes in a thread, expected {expected}"


# --- the document -------------------------------------------------------------------------------------------------

PROSE = """\
# Triton kernels

On a GPU every operator that has one runs its Triton kernel, in float64, float32, bfloat16 and float16, with any
strides. Triton compiles a kernel at its first call: for each dtype and choice of options in a few forms at most, which
are those for small and for large problems, not one per batch size. Where logits lie transposed, batches of a multiple
of 16 samples are a form of their own. A launch like an earlier one goes straight to what was compiled for that one: to
find it again takes Triton longer than the launch. All results are the same bits every time;
`fairkernels.ops.triton_kernels.launch.tuned()` is a scope in which other numbers of warps and pipeline stages are
tried, for who wants that.

## How they are proven

- Values, gradients, layouts and edge cases: the tests of the operator table, on Triton's interpreter
  (`TRITON_INTERPRET=1`, on CPU tensors). `make test` runs, in its second part, of every sample in float32 the values
  or the gradient, and a selection of the others, `make test-all` runs all.
- `tests/test_triton.py`: launches of a call, no copies of inputs, no result that was not written, nothing that waits
  for the GPU, so that a CUDA graph can capture it (after one call outside: the first one compiles and loads).
- `tests/test_triton_bytes.py`: what a call reads and writes, counted on the interpreter: logits once each way, their
  gradient once. No address lies outside the tensors of its launch, and no program reads or writes what another one
  writes, but for the same bits.
- `tests/test_triton_offsets.py`: inputs whose elements lie further apart than 32 bits count, in every dimension.
- `tests/triton_aot.py`: all kernels compiled for sm_80, sm_90 and sm_100: none may spill, and what they need is held
  against `tests/budget.json`. Of all combinations of dtypes, options and sizes so many are compiled that every choice
  of block sizes occurs with each constant and with each type, of the spectral iterations with all their flags; `--all`
  compiles the rest, which takes hours. Nor may a product and a sum be one instruction in a kernel whose loops or
  branches depend on floating numbers: the lanes of a warp would round the sums that they exchange differently and could
  part. None may multiply in TF32. What a kernel is handed at its second launch is compared with the first.
  The same program makes sure that there are few forms of a kernel whatever the batch size, and that `pgd_step` reads
  and writes images that lie alike 16 bytes at a time: for l∞ in whole blocks, for l2 where the length of a sample is a
  multiple of 16.

## What they need

Written by `make budget`; {total} specialisations, triton {version}: registers of a thread,
the most shared memory of a program. This is what the compiler says, nothing of it was measured on a GPU.

{table}
"""


def document(part: budget.Part) -> str:
    total = sum(map(len, part["kernels"].values()))
    return PROSE.format(version=part["version"], total=total, table=budget.table(part))


# --- the command --------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--quick", "--all", "--write", "--batches", "--wide"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--kernel", action="append", help="with --all: these kernels alone")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()
    if options.kernel and not options.all:
        parser.error("--kernel goes with --all")

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is found there does not tell what it needs
        checks = (
            recompilations(options.quick) if options.batches else narrow_accesses() if options.wide else check(options)
        )
        found = []
        for complaint in checks:
            print(complaint, flush=True)  # at once: there may be hours to go
            found.append(complaint)
    return 1 if found else 0


def check(options: argparse.Namespace) -> Iterator[str]:
    import triton

    start = time.perf_counter()
    every = every_specialisation(options.quick)
    written = budget.read("triton")
    if options.quick:
        known = [this for this in every if str(this) in written["kernels"].get(this.name, ())]
        chosen = covering(known, with_blocks=False)
        left_out = {this.name for this in every} - {this.name for this in chosen}
        yield from (f"nothing of {name} for float32 is in the budget" for name in sorted(left_out))
    elif options.all:
        wanted = options.kernel or {this.name for this in every}
        chosen = [this for this in every if this.name in wanted]
        yield from (f"there is no kernel {name}" for name in sorted(set(wanted) - {this.name for this in chosen}))
    else:
        chosen = covering(every, with_blocks=True)
    targets = (90,) if options.quick else TARGETS
    against = None if options.all or options.write else written
    needs: budget.Needs = {}
    for key, need in compile_all(chosen, targets, options.processes):
        needs[key] = need
        yield from budget.complaints({key: need}, against, triton.__version__)
    took = time.perf_counter() - start
    print(f"{len(chosen)} of {len(every)} specialisations for {len(targets)} targets, {took:.0f} s", file=sys.stderr)
    if against is not None and not options.quick:
        yield from budget.stale(needs, against)
    if options.write:
        DOCUMENT.write_text(document(budget.write("triton", triton.__version__, needs)))


if __name__ == "__main__":
    sys.exit(main())
