"""What the toolkit asks of a family of networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from parnet_export.images.input_form import IMAGENET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from parnet_export.detections.detection_form import AnchorLevel
    from parnet_export.images.input_form import InputForm
    from parnet_export.network import Level

Origin = Literal["official", "reconstruction"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One network of the catalogue.

    Parameters
    ----------
    name
        What people type, such as ``"parnet-l"``.
    title
        What papers print, such as ``"ParNet-L"``.
    config
        The structure: the family's frozen configuration.
    resolution
        Height and width of the input in pixels.
    origin
        ``"official"`` where authors' code fixes the structure, ``"reconstruction"``
        where their text left choices to us.
    source
        Paper and section or table.
    choices
        What a reconstruction assumes.
    """

    name: str
    title: str
    config: Any
    resolution: int
    origin: Origin
    source: str
    choices: str = ""


@dataclass(frozen=True, slots=True)
class Restored:
    """A structure that was read off a state dict.

    Parameters
    ----------
    config
        The family's configuration.
    level
        The form that the tensors are in.
    activation
        The activation and how it was chosen, for people.
    """

    config: Any
    level: Level
    activation: str


@dataclass(frozen=True, slots=True)
class Family:
    """Networks that share code, key names and a configuration.

    Parameters
    ----------
    key
        Stored in files, such as ``"parnet"``.
    title
        For people, such as ``"ParNet"``.
    config_type
        The frozen dataclass that fixes a structure.
    module_types
        Classes of the training form and of every fused form.
    recognises
        Tells from state-dict keys whether they belong to the family.
    restore
        Reads the structure off tensors; takes the wanted activation or ``"auto"``.
        Raises ValueError with a clause that says what is wrong.
    build
        Builds a form of a structure with arbitrary weights; takes the tensors that
        will be loaded, or None for the training form's random ones.
    fuse
        Returns a new, exactly equal module of a higher level.
    input_multiple
        Height and width of the input must be multiples of this.
    resolution
        Height and width in pixels that a structure is made for.
    describe
        One line about a structure.
    entries
        The family's networks in the catalogue.
    output_names
        Names of the tensors that a module of the family returns, in order.
    anchor_levels
        Strides and anchors of a detector's outputs; none for other networks.
    untold
        Fields of the configuration that tensors do not tell: `restore` assumes them, and
        a catalogue name that a checkpoint is said to be decides.
    input_form
        How its authors prepare pictures: for a detector, or for ImageNet's 1000 classes.
        For other classes it is not known.
    """

    key: str
    title: str
    config_type: type[Any]
    module_types: tuple[type[nn.Module], ...]
    recognises: Callable[[Iterable[str]], bool]
    restore: Callable[[Mapping[str, Tensor], str], Restored]
    build: Callable[[Any, Level, Iterable[str]], nn.Module]
    fuse: Callable[[nn.Module, Level], nn.Module]
    input_multiple: Callable[[Any], int]
    resolution: Callable[[Any], int]
    describe: Callable[[Any], str]
    entries: tuple[Entry, ...]
    output_names: tuple[str, ...] = ("logits",)
    anchor_levels: tuple[AnchorLevel, ...] = ()
    untold: tuple[str, ...] = ()
    input_form: InputForm = IMAGENET
