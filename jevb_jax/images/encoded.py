"""Pictures that are stored encoded (JPEG, PNG and others) and decoded when they are asked for."""

import abc
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict, Unpack

import numpy as np

from jevb_jax.images import decoding
from jevb_jax.images.crop_boxes import ExampleCrops
from jevb_jax.images.levels import Levels
from jevb_jax.images.source import Subset

_logger = logging.getLogger(__name__)

_CHUNK = 64  # pictures that a thread checks at once


class Reading(TypedDict, total=False):
    """How pictures are read.

    Attributes:
      image_size: height and width of the square images, in pixels. The shorter side is resized to
        it by Pillow's antialiased bilinear filter, then the center is cut out. 0 (the default) keeps
        images as they are; their headers are then read at once, to check that all have one size.
      max_image_pixels: a picture with more pixels is an error, before it is decoded.
      exif: whether the orientation in EXIF is applied (the default) or ignored.
      num_channels: 1 for gray, 3 for color, 4 for color with transparency; 0 (the default) for color,
        or gray where `levels` has more than 8 bits.
      levels: type of the pixels; bytes by default.
      skip_broken: sizes are not checked at once, because `without_broken` will do that.
    """

    image_size: int
    max_image_pixels: int
    exif: decoding.Exif
    num_channels: int
    levels: Levels
    skip_broken: bool


def _mode(num_channels: int, levels: Levels) -> str:
    """The mode of Pillow for a number of channels."""
    modes = {0: "RGB", 1: "L", 3: "RGB", 4: "RGBA"}
    if levels.dtype != "uint8":
        modes = {0: "L", 1: "L"}
    if num_channels not in modes:
        raise ValueError(
            f"pictures of {levels.dtype} have {' or '.join(str(n) for n in modes if n)} channels, got "
            f"num_channels = {num_channels}; for others give arrays"
        )
    return modes[num_channels]


class EncodedPictures(abc.ABC):
    """A set of encoded pictures, of any sizes. Subclasses say where the bytes are.

    Attributes:
      name: the name of the source in messages.
      image_size: size of the square to cut out, in pixels; 0 keeps images as they are.
      class_names: one name for each class, or None.
    """

    class_names: tuple[str, ...] | None = None
    _labels: np.ndarray | None = None

    def __init__(self, name: str, **reading: Unpack[Reading]):
        self.name = name
        self.image_size = reading.get("image_size", 0)
        self._max_pixels = reading.get("max_image_pixels", decoding.MAX_PIXELS)
        self._exif: decoding.Exif = reading.get("exif", "apply")
        self._levels = reading.get("levels", Levels())
        self._mode = _mode(reading.get("num_channels", 0), self._levels)
        self._skip_broken = reading.get("skip_broken", False)
        decoding.check_limits(self.image_size, self._max_pixels)

    @property
    def labels(self) -> np.ndarray | None:
        """Labels, int64 `[N]`, or None."""
        return self._labels

    @property
    def files(self) -> Sequence[str]:
        """The files that hold the pictures; empty if that is not known."""
        return ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def file(self, index: int) -> str | io.BytesIO:
        """Path or bytes of picture `index`.

        Raises:
          ValueError: the bytes cannot be read; the message names the picture and its index.
        """
        ...

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """The name of picture `index` in messages."""
        ...

    def __getitem__(self, index: int) -> np.ndarray:
        return decoding.read(
            self.file(index),
            mode=self._mode,
            image_size=self.image_size,
            max_pixels=self._max_pixels,
            exif=self._exif,
            levels=self._levels,
            where=self.where(index),
        )

    def crops(self, index: int, crops: ExampleCrops) -> list[np.ndarray]:
        """Crops of the whole picture `index`, `[size, size, C]` for each view."""
        return decoding.read_crops(
            self.file(index),
            crops,
            mode=self._mode,
            max_pixels=self._max_pixels,
            exif=self._exif,
            levels=self._levels,
            where=self.where(index),
        )

    def _check_opened(self) -> None:
        """What a subclass calls at the end of its constructor."""
        if self.image_size == 0 and not self._skip_broken:
            self.check_sizes(range(len(self)))

    def check_sizes(self, rows: Sequence[int]) -> None:
        """Raises ValueError unless the pictures `rows` have one size, by their headers."""
        first = None
        for index in rows:
            size = decoding.size(
                self.file(index),
                max_pixels=self._max_pixels,
                exif=self._exif,
                where=self.where(index),
            )
            first = first or size
            if size != first:
                raise ValueError(
                    f"all images must have one size, but {self.where(rows[0])} is "
                    f"{first[0]}x{first[1]} and {self.where(index)} is {size[0]}x{size[1]}; set "
                    "image_size to resize them when they are read"
                )


def without_broken(source: EncodedPictures) -> EncodedPictures | Subset:
    """The pictures of a source that can be read, in their order. All are decoded once, by threads.

    A warning gives the number of the others and the names and errors of the first five.

    Raises:
      ValueError: none can be read; or `image_size` is 0 and those that can be read differ in size.
    """

    def errors(start: int) -> list[tuple[int, str]]:
        found = []
        for index in range(start, min(start + _CHUNK, len(source))):
            try:
                source[index]
            except ValueError as error:
                found.append((index, str(error)))
        return found

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        parts = pool.map(errors, range(0, len(source), _CHUNK))
        broken = [one for part in parts for one in part]
    rows = np.setdiff1d(np.arange(len(source)), [index for index, _ in broken])
    if broken:
        told = "\n".join(f"  {error}" for _, error in broken[:5])
        summary = f"{len(broken):,} of {len(source):,} pictures of {source.name} cannot be read"
        if not len(rows):
            raise ValueError(f"{summary}:\n{told}")
        _logger.warning("%s and are left out (data.skip_broken), first:\n%s", summary, told)
    if source.image_size == 0:
        source.check_sizes(rows.tolist())
    return Subset(source, rows) if broken else source
