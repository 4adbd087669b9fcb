"""Picture files: which of them a folder holds, and what pixels they mean; one reader for all sources.

Pillow is imported by the functions that need it.
"""

import dataclasses
import errno
import io
import os
import struct
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jevb_jax.images.preparation import MAX_PIXELS, cut_picture

# Endings by Pillow's format. A fixed list: were it Pillow's own, the images of a folder, and with them
# order and splits, would follow from its version. Without vector graphics, films and icons.
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
    "TGA": (".tga", ".icb", ".vda", ".vst"),  # the last: it has no mark to be known by
}
SUFFIXES = tuple(ending for endings in _ENDINGS.values() for ending in endings)

# What Pillow raises on damaged images.
_DAMAGED = (ValueError, OSError, EOFError, SyntaxError, struct.error, zlib.error)

_ORIENTATION = 0x0112  # tag of EXIF


# --- Pixels ---


def read(
    file: str | io.BytesIO,
    *,
    mode: str,
    image_size: int = 0,
    max_pixels: int = MAX_PIXELS,
    where: str,
) -> np.ndarray:
    """Reads one picture.

    Palettes, CMYK and one bit a pixel become the colors that they mean. EXIF's orientation is
    followed. Transparent pixels are laid over white, opaque ones stay as they are, bit for bit. Of
    several frames or pages the first is read. Of 16 bits per color the upper 8 are kept; gray
    pictures of more than 8 bits are refused, for their levels are of no known range.

    Args:
        file: its path or content.
        mode: `RGB`, or `L` for gray.
        image_size: side of the square that is cut out of it (`images.preparation`), 0 for none.
        max_pixels: a picture of more is refused before it is decoded. Above Pillow's own limit,
            that is raised to it, for the process.
        where: what to call the picture in messages.

    Returns:
        uint8 `[H, W, C]`.

    Raises:
        ValueError: the picture is damaged, too large or of more than 8 bits; with `where`.
    """
    with _open(file, max_pixels=max_pixels, where=where) as image:
        return picture_pixels(
            image, mode=mode, image_size=image_size, max_pixels=max_pixels, where=where
        )


def picture_pixels(
    image: Any, *, mode: str, image_size: int = 0, max_pixels: int = MAX_PIXELS, where: str
) -> np.ndarray:
    """The pixels of an opened picture, as `read` gives them.

    Args:
        image: a Pillow picture.
        mode: see `read`.
        image_size: see `read`.
        max_pixels: the picture's square is computed without the rest, where that would be larger.
        where: see `read`.

    Returns:
        uint8 `[H, W, C]`.

    Raises:
        ValueError: as `read`.
    """
    if image.mode.startswith(("I", "F")):  # Pillow would clip 16-bit levels to 255 without a word
        raise ValueError(
            f"cannot read {where}: expected 8 bits per channel, got mode {image.mode}; bring its "
            "levels to 0..255 and save it with 8 bits"
        )
    try:
        image.load()
        upright = _upright(_opaque(image, mode), _orientation(image))
        if image_size:
            upright = cut_picture(upright, image_size, max_pixels=max_pixels)
        pixels = np.asarray(upright, np.uint8)
    except _DAMAGED as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    except MemoryError as error:
        raise ValueError(
            f"cannot read {where}: there is no memory for its {image.size[0]} x {image.size[1]} "
            "pixels; lower max_image_pixels, prefetch_batches or num_workers, or remove the picture"
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def size(path: str, *, max_pixels: int = MAX_PIXELS, where: str) -> tuple[int, int]:
    """Width and height of a picture as `read` gives it, from its header alone.

    Args:
        path: where the picture lies; messages name it.
        max_pixels: see `read`.
        where: see `read`.

    Returns:
        `(width, height)`, pixels.

    Raises:
        ValueError: the header cannot be read, or says that there are too many pixels.
    """
    with _open(path, max_pixels=max_pixels, where=where) as image:
        width, height = image.size
        # PNG would decode the whole picture for an EXIF block at its end, TIFF has turned its size.
        knows = width != height and image.format != "TIFF"
        if knows and (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5:
            return height, width
    return width, height


def check_limits(image_size: int, max_pixels: int) -> None:
    """Raises ValueError for a size or a limit that no picture can have.

    Args:
        image_size: see `read`.
        max_pixels: see `read`.
    """
    if image_size < 0:
        raise ValueError(f"expected image_size >= 0 (0: as it is), got {image_size}")
    if max_pixels < 1:
        raise ValueError(f"expected max_image_pixels >= 1, got {max_pixels}")
    if image_size**2 > max_pixels:
        raise ValueError(
            f"image_size = {image_size} makes pictures of {image_size**2:,} pixels, and "
            f"max_image_pixels allows {max_pixels:,}: lower the one or raise the other"
        )


def _open(file: str | io.BytesIO, *, max_pixels: int, where: str) -> Any:
    """An image of which only the header was read, of a size that is allowed."""
    from PIL import Image

    Image.init()
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and max_pixels > max(limit, MAX_PIXELS):
        Image.MAX_IMAGE_PIXELS = max_pixels  # asked for; Pillow has no other way to be told
    formats = [name for name in _ENDINGS if name in Image.OPEN]
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"cannot read {where}: {error}; max_image_pixels allows {max_pixels:,}: raise it if the "
            "picture is meant, or remove the picture"
        ) from error
    except (*_DAMAGED, MemoryError) as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ValueError(
            f"cannot read {where}: it has {width} x {height} = {width * height:,} pixels, and "
            f"max_image_pixels allows {max_pixels:,}: raise it if the picture is meant, or remove the "
            "picture"
        )
    return image


def _orientation(image: Any) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:  # the pixels are whole all the same: it is shown as it is, as viewers do
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


def _opaque(image: Any, mode: str) -> Any:
    from PIL import Image

    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(mode)


# --- Folders ---


@dataclasses.dataclass
class Listing:
    """The pictures of a folder, and what of it is left out; made by `list_folder`.

    Attributes:
        files: paths of the pictures directly in the folder.
        classes: paths of the pictures below each visible folder in it, by its name, sorted.
        endings: how many other files there are, by ending.
        num_hidden: hidden pictures and folders.
        closed_links: links to folders that are not followed, for what they lead to is read already.
        repeated_links: links to pictures that the folder holds anyway: these are read twice.
    """

    files: list[str]
    classes: dict[str, list[str]]
    endings: Counter[str] = dataclasses.field(default_factory=Counter)
    num_hidden: int = 0
    closed_links: list[str] = dataclasses.field(default_factory=list)
    repeated_links: list[str] = dataclasses.field(default_factory=list)

    def remarks(self) -> list[str]:
        """What a reader of the folder should know, a sentence each."""
        found = []
        if self.endings:
            kinds = ", ".join(f"{n:,} {ending}" for ending, n in self.endings.most_common(10))
            found.append(
                f"{self.endings.total():,} files are left out, of no ending that is read: {kinds}"
            )
        if self.num_hidden:
            found.append(f"{self.num_hidden:,} hidden pictures or folders are left out")
        if self.closed_links:
            found.append(
                f"{len(self.closed_links):,} links are not followed, for the folders they lead to are "
                f"read already or lie above: first {self.closed_links[0]}"
            )
        if self.repeated_links:
            found.append(
                f"{len(self.repeated_links):,} links lead to pictures that are in the set anyway, which "
                f"are read twice: first {self.repeated_links[0]}"
            )
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.classes:
            alike[unicodedata.normalize("NFC", name).casefold()].append(name)
        same = [names for names in alike.values() if len(names) > 1]
        if same:
            found.append(
                f"these names differ in case or in the coding of accents alone, and are classes of "
                f"their own: {same[:10]}"
            )
        return found


def list_folder(root: Path) -> Listing:
    """Finds the pictures of a folder, by their endings, in an order that no file system changes.

    Hidden files and folders are passed over. Links are followed, but no folder is read twice: a link
    into the folder itself, to one above it or to what another link has led to already is closed.

    Args:
        root: an existing folder.

    Returns:
        What there is.

    Raises:
        ValueError: a picture that is a link to nothing, or no file (a pipe would be waited for).
    """
    real_root = os.path.realpath(root)
    listing = Listing([], {})
    entered: set[str] = set()  # real paths of folders outside that links have led to

    def is_shown(real: str) -> bool:
        path = Path(real)
        if not path.is_relative_to(real_root):
            return False
        return not any(part.startswith(".") for part in path.relative_to(real_root).parts)

    def may_enter(entry: os.DirEntry[str], real: str) -> bool:
        if is_shown(real) and not entry.is_symlink():
            return True
        if is_shown(real) or real in entered or Path(real_root).is_relative_to(real):
            listing.closed_links.append(entry.path)
            return False
        entered.add(real)
        return True

    def pictures(entries: list[os.DirEntry[str]]) -> Iterator[str]:
        for entry in entries:
            if _is(os.DirEntry.is_dir, entry):
                continue
            is_hidden, ending = entry.name.startswith("."), os.path.splitext(entry.name)[1].lower()
            if ending not in SUFFIXES:
                if not is_hidden:
                    listing.endings[ending or "without an ending"] += 1
            elif is_hidden:
                listing.num_hidden += 1
            elif not _is(os.DirEntry.is_file, entry):
                kind = "a link to nothing" if entry.is_symlink() else "no file"
                raise ValueError(f"{entry.path} is {kind}: remove it, or bring the picture back")
            else:
                if entry.is_symlink() and is_shown(os.path.realpath(entry.path)):
                    listing.repeated_links.append(entry.path)
                yield entry.path

    def folders(
        entries: list[os.DirEntry[str]], real: str
    ) -> Iterator[tuple[os.DirEntry[str], str]]:
        for entry in entries:
            if not _is(os.DirEntry.is_dir, entry):
                continue
            if entry.name.startswith("."):
                listing.num_hidden += 1
                continue
            is_link = entry.is_symlink()
            target = os.path.realpath(entry.path) if is_link else os.path.join(real, entry.name)
            if may_enter(entry, target):
                yield entry, target

    def below(folder: str, real: str) -> Iterator[str]:
        # Not recursive: a tree may be deeper than Python's stack.
        waiting = [(folder, real)]
        while waiting:
            path, real = waiting.pop()
            entries = _entries(path)
            yield from pictures(entries)
            waiting += [(entry.path, target) for entry, target in folders(entries, real)][::-1]

    entries = _entries(os.fspath(root))
    listing.files = list(pictures(entries))
    for entry, target in folders(entries, real_root):
        listing.classes[entry.name] = list(below(entry.path, target))
    return listing


def _is(kind: Callable[[os.DirEntry[str]], bool], entry: os.DirEntry[str]) -> bool:
    try:
        return kind(entry)
    except OSError as error:
        if error.errno == errno.ELOOP:  # links that lead to each other lead to nothing
            return False
        raise


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)
