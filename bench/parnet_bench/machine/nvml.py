"""NVIDIA's management library, where the machine has it."""

from __future__ import annotations

import importlib
from typing import Any

_MODULE = "pynvml"


def open_nvml() -> tuple[Any, str]:
    """Return the initialised module ``pynvml``, or None and why there is none.

    Returns
    -------
    module, missing
        One of them: `missing` is a clause, empty where there is a module. A module that is
        installed and broken raises what it raises.
    """
    try:
        nvml = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None, f"the Python module {_MODULE!r} is not installed (pip install nvidia-ml-py)"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return None, f"NVML cannot be used ({error})"
    return nvml, ""
