"""Image files as arrays of pixels."""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_FORMATS = "Give a picture that Pillow reads, such as PNG, JPEG or WebP"
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise for files that break off or contradict themselves."""


def load_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture as it is meant to be seen.

    Grey and palette pictures become coloured ones; transparency is dropped, as image
    classification's usual loaders do. Of a picture with several frames, the first is read.

    Parameters
    ----------
    path
        A file of any format that Pillow reads.

    Returns
    -------
    NDArray[np.uint8]
        ``(height, width, 3)``: red, green and blue, turned as the EXIF orientation says.

    Raises
    ------
    InputError
        When the file cannot be read or is no picture of 8 or 16 bits per channel.
    """
    try:
        with warnings.catch_warnings():
            # Large pictures are what the user asked for; the largest are refused below.
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                opened.load()
                picture = ImageOps.exif_transpose(opened)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "Check the path") from error
    except UnidentifiedImageError as error:
        raise InputError(path, "is no picture", _FORMATS) from error
    except Image.DecompressionBombError as error:
        raise InputError(path, "has too many pixels to be loaded safely", "Shrink it") from error
    except _DAMAGE as error:
        raise InputError(path, f"is a damaged picture ({error})", _FORMATS) from error
    if picture.mode in _16_BIT_MODES:  # Pillow would clip at 255
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in {"I", "F"}:
        problem = "has 32 bits per pixel, whose range is not known"
        raise InputError(path, problem, "Convert it to 8 bits per channel")
    return np.array(picture.convert("RGB"))
