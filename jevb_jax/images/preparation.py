"""Cuts the square that a network reads out of a picture, for training files and for users' images.

The shorter side is resized to the given size, antialiased, and the center is cut out, as
torchvision's `Resize` and `CenterCrop` do. The aspect ratio does not change. On the device,
`pixels.center_view` cuts by the same `square_cut`.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

# For more pixels than this Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485


class SquareCut(NamedTuple):
    """How a square is cut out of a picture.

    Attributes:
      height: height of the resized picture, in pixels.
      width: width of the resized picture, in pixels.
      top: row of the resized picture at which the square starts.
      left: column of the resized picture at which the square starts.
    """

    height: int
    width: int
    top: int
    left: int


def square_cut(height: int, width: int, size: int) -> SquareCut:
    """The cut of a square of `size` pixels out of a picture `height` x `width`; all at least 1."""
    # The shorter side is exact; the longer side is rounded down.
    shorter = min(height, width)
    resized_height, resized_width = height * size // shorter, width * size // shorter
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    return SquareCut(resized_height, resized_width, top, left)


def cut_picture(picture: "Image", size: int, *, max_pixels: int = MAX_PIXELS) -> "Image":
    """The square of a picture, resized by Pillow's antialiased bilinear filter.

    A picture that is this square already is returned as it is.

    Args:
      picture: a picture with 8 bits for each channel, or of mode F.
      size: height and width of the square in pixels, at least 1.
      max_pixels: largest resized picture. For a long, thin picture that would have more pixels,
        only the square is computed. Pillow then holds its place in single precision, so a level may
        change by one.
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
            return resized(picture, (size, size), Resampling.BILINEAR, box=box)
        picture = resized(picture, (cut.width, cut.height), Resampling.BILINEAR)
    return picture.crop((cut.left, cut.top, cut.left + size, cut.top + size))


def resized(
    picture: "Image",
    size: tuple[int, int],
    kernel: "Resampling",
    *,
    box: tuple[float, float, float, float] | None = None,
) -> "Image":
    """A picture resized by Pillow, channel by channel, also where it is transparent.

    Args:
      picture: the picture.
      size: width and height of the result in pixels.
      kernel: Pillow's filter.
      box: left, top, right and bottom of the part to resize; None for all.
    """
    from PIL import Image

    if picture.mode not in ("RGBA", "LA"):
        return picture.resize(size, kernel, box=box)
    # Pillow would weight the colors by their opacity. Arrays, here and on the device, have channels
    # of which it does not know such a meaning, and a picture must equal its array.
    bands = [band.resize(size, kernel, box=box) for band in picture.split()]
    return Image.merge(picture.mode, bands)


def cut_square(image: np.ndarray, size: int) -> np.ndarray:
    """The square of an image in an array, as `cut_picture` cuts it.

    Args:
      image: `[h, w, c]`, uint8, or float32 in [0, 1]. Levels of uint8 are rounded, floats are not.
      size: height and width of the square in pixels, at least 1.

    Returns:
      `[size, size, c]`, of the type of the image.
    """
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    # Channel by channel: Pillow has no pictures with several floats, and the filter mixes no
    # channels.
    planes = [
        np.asarray(cut_picture(Image.fromarray(np.ascontiguousarray(plane)), size))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, axis=-1)
