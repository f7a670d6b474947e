"""``fairkernels info``: versions, what was built and why not more, and the self-test on this very machine."""

from __future__ import annotations

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fairkernels.app import machine
from fairkernels.app.selftest import devices, runs, verdict
from fairkernels.ops import dispatch, library
from fairkernels.ops.schema import OPERATORS


def run_info(selftest: bool) -> int:
    """Print all there is to know of this installation; returns the exit code, 1 if the self-test found an error."""
    console = Console()
    console.print(facts())
    console.print(backends())
    return run_selftest(console) if selftest else 0


def facts() -> Table:
    table = Table(title="fairkernels", show_header=False)
    for name, value in machine.describe().items():
        table.add_row(name, str(value) if value is not None else "not installed" if name != "gpu" else "none")
    build = library.build_info()
    table.add_row("native kernels", library.MISSING or f"built by {build.get('compiler')}")
    table.add_row("built for torch", f">= {build['torch_target']}" if build else "-")
    archs = build.get("cuda_archs")
    table.add_row(
        "CUDA kernels", f"{', '.join(archs)}, CUDA {build['cuda_version']}" if archs else "none in this build"
    )
    if library.REASON_FILE.exists():
        table.add_row("left out", library.REASON_FILE.read_text().strip())
    return table


def backends() -> Table:
    """Which backend runs each operator on each device in its first dtype, and why not the others."""
    table = Table("operator", "device", "runs", "why not the others", title="Backends")
    for name, operator in OPERATORS.items():
        for device in devices():
            dtype = operator.dtypes[0]
            chosen = dispatch.choose(name, device, dtype, None)
            reasons = {b: dispatch.can_run(b, operator, device, dtype) for b in dispatch.BACKENDS}
            others = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason)
            table.add_row(name, device, chosen, others)
    return table


def run_selftest(console: Console) -> int:
    """Every operator, backend and sample against the reference in float64, values and gradients."""
    table = Table("operator", "device", "backend", "samples", "largest error", "verdict", title="Self-test")
    failures = 0
    for run in track(list(runs(devices())), "Self-test", console=console, transient=True):
        found = verdict(run)
        failures += not found.sound
        said = "[green]ok[/]" if found.sound else "[red]WRONG[/]"
        table.add_row(run.operator.name, run.device, run.backend, str(found.samples), f"{found.error:.1e}", said)
    console.print(table)
    return 1 if failures else 0
