"""Options that say how a network's pictures are prepared, shared by several commands.

Nothing but typer is loaded until they are used.
"""

# Typer reads the annotations at run time.

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_export.errors import InputError
from parnet_export.images.input_form import IMAGENET, ColourOrder, Interpolation

if TYPE_CHECKING:
    from parnet_export.images.input_form import Colours, InputForm

_PANEL = "Preprocessing of pictures"

CropOption = Annotated[
    float | None,
    typer.Option(
        "--crop",
        help="Share of the shorter side that is kept.",
        metavar="SHARE",
        rich_help_panel=_PANEL,
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        "--mean",
        help="Of the network's channels, or one for all, for values from 0 to 1.",
        metavar="R,G,B",
        rich_help_panel=_PANEL,
    ),
]
StdOption = Annotated[
    str | None,
    typer.Option(
        "--std",
        help="Standard deviation, as --mean.",
        metavar="R,G,B",
        rich_help_panel=_PANEL,
    ),
]
InterpolationOption = Annotated[
    Interpolation | None,
    typer.Option("--interpolation", help="How pictures are resized.", rich_help_panel=_PANEL),
]
ColourOrderOption = Annotated[
    ColourOrder | None,
    typer.Option("--colour-order", help="Order of the channels.", rich_help_panel=_PANEL),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", help="Names of the classes, one a line, in order.", metavar="F"),
]


@dataclass(frozen=True, slots=True)
class InputOptions:
    """The options as they were given; None for those that were not."""

    crop: float | None = None
    mean: str | None = None
    std: str | None = None
    interpolation: Interpolation | None = None
    colour_order: ColourOrder | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that were given."""
        values = asdict(self).items()
        return tuple(f"--{name.replace('_', '-')}" for name, value in values if value is not None)

    @property
    def is_complete(self) -> bool:
        """Whether they leave nothing to assume but the usual order of colours."""
        return None not in (self.crop, self.mean, self.std, self.interpolation)

    def note_on(self, form: InputForm | None) -> InputForm | None:
        """Return what is known of a network's pictures once the options are.

        Parameters
        ----------
        form
            Of the network. Where it is None and options are given, ImageNet's is their base.

        Raises
        ------
        InputError
            As `override`.
        """
        return self.override(form or IMAGENET) if self.given else form

    def choose(
        self, stated: InputForm | None, usual: InputForm, whose: str
    ) -> tuple[InputForm, str]:
        """Return how the pictures of a bundle are prepared, and a clause on who says so.

        Parameters
        ----------
        stated
            What the bundle states.
        usual, whose
            What is taken if it states nothing, and where that comes from, such as
            ``"ImageNet's"``.

        Raises
        ------
        InputError
            As `override`.
        """
        source = "as the bundle states" if stated else f"{whose}, as the bundle states none"
        if self.given:
            source += f", but for {', '.join(self.given)}"
        return self.override(stated or usual), source

    def override(self, base: InputForm) -> InputForm:
        """Return a form with the options in place of what it says.

        Raises
        ------
        InputError
            When an option cannot be read, is out of its range, or does not suit the network.
        """
        if self.crop is not None and base.crop is None:
            problem = f"the network's pictures are prepared as a {base.fit}, which cuts nothing"
            raise InputError("--crop", problem, "Leave it out")
        try:
            return replace(
                base,
                crop=base.crop if self.crop is None else self.crop,
                mean=base.mean if self.mean is None else _colours("--mean", self.mean),
                std=base.std if self.std is None else _colours("--std", self.std),
                interpolation=self.interpolation or base.interpolation,
                colour_order=self.colour_order or base.colour_order,
            )
        except ValueError as error:
            remedy = f"Check {', '.join(self.given)}"
            raise InputError("preprocessing", str(error), remedy) from error


def _colours(option: str, text: str) -> Colours:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise InputError(option, f"{text!r} is neither a number nor three", "Write R,G,B")
    return values[0], values[1], values[2]
