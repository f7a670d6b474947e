"""The command ``fairkernels``; what a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

main = typer.Typer(name="fairkernels", help="Fair adversarial robustness for PyTorch.", no_args_is_help=True)


@main.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="How many times everything is trained.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, to see that it runs.")] = False,
) -> None:
    """Fair adversarial training on scikit-learn's digits: tables, pictures and a JSON file in minutes."""
    from fairkernels.app.demo import run_demo

    run_demo(output, seeds, quick)


@main.command()
def info(
    selftest: Annotated[bool, typer.Option("--selftest", help="Check every operator on this machine.")] = False,
) -> None:
    """Versions, what was built and why not more."""
    from fairkernels.app.info import run_info

    raise typer.Exit(run_info(selftest))


@main.command()
def bench(
    output: Annotated[
        Path | None, typer.Option(help="Folder of the JSON file: bench-output, or none with --operator.")
    ] = None,
    operator: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    largest: Annotated[int, typer.Option(min=1, help="Elements of the largest input; all by default.")] = 2**27,
    compile: Annotated[bool, typer.Option(help="Also against torch.compile: minutes of compiling.")] = True,
    minutes: Annotated[float, typer.Option(help="When they are over, the largest inputs are left out.")] = 9.5,
) -> None:
    """Time, memory and bandwidth of every operator on its whole grid, beside everything else one could call."""
    from fairkernels.app.bench import Settings, cases_of, every_case, run_command

    try:
        cases = cases_of(operator) if operator else every_case()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--operator") from None
    if output is None and not operator:
        output = Path("bench-output")
    run_command(Settings(cases=cases, largest=largest, compile=compile, minutes=minutes), output)
