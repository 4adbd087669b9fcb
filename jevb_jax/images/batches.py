"""Batches of images or features, from memory or streamed."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from jevb_jax.images import crop_pixels, workers
from jevb_jax.images.batch_order import batch_indices, steps_per_epoch
from jevb_jax.images.crop_boxes import ExampleCrops, HostCrops
from jevb_jax.images.source import (
    ImageSource,
    InMemory,
    Subset,
    check_has_pictures,
    checked_indices,
    example_bytes,
)
from jevb_jax.images.workers import Carried, ReadAhead

_T = TypeVar("_T")


def gather(source: ImageSource, indices: np.ndarray) -> np.ndarray:
    """The images at integer `indices` `[B]`, `[B, H, W, C]`, or their features.

    Raises:
      TypeError: indices are not integers.
      ValueError: indices are empty, not one axis or out of range, or images differ in size.
    """
    indices = checked_indices(indices, len(source))
    while isinstance(source, Subset):
        source, indices = source.source, source.indices[indices]
    if isinstance(source, InMemory):
        return source.values[indices]
    images = [source[int(index)] for index in indices]
    for index, image in zip(indices, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"all images of {source.name} must have one size, but image {indices[0]} is "
                f"{images[0].shape} and image {index} is {image.shape}; set image_size to resize "
                "them when they are read"
            )
    return np.stack(images)


def gather_crops(
    source: ImageSource, indices: np.ndarray, crops: Sequence[ExampleCrops]
) -> tuple[np.ndarray, ...]:
    """The crops of the whole pictures at integer `indices` `[B]`, one array for each view.

    Args:
      source: pictures in files.
      indices: which pictures.
      crops: the crops of each of them.

    Returns:
      For each view `[B, size, size, C]`, of the type of the source.

    Raises:
      TypeError: indices are not integers, or the source has no picture files.
      ValueError: indices are empty, not one axis or out of range, or a picture cannot be read.
    """
    indices = checked_indices(indices, len(source))
    while isinstance(source, Subset):
        source, indices = source.source, source.indices[indices]
    pictures = check_has_pictures(source)
    examples = [pictures.crops(int(i), one) for i, one in zip(indices, crops, strict=True)]
    return tuple(np.stack(view) for view in zip(*examples, strict=True))


def fits_resident(source: ImageSource, *, limit_bytes: int) -> bool:
    """Whether the examples of `source` take at most `limit_bytes`."""
    return len(source) * example_bytes(source) <= limit_bytes


def load_resident(source: ImageSource) -> np.ndarray:
    """All images, `[N, H, W, C]`, or all features, to be put on the device once.

    An array in memory is not copied. Files are decoded by 16 threads.
    """
    if isinstance(source, InMemory):
        return source.values
    if _in_memory(source):
        return gather(source, np.arange(len(source)))
    first = source[0]
    images = np.empty((len(source), *first.shape), first.dtype)
    start = 0
    for batch, mask in evaluation_batches(source, 64, prefetch_batches=16):
        stop = start + int(mask.sum())
        images[start:stop] = batch[: stop - start]
        start = stop
    return images


def stream_batches(
    source: ImageSource,
    *,
    start_step: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    rows: slice = slice(None),
    crops: HostCrops | None = None,
) -> ReadAhead[Any]:
    """Reads the batches of `num_steps` steps ahead of their use, with Grain.

    The images are those of `gather(source, batch_indices(step, ...))` for each step, whatever the
    first step and the number of workers are. They are the same as those of a data set in memory.

    Args:
      source: the images. Each worker gets a copy of it, so for images in memory use
        `num_workers=0`.
      start_step: first step, at least 0.
      num_steps: number of batches, at least 1.
      batch_size: number of examples in a batch.
      seed: sets the order; see `batch_indices`.
      num_workers: number of worker processes. With 0, up to 16 threads of this process read, which
        is enough if most of the time is decoding (Pillow releases the interpreter lock). Workers
        import the main module of the program, so a script needs `if __name__ == "__main__":`.
      prefetch_batches: batches that each worker, or this process, reads ahead; at least 1.
      rows: the rows of every batch to read, which are the share of this process.
      crops: what to cut out of whole pictures, instead of reading images of one size.

    Returns:
      An iterator of images `[batch_size, H, W, C]`, or of features, of the type of the source; or
      of only the rows in `rows`. With `crops`, of tuples of such images, one for each view. At its
      end, or when it is closed, threads and workers stop.

    Raises:
      ValueError: arguments are out of range; during iteration also if an image cannot be read.
      ModuleNotFoundError: the package of `crops.resizer` is not installed.
      WorkerError: during iteration, if a worker process could not start or was killed.
    """
    steps_per_epoch(len(source), batch_size)
    if start_step < 0 or num_steps < 1:
        raise ValueError(
            f"expected start_step >= 0 and num_steps >= 1, got {start_step} and {num_steps}"
        )
    if crops is not None:
        crop_pixels.check_resizer(crops.resizer)
    read = functools.partial(
        _read_step, source=source, batch_size=batch_size, seed=seed, rows=rows, crops=crops
    )
    return _read_ahead(read, start_step, start_step + num_steps, num_workers, prefetch_batches)


def _read_step(
    step: int,
    *,
    source: ImageSource,
    batch_size: int,
    seed: int,
    rows: slice,
    crops: HostCrops | None,
) -> np.ndarray | tuple[np.ndarray, ...]:
    indices = batch_indices(step, num_examples=len(source), batch_size=batch_size, seed=seed)
    if crops is None:
        return gather(source, indices[rows])
    of_examples = crops.of_examples(step, np.arange(batch_size)[rows])
    return gather_crops(source, indices[rows], of_examples)


def evaluation_batches(
    source: ImageSource,
    batch_size: int,
    *,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    rows: slice = slice(None),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Visits every example exactly once, in order, in batches of one size.

    Args:
      source: the images.
      batch_size: number of examples in a batch, at least 1. It may exceed the number of examples.
      num_workers: number of worker processes; images in memory are read without any.
      prefetch_batches: batches that each worker, or this process, reads ahead.
      rows: the rows of every batch to read; the mask is still of the whole batch.

    Returns:
      An iterator of images `[batch_size, H, W, C]`, or of features, of the type of the source, and
      a mask, bool `[batch_size]`. The mask is False for the zeros that fill up the last batch.

    Raises:
      ValueError: arguments are out of range; during iteration also if an image cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    num_batches = -(-len(source) // batch_size)
    read = functools.partial(_read_padded, source=source, batch_size=batch_size, rows=rows)
    if _in_memory(source):
        return map(read, range(num_batches))
    return _read_ahead(read, 0, num_batches, num_workers, prefetch_batches)


def _read_padded(
    batch: int, *, source: ImageSource, batch_size: int, rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    whole = np.arange(batch * batch_size, (batch + 1) * batch_size)
    mask = whole < len(source)
    asked = whole[rows]
    indices = asked[asked < len(source)]
    # The share of this process in the last batch may be all padding.
    images = gather(source, indices) if len(indices) else source[0][None][:0]
    if len(indices) < len(asked):
        padding = np.zeros((len(asked) - len(indices), *images.shape[1:]), images.dtype)
        images = np.concatenate([images, padding])
    return images, mask


def _in_memory(source: ImageSource) -> bool:
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, InMemory)


def _read_ahead(
    read: Callable[[int], _T], start: int, stop: int, num_workers: int, prefetch_batches: int
) -> ReadAhead[_T]:
    """Yields `read(start), ..., read(stop - 1)`, computed ahead by threads or processes."""
    if num_workers < 0 or prefetch_batches < 1:
        raise ValueError(
            "expected num_workers >= 0 and prefetch_batches >= 1, "
            f"got {num_workers} and {prefetch_batches}"
        )
    workers.check_not_starting()
    import grain
    from absl import flags

    steps = grain.MapDataset.range(start, stop)
    if num_workers == 0:
        threads = min(prefetch_batches, 16)
        pipeline = steps.map(read).to_iter_dataset(grain.ReadOptions(threads, prefetch_batches))
        return ReadAhead(iter(pipeline), num_workers)
    # Grain reads this flag before it starts a worker, and absl raises an error for flags of a
    # program that has not parsed its flags. Marking the flag as present makes its default readable;
    # all other flags stay as they are.
    profiling = "grain_enable_multiprocess_worker_profiling"
    if profiling in flags.FLAGS:
        flags.FLAGS[profiling].present = True
    carried = Carried(read)
    pipeline = (
        steps.map(carried)
        .to_iter_dataset(grain.ReadOptions(1, 1))
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=prefetch_batches),
            worker_init_fn=workers.start_worker,
        )
    )
    return ReadAhead(iter(pipeline), num_workers, carried)
