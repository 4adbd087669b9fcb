"""CPU time to read a training batch of photographs, beside the decoder alone and torchvision.

python -m benchmarks.input --out=runs/input --num_images=500

Writes JPEGs of 500 x 375 pixels, about the size of ImageNet's. Needs the extra `photos`; with
torchvision in the same environment, its rows take turns too. Every way ends with uint8 arrays of two
views of 224 pixels; flips, colors and normalization are left to the device on both sides.

* `alone`: each picture is read once a round, in one thread. `decoder` is Pillow's, `decoder, simd`
  that of the faster resizer. `square` is the square of 256 pixels that the device crops; `image`
  cuts both views out of the whole picture.
* `resizing`: the same crops, out of pictures that are decoded already.
* `loaders`: batches of 50 from worker processes, by CPU time of the workers and of this process, in
  the middle of a stream. The time to start workers does not count.

torchvision's `RandomResizedCrop` is measured on Pillow pictures, as in published recipes, and on
tensors of its own decoder (`v2`). Its `DataLoader` has the same number of workers as ours, the same
batches and as many of them ahead.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.measure import Timing, environment, interleave, make_parser, write_results
from jevb_jax.images import batches, crop_pixels
from jevb_jax.images.crop_boxes import RESIZERS, HostCrops, Resizer, key_words
from jevb_jax.images.image_files import FolderSource

WIDTH, HEIGHT = 500, 375
SQUARE, VIEW, SCALE = 256, 224, (0.08, 1.0)
BATCH_SIZE, NUM_AHEAD = 50, 2
WAIT_SECONDS = 0.02  # far below the time to read a batch
WORKERS = (1, 2)
Read = Callable[[int], Any]


def write_pictures(root: Path, count: int, *, quality: int = 90) -> None:
    """Writes different pieces of two real photographs.

    Args:
      root: an existing directory.
      count: number of JPEGs.
      quality: of the JPEGs.
    """
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    places = np.random.default_rng(0).integers(0, (640 - WIDTH, 427 - HEIGHT), (count, 2))
    for number, (left, top) in enumerate(places.tolist()):
        piece = photos[number % 2].crop((left, top, left + WIDTH, top + HEIGHT))
        piece.save(root / f"{number:06d}.jpg", quality=quality)


def host_crops(resizer: Resizer) -> HostCrops:
    """The two crops of each picture."""
    key = key_words(jax.random.key(0))
    return HostCrops(key, (VIEW,) * 2, (SCALE,) * 2, (3 / 4, 4 / 3), "bilinear", resizer)


class TorchViews:
    """A data set of torchvision: two views of each picture, uint8 `[3, 224, 224]`."""

    def __init__(self, paths: Sequence[str], kind: str):
        self.paths, self.kind = tuple(paths), kind

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.reader(self.paths[index])

    @functools.cached_property
    def reader(self) -> Callable[[str], Any]:
        """Reads one file; made in the process that reads."""
        from_tensors: Any = importlib.import_module("torchvision.transforms.v2")
        plain: Any = importlib.import_module("torchvision.transforms")
        io: Any = importlib.import_module("torchvision.io")
        if self.kind == "v2":
            crop = from_tensors.RandomResizedCrop(VIEW, scale=SCALE, antialias=True)
            mode = io.ImageReadMode.RGB
            return lambda path: _twice(crop, io.decode_jpeg(io.read_file(path), mode=mode))
        crop = plain.Compose([plain.RandomResizedCrop(VIEW, scale=SCALE), plain.PILToTensor()])
        return lambda path: _twice(crop, Image.open(path).convert("RGB"))

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: no reader."""
        return {"paths": self.paths, "kind": self.kind}


def _twice(crop: Callable[[Any], Any], picture: Any) -> tuple[Any, Any]:
    return crop(picture), crop(picture)


def readers(source: FolderSource, torch_sets: Mapping[str, TorchViews]) -> dict[str, Read]:
    """What each candidate does with picture `index`, by name."""

    @functools.lru_cache(maxsize=len(RESIZERS))
    def of_batch(step: int, resizer: Resizer) -> list[Any]:
        return host_crops(resizer).of_examples(step, np.arange(256))

    def image(index: int, resizer: Resizer) -> Any:
        return source.crops(index, of_batch(index // 256, resizer)[index % 256])

    found: dict[str, Read] = {
        "decoder": lambda index: Image.open(source.paths[index]).convert("RGB"),
        "decoder, simd": lambda index: crop_pixels.decoded_jpeg(
            Path(source.paths[index]).read_bytes()
        ),
        "square": source.__getitem__,
    }
    found |= {f"image, {one}": functools.partial(image, resizer=one) for one in RESIZERS}
    return found | {f"torchvision, {kind}": one.__getitem__ for kind, one in torch_sets.items()}


def resizers(source: FolderSource, *, has_torch: bool) -> dict[str, Read]:
    """Both crops of pictures that are decoded, to what each resizer takes; 50 of them take turns."""
    pictures = [Image.open(path).convert("RGB") for path in source.paths[:BATCH_SIZE]]
    arrays = [np.asarray(picture) for picture in pictures]
    examples = host_crops("pillow").of_examples(0, np.arange(len(pictures)))
    boxes = [one.boxes(height=HEIGHT, width=WIDTH) for one in examples]

    def ours(index: int, resizer: Resizer) -> Any:
        number = index % len(pictures)
        picture = (arrays if resizer == "simd" else pictures)[number]
        return crop_pixels.squares(picture, boxes[number], (VIEW,) * 2, resizer=resizer)

    found: dict[str, Read] = {one: functools.partial(ours, resizer=one) for one in RESIZERS}
    if has_torch:
        transforms: Any = importlib.import_module("torchvision.transforms.v2.functional")
        tensors = [transforms.pil_to_tensor(picture) for picture in pictures]

        def of_torch(index: int) -> Any:
            number = index % len(pictures)
            size = [VIEW] * 2
            return [transforms.resized_crop(tensors[number], *b, size) for b in boxes[number]]

        found["torchvision, v2"] = of_torch
    return found


def cpu_seconds(read: Read, count: int) -> float:
    """CPU seconds of this process to read so many pictures, each once."""
    start = time.process_time()
    for index in range(count):
        read(index)
    return time.process_time() - start


def torch_batches(views: TorchViews, num_workers: int) -> Iterator[Any]:
    """Batches of torchvision's views without end."""
    data: Any = importlib.import_module("torch.utils.data")
    loader = data.DataLoader(
        views,
        BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        prefetch_factor=NUM_AHEAD,
        persistent_workers=True,
        multiprocessing_context="spawn",  # as ours; a fork of a process with threads may hang
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def our_batches(source: FolderSource, resizer: Resizer, num_workers: int) -> Iterator[Any]:
    """Batches of our crops, as many as any round asks for."""
    return batches.stream_batches(
        source,
        start_step=0,
        num_steps=10**6,
        batch_size=BATCH_SIZE,
        seed=0,
        num_workers=num_workers,
        prefetch_batches=NUM_AHEAD,
        crops=host_crops(resizer),
    )


class Loader:
    """A stream of batches from processes of its own."""

    def __init__(self, start: Callable[[], Iterator[Any]], num_workers: int):
        """Starts the workers and waits for two batches of each."""
        before = set(multiprocessing.active_children())
        self._stream = start()
        self._num_workers = num_workers
        self._take(2 * num_workers)
        self.processes = set(multiprocessing.active_children()) - before

    def _take(self, count: int) -> None:
        for _ in range(count):
            next(self._stream)

    def cpu_seconds(self, count: int) -> float:
        """CPU seconds of the workers and of this process for about so many pictures."""
        self._take_ready()
        start = self._cpu_now()
        self._take(count // BATCH_SIZE)
        return self._cpu_now() - start

    def _take_ready(self) -> None:
        """Takes what was read before the round, until every worker has been waited for."""
        num_waits = 0
        while num_waits <= self._num_workers:
            start = time.perf_counter()
            next(self._stream)
            num_waits += time.perf_counter() - start > WAIT_SECONDS

    def close(self) -> None:
        """Ends the workers."""
        del self._stream  # of torch; ours closes itself, too
        for process in self.processes:
            process.kill()
            process.join()

    def _cpu_now(self) -> float:
        ticks = 0
        for process in self.processes:
            stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
            ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))  # user and system time
        return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def start_loaders(source: FolderSource, torch_sets: Mapping[str, TorchViews]) -> dict[str, Loader]:
    """All loaders by name, with their workers running."""
    starts: dict[str, Callable[[int], Iterator[Any]]] = {
        f"image, {one}": functools.partial(our_batches, source, one) for one in RESIZERS
    }
    starts |= {
        f"DataLoader, {kind}": functools.partial(torch_batches, views)
        for kind, views in torch_sets.items()
    }
    return {
        f"{name}, {workers} workers": Loader(functools.partial(start, workers), workers)
        for name, start in starts.items()
        for workers in WORKERS
    }


def rows_of(
    timings: Mapping[str, Timing], count: int, references: Sequence[str]
) -> list[dict[str, Any]]:
    """A row of the table for each candidate.

    Args:
      timings: by name.
      count: pictures in a round.
      references: candidates whose time is compared with; those that are missing are left out.
    """
    return [
        {
            "": name,
            "images / CPU s": count / one.median,
            **{
                f"rate / {other}": timings[other].ratio_to(one)
                for other in references
                if other in timings
            },
        }
        for name, one in timings.items()
    ]


def loader_rows(timings: Mapping[str, Timing], count: int) -> list[dict[str, Any]]:
    """A row of the table for each loader, compared with those of as many workers."""
    rows = []
    for workers in WORKERS:
        group = {name: one for name, one in timings.items() if name.endswith(f"{workers} workers")}
        others = [name for name in group if name.startswith("DataLoader")]
        for row in rows_of(group, count, others):
            ratios = {key.rpartition(", ")[0]: row[key] for key in row if key.startswith("rate")}
            rows.append({key: row[key] for key in row if not key.startswith("rate")} | ratios)
    return rows


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The three tables."""
    count, rounds = arguments.num_images, arguments.num_rounds
    source = FolderSource(folder, image_size=SQUARE)
    has_torch = importlib.util.find_spec("torchvision") is not None
    kinds = ("pillow", "v2") if has_torch else ()
    if has_torch:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(1)
    torch_sets = {kind: TorchViews(source.paths, kind) for kind in kinds}

    def timed(candidates: Mapping[str, Read]) -> dict[str, Timing]:
        timers = {
            name: functools.partial(cpu_seconds, read, count) for name, read in candidates.items()
        }
        return interleave(timers, num_rounds=rounds)

    alone = timed(readers(source, torch_sets))
    resizing = timed(resizers(source, has_torch=has_torch))
    loaders = start_loaders(source, torch_sets)
    timers = {
        name: functools.partial(one.cpu_seconds, count - count % BATCH_SIZE)
        for name, one in loaders.items()
    }
    try:
        streamed = interleave(timers, num_rounds=rounds)
    finally:
        for loader in loaders.values():
            loader.close()
    return {
        "alone": rows_of(
            alone, count, ("decoder", "square", "torchvision, pillow", "torchvision, v2")
        ),
        "resizing": rows_of(resizing, count, ("pillow", "torchvision, v2")),
        "loaders": loader_rows(streamed, count - count % BATCH_SIZE),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the tables to `--out`."""
    parser = make_parser(__doc__, num_rounds=5)
    parser.add_argument("--num_images", type=int, default=5000, help="at least 50")
    arguments = parser.parse_args(argv)
    if arguments.num_images < BATCH_SIZE:
        parser.error(f"--num_images must be at least {BATCH_SIZE}")
    command = "python -m benchmarks.input " + shlex.join(sys.argv[1:])
    facts = {**environment(command, vars(arguments)), "pillow": PIL.__version__}
    for name in ("cykooz-resizer", "simplejpeg", "torch", "torchvision"):
        if importlib.util.find_spec(name.replace("-", "_")):
            facts[name] = importlib.metadata.version(name)
    with tempfile.TemporaryDirectory(prefix="jevb_jax_input_") as folder:
        write_pictures(Path(folder), arguments.num_images)
        tables = measured(arguments, Path(folder))
    print(write_results(arguments.out, "input", facts, tables))


if __name__ == "__main__":
    main()
