"""The TensorRT engines that a comparison or a self-test needs, where TensorRT is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_bench.selftest.failure import reason_of
from parnet_engines.cuda.devices import names_gpus
from parnet_engines.tensorrt.build_place import choose_places
from parnet_engines.tensorrt.bundle_engines import build_engines
from parnet_engines.tensorrt.options import EngineOptions
from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from parnet_engines.tensorrt.build_place import BuildPlace
    from parnet_export.bundle import Bundle

AUX_STREAMS = 4
"""How many more CUDA streams TensorRT may use inside an engine of the whole network."""


def choose_build_places(devices: str, engine: str) -> tuple[tuple[BuildPlace, ...], str]:
    """Return the GPUs that engines are built for, and why there are none.

    Parameters
    ----------
    devices, engine
        As for `Session.open`.

    Raises
    ------
    InputError, MissingBackendError
        When TensorRT is asked for and cannot be used.
    """
    if not names_gpus(devices) or engine not in {"auto", "tensorrt"}:
        return (), ""
    try:
        return choose_places("auto", devices, None), ""
    except (InputError, MissingBackendError) as error:
        if engine == "tensorrt":
            raise
        return (), f"No TensorRT engines: {error}"


def build_all(
    bundle: Bundle,
    places: Sequence[BuildPlace],
    progress: Callable[[str], None],
    *,
    timing_cache: Path,
    whole_only: bool = False,
) -> Iterator[str]:
    """Build what is run of a bundle; each kind of engine whether or not others fail.

    Parameters
    ----------
    bundle
        The bundle.
    places
        For which GPUs; none builds nothing.
    progress
        Told of each engine.
    timing_cache
        What has been timed for one engine need not be timed for another.
    whole_only
        Whether only the whole graph is run, and only in one way.

    Yields
    ------
    str
        Why some engines are not there, as a sentence.
    """
    if not places:
        return
    # TensorRT-RTX times nothing when it builds.
    cache = timing_cache if places[0].target.backend == "tensorrt" else None
    kinds = [("", EngineOptions(), not whole_only, True)]
    if not whole_only:
        kinds.append(("with aux streams ", EngineOptions(max_aux_streams=AUX_STREAMS), False, True))
        if bundle.manifest.precision == "fp16":
            kinds.append(("with vectors ", EngineOptions(boundary="vector"), True, False))
    for kind, options, segments, whole in kinds:
        try:
            for report in build_engines(
                bundle, places, options, segments=segments, whole=whole, timing_cache=cache
            ):
                seconds = f"{report.sidecar.build_s:.1f} s"
                progress(f"engine of {report.segment} {kind}{report.status} in {seconds}")
        except Exception as error:  # noqa: BLE001 - rows that need no such engine are run
            yield f"{bundle.label}: engines {kind}could not all be built: {reason_of(error)}"
