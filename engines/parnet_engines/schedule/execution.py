"""How a session carries its program out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["threads", "graph", "device graphs", "enqueue"]
"""CPU threads; one CUDA graph; a CUDA graph for each device and phase; step by step."""

CopyRoute = Literal["none", "memory", "peer", "pinned host"]
"""No copies; within one memory; from GPU to GPU; by way of page-locked host memory."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How a program is carried out, which is not always how one would like it to be.

    Parameters
    ----------
    mode
        What an inference consists of.
    launches
        How many graphs are launched for each inference; 0 without graphs.
    copies
        How tensors get from device to device.
    reason
        Why it is not one CUDA graph; empty where it is, and on the CPU.
    """

    mode: Mode
    launches: int = 0
    copies: CopyRoute = "none"
    reason: str = ""

    def __str__(self) -> str:
        text = {
            "threads": "CPU threads",
            "graph": "one CUDA graph",
            "device graphs": f"{self.launches} CUDA graphs, one for each device and phase",
            "enqueue": "step by step, without a CUDA graph",
        }[self.mode]
        text += {
            "none": "",
            "memory": ", copies within one memory",
            "peer": ", copies from GPU to GPU",
            "pinned host": ", copies by way of the host",
        }[self.copies]
        return f"{text} ({self.reason})" if self.reason else text
