"""What the options of ``parnet-bench latency`` stand for, and what they cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from parnet_export.errors import InputError

Engine = Literal["auto", "onnxruntime", "openvino", "torch", "tensorrt"]

RowEngine = Annotated[
    Engine,
    typer.Option(
        help="Runtime of every row. auto: onnxruntime; on GPUs the first that can be used."
    ),
]
"""The option ``--engine`` of commands that measure rows."""

PLAN_NAMES = ("streams", "auto", "authors", "whole")


def parse_batches(text: str | None) -> tuple[int, ...]:
    """Return the batch sizes of ``--batch``: ``"1,8"``."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError("--batch", f"{text!r} are no batch sizes", "Use numbers such as 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def parse_share(text: str) -> float:
    """Return the share of ``--target-ci``: ``"1%"`` or ``"0.01"``."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1 or rest:
        raise InputError("--target-ci", f"{text!r} is no share", "Use a percentage such as 1%")
    return share


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Return the percentiles of ``--percentiles``: ``"50,90,99"``."""
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 < percent < 100 for percent in found):
        problem = f"{text!r} are no percentiles"
        raise InputError("--percentiles", problem, "Use numbers between 0 and 100: 50,90,99")
    return found


def check_times(max_time: float, min_time: float) -> None:
    """Refuse what are no times in seconds, for ``--max-time`` and ``--min-time``."""
    if not 0 < max_time < math.inf:
        raise InputError("--max-time", f"{max_time} is not a time", "Give seconds above 0")
    if not 0 <= min_time < math.inf:
        raise InputError("--min-time", f"{min_time} is not a time", "Give seconds, 0 or more")


def check_plan(plan: str) -> None:
    """Refuse what is neither a plan's name nor a file, for ``--plan``."""
    if plan not in PLAN_NAMES and not Path(plan).is_file():
        known = ", ".join(PLAN_NAMES)
        raise InputError(
            "--plan", f"{plan!r} is neither a plan nor a file", f"Use {known}, or a file"
        )
