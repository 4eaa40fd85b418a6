"""NVIDIA's management library, where the machine has it.

It numbers boards by their places on the PCI bus, and knows nothing of
``CUDA_VISIBLE_DEVICES``; CUDA numbers the fastest first. So the board of a GPU that rows run
on is found by its bus id. A part of a board (MIG) has the id of the board.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parnet_engines.cuda.driver import Gpu

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


def board_of(nvml: Any, gpu: Gpu) -> Any:
    """Return NVML's handle of the board of a GPU; None where it shows none.

    Parameters
    ----------
    nvml
        The module ``pynvml``, initialised.
    gpu
        As CUDA describes it.
    """
    if not gpu.pci_bus_id:
        return None
    try:
        # NVML reads hexadecimal numbers: it takes CUDA's "0000:3B:00.0" for its own
        # "00000000:3B:00.0".
        return nvml.nvmlDeviceGetHandleByPciBusId(gpu.pci_bus_id)
    except nvml.NVMLError:
        return None
