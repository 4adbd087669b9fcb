"""The pixels of crops: parts of a decoded picture, each resized to a square.

Also the faster decoder of JPEGs, which comes with the faster resizer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jevb_jax import extras
from jevb_jax.images.crop_boxes import Box, Resizer
from jevb_jax.images.pixels import Interpolation
from jevb_jax.images.preparation import resized


class _Part(NamedTuple):
    """Whole pixels `[top:bottom, left:right]`, and within them the part to resize, in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    inside: tuple[float, float, float, float]  # left, top, right, bottom

    @classmethod
    def of(cls, box: Box, scale: int) -> "_Part":
        """A box in pixels of the picture before it was reduced by `scale`."""
        left, top = box.left / scale, box.top / scale
        right, bottom = (box.left + box.width) / scale, (box.top + box.height) / scale
        first, start = math.floor(left), math.floor(top)
        inside = (left - first, top - start, right - first, bottom - start)
        return cls(first, start, math.ceil(right), math.ceil(bottom), inside)


def check_resizer(resizer: Resizer) -> None:
    """Raises ModuleNotFoundError, with advice, if a resizer's packages are missing."""
    if resizer == "simd":
        with extras.explained():
            import cykooz_resizer  # noqa: F401
            import simplejpeg  # noqa: F401


def decoded_jpeg(content: bytes) -> np.ndarray | None:
    """The colors of a JPEG, bit for bit those of Pillow, in less time than Pillow's take to an array.

    Args:
      content: of a file of gray or of color, not of CMYK.

    Returns:
      uint8 `[H, W, 3]`. None where the decoder has any doubt: Pillow reads some damaged files.

    Raises:
      ModuleNotFoundError: the package is not installed.
    """
    with extras.explained():
        import simplejpeg

    try:
        return simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:
        return None


def squares(
    picture: Any,
    boxes: Sequence[Box],
    sizes: Sequence[int],
    *,
    scale: int = 1,
    interpolation: Interpolation = "bilinear",
    resizer: Resizer = "pillow",
) -> list[np.ndarray]:
    """Cuts boxes out of a picture, and resizes each, antialiased. No pixel beside a box is seen.

    The two resizers have the same filter. "simd" needs a third of the time where the processor has
    AVX2. It rounds its weights otherwise, so that about an eighth of the levels of a photograph differ,
    by one, rarely by two. It gives the same bits on every processor.

    Args:
      picture: a Pillow picture of mode RGB or L, for "pillow" also of RGBA or F; for "simd" also
        uint8 `[H, W, 3]`.
      boxes: in pixels of the picture before it was reduced by `scale`.
      sizes: height and width of each square in pixels.
      scale: by how much the picture was reduced.
      interpolation: "bilinear" or "bicubic"; "simd" has only "bilinear".
      resizer: "pillow", or "simd" by the package cykooz-resizer.

    Returns:
      For each box `[size, size, C]`, or `[size, size]` for one channel; uint8, float32 for mode F.

    Raises:
      ValueError: "simd" has no such mode or interpolation.
      ModuleNotFoundError: the package is not installed.
    """
    if resizer == "simd":
        square = _by_vectors(np.asarray(picture), interpolation)
    else:
        square = _by_pillow(picture, interpolation)
    parts = [_Part.of(box, scale) for box in boxes]
    return [square(part, size) for part, size in zip(parts, sizes, strict=True)]


def _by_pillow(picture: Any, interpolation: Interpolation) -> Callable[[_Part, int], np.ndarray]:
    from PIL.Image import Resampling

    kernel = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}[interpolation]

    def square(part: _Part, size: int) -> np.ndarray:
        # With the box alone, Pillow's filter would also read pixels beside it.
        cut = picture.crop((part.left, part.top, part.right, part.bottom))
        return np.asarray(resized(cut, (size, size), kernel, box=part.inside))

    return square


def _by_vectors(
    pixels: np.ndarray, interpolation: Interpolation
) -> Callable[[_Part, int], np.ndarray]:
    with extras.explained():
        import cykooz_resizer as package

    kinds = {(): package.PixelType.U8, (3,): package.PixelType.U8x3}
    channels = pixels.shape[2:]
    if pixels.dtype != np.uint8 or channels not in kinds or interpolation != "bilinear":
        raise ValueError(
            'the resizer "simd" has bilinear crops of color and of gray with 8 bits, got '
            f'{interpolation}, {pixels.dtype} and channels {channels}: take "pillow"'
        )
    kind = kinds[channels]
    kernel = package.ResizeAlg.convolution(package.FilterType.bilinear)
    # A resizer of its own: one that threads share would let them wait for each other.
    resizer = package.Resizer()

    def square(part: _Part, size: int) -> np.ndarray:
        # Copied, as for Pillow; and its memory is not shared, whose layout is Pillow's own affair.
        cut = pixels[part.top : part.bottom, part.left : part.right]
        left, top, right, bottom = part.inside
        options = package.ResizeOptions(
            kernel, crop_box=package.CropBox(left, top, right - left, bottom - top)
        )
        source = package.ImageData(cut.shape[1], cut.shape[0], kind, cut.tobytes())
        target = package.ImageData(size, size, kind)
        resizer.resize(source, target, options)
        return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, *channels)

    return square
