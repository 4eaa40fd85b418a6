"""From what a user asks for to the rows that are measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parnet_bench.results.result import RowDescription
from parnet_bench.targets import graphs
from parnet_bench.targets.graphs import Geometry
from parnet_bench.targets.planned_row import PlannedRow
from parnet_bench.targets.request import STREAMS, Request, with_default_targets
from parnet_bench.targets.row_devices import cores_of, first_device
from parnet_bench.targets.row_engines import with_engines
from parnet_engines.cuda.boundary import require_boundary
from parnet_engines.cuda.devices import names_gpus
from parnet_export import files
from parnet_export.bundle import open_bundle
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from parnet_bench.results.result import Form
    from parnet_bench.targets.graph_cache import CachedGraph
    from parnet_bench.targets.planned_row import Working
    from parnet_export.bundle import Bundle, Precision
    from parnet_export.network import Level
    from parnet_export.stream_graph import TensorSpec


def plan_rows(
    request: Request, workspace: Path, working: Working
) -> tuple[tuple[PlannedRow, ...], tuple[str, ...]]:
    """Find or make all graphs, and say which rows there are.

    Parameters
    ----------
    request
        What to measure.
    workspace
        An existing folder for bundles of ONNX files and for programs; needed until the rows
        have run.
    working
        Told what takes time: a context manager around it.

    Returns
    -------
    rows, notes
        The rows in the order in which they are shown, and sentences about rows that
        are not there.

    Raises
    ------
    InputError
        When a target cannot be used, or not as asked for.
    """
    if not request.targets:
        request = with_default_targets(request)
    cores_of(request.devices, request.threads)  # refuses devices that there are not
    baselines = [graphs.catalogue_name(name) for name in request.baselines]
    for target in request.targets:
        graphs.require_known(target)  # before minutes are spent on exporting another one
    planner = _Planner(request, workspace, working)
    rows: list[PlannedRow] = []
    for batch in request.batches or (None,):
        planner.batch = batch
        own = [row for target in request.targets for row in planner.target_rows(target)]
        geometry = _geometry(own[0], own[0].bundle.manifest.precision)
        if request.ckpt is not None:
            own.insert(0, planner.checkpoint_row(request.ckpt, own[0], geometry))
        rows += own
        rows += [planner.baseline_row(name, geometry) for name in baselines]
    named = _with_unique_names(rows)
    return with_engines(named, request, working), tuple(dict.fromkeys(planner.notes))


class _Planner:
    def __init__(self, request: Request, workspace: Path, working: Working) -> None:
        self._request = request
        self._workspace = workspace
        self._working = working
        self._opened: dict[str, Bundle] = {}
        self.batch: int | None = None
        self.notes: list[str] = []

    def target_rows(self, target: str) -> list[PlannedRow]:
        if graphs.is_bundle(target):
            bundle = self._once(target, f"checking {target}", lambda: open_bundle(Path(target)))
            return self._whole_and_streams(target, bundle, bundle.manifest.precision)
        if graphs.is_onnx_file(target):
            folder = self._workspace / f"{len(self._opened)}.bundle"
            bundle = self._once(
                target, f"splitting {target}", lambda: graphs.onnx_graph(Path(target), folder)
            )
            return self._whole_and_streams(target, bundle, None)
        name = graphs.catalogue_name(target)
        geometry = Geometry(
            self.batch or 1,
            self._request.resolution or graphs.native_resolution(name),
            self._request.precision or "fp32",
        )
        unfused = self._catalogue_graph(name, "none", geometry)
        fused = self._catalogue_graph(name, "full", geometry)
        return [
            self._unfused_row(target, unfused, geometry),
            *self._whole_and_streams(target, fused.bundle, geometry.precision),
        ]

    def checkpoint_row(self, ckpt: str, target: PlannedRow, geometry: Geometry) -> PlannedRow:
        _require_raw_heads(ckpt, target.bundle)
        source, seed = ckpt, self._request.seed
        if not Path(ckpt).is_file():
            source = graphs.catalogue_name(ckpt)
            # A bundle of random weights tells the seed that makes the same ones.
            known = target.bundle.manifest.provenance.seed
            seed = seed if known is None else known
        with self._working(f"exporting {ckpt}, unfused"):
            graph = graphs.network_graph(source, "none", geometry, seed, self._request.reading)
        row = self._unfused_row(ckpt, graph, geometry)
        with self._working(f"comparing {ckpt} with {target.description.target}"):
            _require_same_function(row, target)
        return row

    def baseline_row(self, name: str, geometry: Geometry) -> PlannedRow:
        graph = self._catalogue_graph(name, "full", geometry)
        return self._row(name, graph.bundle, "whole", geometry.precision)

    def _once(self, target: str, description: str, make: Callable[[], Bundle]) -> Bundle:
        """Return the bundle of a target, made for its first batch size."""
        if target not in self._opened:
            with self._working(description):
                self._opened[target] = make()
        return self._opened[target]

    def _catalogue_graph(self, name: str, level: Level, geometry: Geometry) -> CachedGraph:
        with self._working(f"exporting {name}, {'unfused' if level == 'none' else 'fused'}"):
            return graphs.network_graph(name, level, geometry, self._request.seed)

    def _unfused_row(self, target: str, graph: CachedGraph, geometry: Geometry) -> PlannedRow:
        row = self._row(target, graph.bundle, "unfused", geometry.precision)
        # The exporter has folded some BatchNorms into the graph; the network has them still.
        size = graph.size
        description = replace(
            row.description, parameters=size.parameters, flops=size.flops, depth=size.depth
        )
        return replace(row, description=description)

    def _whole_and_streams(
        self, target: str, bundle: Bundle, precision: Precision | None
    ) -> list[PlannedRow]:
        rows = [self._row(target, bundle, "whole", precision)]
        if self._request.plan == "whole":
            return rows
        require_boundary(self._request.boundary, bundle.manifest.precision, "--boundary")
        if len(bundle.stream_graph.segments) == 1:
            self.notes.append(f"{target} is a single segment, so it has no streams row.")
            return rows
        devices = self._request.devices
        rows += [
            self._row(target, bundle, "streams", precision, devices=text)
            for text in dict.fromkeys((first_device(devices), devices))
        ]
        return rows

    def _row(
        self,
        target: str,
        bundle: Bundle,
        form: Form,
        precision: Precision | None,
        *,
        devices: str = "",
    ) -> PlannedRow:
        request, manifest = self._request, bundle.manifest
        _refuse_precision(target, precision, request.precision)
        sizes = _sizes(target, manifest.inputs, self.batch, request.resolution)
        inputs = tuple(replace(t, shape=t.resolve(sizes)) for t in manifest.inputs)
        fixed_batch = _leading_size(manifest.inputs)
        devices = devices or first_device(request.devices)
        count = len(devices.split(","))
        plan, lanes = ("whole", None) if form != "streams" else (request.plan, request.lanes)
        description = RowDescription(
            name=" ".join(
                (
                    manifest.provenance.network,
                    form if plan in {STREAMS, "whole"} else f"{form} ({plan})",
                    *((f"on {count} devices",) if count > 1 else ()),
                    *((f"batch {self.batch}",) if len(request.batches) > 1 else ()),
                )
            ),
            network=manifest.provenance.network,
            form=form,
            target=target,
            provenance=manifest.provenance,
            precision=precision,
            batch=_leading_size(inputs) or 1,
            inputs=inputs,
            parameters=manifest.whole_cost.parameters,
            # A symbolic batch counts as one sample, a fixed one with all its samples.
            flops=manifest.whole_cost.flops // (fixed_batch or 1),
            depth=manifest.whole_cost.depth,
            devices=devices,
            cores=cores_of(devices, request.threads),
            plan=plan,
            lanes=lanes,
            boundary=request.boundary if form == "streams" else None,
            wanted_engine=request.engine,
        )
        row = PlannedRow(description, bundle, sizes, plan)
        if plan != "auto" or names_gpus(devices):
            return row
        return replace(row, plan=self._program_file(row))

    def _program_file(self, row: PlannedRow) -> str:
        """Choose a plan by measuring, once for all processes, and return where it lies."""
        from parnet_engines.planning.plan_option import choose
        from parnet_engines.schedule.program_file import encode
        from parnet_engines.session import Session

        description = row.description
        with self._working(f"choosing a plan for {description.name}"):
            choice = choose(
                row.bundle,
                description.devices,
                "auto",
                open_program=partial(Session.load, row.bundle),
                lanes=description.lanes,
                threads=len(description.cores) or None,
            )
        path = self._workspace / f"{len(list(self._workspace.iterdir()))}.program.json"
        files.write_bytes(path, encode(choice.program.program))
        return str(path)


def _geometry(row: PlannedRow, precision: Precision) -> Geometry:
    """Return what other networks need in order to be measured beside a row."""
    images = [t.resolve() for t in row.description.inputs if len(t.shape) == 4]
    square = [shape[2] for shape in images if shape[1] == 3 and shape[2] == shape[3]]
    resolution = square[0] if len(row.description.inputs) == 1 and square else None
    return Geometry(row.description.batch, resolution, precision)


def _leading_size(inputs: tuple[TensorSpec, ...]) -> int | None:
    """Return the first dimension of the first input that has dimensions; None if symbolic."""
    leading = [tensor.shape[0] for tensor in inputs if tensor.shape]
    return leading[0] if leading and isinstance(leading[0], int) else None


def _sizes(
    target: str, inputs: tuple[TensorSpec, ...], batch: int | None, resolution: int | None
) -> dict[str, int]:
    """Return the sizes of symbolic dimensions; refuse sizes other than those that are fixed."""
    sizes: dict[str, int] = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor.shape):
            option = "--batch" if axis == 0 else "--resolution"
            asked = batch if axis == 0 else resolution
            is_image_side = len(tensor.shape) == 4 and axis >= 2
            if isinstance(size, str):
                if axis == 0:
                    asked = asked or 1
                elif not is_image_side:
                    problem = f"leaves dimension {size!r} of {tensor.name} open"
                    raise InputError(target, problem, "Export it with a fixed size")
                if asked is None:
                    problem = f"leaves dimension {size!r} of {tensor.name} open"
                    raise InputError(target, problem, f"Give {option}")
                sizes[size] = asked
            elif (axis == 0 or is_image_side) and asked not in (None, size):
                problem = f"takes {size}, not {asked}, in dimension {axis} of {tensor.name}"
                raise InputError(target, problem, f"Leave out {option}, or export it anew")
    return sizes


def _refuse_precision(target: str, fixed: Precision | None, asked: Precision | None) -> None:
    if asked is not None and asked != fixed:
        problem = f"is {fixed}" if fixed else "is an ONNX file, which runs as it is"
        remedy = f"Make a bundle with `parnet-export split-streams --precision {asked}`"
        raise InputError(target, problem, remedy)


def _require_raw_heads(ckpt: str, bundle: Bundle) -> None:
    """Refuse to compare a checkpoint's raw heads with a graph that makes boxes of them."""
    output = bundle.manifest.provenance.detections
    if output is not None and output.form != "raw":
        problem = f"a graph of {ckpt} ends with raw heads, and {bundle.path} goes on to boxes"
        remedy = "Leave it out, or make the bundle with --detections raw"
        raise InputError("--ckpt", problem, remedy)


def _require_same_function(row: PlannedRow, target: PlannedRow) -> None:
    """Refuse to compare the latencies of networks that compute different things."""
    from parnet_export.samples import make_samples
    from parnet_export.verify import SOURCE_LIMIT, relative_error

    manifest = target.bundle.manifest
    samples = make_samples(manifest.inputs, sizes=target.sizes)
    (image,) = next(samples).inputs.values()
    error = relative_error(_first_output(row.bundle, image), _first_output(target.bundle, image))
    if error > SOURCE_LIMIT[manifest.precision]:
        raise InputError(
            row.description.target,
            f"does not compute what {target.description.target} computes: the outputs differ "
            f"by {error:.1e}, relative to the largest one",
            "Give the checkpoint that the target was made from",
        )


def _first_output(bundle: Bundle, image: NDArray[Any]) -> NDArray[Any]:
    """Run a network of one input."""
    from parnet_engines.session import Session

    with Session.open(bundle, plan="whole") as session:
        outputs = session.run({session.inputs[0].name: image})
        return outputs[session.outputs[0].name]


def _with_unique_names(rows: list[PlannedRow]) -> tuple[PlannedRow, ...]:
    """Append a number to the names that rows would share."""
    seen: Counter[str] = Counter()
    unique = []
    for row in rows:
        name = row.description.name
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name} ({seen[name]})"
        unique.append(replace(row, description=replace(row.description, name=numbered)))
    return tuple(unique)
