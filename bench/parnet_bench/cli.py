"""The ``parnet-bench`` command line.

A thin layer: every command loads what it needs when it runs, so that ``--help``
loads neither torch nor a runtime.
"""

from __future__ import annotations

import sys

import typer

from parnet_bench import (
    compare_command,
    env_command,
    latency_command,
    loadgen_command,
    paper_command,
    report_command,
)
from parnet_export import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the latency of networks so that the numbers hold up.",
)

latency_command.register(app)
compare_command.register(app)
report_command.register(app)
env_command.register(app)
loadgen_command.register(app)
paper_command.register(app)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(console.run(app))
