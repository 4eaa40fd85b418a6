"""The ``parnet-bench lanes`` commands: what CPU lanes cost, gain and promise on a machine.

They hold what is claimed of lanes against this machine, which should do nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from parnet_export import console, files
from parnet_export.errors import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parnet_bench.lanes.comparison import Comparison
    from parnet_bench.lanes.overhead import Memory, Overhead
    from parnet_bench.lanes.simulator_check import SimulatorCheck

Networks = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        help="parnet-s, parnet-l or parnet-32-64-128; repeatable.",
        metavar="NAME",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Output = Annotated[
    Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
]

app = typer.Typer(
    no_args_is_help=True, help="Check what CPU lanes cost, gain and promise on this machine."
)


def register(parent: typer.Typer) -> None:
    """Add the commands to a command line."""
    parent.add_typer(app, name="lanes")


@app.command()
def overhead(
    inferences: Annotated[int, typer.Option(min=10, help="How many to time.", metavar="N")] = 20000,
    lanes: Annotated[int, typer.Option(min=1, help="How many lanes.", metavar="K")] = 3,
    *,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Time a small ParNet's seven segments with engines that do nothing."""
    from parnet_bench.lanes.networks import SMALL, lane_bundle
    from parnet_bench.lanes.overhead import measure_overhead, spread
    from parnet_engines.clock import MonotonicClock

    _require_writable(output)
    with console.working("running engines that do nothing"):
        bundle = lane_bundle(SMALL)
        program = spread(bundle, lanes)
        found = measure_overhead(bundle, program, inferences, MonotonicClock())
    _show([found], _describe_overhead, as_json=as_json, output=output)


@app.command()
def memory(
    inferences: Annotated[int, typer.Option(min=1, help="How many to run.", metavar="N")] = 100_000,
    lanes: Annotated[int, typer.Option(min=1, help="How many lanes.", metavar="K")] = 3,
    *,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Compare resident memory before and after many inferences of engines that do nothing."""
    from parnet_bench.lanes.networks import SMALL, lane_bundle
    from parnet_bench.lanes.overhead import measure_memory, spread

    _require_writable(output)
    with console.working("running engines that do nothing"):
        bundle = lane_bundle(SMALL)
        found = measure_memory(bundle, spread(bundle, lanes), inferences)
    _show([found], _describe_memory, as_json=as_json, output=output)


@app.command()
def auto(
    network: Networks = None,
    budget_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds to measure each network.", metavar="S")
    ] = 60.0,
    *,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Compare plan auto with ONNX Runtime by itself, in the same rounds.

    Unless --network says otherwise, for all three networks.
    """
    from parnet_bench.lanes.comparison import compare
    from parnet_bench.lanes.networks import RESOLUTIONS, lane_bundle, require_known
    from parnet_engines.clock import MonotonicClock

    _require_writable(output)
    found = []
    for name in require_known(network or RESOLUTIONS):
        with console.working(f"measuring {name}"):
            found.append(
                compare(name, lane_bundle(name), budget_s=budget_s, clock=MonotonicClock())
            )
    _show(found, _describe_comparison, as_json=as_json, output=output)


@app.command()
def simulator(
    network: Networks = None,
    lanes: Annotated[int, typer.Option(min=1, help="Lanes of the real engines.", metavar="K")] = 2,
    repetitions: Annotated[
        int, typer.Option(min=1, help="How often to measure costs and session.", metavar="N")
    ] = 5,
    inferences: Annotated[
        int, typer.Option(min=1, help="Inferences in each repetition.", metavar="N")
    ] = 50,
    *,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Compare predicted latencies with measured ones: of delays, and of real engines.

    Unless --network says otherwise, real engines run parnet-s and parnet-32-64-128.
    """
    from parnet_bench.lanes.networks import SMALL, lane_bundle, require_known
    from parnet_bench.lanes.simulator_check import check_delays, check_engines
    from parnet_engines.clock import MonotonicClock

    _require_writable(output)
    names = require_known(network or ("parnet-s", SMALL))
    clock = MonotonicClock()
    with console.working("waiting instead of computing"):
        small = lane_bundle(SMALL)
        found = [check_delays(small, count, inferences=20, clock=clock) for count in (1, 2, 3)]
    for name in names:
        with console.working(f"measuring {name}"):
            found.append(
                check_engines(
                    lane_bundle(name),
                    lanes,
                    repetitions=repetitions,
                    inferences=inferences,
                    clock=clock,
                )
            )
    _show(found, _describe_simulation, as_json=as_json, output=output)


class _Checked(Protocol):
    @property
    def passed(self) -> bool: ...


_Result = TypeVar("_Result", bound=_Checked)


def _require_writable(output: Path | None) -> None:
    if output is not None:
        files.require_writable(output)


def _show(
    found: Sequence[_Result],
    describe: Callable[[_Result], str],
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    """Show results, and fail if one of them is not what is claimed of lanes."""
    from parnet_bench.machine.environment import read_environment

    result = {"environment": read_environment(), "results": found}
    lines = []
    for one in found:
        lines += [describe(one), f"  {'as claimed' if one.passed else 'NOT AS CLAIMED'}"]
    console.show(result, "\n".join(lines), as_json=as_json, output=output)
    failed = sum(not one.passed for one in found)
    if failed:
        raise CheckFailedError(
            f"{failed} of {len(found)} results are not as claimed. Repeat it on a machine that "
            "does nothing else."
        )


def _describe_overhead(found: Overhead) -> str:
    from parnet_bench.lanes.overhead import OVERHEAD_LIMIT_US

    where = "a core each" if found.pinned else "too few cores to pin them"
    return (
        f"{found.network}, {found.segments} segments on {found.lanes} lanes ({where}):\n"
        f"  median {found.median_us:.1f} us, p90 {found.p90_us:.1f} us of {found.inferences:,} "
        f"inferences; limit {OVERHEAD_LIMIT_US:g} us"
    )


def _describe_memory(found: Memory) -> str:
    from parnet_bench.lanes.overhead import MEMORY_LIMIT_BYTES

    grown = found.after_bytes - found.before_bytes
    return (
        f"{found.network}: {console.format_bytes(found.before_bytes)} resident, "
        f"{console.format_bytes(grown)} more after {found.inferences:,} inferences; "
        f"limit {console.format_bytes(MEMORY_LIMIT_BYTES)}"
    )


def _describe_comparison(found: Comparison) -> str:
    auto_ms = found.latencies_ms["auto"]
    lines = [f"{found.network}: auto takes {found.chosen}, {auto_ms:.3f} ms"]
    for form, ratio in found.against.items():
        mark = ", the best" if form == found.best else ""
        lines.append(
            f"  ONNX Runtime, {form:<24} {found.latencies_ms[form]:9.3f} ms, {ratio.value:.3f} "
            f"times auto ({ratio.low:.3f} to {ratio.high:.3f}, {ratio.rounds} rounds){mark}"
        )
    lines.append(f"  limit: the best of 1 and 2 threads, {found.least_speedup:.3f} times auto")
    return "\n".join(lines)


def _describe_simulation(found: SimulatorCheck) -> str:
    from statistics import median

    count = f"{found.lanes} lane{'' if found.lanes == 1 else 's'}"
    text = (
        f"{found.network}, {found.engines} on {count}: measured "
        f"{console.format_ms(median(found.measured_ms))}, predicted "
        f"{console.format_ms(median(found.predicted_ms))}\n"
        f"  error {found.error:+.1%}, limit {found.limit:.0%}"
    )
    if found.engines != "delays":
        text += f"; {found.error_alone:+.1%} from what segments take alone"
    return text
