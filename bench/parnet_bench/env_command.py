"""``parnet-bench env``: the machine, and what to fix on it before measuring."""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Group

    from parnet_bench.machine.checks import Advice
    from parnet_bench.machine.environment import Environment
    from parnet_bench.machine.state import MachineState

_NUMBERS = (
    "These are NVML's numbers, as nvidia-smi has them. --devices takes CUDA's: the fastest first "
    "unless CUDA_DEVICE_ORDER=PCI_BUS_ID, and only those of CUDA_VISIBLE_DEVICES"
)


def env(
    seconds: Annotated[
        float,
        typer.Option(min=0.1, max=600, help="Watch the cores' times for so long.", metavar="S"),
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Describe this machine, and say what to fix before measuring, with the commands."""
    import msgspec

    from parnet_bench.machine.checks import advise
    from parnet_bench.machine.environment import read_environment
    from parnet_bench.machine.nvml import open_nvml
    from parnet_bench.machine.state import read_machine
    from parnet_export import console, files

    if output is not None:
        files.require_writable(output)
    nvml, missing = open_nvml()
    with console.working(f"watching the cores for {seconds:g} s"):
        state = read_machine(nvml=nvml, sample_s=seconds)
    environment = read_environment()
    found = advise(state)
    result = {
        "environment": msgspec.to_builtins(environment),
        "machine": msgspec.to_builtins(state),
        "gpus_missing": missing,
        "advice": msgspec.to_builtins(found),
    }
    shown = _render(environment, state, found, missing)
    console.show(result, shown, as_json=as_json, output=output)


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(env)


def _render(
    environment: Environment, state: MachineState, found: Sequence[Advice], missing: str
) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from parnet_export.console import printable

    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(environment, state, missing):
        facts.add_row(name, printable(value))
    if not found:
        return Group(facts, Text("\nNothing to fix before measuring."))
    advice = Text("\nTo fix before measuring:\n")
    for item in found:
        advice.append(f"\n{printable(item.check)}: ", style="bold")
        advice.append(printable(item.problem))
        advice.append(f"\n    {printable(item.command)}", style="cyan")
    return Group(facts, advice)


def _facts(
    environment: Environment, state: MachineState, missing: str
) -> Iterator[tuple[str, str]]:
    from parnet_bench.machine.state import heat_of
    from parnet_export.console import format_bytes, format_percent

    def told(value: object) -> str:
        return "not told" if value is None or value == "" else str(value)

    yield "processor", environment.cpu_model
    physical = told(environment.physical_cores)
    yield "cores", f"{state.logical_cores} logical, {physical} physical"
    yield "usable", ", ".join(map(str, state.usable_cores))
    yield "governor", ", ".join(state.governors) or "not told"
    yield "turbo", "not told" if state.turbo is None else "on" if state.turbo else "off"
    busy = "not told" if state.busy_share is None else format_percent(state.busy_share)
    yield "busy", f"{busy} over {state.sampled_s:g} s, load {state.load:.2f}"
    yield "steal", "not told" if state.steal_share is None else format_percent(state.steal_share)
    yield "CPU quota", "none" if state.cpu_quota is None else f"{state.cpu_quota:g} cores"
    available = format_bytes(environment.available_memory_bytes)
    yield "memory", f"{available} of {format_bytes(environment.memory_bytes)} free"
    yield "swap used", format_bytes(state.swap_used_bytes)
    yield "huge pages", told(state.huge_pages)
    for gpu in state.gpus:
        clock = f"{told(gpu.clock_mhz)} of {told(gpu.max_clock_mhz)} MHz"
        facts = (gpu.name, gpu.bus_id, f"driver {gpu.driver}", clock, *heat_of(gpu))
        yield f"GPU {gpu.index}", ", ".join(filter(None, facts))
    if state.gpus:
        yield "", _NUMBERS
    if not state.gpus:
        yield "GPUs", missing or "none"
    yield "system", environment.system
    yield "Python", environment.python
    yield "libraries", ", ".join(f"{name} {v}" for name, v in environment.libraries.items())
