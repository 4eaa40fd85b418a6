"""What a bundle computes when everything is computed in float32, by torch on the CPU.

Weights of a half-precision bundle are those that it holds, so that the difference is what
arithmetic in half precision makes of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parnet_engines.runtimes.torch_graph import TorchGraph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_export.bundle import Bundle


def reference_tensors(
    bundle: Bundle, samples: Sequence[Mapping[str, NDArray[Any]]]
) -> list[dict[str, NDArray[Any]]]:
    """Return every tensor between segments, and every output, for each sample.

    Parameters
    ----------
    bundle
        The bundle.
    samples
        An array for each network input.

    Raises
    ------
    InputError
        When a segment has an operator that the torch engine does not have.
    """
    graphs = {
        segment.name: TorchGraph(bundle.segment_path(segment.name), segment.name, in_float32=True)
        for segment in bundle.stream_graph.segments
    }
    found = []
    for sample in samples:
        tensors = {name: torch.from_numpy(_widened(array)) for name, array in sample.items()}
        with torch.inference_mode():
            for segment in bundle.stream_graph.segments:
                graph = graphs[segment.name]
                tensors |= dict(zip(graph.outputs, graph(tensors), strict=True))
        found.append({name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
    return found


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return np.array(array, np.float32 if array.dtype == np.float16 else array.dtype)
