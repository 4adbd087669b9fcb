"""The square that a network is given of a picture, for files and for whoever asks a trained model.

The shorter side is brought to the size that is asked for, antialiased, and the center is cut out, as
torchvision's `Resize` and `CenterCrop` do. Nothing is squashed. `pixels.center_view` cuts by the
same `square_cut` on the device.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Above as many pixels Pillow itself warns of a decompression bomb.
MAX_PIXELS = 89_478_485


class SquareCut(NamedTuple):
    """How a square comes out of a picture.

    Attributes:
      height: pixels of the resized picture.
      width: pixels of the resized picture.
      top: row of the resized picture at which the square starts.
      left: column, likewise.
    """

    height: int
    width: int
    top: int
    left: int


def square_cut(height: int, width: int, size: int) -> SquareCut:
    """The cut of `size` pixels a side out of a picture of `height` x `width`, all at least 1."""
    # The shorter side is exact, the longer is cut to an integer.
    shorter = min(height, width)
    resized_height, resized_width = height * size // shorter, width * size // shorter
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    return SquareCut(resized_height, resized_width, top, left)


def cut_picture(picture: "Image", size: int, *, max_pixels: int = MAX_PIXELS) -> "Image":
    """The square of a picture.

    Args:
      picture: one with 8 bits a channel, or of mode F.
      size: pixels a side, at least 1.
      max_pixels: of the resized picture. Of a thin picture that would have more, the square alone is
        computed; Pillow keeps its place in single precision, which may move a level by one.

    Returns:
      The square, by Pillow's antialiased bilinear filter; as it is where it is that square already.
    """
    from PIL.Image import Resampling

    width, height = picture.size
    cut = square_cut(height, width, size)
    if min(height, width) != size:
        if cut.width * cut.height > max_pixels:
            across, down = width / cut.width, height / cut.height
            box = (
                cut.left * across,
                cut.top * down,
                (cut.left + size) * across,
                (cut.top + size) * down,
            )
            return picture.resize((size, size), Resampling.BILINEAR, box=box)
        picture = picture.resize((cut.width, cut.height), Resampling.BILINEAR)
    return picture.crop((cut.left, cut.top, cut.left + size, cut.top + size))


def cut_square(image: np.ndarray, size: int) -> np.ndarray:
    """The square of an image in an array, as `cut_picture`.

    Args:
      image: `[h, w, c]`, uint8, or float32 in [0, 1]. Levels of uint8 are rounded, floats are not.
      size: pixels a side, at least 1.

    Returns:
      `[size, size, c]`, of the image's type.
    """
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    # Channel by channel: Pillow has no pictures of several floats, and a filter mixes no channels.
    planes = [
        np.asarray(cut_picture(Image.fromarray(np.ascontiguousarray(plane)), size))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, axis=-1)
