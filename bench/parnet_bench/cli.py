"""The ``parnet-bench`` command line.

A thin layer: every command loads what it needs when it runs, so that ``--help``
loads neither torch nor a runtime.
"""

from __future__ import annotations

import sys

import typer

from parnet_bench import (
    compare_command,
    costs_command,
    engines_command,
    env_command,
    lanes_command,
    latency_command,
    loadgen_command,
    paper_command,
    plan_command,
    repeatability_command,
    report_command,
    selftest_command,
    timeline_command,
)
from parnet_export import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the latency of networks so that the numbers hold up.",
)

for command in (
    latency_command,
    compare_command,
    report_command,
    repeatability_command,
    paper_command,
    plan_command,
    costs_command,
    timeline_command,
    lanes_command,
    loadgen_command,
    env_command,
    engines_command,
    selftest_command,
):
    command.register(app)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(console.run(app))
