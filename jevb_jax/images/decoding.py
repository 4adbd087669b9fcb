"""Picture files: how their pixels are read.

All sources read pictures here. Pillow is imported by the functions that need it.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jevb_jax.images import crop_pixels
from jevb_jax.images.crop_boxes import Box, ExampleCrops
from jevb_jax.images.levels import Levels
from jevb_jax.images.preparation import MAX_PIXELS, cut_picture

# Endings for each format of Pillow. The list is fixed: with Pillow's own list, the images of a
# folder, and so their order and splits, would depend on its version. Vector graphics, films and
# icons are out.
_ENDINGS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "PSD": (".psd",),
    "DDS": (".dds",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),  # last, because its files have no signature
}
SUFFIXES = tuple(ending for endings in _ENDINGS.values() for ending in endings)

# Errors that Pillow raises for damaged images.
_DAMAGED = (ValueError, OSError, EOFError, SyntaxError, struct.error, zlib.error)

_ORIENTATION = 0x0112  # EXIF tag
_BYTES = Levels()
_DEEP = {"uint16": "I", "float32": "F"}  # how Pillow's modes begin
Exif = Literal["apply", "ignore"]


def read(
    file: str | io.BytesIO,
    *,
    mode: str,
    image_size: int = 0,
    max_pixels: int = MAX_PIXELS,
    exif: Exif = "apply",
    levels: Levels = _BYTES,
    where: str,
) -> np.ndarray:
    """Reads one picture.

    Palettes, CMYK and one-bit pixels are converted to the colors they stand for. Transparent pixels
    are blended with white; opaque ones keep their bits. Of several frames or pages, the first is
    read. Of 16 bits for each color, the upper 8 are kept. Gray pictures of more than 8 bits are an
    error unless `levels` says what their values mean. Such pictures are resized as floats.

    Args:
      file: path or content of the picture.
      mode: `RGB`, `L` for gray, or `RGBA` for colors with their transparency.
      image_size: height and width of the square to cut out, by `images.preparation`; 0 for none.
      max_pixels: a picture with more pixels is an error, before it is decoded. If it exceeds
        Pillow's own limit, that limit is raised for the whole process.
      exif: "apply" turns the picture upright, as EXIF says; "ignore" takes the rows as they are
        stored. (Pillow itself turns TIFF files, in both cases.)
      levels: type of the pixels. Those of more than 8 bits have one channel, and `mode` is not read.
      where: name of the picture in messages.

    Returns:
      `[H, W, C]` of the type of `levels`; floats are in [0, 1].

    Raises:
      ValueError: the picture is damaged, too large, or not of the type of `levels`.
    """
    with _open(file, max_pixels=max_pixels, where=where) as image:
        return picture_pixels(
            image,
            mode=mode,
            image_size=image_size,
            max_pixels=max_pixels,
            exif=exif,
            levels=levels,
            where=where,
        )


def picture_pixels(
    image: Any,
    *,
    mode: str,
    image_size: int = 0,
    max_pixels: int = MAX_PIXELS,
    exif: Exif = "apply",
    levels: Levels = _BYTES,
    where: str,
) -> np.ndarray:
    """The pixels of an opened Pillow picture, as `read` returns them.

    Args:
      image: the Pillow picture.
      mode: `RGB`, `L` for gray, or `RGBA` for colors with their transparency.
      image_size: height and width of the square to cut out; 0 for none.
      max_pixels: if the resized picture would have more pixels, only its square is computed.
      exif: as for `read`.
      levels: as for `read`.
      where: name of the picture in messages.

    Returns:
      `[H, W, C]` of the type of `levels`; floats are in [0, 1].

    Raises:
      ValueError: the picture is damaged, too large for the memory, or not of the type of `levels`.
    """
    with _decoding(image, levels, where):
        image.load()
        plain = _plain(image, mode, levels, where)
        upright = _upright(plain, _orientation(image, exif))
        if image_size:
            upright = cut_picture(upright, image_size, max_pixels=max_pixels)
        return _as_array(upright, levels)


def read_crops(
    file: str | io.BytesIO,
    crops: ExampleCrops,
    *,
    mode: str,
    max_pixels: int = MAX_PIXELS,
    exif: Exif = "apply",
    levels: Levels = _BYTES,
    where: str,
) -> list[np.ndarray]:
    """Reads one picture, and cuts the crops of all views out of it, at its own size and ratio.

    Colors, transparency and orientation are those of `read`. The picture is decoded once. A JPEG is
    decoded at a half, a quarter or an eighth of its size where every crop of it still has at least
    the pixels of its view. Each crop is then resized, antialiased, and sees no pixel beside it.

    Args:
      file: path or content of the picture.
      crops: the crops of this example.
      mode: `RGB`, `L` for gray, or `RGBA` for colors with their transparency.
      max_pixels: as for `read`.
      exif: as for `read`.
      levels: as for `read`.
      where: name of the picture in messages.

    Returns:
      For each view `[size, size, C]`, as for `read`.

    Raises:
      ValueError: for the reasons of `read`; or `crops.resizer` has no such mode or levels.
      ModuleNotFoundError: the packages of `crops.resizer` are not installed.
    """
    with _open(file, max_pixels=max_pixels, where=where) as image, _decoding(image, levels, where):
        is_jpeg = image.format in ("JPEG", "MPO")
        if not is_jpeg:
            image.load()  # the orientation may stand behind the pixels, and TIFF is turned by it
        orientation = _orientation(image, exif)
        turned = image.size if orientation < 5 else image.size[::-1]
        boxes = crops.boxes(width=turned[0], height=turned[1])
        scale = _decode_scale(image, boxes, crops.sizes) if is_jpeg else 1
        picture = None
        if crops.resizer == "simd" and is_jpeg and scale == 1 and mode == "RGB":
            picture = _decoded_faster(image)
        if picture is None:
            image.load()
            picture = _plain(image, mode, levels, where)
        # The boxes are turned, and not the picture: a reduced picture may end in a part of a pixel,
        # and after a turn this would be its beginning.
        own = [_in_file(box, orientation, width=turned[0], height=turned[1]) for box in boxes]
        found = crop_pixels.squares(
            picture,
            own,
            crops.sizes,
            scale=scale,
            interpolation=crops.interpolation,
            resizer=crops.resizer,
        )
        return [_as_array(_turned(square, orientation), levels) for square in found]


def _decode_scale(image: Any, boxes: Sequence[Box], sizes: Sequence[int]) -> int:
    """Has a JPEG decoded at the smallest scale that enlarges no crop; returns its divisor."""
    whole = min(min(box.height, box.width) // size for box, size in zip(boxes, sizes, strict=True))
    scale = next((divisor for divisor in (8, 4, 2) if divisor <= whole), 1)
    if scale > 1:
        image.draft(None, tuple(side // scale for side in image.size))
    return scale


def _decoded_faster(image: Any) -> np.ndarray | None:
    """The colors of an opened JPEG of which only the header was read; None if Pillow should decide."""
    if image.mode not in ("L", "RGB"):
        return None
    image.fp.seek(0)
    pixels = crop_pixels.decoded_jpeg(image.fp.read())
    return None if pixels is None or pixels.shape[1::-1] != image.size else pixels


def _in_file(box: Box, orientation: int, *, width: int, height: int) -> Box:
    """A box of the upright picture, `height` x `width`, as a box of the picture in the file."""
    top, left, tall, wide = box
    if orientation in (2, 3, 6, 7):
        left = width - left - wide
    if orientation in (3, 4, 7, 8):
        top = height - top - tall
    return Box(left, top, wide, tall) if orientation >= 5 else Box(top, left, tall, wide)


def _as_array(picture: Any, levels: Levels) -> np.ndarray:
    if levels.dtype != "uint8":
        return levels.from_unit(np.asarray(picture, np.float32))[..., None]
    pixels = np.asarray(picture, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@contextlib.contextmanager
def _decoding(image: Any, levels: Levels, where: str) -> Iterator[None]:
    """Names the picture in every error of decoding it; refuses levels of another type."""
    is_deep = image.mode.startswith(("I", "F"))
    if levels.dtype == "uint8" and is_deep:  # Pillow would silently clip 16-bit levels to 255
        kept = ""
        if image.mode.startswith(("I;16", "F")):
            kept = (
                f', or keep them by data.dtype = "{"float32" if image.mode == "F" else "uint16"}"'
            )
        raise ValueError(
            f"cannot read {where}: expected 8 bits per channel, got mode {image.mode}; scale its "
            f"levels to 0..255 and save it with 8 bits{kept}"
        )
    if levels.dtype != "uint8" and not image.mode.startswith(_DEEP[levels.dtype]):
        raise ValueError(
            f"cannot read {where}: expected one channel of {levels.dtype} (data.dtype), got mode "
            f"{image.mode}"
        )
    try:
        yield
    except _DAMAGED as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    except MemoryError as error:
        raise ValueError(
            f"cannot read {where}: there is no memory for its {image.size[0]} x {image.size[1]} "
            "pixels; lower max_image_pixels, prefetch_batches or num_workers, or remove the picture"
        ) from error


def size(
    file: str | io.BytesIO, *, max_pixels: int = MAX_PIXELS, exif: Exif = "apply", where: str
) -> tuple[int, int]:
    """`(width, height)` in pixels of a picture as `read` returns it, from its header only.

    Args:
      file: path or content of the picture.
      max_pixels: a picture with more pixels is an error.
      exif: as for `read`.
      where: name of the picture in messages.

    Raises:
      ValueError: the header cannot be read, or it says that there are too many pixels.
    """
    with _open(file, max_pixels=max_pixels, where=where) as image:
        width, height = image.size
        # Reading the orientation may need the whole picture (PNG with EXIF at its end), or is not
        # needed (square pictures; TIFF, whose size is rotated already).
        knows = width != height and image.format != "TIFF"
        if knows and (image.format != "PNG" or "exif" in image.info):
            return (height, width) if _orientation(image, exif) >= 5 else (width, height)
    return width, height


def check_limits(image_size: int, max_pixels: int) -> None:
    """Raises ValueError if no picture can have this `image_size` within `max_pixels`."""
    if image_size < 0:
        raise ValueError(f"expected image_size >= 0 (0 keeps the size), got {image_size}")
    if max_pixels < 1:
        raise ValueError(f"expected max_image_pixels >= 1, got {max_pixels}")
    if image_size**2 > max_pixels:
        raise ValueError(
            f"image_size = {image_size} makes pictures of {image_size**2:,} pixels, but "
            f"max_image_pixels allows only {max_pixels:,}; lower the first or raise the second"
        )


def _open(file: str | io.BytesIO, *, max_pixels: int, where: str) -> Any:
    """A picture of which only the header was read, with at most `max_pixels` pixels."""
    from PIL import Image

    Image.init()
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and max_pixels > max(limit, MAX_PIXELS):
        Image.MAX_IMAGE_PIXELS = max_pixels  # the only way to change the limit of Pillow
    formats = [name for name in _ENDINGS if name in Image.OPEN]
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"cannot read {where}: {error}; max_image_pixels allows {max_pixels:,}. Raise it if the "
            "picture is wanted, or remove the picture"
        ) from error
    except (*_DAMAGED, MemoryError) as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ValueError(
            f"cannot read {where}: it has {width} x {height} = {width * height:,} pixels, but "
            f"max_image_pixels allows {max_pixels:,}. Raise it if the picture is wanted, or remove "
            "the picture"
        )
    return image


def _orientation(image: Any, exif: Exif) -> int:
    if exif == "ignore":
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:  # damaged EXIF: show the picture as it is, like image viewers do
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Any, orientation: int) -> Any:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _turned(square: np.ndarray, orientation: int) -> np.ndarray:
    """A square `[size, size, ...]` as `_upright` turns pictures."""
    if orientation >= 5:
        square = square.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        square = square[::-1]
    return square[:, ::-1] if orientation in (2, 3, 6, 7) else square


def _plain(image: Any, mode: str, levels: Levels, where: str) -> Any:
    """A picture of the mode; one of floats in [0, 1] where `levels` has more than 8 bits."""
    from PIL import Image

    if levels.dtype != "uint8":
        return Image.fromarray(levels.to_unit(np.asarray(image), where=where))
    if image.has_transparency_data and mode != "RGBA":
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == mode else image.convert(mode)  # which would copy it
