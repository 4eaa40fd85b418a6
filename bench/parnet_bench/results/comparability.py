"""What keeps two results from being compared, and what a reader of a comparison must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench.results.findings import find
from parnet_bench.results.used_runtimes import used_runtimes
from parnet_export.console import format_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_bench.machine.environment import Environment
    from parnet_bench.results.findings import Kind
    from parnet_bench.results.procedure import Procedure
    from parnet_bench.results.result import Result, Row, RowDescription

_OURSELVES = "parnet-export"
_DISTURBING: frozenset[Kind] = frozenset(
    {"partial", "unsettled", "drift", "throttled", "steal", "neighbours", "load"}
)
"""Findings by which one result alone may have become slower or faster than it is."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something in which two results differ.

    Parameters
    ----------
    row
        The row that it is about; empty where it is about all.
    what
        What differs, as a noun phrase.
    before, after
        What it is in either result.
    """

    row: str
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        subject = f"{self.row}: {self.what}" if self.row else self.what
        return f"{subject} is {self.after or 'absent'} instead of {self.before or 'absent'}"


def refusals(before: Result, after: Result) -> tuple[Difference, ...]:
    """Return what makes latencies of two results incomparable; empty if nothing does.

    Latencies are of the same thing where the machine, its clocks' governor, the drivers and
    the runtimes are the same, where both results empty caches and include transfers or neither
    does, and where rows of a name have the same inputs, precision, devices, threads and way to
    run. A row that only the first result has counts as well: a comparison that leaves it out
    would not see it fail.
    """
    found = [
        *_machine(before.environment, after.environment),
        *_methods(before.procedure, after.procedure),
        *_runtimes(before, after),
        *_gpus(before, after),
    ]
    others = {row.description.name: row for row in after.rows}
    for row in before.rows:
        name = row.description.name
        if name not in others:
            failed = {r.description.name: r.reason for r in after.failed}
            why = f"failed ({failed[name]})" if name in failed else "absent"
            found.append(Difference(name, "the row", "measured", why))
            continue
        found += _row(name, row.description, others[name].description)
        found += _way(row, others[name])
    return tuple(found)


def remarks(before: Result, after: Result) -> tuple[str, ...]:
    """Return what may differ, but makes a comparison no less meaningful, as sentences."""
    found = [*_disturbances(before, after), *_environment_remarks(before, after)]
    known = {row.description.name: row.description for row in before.rows}
    for row in after.rows:
        name = row.description.name
        if name not in known:
            found.append(f"{name} is in the second result alone.")
        else:
            found += _row_remarks(name, known[name], row.description)
    return tuple(found)


def _machine(before: Environment, after: Environment) -> Iterator[Difference]:
    yield from _differing(
        "",
        ("the processor", before.cpu_model, after.cpu_model),
        ("the number of logical cores", before.logical_cores, after.logical_cores),
        ("the number of physical cores", before.physical_cores, after.physical_cores),
        ("the frequency governor", ", ".join(before.governors), ", ".join(after.governors)),
    )


def _methods(before: Procedure, after: Procedure) -> Iterator[Difference]:
    """Compare what a latency has in it; how long and in what order is no matter."""
    for what, one, two in (
        ("--l2-flush", before.l2_flush, after.l2_flush),
        ("--data-transfers", before.data_transfers, after.data_transfers),
    ):
        if one != two:
            yield Difference("", what, *("on" if given else "off" for given in (one, two)))


def _runtimes(before: Result, after: Result) -> Iterator[Difference]:
    one, two = used_runtimes(before), used_runtimes(after)
    for name in sorted({*one, *two}):
        yield from _differing("", (name, one.get(name), two.get(name)))


def _gpus(before: Result, after: Result) -> Iterator[Difference]:
    """Compare boards and drivers, as far as either result has noted them."""
    yield from _differing("", ("the GPU and its driver", _boards(before), _boards(after)))


def _boards(result: Result) -> str:
    found = dict.fromkeys(
        f"{gpu.name} (driver {gpu.driver})"
        for activity in result.activities
        for gpu in activity.gpus
    )
    return ", ".join(found)


def _row(name: str, before: RowDescription, after: RowDescription) -> Iterator[Difference]:
    yield from _differing(
        name,
        ("the input", _inputs(before), _inputs(after)),
        ("the batch", before.batch, after.batch),
        ("the precision", before.precision, after.precision),
        ("the device", before.devices, after.devices),
        ("the number of threads", len(before.cores), len(after.cores)),
        ("the form", before.form, after.form),
    )
    if before.plan and after.plan:  # old files do not tell
        yield from _differing(
            name,
            ("the plan", before.plan, after.plan),
            ("the number of lanes", before.lanes, after.lanes),
        )


def _way(before: Row, after: Row) -> Iterator[Difference]:
    if before.engine and after.engine:  # old files do not tell
        yield from _differing(
            before.description.name,
            ("the runtime", before.engine, after.engine),
            ("the way to launch it", before.execution, after.execution),
        )


def _inputs(row: RowDescription) -> str:
    return ", ".join(f"{t.name} {format_shape(t.shape)} {t.dtype}" for t in row.inputs)


def _differing(row: str, *facts: tuple[str, object, object]) -> Iterator[Difference]:
    for what, before, after in facts:
        if before != after:
            yield Difference(row, what, *("" if v is None else str(v) for v in (before, after)))


def _disturbances(before: Result, after: Result) -> Iterator[str]:
    for name, result in (("First", before), ("Second", after)):
        for finding in find(result):
            if finding.kind in _DISTURBING:
                yield f"{name} result: {finding.sentence}"


def _environment_remarks(before: Result, after: Result) -> Iterator[str]:
    one, two = before.environment, after.environment
    if one.affinity != two.affinity:
        yield f"Usable cores were {_cores(one)} first, and {_cores(two)} then."
    if one.system != two.system:
        yield f"The system was {one.system} first, and {two.system} then."
    if one.python != two.python:
        yield f"Python was {one.python} first, and {two.python} then."
    refused = {_OURSELVES, *used_runtimes(before), *used_runtimes(after)}
    for name in sorted({*one.libraries, *two.libraries} - refused):
        versions = one.libraries.get(name, "absent"), two.libraries.get(name, "absent")
        if versions[0] != versions[1]:
            yield f"{name} was {versions[0]} first, and {versions[1]} then."


def _row_remarks(name: str, before: RowDescription, after: RowDescription) -> Iterator[str]:
    for what, one, two in (
        ("parameters", before.parameters, after.parameters),
        ("FLOPs", before.flops, after.flops),
        ("depth", before.depth, after.depth),
    ):
        if one != two:
            yield f"{name} has changed: {one:,} {what} first, and {two:,} then."


def _cores(environment: Environment) -> str:
    return ", ".join(map(str, environment.affinity))
