"""What a forecast starts from: a network without its weights, costs, and lanes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from parnet_bench.forecasts.hypothetical import Changes, Sketch, sketch
from parnet_bench.targets.graphs import catalogue_name, is_bundle, is_onnx_file
from parnet_engines.planning.cost_table import (
    COSTS_NAME,
    DEVICE_MODELS,
    CostTable,
    DeviceModel,
    estimate_costs,
    load_costs,
)
from parnet_engines.schedule.placement import Lane
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_export.bundle import Precision
    from parnet_export.network import Level

_DEFAULT_MODEL = "rtx3090"
_DEFAULT_NETWORK = "parnet-l"


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be forecast.

    Parameters
    ----------
    name
        A bundle, an ONNX file, or a name of the catalogue; None for the default network.
    changes
        How the network differs from that of the catalogue.
    level, resolution, batch, precision
        Of a network of the catalogue; None for the default.
    """

    name: str | None
    changes: Changes
    level: Level | None = None
    resolution: int | None = None
    batch: int | None = None
    precision: Precision | None = None


@dataclass(frozen=True, slots=True)
class Basis:
    """Where the costs of segments come from.

    Parameters
    ----------
    source
        Whether they were measured or are estimated from FLOPs and bytes.
    device
        The kind of device.
    environment
        What a measurement belongs to, or the device model of an estimate.
    """

    source: Literal["measured", "estimated"]
    device: str
    environment: str


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs on one kind of device.

    Parameters
    ----------
    table
        Latencies of segments and of the whole network.
    basis
        Where they come from.
    threads
        How many threads a device has to share among its lanes; 1 except on CPUs.
    """

    table: CostTable
    basis: Basis
    threads: int

    def lanes(self, devices: int, lanes_per_device: int) -> tuple[Lane, ...]:
        """Return the lanes of some devices; those of one CPU share its threads evenly."""
        kind = self.basis.device
        width = self.threads // lanes_per_device
        if kind == "cpu" and not width:
            raise InputError(
                f"--lanes {lanes_per_device}",
                f"every lane needs a thread, and the costs are for {self.threads}",
                f"Use at most {self.threads}",
            )
        count = devices * lanes_per_device
        return tuple(
            Lane(
                f"lane{number}",
                f"{kind}:{number // lanes_per_device}",
                tuple(range(number * width, (number + 1) * width)) if kind == "cpu" else (),
            )
            for number in range(count)
        )


def sketch_target(target: Target) -> Sketch:
    """Return the network's stream graph.

    Raises
    ------
    InputError
        When there is no such network, or an option does not apply to it.
    """
    name = target.name or _DEFAULT_NETWORK
    for recognises, read in ((is_bundle, _from_bundle), (is_onnx_file, _from_onnx)):
        if recognises(name):
            _refuse_options(target)
            return read(Path(name))
    return sketch(
        catalogue_name(name),
        target.changes,
        level=target.level or "full",
        resolution=target.resolution,
        batch=target.batch or 1,
        precision=target.precision or "fp32",
    )


def find_costs(
    network: Sketch,
    *,
    costs: Path | None,
    device_model: str | None,
    lanes_per_device: int,
) -> Costs:
    """Return measured costs where there are any, and estimates otherwise.

    Parameters
    ----------
    network
        What is to be forecast.
    costs
        A file of measured costs, in place of those that come with the network.
    device_model
        Estimate for this device, even where measurements exist: a name of `DEVICE_MODELS`,
        or ``TFLOPS,GB_S,LAUNCH_US`` of what operators reach.
    lanes_per_device
        How many lanes may be busy on one device.

    Raises
    ------
    InputError
        When the file cannot be used, or there is no such device model.
    """
    if costs is not None and device_model is not None:
        problem = "asks for estimates, and --costs for measurements"
        raise InputError("--device-model", problem, "Give one of them")
    if costs is not None:
        return _measured(network, load_costs(costs), costs)
    if network.measured is not None and device_model is None:
        return _measured(network, network.measured, network.name)
    model = _device_model(device_model or _DEFAULT_MODEL, _precision(network))
    table = estimate_costs(
        network.graph, model, whole=network.whole, max_busy_lanes=lanes_per_device
    )
    return Costs(table, Basis("estimated", model.device_kind, model.name), 1)


def parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Return the whole numbers of an option such as ``256,512,1024``.

    Raises
    ------
    InputError
        When one of them is no number above 0.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        problem = f"{text!r} is no list of whole numbers above 0"
        raise InputError(option, problem, "Give numbers such as 256,512,1024")
    return tuple(map(int, parts))


def _refuse_options(target: Target) -> None:
    fixed = {
        "--streams, --widths and --blocks": target.changes or None,
        "--level": target.level,
        "--resolution": target.resolution,
        "--batch": target.batch,
        "--precision": target.precision,
    }
    for option, value in fixed.items():
        if value is not None:
            problem = f"{target.name} is a graph already, and has its own"
            raise InputError(option, problem, "Leave the option out, or name a catalogue network")


def _from_bundle(folder: Path) -> Sketch:
    from parnet_engines.planning.bundle_costs import network_of
    from parnet_export.bundle import open_bundle

    bundle = open_bundle(folder)
    graph = bundle.stream_graph
    about = bundle.manifest.provenance.architecture or f"{len(graph.segments)} segments"
    path = folder / COSTS_NAME
    measured = load_costs(path) if path.is_file() else None
    if measured is not None and measured.network != network_of(bundle):
        measured = None  # of an earlier version of the bundle
    return Sketch(bundle.label, about, graph, bundle.manifest.whole_cost, measured)


def _from_onnx(path: Path) -> Sketch:
    from parnet_export.graphs.cost import graph_cost
    from parnet_export.pipeline import read_graph
    from parnet_export.splitting.split import split_model

    model, provenance = read_graph(path)
    split = split_model(model)
    graph = split.stream_graph
    about = f"{len(graph.segments)} segments"
    return Sketch(provenance.label, about, graph, graph_cost(split.whole))


def _measured(network: Sketch, table: CostTable, subject: str | Path) -> Costs:
    names = [segment.name for segment in network.graph.segments]
    for kind in ("cuda", "cpu"):
        widths = table.widths(names, kind)
        if widths:
            break
    else:
        raise InputError(
            subject,
            f"lacks segments of {network.name} on any device",
            "Measure this network, or leave --costs out",
        )
    used = [entry for entry in table.entries if entry.device_kind == kind]
    environment = Counter(entry.environment for entry in used).most_common(1)[0][0]
    is_measured = all(entry.source == "measured" for entry in used)
    basis = Basis("measured" if is_measured else "estimated", kind, environment)
    return Costs(table, basis, max(widths))


def _device_model(text: str, precision: Precision) -> DeviceModel:
    if (text, precision) in DEVICE_MODELS:
        return DEVICE_MODELS[text, precision]
    names = ", ".join(sorted({name for name, _ in DEVICE_MODELS}))
    remedy = f"Use one of {names}, or TFLOPS,GB_S,LAUNCH_US such as 35,936,2.5"
    subject = f"--device-model {text}"
    if "," not in text:
        raise InputError(subject, "is no device that is known by name", remedy)
    try:
        tera_flops, gb_per_s, launch_us = map(float, text.split(","))
    except ValueError as error:
        raise InputError(subject, "is not three numbers", remedy) from error
    if not (tera_flops > 0 and gb_per_s > 0 and launch_us >= 0):
        raise InputError(subject, "has a rate that is not above 0", remedy)
    name = f"{tera_flops:g} TFLOP/s, {gb_per_s:g} GB/s and {launch_us:g} us a launch"
    return DeviceModel(name, "cuda", tera_flops * 1e12, gb_per_s * 1e9, launch_us)


def _precision(network: Sketch) -> Precision:
    types = {tensor.dtype for segment in network.graph.segments for tensor in segment.outputs}
    return "fp16" if "float16" in types else "fp32"
