"""Runtime objects that a forked process must not destroy.

Their destructors wait for threads, which a forked process does not have, forever.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

_kept: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_after_fork(runtime_object: object) -> None:
    """Have processes that are forked from this one keep an object, if it still is here."""
    _kept.add(runtime_object)


def _keep_in_child() -> None:
    for runtime_object in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime_object))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_in_child)
