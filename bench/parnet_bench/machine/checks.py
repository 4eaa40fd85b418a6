"""What to fix on a machine before measuring on it, each with the command that helps.

The checks look at a `MachineState` and at nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_export.console import format_bytes, format_percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from parnet_bench.machine.state import GpuState, MachineState

MOST_BUSY = 0.05
"""Part of the cores' time that other programs may take."""

MOST_STEAL = 0.01
"""Part of the cores' time that the hypervisor may give away."""

MOST_SWAP_BYTES = 64 * 1024 * 1024
"""Memory that may have been swapped out: most machines swap a little that nobody misses."""

_AT_REST = 0.9


@dataclass(frozen=True, slots=True)
class Advice:
    """Something to fix.

    Parameters
    ----------
    check
        What it is about, in a word or two.
    problem
        What is found and what it does to latencies, as a sentence.
    command
        What helps, ready for a shell.
    """

    check: str
    problem: str
    command: str


def advise(state: MachineState) -> tuple[Advice, ...]:
    """Return what to fix, in the order in which it pays; empty for a machine at its best."""
    found = [advice for check in _CHECKS for advice in check(state)]
    return (*found, *(advice for gpu in state.gpus for advice in _gpu(gpu)))


def _load(state: MachineState) -> Iterator[Advice]:
    busy = state.busy_share
    if busy is not None and busy > MOST_BUSY:
        yield Advice(
            "load",
            f"Other programs take {format_percent(busy)} of the usable cores' time "
            f"(load {state.load:.1f}): they slow every row, each at another moment.",
            "ps -eo pcpu,pid,comm --sort=-pcpu | head",
        )


def _steal(state: MachineState) -> Iterator[Advice]:
    steal = state.steal_share
    if steal is not None and steal > MOST_STEAL:
        yield Advice(
            "steal",
            f"The hypervisor gives {format_percent(steal)} of the cores' time to other machines: "
            "measure on a host of your own, or at another time.",
            "vmstat 1 10  # column st",
        )


def _quota(state: MachineState) -> Iterator[Advice]:
    quota = state.cpu_quota
    if quota is not None and quota < len(state.usable_cores):
        cores = ",".join(map(str, state.usable_cores[: max(1, int(quota))]))
        yield Advice(
            "CPU quota",
            f"This container may use {quota:.2g} cores' worth of time but runs on "
            f"{len(state.usable_cores)}: it is stopped for the rest of every period.",
            f"docker run --cpuset-cpus {cores} ...  # instead of --cpus",
        )


def _affinity(state: MachineState) -> Iterator[Advice]:
    if len(state.usable_cores) < state.logical_cores:
        yield Advice(
            "affinity",
            f"This process may use {len(state.usable_cores)} of {state.logical_cores} cores: what "
            "it measures does not speak for the machine.",
            f"taskset --cpu-list 0-{state.logical_cores - 1} parnet-bench latency ...",
        )


def _siblings(state: MachineState) -> Iterator[Advice]:
    if state.siblings:
        first = ",".join(map(str, state.siblings[0]))
        second_threads = {core for group in state.siblings for core in group[1:]}
        one_each = [core for core in state.usable_cores if core not in second_threads]
        yield Advice(
            "SMT",
            f"Usable cores share physical cores ({first} do): threads on them wait for each other.",
            f"taskset --cpu-list {','.join(map(str, one_each))} parnet-bench latency ...",
        )


def _governor(state: MachineState) -> Iterator[Advice]:
    others = [name for name in state.governors if name != "performance"]
    if others:
        yield Advice(
            "governor",
            f"The frequency governor is {', '.join(others)}: cores clock up only after work has "
            "begun.",
            "sudo cpupower frequency-set --governor performance",
        )


def _turbo(state: MachineState) -> Iterator[Advice]:
    if state.turbo:
        is_intel = "intel" in state.cpu_model.casefold()
        yield Advice(
            "turbo",
            "Cores may clock above their nominal frequency for as long as heat and power allow, "
            "so that later rows run slower.",
            "echo 1 | sudo tee /sys/devices/system/cpu/intel_pstate/no_turbo"
            if is_intel
            else "echo 0 | sudo tee /sys/devices/system/cpu/cpufreq/boost",
        )


def _swap(state: MachineState) -> Iterator[Advice]:
    if state.swap_used_bytes > MOST_SWAP_BYTES:
        yield Advice(
            "swap",
            f"{format_bytes(state.swap_used_bytes)} of memory are swapped out: a row whose weights "
            "are among them reads them from disk.",
            "sudo swapoff --all",
        )


def _huge_pages(state: MachineState) -> Iterator[Advice]:
    if state.huge_pages == "always":
        yield Advice(
            "huge pages",
            "The kernel merges any memory into huge pages while programs run: the same row is "
            "quicker or slower by what it has merged.",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


_CHECKS: tuple[Callable[[MachineState], Iterator[Advice]], ...] = (
    _load,
    _steal,
    _quota,
    _affinity,
    _siblings,
    _governor,
    _turbo,
    _swap,
    _huge_pages,
)


def _gpu(gpu: GpuState) -> Iterator[Advice]:
    name = f"GPU {gpu.index}"
    if gpu.processes:
        yield Advice(
            f"{name} processes",
            f"{gpu.processes} other processes use {name} ({gpu.name}): its time is shared.",
            f"nvidia-smi --id={gpu.index} --query-compute-apps=pid,name --format=csv",
        )
    if gpu.persistent is False:
        yield Advice(
            f"{name} persistence",
            f"The driver of {name} is unloaded whenever nobody uses it: the first inferences "
            "include loading it, and clocks are forgotten.",
            f"sudo nvidia-smi --id={gpu.index} --persistence-mode=1",
        )
    if gpu.slowed_by:
        yield Advice(
            f"{name} slowdown",
            f"{name} is held back by {' and '.join(gpu.slowed_by)}.",
            f"nvidia-smi --id={gpu.index} --query --display=PERFORMANCE,TEMPERATURE,POWER",
        )
    clock, highest = gpu.clock_mhz, gpu.max_clock_mhz
    if clock is not None and highest is not None and clock < _AT_REST * highest:
        # A locked clock stays where it is at rest, too.
        yield Advice(
            f"{name} clocks",
            f"{name} runs at {clock} of {highest} MHz at rest, so its clocks are not locked: they "
            "follow the work, heat and power.",
            f"sudo nvidia-smi --id={gpu.index} --lock-gpu-clocks={highest}",
        )
