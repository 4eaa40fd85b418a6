"""Networks that need not exist: the stream graph of a structure, without any weights.

A structure is exported and split like a network of the catalogue, so that segments,
FLOPs and bytes are counted by the same code as in a bundle. Only the weights are not
there: every tensor of them repeats one number of its own, which takes no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from parnet_engines.planning.cost_table import CostTable
    from parnet_export.bundle import Precision
    from parnet_export.models.family import Family
    from parnet_export.network import Level
    from parnet_export.stream_graph import Cost, StreamGraph

_WIDENING = 2
"""Each stream of a ParNet is twice as wide as the one before."""

_LAST_WIDENING = 4
"""The last block of ParNet-M, -L and -XL is four times as wide as the last stream."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """A network as a planner sees it.

    Parameters
    ----------
    name
        For people.
    description
        One line about its structure.
    graph
        Its segments.
    whole
        What the whole network costs.
    measured
        Latencies that were measured for exactly this network, if there are any.
    """

    name: str
    description: str
    graph: StreamGraph
    whole: Cost
    measured: CostTable | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """How a hypothetical ParNet differs from one of the catalogue.

    Parameters
    ----------
    streams
        Number of streams; further ones are twice as wide as the one before, and as deep.
    widths
        Channels of each stream, in place of all the network's own.
    blocks
        Blocks in each stream.
    last_width
        Channels before the classifier; when widths change, four times the last of them.
    """

    streams: int | None = None
    widths: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    last_width: int | None = None

    def __bool__(self) -> bool:
        """Whether anything is to be changed."""
        return self != Changes()


def sketch(
    name: str,
    changes: Changes,
    *,
    level: Level = "full",
    resolution: int | None = None,
    batch: int = 1,
    precision: Precision = "fp32",
) -> Sketch:
    """Make the stream graph of a network of the catalogue, or of one like it.

    Parameters
    ----------
    name
        A name of the catalogue.
    changes
        What is different.
    level
        How far the network is fused.
    resolution
        Height and width in pixels; what the structure is made for by default.
    batch
        Images per inference.
    precision
        Element type of weights and tensors.

    Raises
    ------
    InputError
        When there is no such network, or it cannot be changed so or take the resolution.
    """
    from parnet_export.bundle import Provenance
    from parnet_export.export import export_network
    from parnet_export.graphs.cost import graph_cost
    from parnet_export.graphs.precision import to_fp16
    from parnet_export.network import Network
    from parnet_export.splitting.split import split_model

    family, config, label = _structure(name, changes)
    network = Network(
        module=_without_weights(family, config, level),
        family=family.key,
        config=config,
        level=level,
        resolution=family.resolution(config),
        input_multiple=family.input_multiple(config),
        provenance=Provenance(label, name),
    )
    model = export_network(network, resolution=resolution, batch=batch)
    split = split_model(to_fp16(model) if precision == "fp16" else model)
    return Sketch(label, family.describe(config), split.stream_graph, graph_cost(split.whole))


def changed_widths(widths: Sequence[int], streams: int) -> tuple[int, ...]:
    """Return the widths of a network with more or fewer streams."""
    kept = list(widths[:streams])
    while len(kept) < streams:
        kept.append(kept[-1] * _WIDENING)
    return tuple(kept)


def _structure(name: str, changes: Changes) -> tuple[Family, Any, str]:
    from parnet_export.models.catalog import CATALOG
    from parnet_export.models.parnet import ParNetConfig

    family, entry = CATALOG[name]
    config = entry.config
    if not changes:
        return family, config, name
    if not isinstance(config, ParNetConfig):
        raise InputError(
            name, "is no ParNet, so its streams cannot be changed", "Start from parnet-l"
        )
    count = len(changes.widths) or len(changes.blocks) or changes.streams or config.streams
    lengths = {count, len(changes.widths) or count, len(changes.blocks) or count}
    if len(lengths | {changes.streams or count}) > 1:
        raise InputError(
            "--widths, --blocks and --streams",
            "do not agree on the number of streams",
            "Give as many numbers to each of them",
        )
    widths = changes.widths or changed_widths(config.widths, count)
    blocks = changes.blocks or (*config.blocks, *config.blocks[-1:] * count)[:count]
    last_width = changes.last_width or (
        config.last_width if widths == config.widths else _LAST_WIDENING * widths[-1]
    )
    try:
        changed = replace(config, widths=widths, blocks=blocks, last_width=last_width, stem=())
    except ValueError as error:
        raise InputError("--widths and --blocks", str(error), "Choose others") from error
    return family, changed, f"{name} with {count} streams of widths {_slashed(widths)}"


def _without_weights(family: Family, config: Any, level: Level) -> Any:
    import torch

    with torch.device("meta"):
        module = family.build(config, level, ())
    # Exporters leave out sums with 0 and products with 1, and merge equal tensors.
    state = {
        key: torch.tensor(1 / number).to(value.dtype).expand(value.shape)
        for number, (key, value) in enumerate(module.state_dict().items(), start=2)
    }
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def _slashed(numbers: Sequence[int]) -> str:
    return "/".join(map(str, numbers))
