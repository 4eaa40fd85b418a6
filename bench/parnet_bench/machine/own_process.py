"""How a process that measures keeps to its cores, and ends with the one that started it."""

from __future__ import annotations

import ctypes
import signal
import sys

import psutil

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def use_cores(cores: tuple[int, ...]) -> None:
    """Keep this process and the threads it starts on some cores, where the system can."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has no affinity masks
        process.cpu_affinity(list(cores))


def end_with_parent() -> None:
    """Have Linux end this process when its parent dies.

    A suspended process does not notice that its pipes are closed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
