"""CPU engines in the place of engines on GPUs, for a driver that needs no GPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from parnet_engines.cuda.memory import array_at
from parnet_engines.cuda.tensor_layout import TensorLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.cuda.engine import DeviceTensor, EngineFile
    from parnet_engines.cuda.recording_driver import RecordingDriver
    from parnet_engines.engine import Engine
    from parnet_export.stream_graph import TensorSpec


class HostedEngine:
    """A CPU engine as an engine on one of a `RecordingDriver`'s GPUs.

    Parameters
    ----------
    engine
        What computes.
    driver
        The driver on whose streams it is enqueued.
    device
        The GPU that it is for.
    layouts
        Layouts of tensors that are not linear; the memory is there, the engine uses the
        front of it.
    file
        The file that it is said to come from.
    """

    def __init__(
        self,
        engine: Engine,
        driver: RecordingDriver,
        device: int = 0,
        layouts: Mapping[str, TensorLayout] | None = None,
        file: EngineFile | None = None,
    ) -> None:
        self._engine = engine
        self._driver = driver
        self._device = device
        self._layouts = layouts or {}
        self._file = file
        self.bound: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        """Addresses of inputs and outputs of every binding."""
        self.is_closed = False

    @property
    def name(self) -> str:
        """The segment's name."""
        return self._engine.name

    @property
    def device(self) -> int:
        """Ordinal of the GPU that it is for."""
        return self._device

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine reads."""
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine produces."""
        return self._engine.outputs

    @property
    def file(self) -> EngineFile | None:
        """The file that it is said to come from."""
        return self._file

    def layout(self, tensor: str) -> TensorLayout:
        """See `CudaEngine.layout`."""
        return self._layouts.get(tensor, TensorLayout.LINEAR)

    def bind(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]
    ) -> Callable[[int], None]:
        """See `CudaEngine.bind`."""
        self.bound.append((tuple(t.pointer for t in inputs), tuple(t.pointer for t in outputs)))
        compute = self._engine.bind([_array(t) for t in inputs], [_array(t) for t in outputs])
        return partial(_run, self._driver, self.name, compute)

    def close(self) -> None:
        """Close the engine underneath."""
        self._engine.close()
        self.is_closed = True


def _run(driver: RecordingDriver, name: str, compute: Callable[[], object], stream: int) -> None:
    driver.run(stream, name, compute)


def _array(tensor: DeviceTensor) -> NDArray[Any]:
    return array_at(tensor.pointer, tensor.shape, tensor.dtype)
