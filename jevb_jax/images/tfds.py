"""Data sets of TensorFlow Datasets (TFDS), read without TensorFlow."""

import functools
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from jevb_jax import extras
from jevb_jax.images.encoded import EncodedPictures, Reading
from jevb_jax.images.source import checked_labels
from jevb_jax.runs.files import to_path


class TfdsSource(EncodedPictures):
    """A split of a prepared TFDS data set, read without TensorFlow.

    Only the array_record format can be read by index, and only from local or mounted directories.
    Pillow decodes the images here. TFDS itself would use OpenCV where that is installed, and its
    JPEG pixels may differ. (TFDS also needs importlib_resources; it declares neither dependency.)

    Args:
      name: in the spelling of TFDS, for example `cifar10`, `cifar10:3.0.2` or
        `imagenet_resized/32x32`. Without a version, the highest one on disk is read.
      split: a TFDS split, which may be a slice: `train`, `test`, `train[:10%]`.
      data_dir: the directory that contains the data set; empty for that of TFDS
        (`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`).
      image_key: name of the feature with the image.
      label_key: name of the feature with the class label; a data set without it is unlabeled.
      has_labels: whether labels are read; without, the data set counts as unlabeled.
      **reading: see `Reading`. `image_size` is needed if images of the data set differ in size.

    Raises:
      FileNotFoundError: the data set does not exist. The message has the command that prepares it.
      ValueError: the file format or split cannot be read, the image feature does not exist, labels
        are not class labels, or images differ in size with `image_size=0`. Reading a damaged
        record raises ValueError with its index.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        data_dir: str | os.PathLike[str] = "",
        image_key: str = "image",
        label_key: str = "label",
        has_labels: bool = True,
        **reading: Unpack[Reading],
    ):
        super().__init__(name, **reading)
        self._arguments: dict[str, Any] = {
            "name": name,
            "split": split,
            "data_dir": data_dir,
            "image_key": image_key,
            "label_key": label_key,
            "has_labels": has_labels,
            **reading,
        }
        root = to_path(
            os.path.expanduser(
                data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
            )
        )
        directory = _tfds_directory(name, root)
        # Not an import statement, because the lazy modules of TFDS mislead type checkers.
        with extras.explained():
            tfds: Any = importlib.import_module("tensorflow_datasets")
        builder = tfds.builder_from_directory(directory)
        features: dict[str, Any] = dict(builder.info.features.items())
        image: Any = features.get(image_key)
        if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype) != np.uint8:
            raise ValueError(
                f"{directory} has no uint8 image feature {image_key!r}; its features are {features}"
            )
        height, width, channels = image.shape
        if channels not in (1, 3, None):
            raise ValueError(f"expected images of 1 or 3 channels in {directory}, got {channels}")
        if self.image_size == 0 and (height is None or width is None):
            raise ValueError(
                f"the images of {directory} may differ in size: "
                "set image_size to resize them on load"
            )
        label = features.get(label_key) if has_labels else None
        if label is not None and not isinstance(label, tfds.features.ClassLabel):
            raise ValueError(f"feature {label_key!r} of {directory} is not a class label: {label}")
        try:
            # Get the encoded bytes, so that reading labels decodes no image.
            self._records: Any = builder.as_data_source(
                split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{directory} is stored as {builder.info.file_format}, which cannot be read by "
                "index; remove it, or choose another data_dir, and build it with\n"
                f"  {_tfds_build_command(name, root)}"
            ) from error
        self.name = f"{builder.name}:{builder.version}/{split}"
        self.class_names = None if label is None else tuple(label.names)
        if channels == 1 and not reading.get("num_channels"):
            self._mode = "L"
        if len(self._records) == 0:
            raise ValueError(f"{self.name} has no examples")

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open their own readers, because TFDS's objects cannot be pickled.
        return functools.partial(TfdsSource, **self._arguments), ()

    @property
    def labels(self) -> np.ndarray | None:
        """Labels, int64 `[N]`, or None.

        Also None if every label is -1, which marks an unlabeled split in TFDS. The first use reads
        every record once, without decoding images. That takes minutes for a set like ImageNet.
        """
        return self._all_labels

    @functools.cached_property
    def _all_labels(self) -> np.ndarray | None:
        if self.class_names is None:
            return None
        chunk = 4096  # records read at once, by the threads of TFDS
        parts = []
        for start in range(0, len(self), chunk):
            records = self._records.__getitems__(range(start, min(start + chunk, len(self))))
            parts += [record[self._arguments["label_key"]] for record in records]
        labels = np.asarray(parts, np.int64)
        if (labels == -1).all():
            return None
        return checked_labels(labels, len(self), self.class_names, where=self.name)

    def __len__(self) -> int:
        return len(self._records)

    def file(self, index: int) -> io.BytesIO:
        """Bytes of picture `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        return io.BytesIO(self.encoded(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`, as they are stored."""
        try:
            return self._records[index][self._arguments["image_key"]]
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"cannot read {self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        """The name of picture `index` in messages."""
        return f"record {index} of {self.name}"


def _tfds_directory(name: str, root: Path) -> Path:
    """Directory of the data set `name`; of the highest version on disk if `name` has no version."""
    base, _, version = name.partition(":")
    found = [
        path
        for path in (root / base).glob(version or "*")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    if not found:
        raise FileNotFoundError(
            f"no prepared TFDS data set {name!r} in {root}; make it with\n"
            f"  {_tfds_build_command(name, root)}\n"
            "Preparing it needs TensorFlow (pip install 'jevb-jax[prepare]', in a checkout "
            "'.[prepare]'); reading it does not"
        )
    return max(found, key=lambda path: [int(part) for part in path.name.split(".")])


def _tfds_build_command(name: str, root: Path) -> str:
    return f"tfds build {name} --file_format=array_record --data_dir={root}"
